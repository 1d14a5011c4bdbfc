# SPDX-License-Identifier: Apache-2.0
"""Image quality against references: PSNR and SSIM."""

import torch
from torch.nn import functional


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    Peak signal-to-noise ratio in decibels, `-10 log10(mean squared error)`, of images with values in [0, 1].

    Args:
        images, references (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            The images, and what they should be.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: infinite for an image that equals its reference.

    Raises:
        ValueError: if the shapes differ, or values are not in [0, 1].
    """
    _check_shapes(images, references)
    return -10 * (images - references).square().flatten(1).mean(1).log10()


def ssim(
    images: torch.Tensor, references: torch.Tensor, window_size: int = 11, window_sigma: float = 1.5
) -> torch.Tensor:
    """
    Structural similarity of images with values in [0, 1] (Wang et al., Image quality assessment: from error visibility
    to structural similarity, IEEE TIP 2004, equation 13, K1 = 0.01, K2 = 0.03): the mean over all places at which the
    Gaussian window lies within the image, and over channels.

    Args:
        images, references (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            The images, and what they should be.
        window_size (`int`, *optional*, defaults to 11):
            Side of the window, an odd number; smaller images need a smaller one.
        window_sigma (`float`, *optional*, defaults to 1.5):
            Standard deviation of the window in pixels.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: at most 1, for an image that equals its reference.

    Raises:
        ValueError: if the shapes differ, values are not in [0, 1], or the window does not fit the images.
    """
    _check_shapes(images, references)
    channels, height, width = images.shape[1:]
    if window_size % 2 == 0 or not 1 <= window_size <= min(height, width):
        raise ValueError(f"`window_size` must be odd and at most the images' {height} x {width}, got {window_size}.")
    offsets = torch.arange(window_size, dtype=images.dtype, device=images.device) - window_size // 2
    weights = torch.exp(-(offsets**2) / (2 * window_sigma**2))
    weights = weights / weights.sum()
    window = (weights[:, None] * weights[None, :]).expand(channels, 1, window_size, window_size)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return functional.conv2d(values, window, groups=channels)

    mean_x, mean_y = mean(images), mean(references)
    variance_x = mean(images**2) - mean_x**2
    variance_y = mean(references**2) - mean_y**2
    covariance = mean(images * references) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2))
    return similarity.flatten(1).mean(1)


def _check_shapes(images: torch.Tensor, references: torch.Tensor) -> None:
    if images.ndim != 4 or images.shape != references.shape:
        raise ValueError(
            "Images and references must have one shape (batch_size, channels, height, width), got"
            f" {tuple(images.shape)} and {tuple(references.shape)}."
        )
    for name, values in (("images", images), ("references", references)):
        # References are images of a data set; what is compared with them may overshoot.
        scaled = name == "images" or bool(((references >= -1e-3) & (references <= 1 + 1e-3)).all())
        if not (values.is_floating_point() and scaled):
            raise ValueError(f"`{name}` must be floating-point with values in [0, 1], got others of {values.dtype}.")
