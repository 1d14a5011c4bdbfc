# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines with random weights, every layer of them non-zero, for the tests of the pipelines."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    ModelMixin,
    SD3Transformer2DModel,
    UNet2DModel,
)

from diffusers_fm import ClassEmbedder, FlowMatchPipeline, FlowMatchScheduler, FlowMatchUpscalePipeline


NUM_CLASSES = 5


def tiny_unet(**config: Any) -> UNet2DModel:
    """A `UNet2DModel` for 8 x 8 pixels of 1 channel, without classes if nothing else is asked."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{**defaults, **config}).eval()


def tiny_dit(**config: Any) -> DiTTransformer2DModel:
    """A `DiTTransformer2DModel` for 8 x 8 latents of 4 channels."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_embeds_ada_norm": NUM_CLASSES,
    }
    return DiTTransformer2DModel(**{**defaults, **config}).eval()


def tiny_sd3(**config: Any) -> SD3Transformer2DModel:
    """An `SD3Transformer2DModel` for 8 x 8 latents of 4 channels."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "joint_attention_dim": 12,
        "caption_projection_dim": 16,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 6,
    }
    return SD3Transformer2DModel(**{**defaults, **config}).eval()


def tiny_class_embedder(**config: Any) -> ClassEmbedder:
    """The [`ClassEmbedder`] of [`tiny_sd3`]."""
    torch.manual_seed(1)
    defaults = {"num_classes": NUM_CLASSES, "joint_attention_dim": 12, "pooled_projection_dim": 20, "num_tokens": 2}
    return ClassEmbedder(**{**defaults, **config}).eval()


def tiny_vae(kind: str = "kl", **config: Any) -> ModelMixin:
    """An autoencoder of 3 channels and 4 latent channels: `kl` and `dc` halve the size once, `tiny` twice."""
    torch.manual_seed(2)
    if kind == "kl":
        defaults = {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "norm_num_groups": 4,
        }
        return AutoencoderKL(**{**defaults, **config}).eval()
    if kind == "tiny":
        defaults = {
            "encoder_block_out_channels": (8, 8, 8),
            "decoder_block_out_channels": (8, 8, 8),
            "num_encoder_blocks": (1, 1, 1),
            "num_decoder_blocks": (1, 1, 1),
        }
        return AutoencoderTiny(**{**defaults, **config}).eval()
    defaults = {
        "latent_channels": 4,
        "encoder_block_out_channels": (8, 16),
        "decoder_block_out_channels": (8, 16),
        "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1),
        "encoder_qkv_multiscales": ((), ()),
        "decoder_qkv_multiscales": ((), ()),
    }
    return AutoencoderDC(**{**defaults, **config}).eval()


def tiny_pipeline(kind: str, **scheduler: Any) -> FlowMatchPipeline:
    """
    A pipeline without a progress bar.

    Args:
        kind (`str`):
            `unet` (no classes), `unet-classes` (with a null class), `dit`, `dit-vae`, `sd3` or `sd3-vae`.
        scheduler:
            Configuration of the scheduler.

    Returns:
        [`FlowMatchPipeline`]: the pipeline.
    """
    components: dict[str, Any] = {"scheduler": FlowMatchScheduler(**scheduler)}
    if kind == "unet":
        components.update(unet=tiny_unet())
    elif kind == "unet-classes":
        components.update(unet=tiny_unet(num_class_embeds=NUM_CLASSES + 1), num_classes=NUM_CLASSES)
    elif kind.startswith("dit"):
        components.update(transformer=tiny_dit())
    else:
        components.update(transformer=tiny_sd3(), class_embedder=tiny_class_embedder())
    if kind.endswith("vae"):
        components.update(vae=tiny_vae())
    pipeline = FlowMatchPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


KINDS = ("unet", "unet-classes", "dit", "dit-vae", "sd3", "sd3-vae")


def labels_of(pipeline: FlowMatchPipeline, batch_size: int = 3) -> list[int] | None:
    """Different labels for a batch, or `None` for a model without classes."""
    return [(2 * i + 1) % NUM_CLASSES for i in range(batch_size)] if pipeline.num_classes else None


def generators(*seeds: int) -> list[torch.Generator]:
    """One generator for each image."""
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def images_of(pipeline: FlowMatchPipeline, batch_size: int = 3) -> torch.Tensor:
    """Random images of the pipeline's own size, with values in [0, 1]."""
    channels = 3 if pipeline.vae is not None else pipeline.sample_shape[0]
    side = pipeline.sample_shape[1] * pipeline.vae_scale_factor
    return torch.rand(batch_size, channels, side, side, generator=torch.Generator().manual_seed(0))


def save_untrained_upscaler(folder: Path, in_channels: int = 2, scale_factor: int = 2) -> Path:
    """An upscaler of two channels of input, as configs alone."""
    unet = tiny_unet(in_channels=in_channels)
    FlowMatchUpscalePipeline(FlowMatchScheduler(), unet=unet, scale_factor=scale_factor).save_pretrained(folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    return folder
