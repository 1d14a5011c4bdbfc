# SPDX-License-Identifier: Apache-2.0
"""Images to latents and back: the one place of the scaling, shift and mean factors of an autoencoder."""

import inspect
import itertools
import threading
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution, EncoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn


# While an autoencoder has other weights for a call, no other thread calls it or asks for its dtype.
_UPCAST = threading.Lock()


def spatial_scale_factor(vae: ModelMixin) -> int:
    """
    Pixels per latent along height and width.

    Args:
        vae (`ModelMixin`):
            An `AutoencoderKL`, `AutoencoderTiny` or `AutoencoderDC`: each level after the first halves the size.

    Returns:
        `int`: the factor, 8 for the autoencoders of Stable Diffusion.
    """
    levels = vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    return 2 ** (len(levels) - 1)


def encode_latents(
    vae: ModelMixin,
    images: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample: bool = True,
) -> torch.Tensor:
    """
    Latents of images as a flow matching model sees them: `(z - shift) * scaling_factor / std`.

    `shift` is the config's `latents_mean` where there is one, else its `shift_factor`, else 0; `std` is `latents_std`
    or 1; a `scaling_factor` that is missing or `None` counts as 1. Rombach et al. (arXiv 2112.10752, appendix G)
    introduced the scaling so that latents have about unit variance.

    Args:
        vae (`ModelMixin`):
            The autoencoder; it runs in its own dtype, or in float32 where that is float16 and its config says
            `force_upcast`.
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Images with values in [-1, 1].
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            Source of the posterior's noise: one, or one for each image.
        sample (`bool`, *optional*, defaults to `True`):
            Whether to draw from the posterior of a variational autoencoder, or to take its mode. The deterministic
            autoencoders have nothing to draw.

    Returns:
        `torch.Tensor`: float32 latents of shape `(batch_size, latent_channels, height / factor, width / factor)`.

    Raises:
        ValueError: if the autoencoder's `encode` returns a kind of output that is not known here.
    """
    return latents_of_moments(vae, encode_moments(vae, images), generator, sample)


def encode_moments(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """
    What an autoencoder says of images, from which [`latents_of_moments`] draws latents as often as they are needed.

    Args:
        vae (`ModelMixin`):
            The autoencoder; it runs in its own dtype, or in float32 where that is float16 and its config says
            `force_upcast`.
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`, or of sounds without the height):
            Images with values in [-1, 1]; an autoencoder of videos takes each as a video of one frame.

    Returns:
        `torch.Tensor` of shape `(batch_size, 2 * latent_channels, height / factor, width / factor)`: means and log
        variances of the posterior, in the dtype in which the autoencoder ran; of a deterministic autoencoder, its
        `latent_channels` latents; of one that keeps its posterior to itself, the means.

    Raises:
        ValueError: if the images are integers, or the autoencoder's `encode` returns a kind of output that is not
            known here.
    """
    if not images.is_floating_point():
        raise ValueError(f"`images` must be floating-point with values in [-1, 1], got {images.dtype}.")
    if images.ndim == 4 and any(isinstance(layer, nn.Conv3d) for layer in vae.modules()):
        images = images.unsqueeze(2)
    if images.ndim == 3:
        return _moments_of_sounds(vae, images)
    encoded = _run(vae, "encode", images)
    if isinstance(encoded, AutoencoderKLOutput):
        return encoded.latent_dist.parameters
    if isinstance(encoded, AutoencoderTinyOutput):
        return encoded.latents
    if isinstance(encoded, EncoderOutput):
        return encoded.latent
    raise ValueError(
        f"{vae.__class__.__name__}.encode returned {encoded.__class__.__name__}; the autoencoders that can be used"
        " are those that return AutoencoderKLOutput, AutoencoderTinyOutput or EncoderOutput."
    )


def _moments_of_sounds(vae: Any, waveforms: torch.Tensor) -> torch.Tensor:
    """Moments of waveforms: autoencoders of sounds have outputs, and posteriors, of their own."""
    encoded = vae.encode(waveforms.to(vae.dtype), **without_draw(vae))
    if "latent_dist" in encoded:
        return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.logvar], dim=1)
    return encoded[0]


