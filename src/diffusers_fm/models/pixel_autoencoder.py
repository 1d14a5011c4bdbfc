# SPDX-License-Identifier: Apache-2.0
"""Autoencoders whose latents are the pixels: with them diffusers' latent pipelines work in pixels."""

from typing import cast

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from diffusers.models.attention_processor import Attention
from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock, WanRMS_norm
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


# The constant C that fills two channels before the last norm: a power of two, exact in every dtype. The norm then
# divides by nearly the same number whatever the image is. With c channels in [-1, 1], images come back within
# c / (2 C**2), 6e-6 for three, and the norm's own rounding of the mean, some C * 2**-24 = 3e-5; a grey level of 8 bits
# is 8e-3.
CONSTANT = 512.0


def can_be_identity(vae: AutoencoderKL | AutoencoderKLWan) -> bool:
    """
    Whether [`set_identity`] can turn this autoencoder into the identity.

    Args:
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.AutoencoderKLWan`]):
            Any.

    Returns:
        `bool`: whether it has one level (so it does not change the size), as many latent channels as channels, one
        group in its norms, `silu`, and at least `2 * in_channels + 2` inner channels, an even number. Of videos,
        likewise, without patches, and with factors of 1 in its configuration.
    """
    config = vae.config
    if isinstance(vae, AutoencoderKLWan):
        return (
            list(config.dim_mult) == [1]
            and config.in_channels == config.out_channels == config.z_dim
            and config.scale_factor_spatial == config.scale_factor_temporal == 1
            and config.decoder_base_dim is None
            and config.patch_size is None
            and not config.is_residual
            and config.base_dim >= 2 * config.in_channels + 2
        )
    return (
        len(config.block_out_channels) == 1
        and config.in_channels == config.out_channels == config.latent_channels
        and config.norm_num_groups == 1
        and config.act_fn == "silu"
        and config.block_out_channels[0] >= 2 * config.in_channels + 2
    )


@torch.no_grad()
def set_identity(vae: AutoencoderKL | AutoencoderKLWan) -> None:
    """
    Gives an autoencoder the weights of the identity: `encode` returns the image, `decode` returns the latents.

    An autoencoder with random weights teaches a latent model nothing; this one needs no training, and costs next to
    nothing. Each half holds every channel `x` as the pair `(x, -x)` beside a constant and its negative. All residual
    branches are zero. The group norm at the end sees mean 0 and a variance that the constant alone decides, so it is
    a scaling, which its weight undoes; and `silu(x) - silu(-x) = x` passes the activation. The posterior's variance
    is the smallest that `AutoencoderKL` admits, a standard deviation of 3e-7.

    Args:
        vae ([`~diffusers.AutoencoderKL`] or [`~diffusers.AutoencoderKLWan`]):
            Changed in place.

    Raises:
        ValueError: if its configuration does not admit it, see [`can_be_identity`].
    """
    if not can_be_identity(vae):
        raise ValueError(
            "An AutoencoderKL, or in its terms an AutoencoderKLWan, can be the identity if it has one level in"
            " `block_out_channels` of at least"
            " 2 * in_channels + 2 channels, equal `in_channels`, `out_channels` and `latent_channels`,"
            f" `norm_num_groups` 1 and `act_fn` 'silu', got {dict(vae.config)}."
        )
    for module in vae.modules():
        if isinstance(module, (ResnetBlock2D, WanResidualBlock)):
            _zero(module.conv2)
        elif isinstance(module, WanAttentionBlock):
            _zero(module.proj)
        elif isinstance(module, Attention):
            _zero(cast(nn.ModuleList, module.to_out)[0])
    of_videos = isinstance(vae, AutoencoderKLWan)
    channels = vae.config.in_channels
    width = vae.config.base_dim if of_videos else vae.config.block_out_channels[0]
    pixels = torch.arange(channels)
    # (x, -x, constant, -constant, 0, ...) comes in, and x goes out.
    pairs = torch.zeros(width, channels)
    pairs[2 * pixels, pixels], pairs[2 * pixels + 1, pixels] = 1.0, -1.0
    constants = torch.zeros(width)
    constants[2 * channels : 2 * channels + 2] = torch.tensor([CONSTANT, -CONSTANT])
    for half in (vae.encoder, vae.decoder):
        _set_convolution(half.conv_in, pairs, constants)
        gain = CONSTANT * (2 / width) ** 0.5
        if of_videos:
            cast(WanRMS_norm, half.norm_out).gamma.fill_(gain)
        else:
            half.conv_norm_out.load_state_dict({"weight": torch.full((width,), gain), "bias": torch.zeros(width)})
    # The second half of the encoder's output is the logarithm of the variance, which is clamped at -30.
    log_variance = torch.cat([torch.zeros(channels), torch.full((channels,), -30.0)])
    _set_convolution(vae.encoder.conv_out, torch.cat([pairs.T, torch.zeros(channels, width)]), log_variance)
    _set_convolution(vae.decoder.conv_out, pairs.T, torch.zeros(channels))
    if vae.quant_conv is not None:
        _set_convolution(vae.quant_conv, torch.eye(2 * channels), torch.zeros(2 * channels))
    if vae.post_quant_conv is not None:
        _set_convolution(vae.post_quant_conv, torch.eye(channels), torch.zeros(channels))


def _set_convolution(layer: nn.Conv2d | nn.Conv3d, matrix: torch.Tensor, bias: torch.Tensor) -> None:
    """A convolution that looks at one pixel: `matrix` is the weight at its centre, of shape `(out, in)`.

    In time, where it sees nothing later, that is the end.
    """
    weight = torch.zeros_like(layer.weight)
    weight[(..., *(-1,) * (weight.ndim == 5), weight.shape[-2] // 2, weight.shape[-1] // 2)] = matrix.to(weight)
    layer.load_state_dict({"weight": weight, "bias": bias})


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
