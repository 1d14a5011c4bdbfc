# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Diffusion 1.5 and XL with everything in them, as diffusion checkpoints."""

import copy
from typing import Any

from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from stock_pipelines import SD_BETAS, stable_diffusion, stable_diffusion_xl
from tiny_text_to_image import _clip, clip_tokenizer
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel


BETAS = SD_BETAS | {"clip_sample": False, "steps_offset": 1}


def clip(kind: type[PreTrainedModel], hidden_size: int, seed: int, projection_dim: int = 16) -> PreTrainedModel:
    """A text encoder of CLIP, with or without projection."""
    config = copy.deepcopy(_clip(hidden_size, seed).config)
    config.projection_dim = projection_dim
    return kind(config).eval()


def tiny_stable_diffusion(**scheduler: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5: 8 x 8 latents of 16 x 16 pixels, a DDIM that ends in clean data."""
    parts = {**stable_diffusion()[0].pipeline.components, "text_encoder": clip(CLIPTextModel, 16, 0)}
    parts |= {"tokenizer": clip_tokenizer(), "scheduler": DDIMScheduler(**BETAS | scheduler)}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def tiny_stable_diffusion_xl(**scheduler: Any) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text encoders, a pooled one, and sizes as conditions."""
    parts = {**stable_diffusion_xl()[0].pipeline.components, "text_encoder": clip(CLIPTextModel, 8, 0)}
    parts["text_encoder_2"] = clip(CLIPTextModelWithProjection, 8, 1)
    parts["scheduler"] = DDIMScheduler(**BETAS | scheduler)
    return StableDiffusionXLPipeline(**parts | dict.fromkeys(("tokenizer", "tokenizer_2"), clip_tokenizer()))
