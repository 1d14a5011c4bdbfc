# SPDX-License-Identifier: Apache-2.0
from .base import FlowMatchPipelineOutput
from .init_pipeline import init_pipeline
from .pipeline_flow_match import FlowMatchPipeline
from .stock import with_stock_scheduler


__all__ = ["FlowMatchPipeline", "FlowMatchPipelineOutput", "init_pipeline", "with_stock_scheduler"]
