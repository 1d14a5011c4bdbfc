# SPDX-License-Identifier: Apache-2.0
"""What the components of a [`FlowMatchPipeline`] must be, and whether a folder holds them."""

from pathlib import Path

from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from diffusers.utils.torch_utils import unwrap_module

from ..models.class_embedder import ClassEmbedder


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".flashpack")


def has_weights(folder: Path) -> bool:
    """
    Whether a component's folder holds weights of any format and variant.

    Args:
        folder (`Path`):
            A component's folder, which need not exist.

    Returns:
        `bool`: whether there is a file of weights.
    """
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.glob("*.*"))


def check_one_network(unet: object, transformer: object) -> None:
    """
    Checks that a pipeline has one network.

    Args:
        unet (`object`):
            The network under this name, or `None`.
        transformer (`object`):
            The network under this name, or `None`.

    Raises:
        ValueError: if both or neither is given.
    """
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
    """
    Checks that the components of a pipeline fit together.

    Args:
        unet ([`~diffusers.UNet2DModel`]):
            The network, or `None`.
        transformer ([`~diffusers.DiTTransformer2DModel`] or [`~diffusers.SD3Transformer2DModel`]):
            The network, or `None`.
        vae ([`~diffusers.AutoencoderKL`], [`~diffusers.AutoencoderTiny`] or [`~diffusers.AutoencoderDC`]):
            The autoencoder of a latent model, or `None`.
        class_embedder ([`ClassEmbedder`]):
            The class conditioning of an `SD3Transformer2DModel`, or `None`.
        num_classes (`int`):
            Number of classes, or `None` where the network says it all.

    Raises:
        ValueError: if they do not.
    """
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
    """
    Checks that what a network of a [`FlowMatchPipeline`] takes is what it gives.

    Args:
        network ([`~diffusers.ModelMixin`]):
            The network.
        vae ([`~diffusers.ModelMixin`]):
            The autoencoder of a latent model, or `None`.

    Raises:
        ValueError: if it is not, or does not fit the autoencoder.
    """
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


def check_sd3_components(pipeline: StableDiffusion3Pipeline) -> None:
    """
    Checks that the components of a Stable Diffusion 3 pipeline fit together; diffusers itself finds out in the first
    step, in a matrix product.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The pipeline; text encoders may be missing.

    Raises:
        ValueError: if they do not.
    """
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


def check_upscale_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
    """
    Checks that a network takes the low-resolution image beside x_t.

    Args:
        network ([`~diffusers.ModelMixin`]):
            The network of a [`FlowMatchUpscalePipeline`].
        vae ([`~diffusers.ModelMixin`]):
            The autoencoder of a latent model, or `None`.

    Raises:
        ValueError: if it does not, or does not fit the autoencoder.
    """
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
