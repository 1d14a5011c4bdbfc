# SPDX-License-Identifier: Apache-2.0
"""Anomaly scores: a test of the noise that a flow maps an image to, and the image's likelihood."""

import math
from dataclasses import dataclass

import torch

from ..precision import widest_float


@dataclass(frozen=True)
class NoiseTest:
    """
    What [`noise_test`] returns.

    Args:
        statistics (`torch.Tensor` of shape `(batch_size, 1 + axes)`):
            About standard normal for standard normal noise: its size, and the correlation of neighbours along each
            axis after the channels.
        score (`torch.Tensor` of shape `(batch_size,)`):
            The sum of their squares: the larger, the less like noise.
        p_value (`torch.Tensor` of shape `(batch_size,)`):
            How often noise has a larger score, by the chi-squared distribution.
    """

    statistics: torch.Tensor
    score: torch.Tensor
    p_value: torch.Tensor


def noise_test(noise: torch.Tensor) -> NoiseTest:
    """
    Test whether samples are standard normal noise, from either side: too large and too small are both unlike it.

    A likelihood ranks smooth images above the very images that a model was trained on (Nalisnick et al.,
    arXiv 1810.09136): they are nearer to the mode than samples are. The noise that a flow makes of them is then too
    small (arXiv 1906.02994 calls samples typical whose density is neither too low nor too high), or its neighbours are
    alike.

    Args:
        noise (`torch.Tensor` of shape `(batch_size, channels, ...)`):
            Noise of at least two values, such as `FlowMatchPipeline.encode` returns.

    Returns:
        [`NoiseTest`]: Statistics, score and p-value.

    Raises:
        ValueError: If the noise is no batch of samples of at least two finite values each.
    """
    if noise.ndim < 2 or noise[:1].numel() < 2 or not noise.is_floating_point():
        raise ValueError(
            f"`noise` must be a floating-point batch of samples of at least two values, got {noise.dtype} of shape "
            f"{tuple(noise.shape)}."
        )
    if not bool(noise.isfinite().all()):
        raise ValueError("`noise` must be finite, got values that are not.")
    noise = noise.to(widest_float(noise))
    values = noise[0].numel()
    squares = noise.square().flatten(1).sum(1)
    # Wilson and Hilferty's cube root: normal to third order, where the sum of squares itself is skewed.
    spread = math.sqrt(2 / (9 * values))
    statistics = [((squares / values) ** (1 / 3) - (1 - spread**2)) / spread]
    for axis in range(2, noise.ndim):
        if noise.shape[axis] < 2:
            continue
        products = noise.narrow(axis, 1, noise.shape[axis] - 1) * noise.narrow(axis, 0, noise.shape[axis] - 1)
        pairs = products[0].numel()
        # In units of the sample's own variance, so that size and correlation are told apart. All zeros are as much
        # alike as any other constant.
        variance = squares / values
        correlation = products.flatten(1).sum(1) / torch.where(variance > 0, variance, 1.0)
        statistics.append(torch.where(variance > 0, correlation, float(pairs)) / math.sqrt(pairs))
    table = torch.stack(statistics, dim=1)
    score = table.square().sum(1)
    degrees = torch.full_like(score, table.shape[1] / 2)
    return NoiseTest(table, score, torch.special.gammaincc(degrees, score / 2))
