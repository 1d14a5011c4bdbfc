# SPDX-License-Identifier: Apache-2.0
from .base import FlowMatchPipelineOutput
from .init_pipeline import init_pipeline
from .pipeline_flow_match import FlowMatchPipeline
from .pipeline_flow_match_inverse import FlowMatchInversePipeline, FlowMatchInversePipelineOutput
from .pipeline_flow_match_upscale import FlowMatchUpscalePipeline
from .stock import with_stock_scheduler


__all__ = [
    "FlowMatchInversePipeline",
    "FlowMatchInversePipelineOutput",
    "FlowMatchPipeline",
    "FlowMatchPipelineOutput",
    "FlowMatchUpscalePipeline",
    "init_pipeline",
    "with_stock_scheduler",
]
