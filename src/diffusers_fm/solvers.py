# SPDX-License-Identifier: Apache-2.0
"""Solvers of ordinary differential equations: tableaux as data, fixed steps, Adams multistep, adaptive Runge-Kutta."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from .precision import read_numbers, to_float64


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
                f"Tableau {self.name!r} has {stages} weights `b`, but {len(self.a)} rows `a` and {len(self.c)} `c`."
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
                raise ValueError(
                    f"The weights `b_error` of tableau {self.name!r} sum to {sum(self.b_error)}, not to 0."
                )

    @property
    def stages(self) -> int:
        """The number of evaluations in a step."""
        return len(self.b)

    @property
    def first_same_as_last(self) -> bool:
        """True if the last stage is the first one of the next step, and so costs nothing in a sequence of steps."""
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

ADAMS: dict[str, tuple[int, bool]] = {"ab2": (2, False), "ab3": (3, False), "abm2": (2, True), "abm3": (3, True)}
"""Adams methods by name: the order, and whether a Moulton corrector follows the Bashforth predictor."""

STEP_CONTROLS = ("batch", "per_sample")


@dataclass(frozen=True)
class Solution:
    """
    What [`odeint`] returns.

    Args:
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            The state at `t1`.
        nfe (`int`):
            How often the field was called.
        evaluations (`torch.LongTensor` of shape `(batch_size,)`):
            In how many of these calls each sample took part: fewer than `nfe` where samples finish early.
        accepted, rejected (`torch.LongTensor` of shape `(batch_size,)`):
            The steps that each sample made, and those that were tried and thrown away.
        times, trajectory (`torch.Tensor` of shapes `(num_points,)` and `(num_points, batch_size, ...)`, *optional*):
            The times of the steps, both ends included, and the states there, if they were asked for.
    """

    x: torch.Tensor
    nfe: int
    evaluations: torch.Tensor
    accepted: torch.Tensor
    rejected: torch.Tensor
    times: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None


def adams_weights(times: Sequence[float], start: float, end: float) -> list[float]:
    """
    Weights of the values at `times` in the integral from `start` to `end` of the polynomial through them.

    With the newest times of a solver and the next interval, these are the variable-step Adams-Bashforth weights; with
    the end of the interval among `times`, the Adams-Moulton ones (Hairer, Norsett, Wanner I, section III.5).

    Args:
        times (`Sequence[float]`):
            Different times, in any order.
        start (`float`):
            Where the integral begins.
        end (`float`):
            Where it ends.

    Returns:
        `list[float]`: One weight for each time; they sum to `end - start`.
    """
    # In units of the interval, so that short steps lose no digits.
    nodes = [(time - start) / (end - start) for time in times]
    weights = []
    for i, node in enumerate(nodes):
        polynomial = [1.0]
        for j, other in enumerate(nodes):
            if j != i:
                raised = [0.0, *polynomial]
                lowered = [*(other * coefficient for coefficient in polynomial), 0.0]
                polynomial = [(high - low) / (node - other) for high, low in zip(raised, lowered)]
        weights.append((end - start) * sum(value / (power + 1) for power, value in enumerate(polynomial)))
    return weights


def quadrature_weights(times: Sequence[float], points: int = 6) -> list[float]:
    """
    Weights of the values at `times` in the integral from the first time to the last.

    In each interval the integrand is the polynomial through the `points` nearest times, so the error falls with the
    power `points` of the spacing.

    Args:
        times (`Sequence[float]`):
            At least two times, rising or falling.
        points (`int`, *optional*, defaults to 6):
            How many times a polynomial runs through; all of them if there are fewer.

    Returns:
        `list[float]`: One weight for each time.
    """
    points = min(points, len(times))
    weights = [0.0] * len(times)
    for i in range(len(times) - 1):
        first = min(max(i + 1 - points // 2, 0), len(times) - points)
        nearest = range(first, first + points)
        for j, weight in zip(nearest, adams_weights([times[j] for j in nearest], times[i], times[i + 1])):
            weights[j] += weight
    return weights


def graded_grid(start: float, end: float, num_steps: int, grading: float = 1.0) -> list[float]:
    """
    Times from `start` to `end` that lie closer together towards zero.

    Args:
        start (`float`):
            The first time, not negative.
        end (`float`):
            The last time, not negative.
        num_steps (`int`):
            The number of steps.
        grading (`float`, *optional*, defaults to 1.0):
            Equal spaces are raised to this power; one gives the uniform grid.

    Returns:
        `list[float]`: `num_steps + 1` times.

    Raises:
        ValueError: If a number is out of range.
    """
    if not (start >= 0.0 and end >= 0.0 and num_steps >= 1 and grading > 0.0):
        raise ValueError(
            f"A graded grid needs times of at least 0, at least one step and a grading above 0, not start {start}, "
            f"end {end}, {num_steps} steps and grading {grading}."
        )
    roots = torch.linspace(start ** (1 / grading), end ** (1 / grading), num_steps + 1, dtype=torch.float64)
    return [start, *roots.pow(grading)[1:-1].tolist(), end]


def odeint(
    field: Callable[..., torch.Tensor],
    x: torch.Tensor,
    t0: float,
    t1: float,
    *,
    method: str | ButcherTableau = "dopri5",
    num_steps: int | None = None,
    grid: Sequence[float] | torch.Tensor | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    step_control: str | None = None,
    first_step: float | None = None,
    max_steps: int | None = None,
    norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    args: Sequence[torch.Tensor] = (),
    return_trajectory: bool = False,
) -> Solution:
    """
    Integrates `dx/dt = field(t, x)` from `t0` to `t1`, which may lie before `t0`.

    With `num_steps` or `grid` the steps are fixed; without, they adapt to `rtol` and `atol`. The field is never called
    outside the interval. Gradients flow through the solution: call it under `torch.no_grad()` where none is wanted.

    Args:
        field (`Callable`):
            `field(t, x, *args)` with `t` of shape `(batch_size,)`, on the device of `x`, in float64 if `x` is and in
            float32 otherwise. Returns the derivative, of the shape of `x`.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            The state at `t0`. Half precision is integrated, and given to the field, in float32.
        t0, t1 (`float`):
            The first and the last time.
        method (`str` or `ButcherTableau`, *optional*, defaults to `"dopri5"`):
            A Runge-Kutta method of `TABLEAUX`, or one's own; with fixed steps also an Adams method: `"ab2"`, `"ab3"`
            (Bashforth) and `"abm2"`, `"abm3"` (Bashforth predictor and Moulton corrector with one call a step; the
            last step is the predictor's). Adaptive steps need a method with an error estimate: `"dopri5"`, `"bosh3"`.
        num_steps (`int`, *optional*): The number of equal steps.
        grid (`Sequence[float]` or `torch.Tensor` of shape `(num_steps + 1,)`, *optional*):
            The times of the steps, from `t0` to `t1`.
        rtol, atol (`float`, *optional*, defaults to `1e-5`):
            Adaptive steps: the tolerated error of a step, relative to the state and absolute.
        step_control (`str`, *optional*, defaults to `"batch"`):
            Adaptive steps: `"batch"` for one step size, `"per_sample"` for one per sample, which makes the result of a
            sample independent of the others; samples that have arrived leave the calls of the field.
        first_step (`float`, *optional*):
            Adaptive steps: the size of the first step. Chosen by an extra call of the field if not given.
        max_steps (`int`, *optional*, defaults to `1000`):
            Adaptive steps: how many steps may be tried.
        norm (`Callable`, *optional*):
            Adaptive steps: maps the error over its tolerance, `(batch_size, ...)`, to its size `(batch_size,)`.
            The root mean square if not given.
        args (`Sequence[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors with one row per sample that the field is given too; they lose the rows of samples that left.
        return_trajectory (`bool`, *optional*, defaults to `False`):
            Return the states of all steps, too; not with `step_control="per_sample"`, where times are not shared.

    Returns:
        [`Solution`]: The state at `t1`, the work it took and, if asked for, the trajectory.

    Raises:
        ValueError: If an argument is not accepted, alone or with the others, or the field answers NaN or infinity.
        RuntimeError: If `max_steps` do not reach `t1`, or the step size falls below the resolution of time.
    """
    tableau = find_method(method)
    t0, t1 = float(t0), float(t1)
    if not (math.isfinite(t0) and math.isfinite(t1)) or t0 == t1:
        raise ValueError(f"The interval must have two different finite ends, not {t0} and {t1}.")
    if x.ndim == 0 or not x.is_floating_point():
        raise ValueError(f"`x` must be a floating-point batch, not of shape {tuple(x.shape)} and {x.dtype}.")
    if any(len(arg) != len(x) for arg in args):
        raise ValueError(f"Each of `args` must have {len(x)} rows, as `x` has, not {[len(arg) for arg in args]}.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    evaluate = _Evaluate(field, return_trajectory)

    if num_steps is not None or grid is not None:
        adaptive = {"rtol": rtol, "atol": atol, "step_control": step_control, "first_step": first_step}
        adaptive |= {"max_steps": max_steps, "norm": norm}
        given = [name for name, value in adaptive.items() if value is not None]
        if given:
            raise ValueError(f"{given} belong to adaptive steps, but `num_steps` or `grid` ask for fixed ones.")
        times = _fixed_times(t0, t1, num_steps, grid)
        if tableau is None:
            x = _adams(evaluate, x, times, *ADAMS[method], args)
        else:
            x = _runge_kutta(evaluate, x, times, tableau.without_error_estimate(), args)
        if not bool(x.isfinite().all()):
            raise ValueError(f"The field answered with NaN or infinity somewhere between {t0} and {t1}.")
        accepted = torch.full((len(x),), len(times) - 1)
        return evaluate.solution(t1, x, torch.full_like(accepted, evaluate.nfe), accepted, torch.zeros_like(accepted))

    if tableau is None or tableau.b_error is None:
        raise ValueError(f"Method {method!r} has no error estimate: give `num_steps` or `grid`, or choose 'dopri5'.")
    rtol = 1e-5 if rtol is None else rtol
    atol = 1e-5 if atol is None else atol
    step_control = "batch" if step_control is None else step_control
    max_steps = 1000 if max_steps is None else max_steps
    if not (rtol >= 0.0 and atol >= 0.0 and rtol + atol > 0.0):
        raise ValueError(f"`rtol` and `atol` must not be negative, nor both zero, but are {rtol} and {atol}.")
    if step_control not in STEP_CONTROLS:
        raise ValueError(f"`step_control` must be one of {STEP_CONTROLS}, not {step_control!r}.")
    if first_step is not None and not 0.0 < first_step <= abs(t1 - t0):
        raise ValueError(f"`first_step` must lie in (0, {abs(t1 - t0)}], not be {first_step}.")
    if max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, not {max_steps}.")
    if return_trajectory and step_control == "per_sample":
        raise ValueError("A trajectory needs times that all samples share, not `step_control='per_sample'`.")
    control = _StepControl(rtol, atol, step_control == "batch", first_step, max_steps, norm or _root_mean_square)
    return _adaptive(evaluate, x, t0, t1, tableau, control, args)


def find_method(method: str | ButcherTableau) -> ButcherTableau | None:
    """The tableau of a method."""
    if isinstance(method, ButcherTableau):
        return method
    if method not in TABLEAUX and method not in ADAMS:
        raise ValueError(f"`method` must be one of {[*TABLEAUX, *ADAMS]}, not {method!r}.")
    return TABLEAUX.get(method)


def _fixed_times(
    t0: float, t1: float, num_steps: int | None, grid: Sequence[float] | torch.Tensor | None
) -> list[float]:
    """The checked times of fixed steps, in float64, with exactly `t0` and `t1` at the ends."""
    if num_steps is not None:
        if grid is not None:
            raise ValueError("Give `num_steps` or `grid`, not both.")
        if num_steps < 1:
            raise ValueError(f"`num_steps` must be at least 1, not {num_steps}.")
        times = torch.linspace(t0, t1, num_steps + 1, dtype=torch.float64)
    else:
        times = read_numbers("grid", grid)
        if len(times) < 2 or not ((times[1:] - times[:-1]) * (t1 - t0) > 0).all():
            raise ValueError(f"`grid` must be a list of times that runs from {t0} to {t1} without turning.")
        if (times[[0, -1]] - torch.tensor([t0, t1], dtype=torch.float64)).abs().max() > 1e-6 * max(abs(t0), abs(t1)):
            raise ValueError(f"`grid` must run from {t0} to {t1}, not from {times[0]:.7g} to {times[-1]:.7g}.")
    return [t0, *times[1:-1].tolist(), t1]


class _Evaluate:
    """The field with its calls counted, its output checked, and the states of the steps if they are wanted."""

    def __init__(self, field: Callable[..., torch.Tensor], keep_states: bool) -> None:
        self.field = field
        self.nfe = 0
        self.states: list[tuple[float, torch.Tensor]] | None = [] if keep_states else None

    def keep(self, t: float, x: torch.Tensor) -> None:
        if self.states is not None:
            self.states.append((t, x))

    def solution(self, t1: float, x: torch.Tensor, *work: torch.Tensor) -> Solution:
        solution = Solution(x, self.nfe, *work)
        if self.states is None:
            return solution
        times, states = zip(*self.states, (t1, x))
        return replace(solution, times=torch.tensor(times, dtype=torch.float64), trajectory=torch.stack(states))

    def __call__(self, t: float | torch.Tensor, x: torch.Tensor, args: Sequence[torch.Tensor]) -> torch.Tensor:
        if isinstance(t, torch.Tensor):
            t = t.to(device=x.device, dtype=x.dtype)
        else:
            t = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        derivative = self.field(t, x, *args)
        if derivative.shape != x.shape:
            raise ValueError(f"The field returned shape {tuple(derivative.shape)} for `x` of {tuple(x.shape)}.")
        self.nfe += 1
        # The tensor of the field is not kept: it may be a buffer that the next call fills again.
        return derivative.to(x.dtype, copy=True)


def _move(
    x: torch.Tensor, h: float | torch.Tensor, weights: Sequence[float], slopes: Sequence[torch.Tensor]
) -> torch.Tensor:
    """`x + h * sum_i weights[i] * slopes[i]`, without the terms of weight zero."""
    terms = [(weight, slope) for weight, slope in zip(weights, slopes) if weight != 0.0]
    if not terms:
        return x
    total = terms[0][0] * terms[0][1]
    for weight, slope in terms[1:]:
        total = torch.add(total, slope, alpha=weight)
    return x + h * total


def _runge_kutta(
    evaluate: _Evaluate, x: torch.Tensor, times: list[float], tableau: ButcherTableau, args: Sequence[torch.Tensor]
) -> torch.Tensor:
    for t, t_next in zip(times[:-1], times[1:]):
        evaluate.keep(t, x)
        h = t_next - t
        slopes: list[torch.Tensor] = []
        for row, c in zip(tableau.a, tableau.c):
            slopes.append(evaluate(t_next if c == 1.0 else t + c * h, _move(x, h, row, slopes), args))
        x = _move(x, h, tableau.b, slopes)
    return x


def _adams(
    evaluate: _Evaluate, x: torch.Tensor, times: list[float], order: int, corrector: bool, args: Sequence[torch.Tensor]
) -> torch.Tensor:
    slopes: list[torch.Tensor] = []
    start = x
    for i, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
        slopes = [evaluate(t, x, args), *slopes[: order - 1]]
        known = times[i::-1][: len(slopes)]
        if i > 0 and (corrector or i < order - 1):
            # The evaluation that this step makes anyway, at the predicted state, corrects the step before. Bashforth's
            # order 3 needs it for its first step too: left to Euler, that would cap the order at 2.
            x = _move(start, 1.0, adams_weights(known, times[i - 1], t), slopes)
        evaluate.keep(t, x)
        start = x
        x = _move(start, 1.0, adams_weights(known, t, t_next), slopes)
    return x


@dataclass(frozen=True)
class _StepControl:
    rtol: float
    atol: float
    shared: bool
    first_step: float | None
    max_steps: int
    norm: Callable[[torch.Tensor], torch.Tensor]

    def size(self, value: torch.Tensor, tolerance: torch.Tensor) -> torch.Tensor:
        """The size of `value` in units of the tolerance, in float64 on the CPU; the same for all samples if shared."""
        size = to_float64(self.norm((value / tolerance).detach()))
        return size.square().mean().sqrt().expand(len(size)) if self.shared else size

    def tolerance(self, *states: torch.Tensor) -> torch.Tensor:
        largest = states[0].detach().abs()
        for state in states[1:]:
            largest = torch.maximum(largest, state.detach().abs())
        return self.atol + self.rtol * largest


def _root_mean_square(value: torch.Tensor) -> torch.Tensor:
    return value.flatten(1).square().mean(1).sqrt() if value.ndim > 1 else value.abs()


def _like(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Per-sample values on the CPU, on the device of `x` and lifted to its rank."""
    values = values.to(device=x.device, dtype=values.dtype if values.dtype == torch.bool else x.dtype)
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _first_step(
    evaluate: _Evaluate,
    x: torch.Tensor,
    slope: torch.Tensor,
    t0: float,
    t1: float,
    order: int,
    control: _StepControl,
    args: Sequence[torch.Tensor],
) -> torch.Tensor:
    """A first step size from the sizes of the state and its first two derivatives (Hairer et al. I, section II.4)."""
    span = abs(t1 - t0)
    tolerance = control.tolerance(x)
    d0, d1 = control.size(x, tolerance), control.size(slope, tolerance)
    trial = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6 * span, 0.01 * d0 / d1).clamp(max=span)
    signed = math.copysign(1.0, t1 - t0) * trial
    moved = evaluate(t0 + signed, x + _like(signed, x) * slope, args)
    d2 = control.size(moved - slope, tolerance) / trial
    largest = torch.maximum(d1, d2)
    step = torch.where(largest <= 1e-15, (1e-3 * trial).clamp(min=1e-6 * span), (0.01 / largest) ** (1 / (order + 1)))
    return torch.minimum(step, 100 * trial).nan_to_num(nan=1e-6 * span).clamp(max=span)


def _adaptive(
    evaluate: _Evaluate,
    x: torch.Tensor,
    t0: float,
    t1: float,
    tableau: ButcherTableau,
    control: _StepControl,
    args: Sequence[torch.Tensor],
) -> Solution:
    # Times and step sizes live on the CPU in float64, one of each per sample; with a shared step they are all equal.
    batch_size = len(x)
    sign = math.copysign(1.0, t1 - t0)
    resolution = 10 * torch.finfo(x.dtype).eps * max(abs(t0), abs(t1))
    result = torch.empty_like(x)
    evaluations, accepted, rejected = (torch.zeros(batch_size, dtype=torch.long) for _ in range(3))
    running = torch.arange(batch_size)
    t = torch.full((batch_size,), t0, dtype=torch.float64)
    slope = evaluate(t0, x, args)
    if control.first_step is None:
        h = _first_step(evaluate, x, slope, t0, t1, tableau.order, control, args)
    else:
        h = torch.full_like(t, control.first_step)
    evaluations += evaluate.nfe
    last_error = torch.full_like(t, 1e-4)
    just_rejected = torch.zeros(batch_size, dtype=torch.bool)

    for _ in range(control.max_steps):
        # A step that nearly arrives is stretched to arrive.
        arrives = 1.01 * h >= (t1 - t).abs()
        h = torch.where(arrives, (t1 - t).abs(), h)
        calls = evaluate.nfe
        slopes = [slope]
        for row, c in zip(tableau.a[1:], tableau.c[1:]):
            time = torch.where(arrives, t1, t + sign * h) if c == 1.0 else t + c * sign * h
            slopes.append(evaluate(time, _move(x, _like(sign * h, x), row, slopes), args))
        moved = _move(x, _like(sign * h, x), tableau.b, slopes)
        error = _move(torch.zeros_like(x), _like(h, x), tableau.b_error, slopes)
        error = control.size(error, control.tolerance(x, moved))

        accept = error <= 1.0
        accepted[running] += accept
        rejected[running] += ~accept
        evaluations[running] += evaluate.nfe - calls
        # PI control (Hairer et al. II, section IV.2); an error that is not a number counts as large.
        safe = error.nan_to_num(nan=math.inf).clamp(min=1e-10)
        grow = 0.9 * safe ** (-0.85 / tableau.order) * last_error ** (0.2 / tableau.order)
        grow = grow.clamp(0.2, 10.0).minimum(torch.where(just_rejected, 1.0, 10.0))
        shrink = (0.9 * safe ** (-1 / tableau.order)).clamp(0.2, 1.0)
        if accept[0]:
            evaluate.keep(t[0].item(), x)
        t = torch.where(accept, t + sign * h, t)
        h = h * torch.where(accept, grow, shrink)
        last_error = torch.where(accept, safe.clamp(min=1e-4), last_error)
        just_rejected = ~accept
        x = torch.where(_like(accept, x), moved, x)
        slope = torch.where(_like(accept, x), slopes[-1], slope) if tableau.first_same_as_last else slope

        keep = ~(accept & arrives)
        if not keep.all():
            result = result.index_copy(0, running[~keep].to(x.device), x[(~keep).to(x.device)])
            if not keep.any():
                return evaluate.solution(t1, result, evaluations, accepted, rejected)
            staying = keep.to(x.device)
            x, slope = x[staying], slope[staying]
            args = tuple(arg[keep.to(arg.device)] for arg in args)
            running, t, h, last_error, just_rejected = (
                values[keep] for values in (running, t, h, last_error, just_rejected)
            )
        if (h < resolution).any():
            raise RuntimeError(
                f"The step size fell to {h.min():.3g} at t = {t[h.argmin()]:.7g}: the field is not finite or smooth "
                f"there, or the tolerances (rtol {control.rtol}, atol {control.atol}) are too small for {x.dtype}."
            )
        if not tableau.first_same_as_last:
            slope = evaluate(t, x, args)
            evaluations[running] += 1
    raise RuntimeError(
        f"{control.max_steps} steps reached t = {t[(t1 - t).abs().argmax()]:.7g} of {t1}: allow more `max_steps`, or "
        f"larger tolerances than rtol {control.rtol} and atol {control.atol}."
    )
