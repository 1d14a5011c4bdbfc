# SPDX-License-Identifier: Apache-2.0
"""
Coordinates of integration: the same flow at another scale and in another time.

In the straight coordinates every Gaussian path is the optimal transport one, in the angle every path is the
trigonometric one: one grid of times then serves all of them, and no path has a singular start.
"""

import math
from dataclasses import dataclass

import torch

from .paths import ConditionalPath


SAMPLING_PATHS = ("ot", "native", "angle")

Row = tuple[torch.Tensor, torch.Tensor]


def ratio_of_angle(angle: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """
    The straight time at an angle `atan2(sigma, alpha * sigma_data)`.

    Args:
        angle (`torch.Tensor`):
            Angles in [0, pi / 2], 0 = data, any shape.
        sigma_data (`float`):
            The standard deviation of the data.

    Returns:
        `torch.Tensor`: `sigma / (alpha + sigma)`.
    """
    noise = sigma_data * torch.sin(angle)
    # The sine of the complement is exactly 0 at pi / 2; the cosine is not.
    return noise / (torch.sin(math.pi / 2 - angle) + noise)


def angle_of_ratio(ratio: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """
    The inverse of [`ratio_of_angle`].

    Args:
        ratio (`torch.Tensor`):
            Straight times in [0, 1], any shape.
        sigma_data (`float`):
            The standard deviation of the data.

    Returns:
        `torch.Tensor`: `atan2(sigma, alpha * sigma_data)`.
    """
    return torch.atan2(ratio, sigma_data * (1 - ratio))


@dataclass(frozen=True)
class Coordinates:
    """
    Coordinates `X = x_t / scale` in a time `u` of a path, in which `dX/du` is a linear combination of data and noise.

    Args:
        path (`ConditionalPath`):
            The path.
        name (`str`):
            `ot`: `u = sigma / (alpha + sigma)` and `X = x / (alpha + sigma)`, in which every path is the OT path.
            `native`: `u = t` and `X = x`, the path's own ODE (arXiv 2210.02747).
            `angle`: `u = atan2(sigma, alpha * sigma_data)` and `X = x / sqrt(sigma^2 + (alpha * sigma_data)^2)`, in
            which every path is the trigonometric one and `X` keeps unit variance.
        sigma_data (`float`, *optional*, defaults to 1.0):
            The standard deviation of the data, for `angle`.

    Raises:
        ValueError: If there are no coordinates of this name.
    """

    path: ConditionalPath
    name: str
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in SAMPLING_PATHS:
            raise ValueError(f"The coordinates must be one of {', '.join(SAMPLING_PATHS)}, not {self.name!r}.")

    def derivative(self, t: torch.Tensor) -> str | Row:
        """`dX/du` at `t`, as a prediction type or as the weights of data and noise."""
        if self.name == "native":
            return "flow_prediction"
        if self.name == "ot":
            return -torch.ones_like(t), torch.ones_like(t)
        alpha, sigma = self.sigma_data * self.path.alpha(t), self.path.sigma(t)
        norm = torch.hypot(alpha, sigma)
        return -sigma / (norm * self.sigma_data), alpha / norm

    def coefficients(self, t: torch.Tensor, prediction_type: str) -> Row:
        """Weights of `x_t` and of the network's answer in `dX/du` at `t`."""
        return self.path.coefficients(t, prediction_type, self.derivative(t))

    def node(self, ratio: torch.Tensor) -> torch.Tensor:
        """`u` at a straight time, elementwise."""
        if self.name == "native":
            return self.path.time_at(ratio)
        return ratio if self.name == "ot" else angle_of_ratio(ratio, self.sigma_data)

    def node_at(self, t: torch.Tensor) -> torch.Tensor:
        """`u` at a time of the path, elementwise."""
        if self.name == "native":
            return t
        if self.name == "ot":
            return self.path.ratio(t)
        return torch.atan2(self.path.sigma(t), self.sigma_data * self.path.alpha(t))

    def time(self, u: torch.Tensor) -> torch.Tensor:
        """The path's time at `u`, elementwise."""
        if self.name == "native":
            return u
        return self.path.time_at(u if self.name == "ot" else ratio_of_angle(u, self.sigma_data))

    def scale(self, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """The scale of `x` at `(alpha, sigma)`, elementwise."""
        if self.name == "native":
            return torch.ones_like(alpha)
        return alpha + sigma if self.name == "ot" else torch.hypot(self.sigma_data * alpha, sigma)

    def scale_at(self, t: torch.Tensor) -> torch.Tensor:
        """The scale of `x` at a time of the path, elementwise."""
        return self.scale(self.path.alpha(t), self.path.sigma(t))
