# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM against their definitions."""

import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from diffusers_fm.applications.image_quality import psnr, ssim


def test_psnr_is_that_of_the_definition() -> None:
    references = torch.rand(3, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = torch.tensor([0.1, 0.01, 0.5], dtype=torch.float64)
    assert torch.allclose(psnr(references + errors[:, None, None, None], references), -20 * errors.log10())
    assert psnr(references, references).eq(math.inf).all()


def test_ssim_is_that_of_the_definition() -> None:
    # By scipy's Gaussian filter, cut where the window leaves the image: with radius 5 and sigma 1.5 it is the window
    # of Wang et al., normalised.
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(2, 2, 3, 16, 19, dtype=torch.float64, generator=generator)
    y = 0.6 * x + 0.4 * y

    def mean(values: np.ndarray) -> np.ndarray:
        return scipy.ndimage.gaussian_filter(values, 1.5, radius=5)[5:-5, 5:-5]

    for images, references, value in zip(x.numpy(), y.numpy(), ssim(x, y)):
        channels = []
        for a, b in zip(images, references):
            mu_a, mu_b = mean(a), mean(b)
            var_a, var_b, cov = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2, mean(a * b) - mu_a * mu_b
            luminance = (2 * mu_a * mu_b + 1e-4) / (mu_a**2 + mu_b**2 + 1e-4)
            channels.append((luminance * (2 * cov + 9e-4) / (var_a + var_b + 9e-4)).mean())
        assert value.item() == pytest.approx(np.mean(channels), rel=1e-10)
    assert torch.allclose(ssim(x, x), torch.ones(2, dtype=torch.float64))


def test_ssim_of_flat_images() -> None:
    # Without structure only the luminance term is left.
    a, b = torch.full((1, 1, 11, 11), 0.2, dtype=torch.float64), torch.full((1, 1, 11, 11), 0.6, dtype=torch.float64)
    assert ssim(a, b).item() == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), rel=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    small = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"one shape .* got \(1, 1, 8, 8\) and \(1, 1, 8, 9\)"):
        psnr(small, torch.zeros(1, 1, 8, 9))
    for size in (11, 4):
        with pytest.raises(ValueError, match=f"must be odd and at most the images' 8 x 8, got {size}"):
            ssim(small, small, size)


@pytest.mark.parametrize("scale", ["bytes", "levels", "other scale", "nan"])
@pytest.mark.parametrize("measure", [psnr, ssim])
def test_images_of_another_scale_are_refused(measure: object, scale: str) -> None:
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    levels = 255 * images
    changed = {"bytes": levels.byte(), "levels": levels, "other scale": 2 * images - 1, "nan": images / 0}[scale]
    with pytest.raises(ValueError, match=r"must be floating-point with values in \[0, 1\]"):
        measure(changed, changed)
    # A difference of bytes would wrap around.
    if scale == "bytes":
        with pytest.raises(ValueError, match=r"`images` must be floating-point"):
            measure(changed, images)
