# SPDX-License-Identifier: Apache-2.0
"""The conditional path: samples, velocities, and conversions between the quantities that a network may predict."""

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch


PREDICTION_TYPES = ("flow_prediction", "epsilon", "sample", "v_prediction", "score")


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
    """Raise a `ValueError` at the first time without a limit of a quantity, named by `what % names`."""
    if bool(without_limit.any()):
        what = what % names
        t, without_limit = torch.broadcast_tensors(t, without_limit)
        raise ValueError(f"{what} has no limit at t = {t[without_limit].flatten()[0].item():g}; keep t away from it.")


def _require_known(prediction_type: str) -> None:
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {list(PREDICTION_TYPES)}, got {prediction_type!r}.")


class ConditionalPath:
    """
    A Gaussian conditional path `x_t = alpha(t) * data + sigma(t) * noise` (arXiv 2210.02747, equation 10).

    A subclass gives `alpha` and `sigma` as torch functions of `t` that act elementwise; the ratio
    `sigma / (alpha + sigma)` must rise with `t`. Derivatives default to automatic ones; closed forms may replace them.

    `t` is a tensor of shape `(batch_size,)` or `()`, 0 = data and 1 = noise. It may stay on the CPU in float64 while
    the data lives elsewhere: coefficients are computed where `t` is and cast once. Data has any shape `(batch_size,
    ...)`.
    """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

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
        """Factor of `x_t` before the network sees it, elementwise: 1, except on paths that grow (VE)."""
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
        self,
        t: torch.Tensor,
        source: str,
        target: str | tuple[torch.Tensor, torch.Tensor],
        check: bool = True,
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
            check (`bool`, *optional*, defaults to `True`):
                Whether to look for times without a limit, for which an accelerator is waited for.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `on_sample` and `on_output`, of the shape of `t`.

        Raises:
            ValueError: As for `convert`.
        """
        on_sample, on_output, undetermined = self._solve(t, source, target)
        if check:
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
