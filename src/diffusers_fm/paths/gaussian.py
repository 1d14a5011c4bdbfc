# SPDX-License-Identifier: Apache-2.0
"""The paths themselves: optimal transport, diffusion with its betas in several forms, and trigonometric ones."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from .conditional import ConditionalPath


BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class OTPath(ConditionalPath):
    """
    The optimal transport path: `alpha = 1 - t`, `sigma = sigma_min + (1 - sigma_min) t` (equation 20).

    Args:
        sigma_min (`float`, *optional*, defaults to `0.0`):
            Standard deviation left at the data end, in [0, 1). Zero is the rectified flow of SD3 and Flux.
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        valid = _is_number(self.sigma_min) and 0 <= self.sigma_min < 1
        _require(valid, "sigma_min", self.sigma_min, "a number in [0, 1)")

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min + (1 - self.sigma_min) * t

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.ones_like(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, 1 - self.sigma_min)

    def target(
        self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, prediction_type: str = "flow_prediction"
    ) -> torch.Tensor:
        if prediction_type == "flow_prediction" and self.sigma_min == 0:
            # One velocity at all times: no coefficients to be computed, nor to be sent to a device.
            return (noise - data).to(data.dtype)
        return super().target(data, noise, t, prediction_type)

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        t = (ratio * (1 + self.sigma_min) - self.sigma_min) / (1 - self.sigma_min + ratio * self.sigma_min)
        return t.clamp(0, 1)


