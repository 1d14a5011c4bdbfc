# SPDX-License-Identifier: Apache-2.0
"""Solvers of ordinary differential equations: tableaux as data, fixed steps, Adams multistep and adaptive Runge-Kutta."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Field = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A field `field(t, x)`: `t` of shape `(batch_size,)`, `x` and the derivative it returns of shape `(batch_size, ...)`."""


@dataclass(frozen=True)
class ButcherTableau:
    """
    An explicit Runge-Kutta method as a table of numbers.

    Stage `i` is evaluated at `t + c[i] * h` and `x + h * sum_j a[i][j] * k_j`; the step is `x + h * sum_i b[i] * k_i`
    (Hairer, Norsett, Wanner: Solving Ordinary Differential Equations I, section II.1).

    Args:
        name (`str`):
            The name of the method.
        order (`int`):
            The order of convergence of the step.
        a (`tuple[tuple[float, ...], ...]`):
            The weights of the earlier stages; row `i` has `i` entries.
        b (`tuple[float, ...]`):
            The weights of the step.
        c (`tuple[float, ...]`):
            The times of the stages, as parts of the step.
        b_error (`tuple[float, ...]`, *optional*):
            `b` minus the weights of an embedded method of order `order - 1`: with it, `h * sum_i b_error[i] * k_i`
            estimates the error of a step, which adaptive integration needs.

    Raises:
        ValueError: If the numbers do not make an explicit, consistent method.
    """

    name: str
    order: int
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    b_error: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        stages = len(self.b)
        if stages == 0 or self.order < 1:
            raise ValueError(f"Tableau {self.name!r} needs an order and a number of stages of at least 1.")
        if len(self.a) != stages or len(self.c) != stages:
            raise ValueError(
                f"Tableau {self.name!r} has {stages} weights `b`, but {len(self.a)} rows `a` and {len(self.c)} times `c`."
            )
        for i, (row, time) in enumerate(zip(self.a, self.c)):
            if len(row) != i:
                raise ValueError(f"Row {i} of `a` in tableau {self.name!r} must have {i} entries, not {len(row)}.")
            if not math.isclose(sum(row), time, rel_tol=0.0, abs_tol=1e-12):
                raise ValueError(f"Row {i} of `a` in tableau {self.name!r} sums to {sum(row)}, not to c = {time}.")
            if not 0.0 <= time <= 1.0:
                raise ValueError(f"Stage {i} of tableau {self.name!r} lies outside the step, at c = {time}.")
        if not math.isclose(sum(self.b), 1.0, rel_tol=0.0, abs_tol=1e-12):
            raise ValueError(f"The weights `b` of tableau {self.name!r} sum to {sum(self.b)}, not to 1.")
        if self.b_error is not None:
            if len(self.b_error) != stages:
                raise ValueError(f"Tableau {self.name!r} has {stages} stages, but {len(self.b_error)} `b_error`.")
            if not math.isclose(sum(self.b_error), 0.0, rel_tol=0.0, abs_tol=1e-12):
                raise ValueError(f"The weights `b_error` of tableau {self.name!r} sum to {sum(self.b_error)}, not to 0.")

    @property
    def stages(self) -> int:
        """The number of evaluations in a step."""
        return len(self.b)

    @property
    def first_same_as_last(self) -> bool:
        """Whether the last stage is the first one of the next step, and so costs nothing in a sequence of steps."""
        return self.stages > 1 and self.b[-1] == 0.0 and self.a[-1] == self.b[:-1]

    def without_error_estimate(self) -> "ButcherTableau":
        """
        The same step for fixed step sizes.

        Returns:
            `ButcherTableau`: The method without `b_error` and without the last stages that served only the estimate.
        """
        stages = max(i for i, weight in enumerate(self.b) if weight != 0.0) + 1
        return ButcherTableau(self.name, self.order, self.a[:stages], self.b[:stages], self.c[:stages])


TABLEAUX: dict[str, ButcherTableau] = {
    "euler": ButcherTableau("euler", order=1, a=((),), b=(1.0,), c=(0.0,)),
    "midpoint": ButcherTableau("midpoint", order=2, a=((), (1 / 2,)), b=(0.0, 1.0), c=(0.0, 1 / 2)),
    "heun": ButcherTableau("heun", order=2, a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0)),
    "rk4": ButcherTableau(
        "rk4",
        order=4,
        a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        c=(0.0, 1 / 2, 1 / 2, 1.0),
    ),
    # Bogacki and Shampine, A 3(2) pair of Runge-Kutta formulas, 1989.
    "bosh3": ButcherTableau(
        "bosh3",
        order=3,
        a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        b=(2 / 9, 1 / 3, 4 / 9, 0.0),
        c=(0.0, 1 / 2, 3 / 4, 1.0),
        b_error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
    ),
    # Dormand and Prince, A family of embedded Runge-Kutta formulae, 1980: the 5(4) pair.
    "dopri5": ButcherTableau(
        "dopri5",
        order=5,
        a=(
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        b_error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    ),
}
"""The Runge-Kutta methods by name."""
