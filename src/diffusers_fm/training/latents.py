# SPDX-License-Identifier: Apache-2.0
"""What the flow is trained on: pixels, or latents of an autoencoder, made on the way or kept."""

from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models

from ..models import encode_moments, latents_of_moments
from .randomness import BatchSlice


def normalize(images: torch.Tensor) -> torch.Tensor:
    """
    Bytes to the range of models.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            uint8.

    Returns:
        `torch.Tensor` of the same shape: float32 in [-1, 1].
    """
    return images.float() / 127.5 - 1


def latents_of_batch(
    pipeline: DiffusionPipeline,
    batch: dict[str, Any],
    device: torch.device,
    part: BatchSlice | None = None,
    offload: bool = False,
) -> torch.Tensor:
    """
    The data of a batch, as the flow sees it: latents drawn from the posterior that the autoencoder or a cache of its
    answers gives, or pixels where there is no autoencoder.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With the component `vae`, which may be `None`.
        batch (`dict[str, Any]`):
            With `images` or `moments`.
        device (`torch.device`):
            Where they are wanted.
        part ([`BatchSlice`], *optional*):
            Whose random numbers are taken; without it the mode of the posterior is.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the autoencoder is on the device only while it runs.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height, width)`: float32, pixels in [-1, 1].
    """
    vae: Any = pipeline.vae
    if "moments" in batch:
        moments = batch["moments"].to(device, non_blocking=True)
    else:
        images = normalize(batch["images"].to(device, non_blocking=True))
        if vae is None:
            return images
        with torch.no_grad(), offload_models(vae, device=device, offload=offload):
            moments = encode_moments(vae, images)
    generators = None if part is None else part.sample_generators("posterior", device)
    return latents_of_moments(vae, moments, generators, sample=part is not None)
