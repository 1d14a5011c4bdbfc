# SPDX-License-Identifier: Apache-2.0
from .base import FlowMatchPipelineOutput
from .edits import FlowMatchInversionOutput
from .init_pipeline import init_pipeline
from .pipeline_flow_match import FlowMatchPipeline
from .pipeline_flow_match_edit import FlowMatchEditPipeline
from .pipeline_flow_match_inverse import FlowMatchInversePipeline, FlowMatchInversePipelineOutput
from .pipeline_flow_match_upscale import FlowMatchUpscalePipeline
from .pipeline_stable_diffusion_3_edit import StableDiffusion3EditPipeline
from .stock import with_stock_scheduler


__all__ = [
    "FlowMatchEditPipeline",
    "FlowMatchInversePipeline",
    "FlowMatchInversePipelineOutput",
    "FlowMatchInversionOutput",
    "FlowMatchPipeline",
    "FlowMatchPipelineOutput",
    "FlowMatchUpscalePipeline",
    "StableDiffusion3EditPipeline",
    "init_pipeline",
    "with_stock_scheduler",
]
