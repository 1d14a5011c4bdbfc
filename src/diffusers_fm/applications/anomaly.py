# SPDX-License-Identifier: Apache-2.0
"""Anomaly scores: a test of the noise that a flow maps an image to, the image's likelihood, and thresholds."""

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


@dataclass(frozen=True)
class AnomalyScore:
    """
    What `FlowMatchPipeline.anomaly_score` returns.

    Args:
        likelihood (`torch.Tensor` of shape `(batch_size,)`):
            Minus the log-density in nats per dimension.
        noise_test ([`NoiseTest`]):
            Of the noise that the images come from.
    """

    likelihood: torch.Tensor
    noise_test: NoiseTest

    @property
    def table(self) -> torch.Tensor:
        """Both scores, `(batch_size, 2)`: the larger, the less like the data."""
        return torch.stack([self.likelihood, self.noise_test.score.to(self.likelihood)], dim=1)


def alarm_threshold(scores: torch.Tensor, false_alarm_rate: float) -> float:
    """
    Score above which an image raises an alarm.

    An image of the same kind as the held-out ones, which took no part in training, has a larger score with a
    probability of `false_alarm_rate` at most, and of at most one in `len(scores) + 1` less where no scores are equal
    (split conformal prediction, Vovk et al., 2005). The rate with one set of held-out images at hand varies about that
    as Beta(j, len(scores) + 1 - j) does, j being the whole part of `false_alarm_rate * (len(scores) + 1)`.

    Args:
        scores (`torch.Tensor` of shape `(num_images,)`):
            Of held-out images of the kind that raises no alarm.
        false_alarm_rate (`float`):
            Part of such images that may raise one.

    Returns:
        `float`: The threshold.

    Raises:
        ValueError: If scores are not finite, or too few for the rate.
    """
    if scores.ndim != 1 or not bool(scores.isfinite().all()):
        raise ValueError(f"`scores` must be finite, one for each image, got the shape {tuple(scores.shape)}.")
    least = math.ceil(1 / false_alarm_rate) - 1 if 0 < false_alarm_rate < 1 else 0
    if not 0 < least <= len(scores):
        raise ValueError(
            f"`false_alarm_rate` must be below 1 and at least 1 / {len(scores) + 1} with {len(scores)} held-out"
            f" images, got {false_alarm_rate!r}."
        )
    above = math.floor(false_alarm_rate * (len(scores) + 1) + 1e-9)
    return scores.sort(descending=True).values[above - 1].item()


def larger_deviation(table: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """
    One score from several: the largest, each in units of the way from the median of held-out images to the score that
    one in twenty of them exceeds.

    Args:
        table (`torch.Tensor` of shape `(batch_size, num_scores)`):
            Such as [`AnomalyScore.table`].
        reference (`torch.Tensor` of shape `(num_images, num_scores)`):
            The same of held-out images, other ones than [`alarm_threshold`] is given.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: The scores.

    Raises:
        ValueError: If the shapes differ, or a score of the held-out images does not vary.
    """
    if table.ndim != 2 or reference.ndim != 2 or table.shape[1] != reference.shape[1]:
        raise ValueError(
            "`table` and `reference` must have the shapes (batch_size, num_scores) and (num_images, num_scores), got"
            f" {tuple(table.shape)} and {tuple(reference.shape)}."
        )
    levels = torch.tensor([0.5, 0.95], dtype=reference.dtype, device=reference.device)
    middle, high = reference.quantile(levels, dim=0)
    if not bool((high > middle).all()):
        raise ValueError("`reference` must vary in every score: the median of one equals its 95 % quantile.")
    return ((table - middle) / (high - middle)).amax(1)


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
