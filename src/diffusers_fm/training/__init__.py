# SPDX-License-Identifier: Apache-2.0
"""The parts of a training script that are not its loop."""
