# SPDX-License-Identifier: Apache-2.0
"""Transport along a flow from data to noise and back, on one grid of times for every path."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real

import torch

from .coordinates import Coordinates
from .paths import ConditionalPath, lift
from .precision import to_float64, widest_float
from .solvers import ButcherTableau, Solution, graded_grid, odeint


@torch.no_grad()
def transport(
    predict: Callable[..., torch.Tensor],
    x: torch.Tensor,
    path: ConditionalPath,
    *,
    start: float = 0.0,
    end: float = 1.0,
    prediction_type: str = "flow_prediction",
    coordinates: str = "ot",
    method: str | ButcherTableau = "abm3",
    num_steps: int | None = 64,
    grading: float | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    step_control: str | None = None,
    args: Sequence[torch.Tensor] = (),
    return_trajectory: bool = False,
) -> Solution:
    """
    Carries points along the flow: data to noise (`start=0, end=1`), noise to data (`start=1, end=0`), or in between.

    Args:
        predict (`Callable`):
            `predict(x_t, t, *args)` gives the network's output at points `(batch_size, ...)` of the path and times
            `(batch_size,)` in [0, 1], both in the precision of `x`, float32 at least.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            Points of the path at `start`.
        path (`ConditionalPath`):
            The path on which the network was trained.
        start (`float`, *optional*, defaults to 0.0):
            The time of `x`, in [0, 1].
        end (`float`, *optional*, defaults to 1.0):
            The time to go to, in [0, 1].
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network predicts, one of `PREDICTION_TYPES`.
        coordinates (`str`, *optional*, defaults to `"ot"`):
            The name of the [`~coordinates.Coordinates`] of the integration: `"ot"`, the straight ones, `"angle"` or
            `"native"`, the path's own.
        method (`str` or `ButcherTableau`, *optional*, defaults to `"abm3"`):
            A method of [`~solvers.odeint`].
        num_steps (`int`, *optional*, defaults to 64):
            The number of steps; `None` for adaptive ones.
        grading (`float`, *optional*, defaults to 1.5):
            Fixed steps: how much finer the grid is towards the data.
        rtol (`float`, *optional*, defaults to `1e-5`):
            Adaptive steps: relative tolerance.
        atol (`float`, *optional*, defaults to `1e-5`):
            Adaptive steps: absolute tolerance.
        step_control (`str`, *optional*, defaults to `"batch"`):
            Adaptive steps: `"batch"` or `"per_sample"`.
        args (`Sequence[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors with one row per sample that the network is given too.
        return_trajectory (`bool`, *optional*, defaults to `False`):
            Return the points after all steps and their times in [0, 1], too, as `trajectory` and `times`.

    Returns:
        [`~solvers.Solution`]: The points at `end`, in float64 where the device has it, the work they took and, if
        asked for, the trajectory.

    Raises:
        ValueError: If an argument is not among the accepted ones, or does not go with the others.
    """
    check_steps(method, num_steps, grading=grading, rtol=rtol, atol=atol, start=start, end=end)
    if num_steps is None and grading is not None:
        raise ValueError("`grading` belongs to fixed steps, but `num_steps` is None.")
    check_batch(x, args)
    flow = Flow(predict, Coordinates(path, coordinates), prediction_type, model_dtype(x))
    u0, u1 = flow.time(start), flow.time(end)
    grid = None if num_steps is None else flow.grid(u0, u1, num_steps, grading)
    # The state is cheap beside the network, and rounding adds up along a trajectory.
    state = x.to(widest_float(x)) / flow.scale(start)
    options = {"rtol": rtol, "atol": atol, "step_control": step_control, "return_trajectory": return_trajectory}
    solution = odeint(flow.velocity, state, u0, u1, method=method, grid=grid, args=args, **options)
    times, trajectory = solution.times, solution.trajectory
    if times is not None and trajectory is not None:
        times = flow.coordinates.time(times)
        trajectory = trajectory * lift(flow.coordinates.scale_at(times), trajectory)
    return replace(solution, x=solution.x * flow.scale(end), times=times, trajectory=trajectory)


def check_steps(method: str | ButcherTableau, num_steps: int | None, **numbers: float | None) -> None:
    """Raise a `ValueError` for settings of another type, such as numbers given as strings."""
    if not isinstance(method, (str, ButcherTableau)):
        raise ValueError(f"`method` must be the name of a method or a ButcherTableau, not {method!r}.")
    if num_steps is not None and not (isinstance(num_steps, Integral) and int(num_steps) >= 1):
        raise ValueError(f"`num_steps` must be at least 1, not {num_steps!r}.")
    for name, number in numbers.items():
        if number is not None and not isinstance(number, Real):
            raise ValueError(f"`{name}` must be a number, not {number!r}.")


def check_batch(x: torch.Tensor, args: Sequence[torch.Tensor]) -> None:
    """Raise a `ValueError` for what is no batch of samples, with a row of each of `args` for each."""
    if x.ndim < 2 or len(x) == 0 or not x.is_floating_point():
        raise ValueError(f"A batch of floating-point samples is needed, not shape {tuple(x.shape)} of {x.dtype}.")
    if any(len(arg) != len(x) for arg in args):
        raise ValueError(f"Each of `args` must have {len(x)} rows, as the samples have, not {[len(a) for a in args]}.")


def model_dtype(x: torch.Tensor) -> torch.dtype:
    """Precision in which the network is called."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Flow:
    """The flow of a network in chosen coordinates: `y = x_t / scale(t)` in the time `u`."""

    predict: Callable[..., torch.Tensor]
    coordinates: Coordinates
    prediction_type: str
    dtype: torch.dtype

    def time(self, t: float) -> float:
        """The time `u` of these coordinates at `t`."""
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"Times must lie in [0, 1], not at {t}.")
        return self.coordinates.node_at(torch.tensor(t, dtype=torch.float64)).item()

    def scale(self, t: float) -> float:
        """The scale of `x_t` at `t`."""
        return self.coordinates.scale_at(torch.tensor(t, dtype=torch.float64)).item()

    def grid(self, u0: float, u1: float, num_steps: int, grading: float | None) -> list[float]:
        """Fixed times from `u0` to `u1`, finer towards the data."""
        return graded_grid(u0, u1, num_steps, 1.5 if grading is None else grading)

    def point(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The path's time and scale at `u`, and the `a, b` of `dy/du = a * y + b * model_output`."""
        # On the CPU in float64, as coefficients are everywhere.
        t = self.coordinates.time(to_float64(u))
        on_sample, on_output = self.coordinates.coefficients(t, self.prediction_type)
        scale = self.coordinates.scale_at(t)
        return t, scale, on_sample * scale, on_output

    def velocity(self, u: torch.Tensor, y: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        """`dy/du`, as a field for a solver."""
        t, scale, on_state, on_output = self.point(u)
        output = self.model(t, args)(self.input(y, scale))
        return lift(on_state, y) * y + lift(on_output, y) * output

    def input(self, y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The points of the path, in the precision of the network."""
        return (lift(scale, y) * y).to(self.dtype)

    def model(self, t: torch.Tensor, args: Sequence[torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """The network at the times `t` as a function of the points alone."""

        def function(x: torch.Tensor) -> torch.Tensor:
            output = self.predict(x, t.to(device=x.device, dtype=x.dtype), *args)
            if output.shape != x.shape:
                raise ValueError(f"`predict` returned {tuple(output.shape)} for points of {tuple(x.shape)}.")
            return output

        return function
