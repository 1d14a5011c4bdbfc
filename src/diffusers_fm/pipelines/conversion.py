# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusion checkpoints as flows of the straight path."""

import copy
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel

from ..models.velocity_unets import VelocityUNet2DConditionModel, VelocityUNet2DModel
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .components import check_channels
from .pipeline_flow_match import FlowMatchPipeline


VELOCITIES = {UNet2DModel: VelocityUNet2DModel, UNet2DConditionModel: VelocityUNet2DConditionModel}


def with_velocity(pipeline: DiffusionPipeline, clip_sample: bool = False) -> DiffusionPipeline:
    """
    The same pipeline as a flow on the path `ot` whose network answers with the velocity (Diff2Flow, CVPR 2025).

    At the noise levels of a diffusion grid it gives the images of that grid (see
    [`~models.VelocityUNet2DModel.straight_times`]); the weights are the same. It is trained further like every other.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With a [`~diffusers.UNet2DModel`] and a scheduler alone, as DDPM's, or with a
            [`~diffusers.UNet2DConditionModel`], as those of Stable Diffusion 1.5, 2 and XL.
        clip_sample (`bool`, *optional*, defaults to `False`):
            Whether to clip data estimates where the pipeline's scheduler does, as most DDPMs'. Only Euler can, and it
            bends trajectories.

    Returns:
        [`~diffusers.DiffusionPipeline`]: A [`FlowMatchPipeline`] in the first case, a pipeline of the same class in
        the second. It shares the weights and all other components.

    Raises:
        ValueError: If the network or the scheduler is another one, or what is predicted leaves the velocity open.
    """
    name, network = type(pipeline).__name__, pipeline.components.get("unet")
    kind = type(network)
    alone = set(pipeline.components) == {"unet", "scheduler"}
    if kind not in VELOCITIES or (kind is UNet2DModel and not alone):
        others = ", ".join(f"{part} {type(each).__name__}" for part, each in pipeline.components.items())
        raise ValueError(
            f"Only a pipeline of a UNet2DModel and a scheduler, or with a UNet2DConditionModel, becomes a flow by this"
            f" way; {name} has {others}."
        )
    check_channels(network, pipeline.components.get("vae"))
    scheduler = FlowMatchScheduler.from_stock(pipeline.scheduler)
    config: Any = scheduler.config
    if config.path != "vp_discrete":
        raise ValueError(f"{name} is no diffusion model: its scheduler is on the path {config.path!r}.")
    path_kwargs = {"num_train_timesteps": config.num_train_timesteps, **(config.path_kwargs or {})}
    velocity = VELOCITIES[kind].from_diffusion(network, **path_kwargs, prediction_type=config.prediction_type)
    straight = FlowMatchScheduler(
        num_train_timesteps=config.num_train_timesteps,
        clip_sample=clip_sample and config.clip_sample,
        clip_sample_range=config.clip_sample_range,
    )
    if alone:
        return FlowMatchPipeline(unet=velocity, scheduler=straight)
    converted = copy.copy(pipeline)
    converted.unet, converted.scheduler = velocity, straight
    return converted
