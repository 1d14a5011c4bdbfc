# SPDX-License-Identifier: Apache-2.0
"""Problems with closed forms: Gaussian mixtures as data, on any path, at any time and in any shape."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from diffusers_fm.paths import ConditionalPath, lift


@dataclass(frozen=True)
class GaussianMixture:
    """
    Data drawn from a mixture of Gaussians with diagonal covariances.

    On every path the marginals stay mixtures: mode k is `N(alpha * mean_k, alpha^2 * std_k^2 + sigma^2)`, which gives
    the posterior means of data and noise, hence the exact output of a network of every prediction type, the score, the
    divergence and the log-density, all without dividing by anything that vanishes at t = 0 or t = 1.

    Args:
        weights (`torch.Tensor` of shape `(modes,)`):
            Positive, of sum one.
        means (`torch.Tensor` of shape `(modes, *shape)`):
            The centres of the modes.
        stds (`torch.Tensor` of shape `(modes, *shape)`):
            Their standard deviations, positive.
    """

    weights: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor

    @property
    def shape(self) -> torch.Size:
        """The shape of one sample."""
        return self.means.shape[1:]

    @property
    def dim(self) -> int:
        """The number of values in one sample."""
        return self.shape.numel()

    def to(self, dtype: torch.dtype) -> "GaussianMixture":
        """The same mixture in another precision."""
        return GaussianMixture(self.weights.to(dtype), self.means.to(dtype), self.stds.to(dtype))

    def standardized(self) -> "GaussianMixture":
        """The mixture moved and scaled to mean zero and variance one in each coordinate."""
        weights = lift(self.weights, self.means)
        mean = (weights * self.means).sum(0)
        scale = (weights * (self.stds.square() + (self.means - mean).square())).sum(0).sqrt()
        return GaussianMixture(self.weights, (self.means - mean) / scale, self.stds / scale)

    def sample(self, num_samples: int, seed: int = 0) -> torch.Tensor:
        """Samples of shape `(num_samples, *shape)`."""
        generator = torch.Generator().manual_seed(seed)
        modes = torch.multinomial(self.weights, num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, *self.shape, generator=generator, dtype=self.means.dtype)
        return self.means[modes] + self.stds[modes] * noise

    def marginal_sample(self, path: ConditionalPath, t: float, num_samples: int, seed: int = 0) -> torch.Tensor:
        """Samples of `x_t`, of shape `(num_samples, *shape)`."""
        data = self.sample(num_samples, seed)
        noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=data.dtype)
        return path.sample(data, noise, torch.full((num_samples,), t, dtype=torch.float64))

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        """The log-density of the data at `x`, of shape `(batch_size,)`."""
        one = torch.ones(len(x), dtype=x.dtype, device=x.device)
        return torch.logsumexp(self._modes(x, one, 0 * one)[0], 1)

    def marginal_log_prob(self, path: ConditionalPath, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The log-density of `x_t` at `x`, of shape `(batch_size,)`; `t` has shape `(batch_size,)`."""
        return torch.logsumexp(self._modes(x, path.alpha(t), path.sigma(t))[0], 1)

    def predict(self, path: ConditionalPath, x: torch.Tensor, t: torch.Tensor, prediction_type: str) -> torch.Tensor:
        """A perfect network's output of any prediction type at `x` `(batch_size, *shape)` and `t` `(batch_size,)`."""
        data, slope, _ = self._posterior(x, path.alpha(t), path.sigma(t))
        alpha, sigma = lift(path.alpha(t), x), lift(path.sigma(t), x)
        if prediction_type == "sample":
            return data
        if prediction_type == "score":
            return -slope
        if prediction_type == "epsilon":
            return sigma * slope
        if prediction_type == "v_prediction":
            return (alpha * sigma * slope - sigma * data) / torch.hypot(alpha, sigma)
        if prediction_type == "flow_prediction":
            # sigma * d_sigma is finite at VP's t = 0, where d_sigma alone is not.
            return lift(path.d_alpha(t), x) * data + lift(path.sigma_d_sigma(t), x) * slope
        raise ValueError(f"Unknown prediction type {prediction_type!r}.")

    def model(
        self, path: ConditionalPath, prediction_type: str = "flow_prediction"
    ) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """A perfect network `model(x_t, t)`."""
        return lambda x, t: self.predict(path, x, t, prediction_type)

    def field(self, path: ConditionalPath) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The exact velocity as a field `field(t, x)` for a solver, on the path's own coordinates."""
        return lambda t, x: self.predict(path, x, t, "flow_prediction")

    def straight_field(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """The exact velocity noise - data in the straight coordinates, as a field `field(s, x)` for a solver."""

        def field(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            data, slope, _ = self._posterior(x, 1 - s, s)
            return lift(s, x) * slope - data

        return field

    def data_divergence(self, path: ConditionalPath, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The divergence in `x` of the posterior mean of the data, of shape `(batch_size,)`."""
        return self._posterior(x, path.alpha(t), path.sigma(t))[2]

    def _modes(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Joint log-densities `(batch_size, modes)`; centred points and variances `(batch_size, modes, *shape)`."""
        x = x.unsqueeze(1)
        alpha, sigma = lift(alpha, x), lift(sigma, x)
        variance = alpha**2 * self.stds.square() + sigma**2
        centred = x - alpha * self.means
        log_modes = -(centred.square() / variance + torch.log(2 * math.pi * variance)).flatten(2).sum(2) / 2
        return log_modes + torch.log(self.weights), centred, variance

    def _posterior(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The posterior mean of the data, minus the score, and the divergence of the posterior mean."""
        log_modes, centred, variance = self._modes(x, alpha, sigma)
        shares = lift(torch.softmax(log_modes, 1), centred)
        slopes = centred / variance
        gain = lift(alpha, centred) * self.stds.square() / variance
        data = self.means + gain * centred
        slope = (shares * slopes).sum(1)
        divergence = (shares * (gain - data * (slopes - slope.unsqueeze(1)))).flatten(1).sum(1)
        return (shares * data).sum(1), slope, divergence


def draw_mixture(
    seed: int,
    shape: tuple[int, ...],
    modes: int = 4,
    narrowest: float = 0.1,
    widest: float = 0.5,
    dtype: torch.dtype = torch.float64,
) -> GaussianMixture:
    """
    A random mixture of zero mean and unit variance per coordinate: wide and narrow modes of unequal weight.

    Args:
        seed (`int`):
            The seed; equal seeds give equal mixtures.
        shape (`tuple[int, ...]`):
            The shape of one sample, images included.
        modes (`int`, *optional*, defaults to 4):
            How many modes.
        narrowest (`float`, *optional*, defaults to 0.1):
            The least standard deviation before scaling to unit variance.
        widest (`float`, *optional*, defaults to 0.5):
            The greatest.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            The precision.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(*size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64)

    weights = 0.5 + uniform(modes)
    means = torch.randn(modes, *shape, generator=generator, dtype=torch.float64)
    scales = narrowest * (widest / narrowest) ** uniform(modes, *[1] * len(shape))
    stds = scales * (0.8 + 0.4 * uniform(modes, *shape))
    return GaussianMixture(weights / weights.sum(), means, stds).standardized().to(dtype)


def gaussian(shape: tuple[int, ...], mean: float = 0.0, std: float = 1.0) -> GaussianMixture:
    """A single Gaussian, in float64."""
    full = torch.ones(1, *shape, dtype=torch.float64)
    return GaussianMixture(torch.ones(1, dtype=torch.float64), mean * full, std * full)


def ring_mixture(modes: int = 8, radius: float = 1.2, std: float | None = None) -> GaussianMixture:
    """
    Equal modes on a circle in the plane.

    If no `std` is given, the one that makes the covariance the identity: with eight modes, all moments below the
    eighth are then those of an isotropic density, and odd ones vanish.
    """
    std = math.sqrt(1 - radius**2 / 2) if std is None else std
    angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
    means = radius * torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(torch.full((modes,), 1 / modes, dtype=torch.float64), means, torch.full_like(means, std))


def cross_mixture(shape: tuple[int, ...], radius: float) -> GaussianMixture:
    """
    Equal modes at plus and minus `radius` on each axis, of the deviation that makes the covariance the identity.

    Odd moments vanish, so the moments differ from those of a standard normal from the fourth on.
    """
    dims = math.prod(shape)
    axes = radius * torch.eye(dims, dtype=torch.float64).reshape(dims, *shape)
    means = torch.cat([axes, -axes])
    stds = torch.full_like(means, math.sqrt(1 - radius**2 / dims))
    return GaussianMixture(torch.full((2 * dims,), 1 / (2 * dims), dtype=torch.float64), means, stds)


def flow_of_gaussian(
    problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor, t0: float, t1: float
) -> torch.Tensor:
    """Where the exact ODE takes `x` from `t0` to `t1` if the data is a single Gaussian: the map is linear."""
    start, end = (torch.full((len(x),), t, dtype=torch.float64) for t in (t0, t1))

    def moments(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha, sigma = lift(path.alpha(t), x), lift(path.sigma(t), x)
        return alpha * problem.means, (alpha**2 * problem.stds.square() + sigma**2).sqrt()

    (mean0, std0), (mean1, std1) = moments(start), moments(end)
    return mean1 + std1 / std0 * (x - mean0)