def without_draw(vae: Any) -> dict[str, Any]:
    """Arguments with which `vae.encode` draws nothing from a posterior that it keeps to itself."""
    names = inspect.signature(vae.encode).parameters
    return {"sample_posterior": False} if "sample_posterior" in names else {}


def latents_of_moments(
    vae: ModelMixin,
    moments: torch.Tensor,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sample: bool = True,
) -> torch.Tensor:
    """
    Latents in the scale of the flow matching model, see [`encode_latents`].

    Args:
        vae (`ModelMixin`):
            The autoencoder that gave the moments.
        moments (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            As [`encode_moments`] returns them.
        generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
            Source of the posterior's noise: one, or one for each image.
        sample (`bool`, *optional*, defaults to `True`):
            Whether to draw from the posterior, or to take its mode.

    Returns:
        `torch.Tensor` of shape `(batch_size, latent_channels, height, width)`: float32.
    """
    if moments.shape[1] == 2 * vae.config.latent_channels:
        posterior = DiagonalGaussianDistribution(moments)
        latents = posterior.sample(generator) if sample else posterior.mode()
    else:
        latents = moments
    shift, scale = _shift_and_scale(vae, latents)
    return (latents.float() - shift) * scale


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """
    Images of latents, the inverse of [`encode_latents`].

    Args:
        vae (`ModelMixin`):
            The autoencoder; it runs in its own dtype, or in float32 where that is float16 and its config says
            `force_upcast`.
        latents (`torch.Tensor` of shape `(batch_size, latent_channels, height, width)`):
            Latents in the scale of the flow matching model.

    Returns:
        `torch.Tensor`: float32 images of shape `(batch_size, channels, factor * height, factor * width)`, mostly in
        [-1, 1].
    """
    shift, scale = _shift_and_scale(vae, latents)
    return _run(vae, "decode", latents.float() / scale + shift).sample.float()


class _Half(nn.Module):
    """One half of an autoencoder as a module."""

    def __init__(self, vae: ModelMixin, name: str) -> None:
        super().__init__()
        self.vae, self.name = vae, name

    def forward(self, x: torch.Tensor) -> Any:
        return getattr(self.vae, self.name)(x)


def _run(vae: ModelMixin, name: str, x: torch.Tensor) -> Any:
    """`vae.encode` or `vae.decode`. SDXL's autoencoder, and all that do not deny it, overflow in float16."""
    with _UPCAST:
        dtype = vae.dtype
        if dtype == torch.float16 and vae.config.get("force_upcast"):
            tensors = itertools.chain(vae.named_parameters(), vae.named_buffers())
            weights = {f"vae.{key}": tensor.detach().float() for key, tensor in tensors if tensor.is_floating_point()}
            return torch.func.functional_call(_Half(vae, name), weights, (x.float(),))
    return getattr(vae, name)(x.to(dtype))


def _shift_and_scale(vae: ModelMixin, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift and scale as float32 tensors that broadcast over `(batch_size, channels, ...)`."""
    config = vae.config
    shift = config.get("latents_mean")
    if shift is None:
        shift = config.get("shift_factor")
    shift = torch.tensor(0.0 if shift is None else shift, dtype=torch.float32, device=latents.device)
    scaling_factor = config.get("scaling_factor")
    scale = torch.tensor(1.0 if scaling_factor is None else scaling_factor, dtype=torch.float32, device=latents.device)
    if config.get("latents_std") is not None:
        scale = scale / torch.tensor(config.latents_std, dtype=torch.float32, device=latents.device)
    broadcast = (-1,) + (1,) * (latents.ndim - 2)
    return shift.reshape(broadcast), scale.reshape(broadcast)
