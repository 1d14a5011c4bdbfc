# SPDX-License-Identifier: Apache-2.0
"""Components of the pipelines: whether they fit together, whether a folder holds them, and how they are shared."""

from pathlib import Path
from typing import Any, TypeVar

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..models.class_embedder import ClassEmbedder


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".flashpack")

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)


class KeepDtypeMixin:
    """`from_pipe` without a cast."""

    @classmethod
    def from_pipe(cls: type[PipelineT], pipeline: DiffusionPipeline, **kwargs: Any) -> PipelineT:  # type: ignore[misc]
        """
        Make a pipeline of this class that shares the components of another one.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                The other pipeline.
            kwargs (*optional*):
                Arguments of [`~diffusers.DiffusionPipeline.from_pipe`], such as components that the other one lacks.
                Its own way is to cast everything to float32, in both pipelines: here dtypes stay as they are unless
                `torch_dtype` asks for one.

        Returns:
            The pipeline.

        Raises:
            ValueError: If a component is missing, or they do not fit together.
        """
        cast = kwargs.get("torch_dtype") is not None or kwargs.get("dtype") is not None
        # The cast is the last thing that diffusers' method does, by a call of `to`.
        made = cls if cast else type(cls.__name__, (cls,), {"to": lambda self, **_: self})
        parent: Any = super(KeepDtypeMixin, made)
        shared = parent.from_pipe(pipeline, **kwargs)
        shared.__class__ = cls
        return shared


def has_weights(folder: Path) -> bool:
    """Whether a component's folder holds weights of any format and variant."""
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.glob("*.*"))


def keep_labels(network: nn.Module) -> None:
    """Have a network keep its labels in training too: a `LabelEmbedding` would drop a tenth of them by itself."""
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def check_one_network(unet: object, transformer: object) -> None:
    """Raise a `ValueError` if a pipeline has both networks or neither."""
    if (unet is None) == (transformer is None):
        given = "neither was" if unet is None else "both were"
        raise ValueError(f"A FlowMatchPipeline needs either `unet` or `transformer`, {given} given.")


def check_components(
    unet: UNet2DModel | None,
    transformer: DiTTransformer2DModel | SD3Transformer2DModel | None,
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    class_embedder: ClassEmbedder | None,
    num_classes: int | None,
) -> None:
    """Raise a `ValueError` if the components of a [`FlowMatchPipeline`] do not fit together."""
    check_one_network(unet, transformer)
    network = unwrap_module(transformer if unet is None else unet)
    if unet is not None and not isinstance(network, UNet2DModel):
        raise ValueError(f"`unet` must be a UNet2DModel, got {network.__class__.__name__}.")
    if unet is None and not isinstance(network, (DiTTransformer2DModel, SD3Transformer2DModel)):
        raise ValueError(
            "`transformer` must be a DiTTransformer2DModel or an SD3Transformer2DModel, got"
            f" {network.__class__.__name__}."
        )
    config = network.config

    if isinstance(network, SD3Transformer2DModel):
        if class_embedder is None or not isinstance(unwrap_module(class_embedder), ClassEmbedder):
            raise ValueError(
                "An SD3Transformer2DModel needs a ClassEmbedder as `class_embedder` (one with `num_classes=0` for an"
                f" unconditional model), got {class_embedder.__class__.__name__}."
            )
        for name in ("joint_attention_dim", "pooled_projection_dim"):
            if class_embedder.config[name] != config[name]:
                raise ValueError(
                    f"The class embedder's `{name}` {class_embedder.config[name]} must equal the transformer's"
                    f" {config[name]}."
                )
        classes = {class_embedder.config.num_classes}
    elif class_embedder is not None:
        raise ValueError(f"A {network.__class__.__name__} takes labels by itself: `class_embedder` must be None.")
    elif isinstance(network, DiTTransformer2DModel):
        classes = {config.num_embeds_ada_norm}
    elif config.class_embed_type is not None:
        raise ValueError(f"A `unet` with `class_embed_type` {config.class_embed_type!r} is not supported: use None.")
    elif config.num_class_embeds is None:
        classes = {0}
    else:
        classes = {config.num_class_embeds, config.num_class_embeds - 1}
    if num_classes is not None and num_classes not in classes:
        accepted = " or ".join(str(value) for value in sorted(classes))
        raise ValueError(f"`num_classes` must be {accepted} for this network, got {num_classes}.")


def check_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
    """Raise a `ValueError` if a network gives other channels than it takes, or other ones than the autoencoder has."""
    config = unwrap_module(network).config
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"The network's `out_channels` must equal its `in_channels` {config.in_channels}, or be twice as many with"
            f" a learned variance, got {out_channels}."
        )
    if vae is not None and vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"The autoencoder has {vae.config.latent_channels} latent channels, the network {config.in_channels}."
        )


def check_upscale_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
    """Raise a `ValueError` if a network does not take the low-resolution image beside x_t."""
    config = unwrap_module(network).config
    channels = config.in_channels if config.out_channels is None else config.out_channels
    if config.in_channels not in (2 * channels, 2 * channels + 1):
        raise ValueError(
            "An upscaling network takes x_t, the low-resolution image and perhaps a channel for its noise level: with"
            f" `out_channels` {channels} its `in_channels` must be {2 * channels} or {2 * channels + 1}, got"
            f" {config.in_channels}."
        )
    if vae is not None and vae.config.latent_channels != channels:
        raise ValueError(f"The autoencoder has {vae.config.latent_channels} latent channels, the network {channels}.")


def check_sd3_components(pipeline: StableDiffusion3Pipeline) -> None:
    """Raise a `ValueError` for a Stable Diffusion 3 pipeline that diffusers would refuse in a matrix product."""
    config = pipeline.transformer.config
    if pipeline.vae is not None and pipeline.vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"The autoencoder has {pipeline.vae.config.latent_channels} latent channels, the transformer"
            f" {config.in_channels}."
        )
    clips = [model for model in (pipeline.text_encoder, pipeline.text_encoder_2) if model is not None]
    if len(clips) == 2:
        pooled = sum(model.config.projection_dim for model in clips)
        if pooled != config.pooled_projection_dim:
            raise ValueError(
                f"`text_encoder` and `text_encoder_2` project to {pooled} dimensions together, the transformer's"
                f" `pooled_projection_dim` is {config.pooled_projection_dim}."
            )
        width = sum(model.config.hidden_size for model in clips)
        if width > config.joint_attention_dim:
            raise ValueError(
                f"`text_encoder` and `text_encoder_2` are {width} wide together, the transformer's"
                f" `joint_attention_dim` is {config.joint_attention_dim}."
            )
    t5 = pipeline.text_encoder_3
    if t5 is not None and t5.config.d_model != config.joint_attention_dim:
        raise ValueError(
            f"`text_encoder_3` is {t5.config.d_model} wide, the transformer's `joint_attention_dim` is"
            f" {config.joint_attention_dim}."
        )
