# SPDX-License-Identifier: Apache-2.0
"""
Gaussian conditional probability paths (Lipman et al., arXiv 2210.02747, section 4), in one time direction.

Every path is `x_t = alpha(t) * data + sigma(t) * noise` with `t` in [0, 1], 0 = data and 1 = noise (the paper's time
is `1 - t`). A path that gives `alpha` and `sigma` has everything else: derivatives, samples, velocities, conversions
between the quantities a network may predict, and the straight coordinates in which each path becomes the optimal
transport one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch


PREDICTION_TYPES = ("flow_prediction", "epsilon", "sample", "v_prediction", "score")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def lift(coefficient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """
    Give per-sample coefficients the device and rank of a batch, in at least float32.

    Args:
        coefficient (`torch.Tensor` of shape `(batch_size,)` or `()`):
            Any leading part of the shape of `like`.
        like (`torch.Tensor` of shape `(batch_size, ...)`):
            The batch that will be multiplied.

    Returns:
        `torch.Tensor`: The coefficients with trailing dimensions of size one.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    shape = coefficient.shape + (1,) * (like.ndim - coefficient.ndim)
    return coefficient.to(device=like.device, dtype=dtype).reshape(shape)


def _derivative(function: Callable[[torch.Tensor], torch.Tensor], t: torch.Tensor) -> torch.Tensor:
    t = t.contiguous()
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]


def refuse_without_limit(without_limit: torch.Tensor, t: torch.Tensor, what: str, *names: Any) -> None:
    """
    Raise a `ValueError` that names the first time at which a quantity has no limit.

    Args:
        without_limit (`torch.BoolTensor`):
            Where that is so.
        t (`torch.Tensor`):
            The times, of a shape that broadcasts with it.
        what (`str`):
            The quantity, with a `%s` or `%r` for each of `names`.
    """
    if bool(without_limit.any()):
        what = what % names
        t, without_limit = torch.broadcast_tensors(t, without_limit)
        raise ValueError(f"{what} has no limit at t = {t[without_limit].flatten()[0].item():g}; keep t away from it.")


def _require(condition: bool, name: str, value: Any, accepted: str) -> None:
    if not condition:
        raise ValueError(f"`{name}` must be {accepted}, got {value!r}.")


