# SPDX-License-Identifier: Apache-2.0
"""Flow matching for diffusers: a scheduler that carries the probability path, and a pipeline that samples from it."""

from ._quiet import restore


# isort: split
# diffusers looks up the base classes of a component among the names of the library that model_index.json gives.
from diffusers import ModelMixin as ModelMixin
from diffusers import SchedulerMixin as SchedulerMixin

from ._register import register, register_network
from .losses import flow_matching_loss
from .models import (
    ClassEmbedder,
    IntervalEmbedding,
    VelocityUNet2DConditionModel,
    VelocityUNet2DModel,
    decode_latents,
    encode_latents,
)
from .paths import (
    PATHS,
    PREDICTION_TYPES,
    ConditionalPath,
    CosinePath,
    DiscreteVPPath,
    OTPath,
    VEPath,
    VPPath,
    make_path,
    register_path,
)
from .pipelines import (
    FlowMatchAudioPipeline,
    FlowMatchAudioPipelineOutput,
    FlowMatchEditPipeline,
    FlowMatchInversePipeline,
    FlowMatchInversePipelineOutput,
    FlowMatchInversionOutput,
    FlowMatchPipeline,
    FlowMatchPipelineOutput,
    FlowMatchUpscalePipeline,
    StableDiffusion3EditPipeline,
    StockFlow,
    init_pipeline,
    with_flow_map,
    with_stock_scheduler,
    with_velocity,
    without_velocity,
)
from .schedulers.calibration import calibrate
from .schedulers.scheduling_flow_match import FlowMatchScheduler
from .timesteps import register_density, sample_timesteps


__version__ = "0.1.0"

__all__ = [
    "PATHS",
    "PREDICTION_TYPES",
    "ClassEmbedder",
    "ConditionalPath",
    "CosinePath",
    "DiscreteVPPath",
    "FlowMatchAudioPipeline",
    "FlowMatchAudioPipelineOutput",
    "FlowMatchEditPipeline",
    "FlowMatchInversePipeline",
    "FlowMatchInversePipelineOutput",
    "FlowMatchInversionOutput",
    "FlowMatchPipeline",
    "FlowMatchPipelineOutput",
    "FlowMatchScheduler",
    "FlowMatchUpscalePipeline",
    "IntervalEmbedding",
    "OTPath",
    "StableDiffusion3EditPipeline",
    "StockFlow",
    "VEPath",
    "VPPath",
    "VelocityUNet2DConditionModel",
    "VelocityUNet2DModel",
    "__version__",
    "calibrate",
    "decode_latents",
    "encode_latents",
    "flow_matching_loss",
    "init_pipeline",
    "make_path",
    "register_density",
    "register_network",
    "register_path",
    "sample_timesteps",
    "with_flow_map",
    "with_stock_scheduler",
    "with_velocity",
    "without_velocity",
]

register()
restore()