@dataclass(frozen=True)
class VPPath(ConditionalPath):
    """
    The variance-preserving diffusion path with linear beta: `alpha = exp(-T(t) / 2)` (equation 19).

    `T(t) = beta_min t + (beta_max - beta_min) t^2 / 2` and `sigma = sqrt(1 - alpha^2)`. The velocity is infinite at
    t = 0; conversions from it are not.

    Args:
        beta_min (`float`, *optional*, defaults to `0.1`):
            The rate at t = 0, above 0.
        beta_max (`float`, *optional*, defaults to `20.0`):
            The rate at t = 1, at least `beta_min`.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        _require(_is_number(self.beta_min) and self.beta_min > 0, "beta_min", self.beta_min, "a number above 0")
        valid = _is_number(self.beta_max) and self.beta_max >= self.beta_min
        _require(valid, "beta_max", self.beta_max, f"a number of at least beta_min = {self.beta_min}")

    def _integral(self, t: torch.Tensor) -> torch.Tensor:
        return t * (self.beta_min + (self.beta_max - self.beta_min) * t / 2)

    def _beta(self, t: torch.Tensor) -> torch.Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.exp(-self._integral(t) / 2)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(-torch.expm1(-self._integral(t)))

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -self._beta(t) * self.alpha(t) / 2

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_d_sigma(t) / self.sigma(t)

    def sigma_d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self._beta(t) * torch.exp(-self._integral(t)) / 2

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        # sigma / alpha = r / (1 - r) gives T = log(1 + (r / (1 - r))^2); t is the positive root of the quadratic T(t).
        # It is bounded by T(1), which is finite where the ratio rounds to one.
        slope = self.beta_max - self.beta_min
        integral = torch.log1p((ratio.clamp(0, 1) / (1 - ratio.clamp(0, 1))).square())
        integral = integral.clamp(max=self.beta_min + slope / 2)
        return (2 * integral / (self.beta_min + torch.sqrt(self.beta_min**2 + 2 * slope * integral))).clamp(0, 1)


@dataclass(frozen=True)
class VEPath(ConditionalPath):
    """
    The variance-exploding diffusion path: `alpha = 1`, `sigma = sigma_min (sigma_max / sigma_min)^t` (equation 16).

    Its points grow to `sigma_max`, so networks are given `x_t / sqrt(1 + sigma^2)` (`input_scale`).

    Args:
        sigma_min (`float`, *optional*, defaults to `0.01`):
            Noise at the data end, above 0.
        sigma_max (`float`, *optional*, defaults to `50.0`):
            Noise at the noise end, above `sigma_min`.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        _require(_is_number(self.sigma_min) and self.sigma_min > 0, "sigma_min", self.sigma_min, "a number above 0")
        valid = _is_number(self.sigma_max) and self.sigma_max > self.sigma_min
        _require(valid, "sigma_max", self.sigma_max, f"a number above sigma_min = {self.sigma_min}")

    @property
    def _log_range(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self.sigma_min * torch.exp(self._log_range * t)

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return self._log_range * self.sigma(t)

    def input_scale(self, t: torch.Tensor) -> torch.Tensor:
        return torch.rsqrt(1 + self.sigma(t).square())

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        ratio = ratio.clamp(self.ratio_min, self.ratio_max)
        return (torch.log(ratio / (1 - ratio) / self.sigma_min) / self._log_range).clamp(0, 1)


@dataclass(frozen=True)
class LevelPath(ConditionalPath):
    """Time as the level of noise: `alpha = 1`, `sigma = t` for any `t` of at least 0 (arXiv 2206.00364, table 1)."""

    ratio_max = 1.0  # type: ignore[assignment]

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(t)

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        return ratio / (1 - ratio)


@dataclass(frozen=True)
class CosinePath(ConditionalPath):
    """The trigonometric path: `alpha = cos(pi t / 2)`, `sigma = sin(pi t / 2)` (SiT's GVP, arXiv 2401.08740)."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        # The sine of the complement is exactly 0 at t = 1 in every dtype; the cosine is not.
        return torch.sin(math.pi / 2 * (1 - t))

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(math.pi / 2 * t)

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        return -math.pi / 2 * self.sigma(t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        return math.pi / 2 * self.alpha(t)

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        return (torch.atan2(ratio, 1 - ratio) * (2 / math.pi)).clamp(0, 1)


@dataclass(frozen=True)
class DiscreteVPPath(ConditionalPath):
    """
    The path of a diffusion checkpoint, from its own betas (DDPM, arXiv 2006.11239), at continuous times.

    Knot i of `num_train_timesteps` lies at `t = i / (num_train_timesteps - 1)` and has `alpha^2` = the cumulated
    product of `1 - beta`. Between knots the angle `atan2(sigma, alpha)` is linear, which keeps `alpha^2 + sigma^2 = 1`
    and is finite for zero terminal SNR too, where the log-SNR is not.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            Number of knots, at least 2.
        beta_start (`float`, *optional*, defaults to 0.0001):
            The first beta, in (0, 1).
        beta_end (`float`, *optional*, defaults to 0.02):
            The last beta, in (0, 1).
        beta_schedule (`str`, *optional*, defaults to `"linear"`):
            `linear`, `scaled_linear` (Stable Diffusion), `squaredcos_cap_v2` (arXiv 2102.09672) or `sigmoid`.
        trained_betas (`list[float]`, *optional*):
            The betas themselves, in place of a schedule.
        rescale_betas_zero_snr (`bool`, *optional*, defaults to `False`):
            Rescale to pure noise at t = 1 (arXiv 2305.08891, algorithm 1).
        snr_shift_scale (`float`, *optional*, defaults to 1.0):
            The signal-to-noise ratio is divided by this, above 0 (CogVideoX, arXiv 2408.06072).
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 1.0

    def __post_init__(self) -> None:
        valid = isinstance(self.num_train_timesteps, int) and self.num_train_timesteps >= 2
        _require(valid, "num_train_timesteps", self.num_train_timesteps, "an integer of at least 2")
        _require(
            self.beta_schedule in BETA_SCHEDULES, "beta_schedule", self.beta_schedule, f"one of {list(BETA_SCHEDULES)}"
        )
        for name in ("beta_start", "beta_end"):
            beta = getattr(self, name)
            _require(_is_number(beta) and 0 < beta < 1, name, beta, "a number in (0, 1)")
        scale = self.snr_shift_scale
        _require(_is_number(scale) and scale > 0, "snr_shift_scale", scale, "a number above 0")
        zero_snr = self.rescale_betas_zero_snr
        _require(isinstance(zero_snr, bool), "rescale_betas_zero_snr", zero_snr, "True or False")
        if self.trained_betas is not None:
            accepted = f"{self.num_train_timesteps} numbers in (0, 1), one for each train timestep"
            listed = isinstance(self.trained_betas, Iterable) and not isinstance(self.trained_betas, str)
            _require(listed, "trained_betas", self.trained_betas, accepted)
            betas = tuple(float(beta) for beta in self.trained_betas)
            _require(len(betas) == self.num_train_timesteps, "trained_betas", f"{len(betas)} numbers", accepted)
            outside = [beta for beta in betas if not 0 < beta < 1]
            _require(not outside, "trained_betas", outside[:3], accepted)
            object.__setattr__(self, "trained_betas", betas)

    @cached_property
    def betas(self) -> torch.Tensor:
        """The betas of the forward chain, `(num_train_timesteps,)` in float64, before any rescaling."""
        n, start, end = self.num_train_timesteps, self.beta_start, self.beta_end
        if self.trained_betas is not None:
            return torch.tensor(self.trained_betas, dtype=torch.float64)
        if self.beta_schedule == "linear":
            return torch.linspace(start, end, n, dtype=torch.float64)
        if self.beta_schedule == "scaled_linear":
            return torch.linspace(math.sqrt(start), math.sqrt(end), n, dtype=torch.float64).square()
        if self.beta_schedule == "sigmoid":
            return torch.sigmoid(torch.linspace(-6, 6, n, dtype=torch.float64)) * (end - start) + start
        edges = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        alpha_bar = torch.cos((edges + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)

    @cached_property
    def _angles(self) -> torch.Tensor:
        """`atan2(alpha, sigma)` at the knots, from nearly pi/2 (data) down to 0 if the last knot is pure noise."""
        log_alpha_bar = torch.cumsum(torch.log1p(-self.betas), 0)
        alpha, sigma = torch.exp(log_alpha_bar / 2), torch.sqrt(-self.snr_shift_scale * torch.expm1(log_alpha_bar))
        alpha, sigma = alpha / torch.hypot(alpha, sigma), sigma / torch.hypot(alpha, sigma)
        if self.rescale_betas_zero_snr:
            alpha = alpha[0] * (alpha - alpha[-1]) / (alpha[0] - alpha[-1])
            sigma = torch.sqrt((1 - alpha) * (1 + alpha))
        return torch.atan2(alpha, sigma)

    def _angle(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = self._angles.to(device=t.device, dtype=t.dtype)
        position = t * (self.num_train_timesteps - 1)
        knot = position.detach().floor().clamp(0, self.num_train_timesteps - 2).long()
        slope = angles[knot + 1] - angles[knot]
        # From the nearer knot, so that both ends of the table are met exactly.
        angle = torch.where(
            position - knot < 0.5,
            angles[knot] + (position - knot) * slope,
            angles[knot + 1] + (position - knot - 1) * slope,
        )
        return angle, slope * (self.num_train_timesteps - 1)

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sin(self._angle(t)[0])

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.cos(self._angle(t)[0])

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        angle, rate = self._angle(t)
        return torch.cos(angle) * rate

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        angle, rate = self._angle(t)
        return -torch.sin(angle) * rate

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        rising = -self._angles.to(device=ratio.device, dtype=ratio.dtype)
        angle = -torch.atan2(1 - ratio, ratio)
        knot = torch.searchsorted(rising, angle.contiguous()).clamp(1, self.num_train_timesteps - 1)
        fraction = (angle - rising[knot - 1]) / (rising[knot] - rising[knot - 1])
        return ((knot - 1 + fraction) / (self.num_train_timesteps - 1)).clamp(0, 1)