def _require_known(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {list(PREDICTION_TYPES)}, got {prediction_type!r}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class ConditionalPath:
    """
    A Gaussian conditional path `x_t = alpha(t) * data + sigma(t) * noise` (arXiv 2210.02747, equation 10).

    A subclass gives `alpha` and `sigma` as torch functions of `t` that act elementwise; the ratio
    `sigma / (alpha + sigma)` must rise with `t`. Derivatives default to automatic ones; closed forms may replace them.

    `t` is a tensor of shape `(batch_size,)` or `()`, 0 = data and 1 = noise. It may stay on the CPU in float64 while
    the data lives elsewhere: coefficients are computed where `t` is and cast once. Data has any shape `(batch_size,
    ...)`.
    """

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The scale of the data at `t`, elementwise."""
        raise NotImplementedError

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The standard deviation of the noise at `t`, elementwise."""
        raise NotImplementedError

    def d_alpha(self, t: torch.Tensor) -> torch.Tensor:
        """The derivative of `alpha` in `t`, elementwise."""
        return _derivative(self.alpha, t)

    def d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """The derivative of `sigma` in `t`, elementwise; infinite where it has no limit (VP at t = 0)."""
        return _derivative(self.sigma, t)

    def sigma_d_sigma(self, t: torch.Tensor) -> torch.Tensor:
        """`sigma * d_sigma`, elementwise: half the rate of the variance, finite also where `d_sigma` is not."""
        rate = self.sigma(t) * self.d_sigma(t)
        if bool(rate.isnan().any()):
            # 0 * infinity: the variance is smooth where its root is not, so a time beside this one will do.
            beside = t + torch.where(t < 0.5, 1.0, -1.0).to(t) * torch.finfo(t.dtype).eps
            rate = torch.where(rate.isnan(), self.sigma(beside) * self.d_sigma(beside), rate)
        return rate

    def input_scale(self, t: torch.Tensor) -> torch.Tensor:
        """What `x_t` is multiplied by before the network sees it, elementwise: 1, save on paths that grow (VE)."""
        return torch.ones_like(t)

    # The straight coordinates: x / (alpha + sigma) at ratio sigma / (alpha + sigma) lies on the OT path.

    def ratio(self, t: torch.Tensor) -> torch.Tensor:
        """The time of the straight coordinates, `sigma / (alpha + sigma)` in [0, 1], elementwise."""
        sigma = self.sigma(t)
        return sigma / (self.alpha(t) + sigma)

    def time_at(self, ratio: torch.Tensor) -> torch.Tensor:
        """
        The inverse of `ratio`, elementwise. Ratios outside `[ratio_min, ratio_max]` give the nearer end.

        A path without a closed form is inverted by bisection to the last bit of `ratio`'s dtype.

        Args:
            ratio (`torch.Tensor`):
                Any shape.

        Returns:
            `torch.Tensor`: `t` in [0, 1], of the shape of `ratio`.
        """
        low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
        for _ in range(64):
            middle = (low + high) / 2
            below = self.ratio(middle) < ratio
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return torch.where(ratio <= self.ratio_min, torch.zeros_like(high), high)

    @cached_property
    def ratio_min(self) -> float:
        """`ratio(0)`: zero if the path ends in clean data."""
        return self.ratio(torch.zeros((), dtype=torch.float64)).item()

    @cached_property
    def ratio_max(self) -> float:
        """`ratio(1)`: one if the path begins in pure noise."""
        return self.ratio(torch.ones((), dtype=torch.float64)).item()

    @cached_property
    def prior_std(self) -> float:
        """The standard deviation of `x_1` for data of unit variance; sampling starts from noise of this scale."""
        one = torch.ones((), dtype=torch.float64)
        return math.hypot(self.alpha(one).item(), self.sigma(one).item())

    def to_straight(self, x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Map a point of this path to the straight (OT) path.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                A point at `t`.
            t (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Time, 0 = data, 1 = noise.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The point `(1 - s) * data + s * noise` and its time `s`.
        """
        scale = self.alpha(t) + self.sigma(t)
        return (x_t / lift(scale, x_t)).to(x_t.dtype), self.sigma(t) / scale

    def from_straight(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Map a point of the straight (OT) path to this path; the inverse of `to_straight`.

        Args:
            x (`torch.Tensor` of shape `(batch_size, ...)`):
                A point `(1 - s) * data + s * noise`.
            s (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Its time, in `[ratio_min, ratio_max]`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The point of this path and its time `t`.
        """
        t = self.time_at(s)
        return (x * lift(self.alpha(t) + self.sigma(t), x)).to(x.dtype), t

    # Samples and targets

    def sample(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """
        `x_t = alpha(t) * data + sigma(t) * noise` (arXiv 2210.02747, equation 11).

        Args:
            data (`torch.Tensor` of shape `(batch_size, ...)`):
                Clean samples.
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            t (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Time, 0 = data, 1 = noise.

        Returns:
            `torch.Tensor`: `x_t`, in the dtype of `data`.

        Raises:
            ValueError: If the data is not of floating point.
        """
        if not data.is_floating_point():
            raise ValueError(f"`data` must be of floating point, got {data.dtype}.")
        return self._combine(self.alpha(t), data, self.sigma(t), noise)

    def velocity(self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """
        `dx_t/dt = d_alpha(t) * data + d_sigma(t) * noise`, the conditional velocity (arXiv 2210.02747, theorem 3).

        The paper's time runs the other way, so its u_t is minus this one. On OT it is `noise - data`.

        Args:
            data (`torch.Tensor` of shape `(batch_size, ...)`):
                Clean samples.
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            t (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Time, 0 = data, 1 = noise.

        Returns:
            `torch.Tensor`: The velocity, in the dtype of `data`.

        Raises:
            ValueError: Where the velocity has no limit (VP at t = 0).
        """
        return self.target(data, noise, t, "flow_prediction")

    def target(
        self, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, prediction_type: str = "flow_prediction"
    ) -> torch.Tensor:
        """
        What a network of this `prediction_type` should answer at `x_t`.

        Args:
            data (`torch.Tensor` of shape `(batch_size, ...)`):
                Clean samples.
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            t (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Time, 0 = data, 1 = noise.
            prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
                One of `PREDICTION_TYPES`: `flow_prediction` (the velocity), `epsilon` (the noise), `sample` (the
                data), `v_prediction` (`(alpha * noise - sigma * data) / sqrt(alpha^2 + sigma^2)`, arXiv 2202.00512)
                and `score` (the gradient of the conditional log-density, `-noise / sigma`).

        Returns:
            `torch.Tensor`: The target, in the dtype of `data`.

        Raises:
            ValueError: If the prediction type is unknown, or has no limit at one of the times.
        """
        p, q = self._row(prediction_type, t)
        refuse_without_limit(~torch.isfinite(q), t, "The %r of %s", prediction_type, self)
        return self._combine(p, data, q, noise)

    def convert(
        self, model_output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, source: str, target: str
    ) -> torch.Tensor:
        """
        Turn a prediction of one type into another at the same `x_t`.

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, ...)`):
                A prediction of type `source`.
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                Where it was made.
            t (`torch.Tensor` of shape `(batch_size,)` or `()`):
                When, 0 = data, 1 = noise.
            source (`str`):
                One of `PREDICTION_TYPES`.
            target (`str`):
                One of `PREDICTION_TYPES`.

        Returns:
            `torch.Tensor`: The prediction of type `target`, in the dtype of `model_output`.

        Raises:
            ValueError: If a type is unknown, or `source` does not determine `target` at one of the times (the noise
                does not determine the data at t = 1 on OT).
        """
        on_sample, on_output = self.coefficients(t, source, target)
        return self._combine(on_output, model_output, on_sample, x_t)

    def coefficients(
        self, t: torch.Tensor, source: str, target: str | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The two numbers per time that convert predictions: `target = on_sample * x_t + on_output * source`.

        A prediction is a row `p * data + q * noise`; with `x_t = alpha * data + sigma * noise` it makes a 2x2 system,
        so one formula serves every path and every pair of types. Where a rate is infinite (VP's velocity and every
        path's score at sigma = 0), rows are multiplied by sigma, which leaves the finite limits.

        Args:
            t (`torch.Tensor`):
                Time, any shape, 0 = data, 1 = noise.
            source (`str`):
                One of `PREDICTION_TYPES`.
            target (`str` or `tuple[torch.Tensor, torch.Tensor]`):
                One of `PREDICTION_TYPES`, or `p` and `q` themselves, finite and of the shape of `t`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `on_sample` and `on_output`, of the shape of `t`.

        Raises:
            ValueError: As for `convert`.
        """
        on_sample, on_output, undetermined = self._solve(t, source, target)
        name = repr(target) if isinstance(target, str) else "derivative"
        refuse_without_limit(undetermined, t, "The %s that a %r implies on %s", name, source, self)
        return on_sample, on_output

    def determines(
        self, t: torch.Tensor, source: str, target: str | tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """
        Whether a prediction of type `source` determines a finite `target`: the check of `coefficients`.

        Args:
            t (`torch.Tensor`):
                Time, any shape, 0 = data, 1 = noise.
            source (`str`):
                One of `PREDICTION_TYPES`.
            target (`str` or `tuple[torch.Tensor, torch.Tensor]`):
                As for `coefficients`.

        Returns:
            `torch.BoolTensor`: Of the shape of `t`.
        """
        return ~self._solve(t, source, target)[2]

    def error_scale(self, t: torch.Tensor, source: str, target: str) -> torch.Tensor:
        """
        How an error of one prediction shows in another: `|target error| = error_scale * |source error|`.

        Args:
            t (`torch.Tensor`):
                Time, any shape, 0 = data, 1 = noise.
            source (`str`):
                One of `PREDICTION_TYPES`.
            target (`str`):
                One of `PREDICTION_TYPES`.

        Returns:
            `torch.Tensor`: The factor, of the shape of `t`.

        Raises:
            ValueError: As for `convert`.
        """
        return self.coefficients(t, source, target)[1].abs()

    def _solve(
        self, t: torch.Tensor, source: str, target: str | tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The coefficients of a conversion, and where it has none."""
        if source == target:
            _require_known(source)
            return torch.zeros_like(t), torch.ones_like(t), torch.zeros_like(t, dtype=torch.bool)
        p1, q1 = self._row(source, t)
        p2, q2 = target if isinstance(target, tuple) else self._row(target, t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        by_sigma = ~(torch.isfinite(q1) & torch.isfinite(q2))
        q1 = torch.where(by_sigma, self._sigma_times(source, q1, t), q1)
        q2 = torch.where(by_sigma, self._sigma_times(target, q2, t), q2)
        sigma = torch.where(by_sigma, sigma.square(), sigma)
        determinant = alpha * q1 - sigma * p1
        across = p2 * q1 - p1 * q2
        # Multiples of each other need no x_t: epsilon and score where alpha is 0.
        multiple = (determinant == 0) & (across == 0)
        on_sample = torch.where(multiple, torch.zeros_like(across), across / determinant)
        on_output = torch.where(multiple, q2 / q1, (alpha * q2 - sigma * p2) / determinant)
        return on_sample, on_output, ~(torch.isfinite(on_sample) & torch.isfinite(on_output))

    def _row(self, prediction_type: str, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`p` and `q` of the prediction `p * data + q * noise`; only `q` may be infinite."""
        _require_known(prediction_type)
        if prediction_type == "flow_prediction":
            return self.d_alpha(t), self.d_sigma(t)
        if prediction_type == "epsilon":
            return torch.zeros_like(t), torch.ones_like(t)
        if prediction_type == "sample":
            return torch.ones_like(t), torch.zeros_like(t)
        if prediction_type == "score":
            return torch.zeros_like(t), -1 / self.sigma(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        norm = torch.hypot(alpha, sigma)
        return -sigma / norm, alpha / norm

    def _sigma_times(
        self, prediction_type: str | tuple[torch.Tensor, torch.Tensor], q: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """`sigma * q`, which is finite also where `q` is not."""
        if prediction_type == "flow_prediction":
            return self.sigma_d_sigma(t)
        return -torch.ones_like(t) if prediction_type == "score" else self.sigma(t) * q

    @staticmethod
    def _combine(a: torch.Tensor, x: torch.Tensor, b: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (lift(a, x) * x + lift(b, y) * y).to(x.dtype)


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

    ratio_max = 1.0

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


PATHS: dict[str, type[ConditionalPath]] = {
    "ot": OTPath,
    "vp": VPPath,
    "ve": VEPath,
    "cosine": CosinePath,
    "vp_discrete": DiscreteVPPath,
}


def make_path(name: str, **path_kwargs: Any) -> ConditionalPath:
    """
    Build a path by its name in `scheduler_config.json`.

    Args:
        name (`str`):
            One of `PATHS`: `ot`, `vp`, `ve`, `cosine`, `vp_discrete`.
        path_kwargs: The parameters of that path's class.

    Returns:
        `ConditionalPath`: The path.

    Raises:
        ValueError: If the name or a parameter is unknown or out of range.
    """
    if not isinstance(name, str) or name not in PATHS:
        raise ValueError(f"`path` must be one of {list(PATHS)}, got {name!r}.")
    accepted = [field.name for field in fields(PATHS[name])]  # type: ignore[arg-type]
    unknown = sorted(set(path_kwargs) - set(accepted))
    if unknown:
        raise ValueError(f"`path_kwargs` of the {name!r} path may hold {accepted}, got {unknown}.")
    return PATHS[name](**path_kwargs)
