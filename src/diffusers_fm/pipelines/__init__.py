# SPDX-License-Identifier: Apache-2.0
from .base import FlowMatchPipelineOutput
from .conversion import with_velocity
from .decode_map import DecodeMap
from .edits import FlowMatchInversionOutput
from .flow_map import with_flow_map
from .init_pipeline import init_pipeline
from .pipeline_flow_match import FlowMatchPipeline
from .pipeline_flow_match_audio import FlowMatchAudioPipeline, FlowMatchAudioPipelineOutput
from .pipeline_flow_match_edit import FlowMatchEditPipeline
from .pipeline_flow_match_inverse import FlowMatchInversePipeline, FlowMatchInversePipelineOutput
from .pipeline_flow_match_upscale import FlowMatchUpscalePipeline
from .pipeline_stable_diffusion_3_edit import StableDiffusion3EditPipeline
from .replay import CapturedCall, capture
from .stock import with_stock_scheduler, without_velocity
from .stock_flow import StockFlow
from .velocity_field import VelocityField


__all__ = [
    "CapturedCall",
    "DecodeMap",
    "FlowMatchAudioPipeline",
    "FlowMatchAudioPipelineOutput",
    "FlowMatchEditPipeline",
    "FlowMatchInversePipeline",
    "FlowMatchInversePipelineOutput",
    "FlowMatchInversionOutput",
    "FlowMatchPipeline",
    "FlowMatchPipelineOutput",
    "FlowMatchUpscalePipeline",
    "StableDiffusion3EditPipeline",
    "StockFlow",
    "VelocityField",
    "capture",
    "init_pipeline",
    "with_flow_map",
    "with_stock_scheduler",
    "with_velocity",
    "without_velocity",
]
