# SPDX-License-Identifier: Apache-2.0
from .scheduling_flow_match import FlowMatchScheduler


__all__ = ["FlowMatchScheduler"]
