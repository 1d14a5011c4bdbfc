# SPDX-License-Identifier: Apache-2.0
"""Pipelines for readers who have diffusers alone."""

import copy
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)

from ..models.pixel_autoencoder import set_identity
from ..models.velocity_unets import VelocityMixin
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..schedulers.stock_configs import stock_diffusion_config, stock_flow_config


PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

# Written into DiTPipeline as the label of no class.
NULL_CLASS = 1000
# A stock scheduler of Euler steps on the grid `trailing`, with all that DiTPipeline calls.
TRAILING = "FlowMapEulerDiscreteScheduler"


def with_stock_scheduler(pipeline: PipelineT) -> PipelineT:
    """
    The same pipeline with diffusers' own scheduler in place of ours, see [`FlowMatchScheduler.to_stock`]: what it
    saves and pushes loads where this package is not installed, and gives the same images.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of diffusers, such as `StableDiffusion3Pipeline`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: Of the same class; it shares all other components, and `pipeline` itself is
        left as it is.

    Raises:
        ValueError: If the scheduler has no counterpart in diffusers, or something else of the pipeline is not
            diffusers' own.
    """
    own_package = __name__.partition(".")[0]
    components = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    own = [
        type(part).__name__
        for part in (pipeline, *components.values())
        if type(part).__module__.partition(".")[0] == own_package
    ]
    if own:
        raise ValueError(
            f"Stock diffusers cannot load {', '.join(own)}: only a pipeline of its own classes can become one."
        )
    stock = copy.copy(pipeline)
    if isinstance(pipeline.scheduler, FlowMatchScheduler):
        stock.scheduler = pipeline.scheduler.to_stock()
    return stock


def without_velocity(pipeline: PipelineT) -> PipelineT:
    """
    A converted pipeline as the diffusion model that it also is: the way back of [`with_velocity`].

    Its weights, trained further or not, are those of diffusers' own network, which DDIM samples, so that readers need
    nothing of this package. At the noise levels of a DDIM grid both give the same images.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With a [`~models.VelocityUNet2DConditionModel`].

    Returns:
        [`~diffusers.DiffusionPipeline`]: Of the same class; it shares the weights and all other components.

    Raises:
        ValueError: If its `unet` is not converted.
    """
    unet: Any = pipeline.components.get("unet")
    if not isinstance(unet, VelocityMixin):
        raise ValueError(f"{type(pipeline).__name__} was not converted by `with_velocity`: its unet is {type(unet)}.")
    stock: Any = copy.copy(pipeline)
    stock.unet, stock.scheduler = unet.to_diffusion(), _ddim_of(unet, pipeline.scheduler.config)
    return stock


def _ddim_of(unet: Any, config: Any) -> DDIMScheduler:
    """Scheduler of the diffusion model in a converted network; it ends in clean data, as the flow does."""
    settings: Any = {"clip_sample": config.clip_sample, "clip_sample_range": config.clip_sample_range}
    return DDIMScheduler(**{**unet.config.diffusion, **settings, "timestep_spacing": "trailing"})


def stock_pipeline(pipeline: Any) -> DiffusionPipeline:
    """Pipeline of diffusers with the images of a [`FlowMatchPipeline`], see [`FlowMatchPipeline.to_stock`]."""
    network, scheduler = pipeline.denoiser, pipeline.scheduler
    kind, is_pixel = type(network), pipeline.vae is None
    if pipeline.guider is not None or scheduler.config.solver == "flow_map":
        raise ValueError("diffusers has no pipeline that samples a guider or a flow map of this network.")
    if isinstance(network, VelocityMixin) and network.config.get("num_class_embeds") is None:
        return DDIMPipeline(network.to_diffusion(), _ddim_of(network, scheduler.config))
    if kind is UNet2DModel and is_pixel and network.config.num_class_embeds is None:
        if scheduler.config.path == "vp_discrete":
            config = stock_diffusion_config(scheduler.config, scheduler.path)
            return DDIMPipeline(network, DDIMScheduler(**config))
        return DDPMPipeline(network, scheduler.to_stock())
    if kind is DiTTransformer2DModel and (is_pixel or _plain(pipeline.vae)):
        if not hasattr(diffusers, TRAILING):
            raise ValueError(f"DiTPipeline needs {TRAILING}, which diffusers {diffusers.__version__} lacks.")
        settings = {**scheduler.config, "shift": scheduler.shift}
        config = stock_flow_config(settings, scheduler.path, TRAILING, "trailing")
        return DiTPipeline(
            _with_null_class(network),
            _identity(network.config.in_channels) if is_pixel else pipeline.vae,
            getattr(diffusers, TRAILING)(**config),
            id2label=pipeline.config.id2label,
        )
    raise ValueError(
        f"diffusers has no pipeline that samples a {kind.__name__} with {pipeline.num_classes} classes"
        f" {'in pixels' if is_pixel else f'and {type(pipeline.vae).__name__}'} by flow matching: DDPMPipeline reads no"
        " labels and has no autoencoder, DiTPipeline has a DiTTransformer2DModel and an AutoencoderKL without shift."
    )


def _plain(vae: Any) -> bool:
    """Return whether DiTPipeline, which knows a scale alone, decodes with an autoencoder."""
    return isinstance(vae, AutoencoderKL) and not vae.config.shift_factor and vae.config.latents_mean is None


def _with_null_class(network: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """The network with its null class where DiTPipeline has it; labels between answer as no class does."""
    classes = network.config["num_embeds_ada_norm"]
    if classes > NULL_CLASS:
        raise ValueError(f"DiTPipeline has {NULL_CLASS} classes at most, got {classes}.")
    rows = torch.arange(NULL_CLASS + 1).clamp(max=classes)
    table = "class_embedder.embedding_table.weight"
    state = {name: value[rows] if name.endswith(table) else value for name, value in network.state_dict().items()}
    # It halves `out_channels`, too.
    changes = {"num_embeds_ada_norm": NULL_CLASS, "out_channels": network.out_channels}
    with torch.device("meta"):
        grown: Any = DiTTransformer2DModel.from_config(network.config, **changes)
    grown.load_state_dict(state, assign=True)
    return grown.eval()


def _identity(channels: int) -> AutoencoderKL:
    """An autoencoder whose latents are the pixels."""
    vae = AutoencoderKL(
        in_channels=channels,
        out_channels=channels,
        latent_channels=channels,
        block_out_channels=(2 * channels + 2,),
        norm_num_groups=1,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    set_identity(vae)
    return vae.eval()
