# SPDX-License-Identifier: Apache-2.0
"""Bicubic resampling, identical to Pillow's, in training and sampling."""

import torch
from torch.nn import functional


def resize_bicubic(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Resizes images by the cubic kernel of `PIL.Image.Resampling.BICUBIC` (a = -0.5), which widens where it shrinks an
    image: nothing aliases.

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Floating-point images of any range. The kernel overshoots at edges, and nothing is clamped.
        size (`tuple[int, int]`):
            The wanted height and width.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, *size)`: float32.
    """
    return functional.interpolate(images.float(), size, mode="bicubic", antialias=True)


def downscale(images: torch.Tensor, factor: int) -> torch.Tensor:
    """
    Low-resolution images of 8 bits, as `image.resize` of Pillow makes them with `BICUBIC` (to one level: Pillow rounds
    after each direction, this rounds once).

    Args:
        images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            uint8.
        factor (`int`):
            How many times smaller; it divides height and width.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height / factor, width / factor)`: uint8.
    """
    height, width = images.shape[-2:]
    return resize_bicubic(images, (height // factor, width // factor)).round().clamp(0, 255).to(torch.uint8)
