# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusers_fm.models import can_be_identity, decode_latents, encode_latents, set_identity
from diffusers_fm.models.pixel_autoencoder import CONSTANT


def autoencoder(channels: int = 3, width: int = 8, **config: Any) -> AutoencoderKL:
    """One that can be the identity, with random weights."""
    torch.manual_seed(0)
    return AutoencoderKL(
        **{
            "in_channels": channels,
            "out_channels": channels,
            "latent_channels": channels,
            "block_out_channels": (width,),
            "norm_num_groups": 1,
            "scaling_factor": 1.0,
            **config,
        }
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (31, 96)])
@pytest.mark.parametrize(
    ("channels", "width", "layers"),
    [(3, 8, {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}),
     (1, 6, {"layers_per_block": 2}), (3, 16, {})],
)  # fmt: skip
def test_latents_are_the_pixels(channels: int, width: int, layers: dict, size: tuple[int, int]) -> None:
    vae = autoencoder(channels, width, **layers)
    assert can_be_identity(vae)
    set_identity(vae)
    images = 2 * torch.rand(3, channels, *size) - 1
    # The image that disturbs the norm most, and the one that disturbs it least.
    images[0], images[1] = 1.0, 0.0
    latents = encode_latents(vae, images, torch.Generator().manual_seed(0))
    # What the constant cannot hide, the rounding of the mean, and five times exp(-15) from the posterior.
    bound = channels / (2 * CONSTANT**2) + CONSTANT * 2**-24 + 5 * 3.1e-7
    assert (latents - images).abs().max() < bound
    assert (decode_latents(vae, latents) - images).abs().max() < 2 * bound


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identity_in_16_bits(dtype: torch.dtype) -> None:
    vae = autoencoder()
    set_identity(vae)
    images = (2 * torch.rand(2, 3, 8, 8) - 1).to(dtype)
    decoded = vae.to(dtype).decode(vae.encode(images).latent_dist.mode()).sample
    # Two roundings of the halves' outputs, each by half a unit in the last place.
    assert ((decoded - images).abs() <= torch.finfo(dtype).eps * images.abs() + 4e-5).all()


def test_scaling_factors_of_the_config_stay_in_force() -> None:
    vae = autoencoder(scaling_factor=2.0, shift_factor=0.25)
    set_identity(vae)
    images = 2 * torch.rand(2, 3, 8, 8) - 1
    with torch.no_grad():
        torch.testing.assert_close(encode_latents(vae, images), 2 * (images - 0.25), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"latent_channels": 4},
        {"block_out_channels": (6,)},
        {"norm_num_groups": 2},
        {"act_fn": "relu"},
        {
            "block_out_channels": (8, 8),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ],
    ids=lambda config: next(iter(config)),
)
def test_configurations_that_admit_no_identity(config: dict) -> None:
    vae = autoencoder(**config)
    before = {name: weight.clone() for name, weight in vae.state_dict().items()}
    assert not can_be_identity(vae)
    with pytest.raises(ValueError, match="can be the identity if it has one level") as error:
        set_identity(vae)
    assert "\n" not in str(error.value)
    assert all(torch.equal(weight, before[name]) for name, weight in vae.state_dict().items())
