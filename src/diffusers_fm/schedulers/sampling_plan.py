# SPDX-License-Identifier: Apache-2.0
"""A grid of times and a solver, turned into numbers: what each turn of a sampling loop does to the sample.

All of it is computed once, in float64 on the CPU, before the loop begins; a turn is then a sum of tensors with scalar
weights, whatever the path, the prediction type and the solver.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..paths import STRAIGHT_VELOCITY, ConditionalPath
from ..solvers import TABLEAUX, ButcherTableau


@dataclass(frozen=True)
class Stage:
    """One turn of the loop: a call of the network at `x` and what becomes of its answer.

    The derivative is `on_sample * x + on_output * model_output`. The turn's result is `keep` times the point at which
    the step began, plus the step's derivatives so far, each by its weight: the input of the next stage, or after the
    last stage the end of the step. Points are in the path's own coordinates, derivatives in those of the integration.

    Args:
        t (`float`): The path's time, 0 = data, 1 = noise.
        ratio (`float`): The straight time, `sigma / (alpha + sigma)`.
        on_sample (`float`): Weight of `x` in the derivative.
        on_output (`float`): Weight of the network's answer in the derivative.
        keep (`float`): Weight of the step's beginning in the result.
        weights (`tuple[float, ...]`): Weights of the step's derivatives in the result, this stage's last.
        first (`bool`): Whether the stage begins a step.
        last (`bool`): Whether the stage ends a step.
        end (`tuple[float, float]`): `alpha` and `sigma` where the step ends.
    """

    t: float
    ratio: float
    on_sample: float
    on_output: float
    keep: float
    weights: tuple[float, ...]
    first: bool
    last: bool
    end: tuple[float, float]


@dataclass(frozen=True)
class Coordinates:
    """Coordinates in which a path is integrated: `x = scale * X` and `dX/du` is a linear prediction.

    Args:
        derivative (`str`): The prediction that is `dX/du`.
        node (`Callable`): `u` at a straight time.
        time (`Callable`): `t` at `u`.
        scale (`Callable`): The scale of `x` at `(alpha, sigma)`.
    """

    derivative: str
    node: Callable[[torch.Tensor], torch.Tensor]
    time: Callable[[torch.Tensor], torch.Tensor]
    scale: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def straight_coordinates(path: ConditionalPath) -> Coordinates:
    """`u = sigma / (alpha + sigma)` and `X = x / (alpha + sigma)`: every path is the OT path."""
    return Coordinates(STRAIGHT_VELOCITY, lambda ratio: ratio, path.time_at, lambda alpha, sigma: alpha + sigma)


def native_coordinates(path: ConditionalPath) -> Coordinates:
    """`u = t` and `X = x`: the path's own ODE (arXiv 2210.02747)."""
    return Coordinates("flow_prediction", path.time_at, lambda u: u, lambda alpha, sigma: torch.ones_like(alpha))


def end_point(path: ConditionalPath, ratios: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`alpha` and `sigma` at straight times; below the path's own end, that of clean data.

    Args:
        path (`ConditionalPath`): The path.
        ratios (`torch.Tensor`): Straight times, any shape.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `alpha` and `sigma`, of that shape.
    """
    t = path.time_at(ratios)
    beyond = ratios < path.ratio_min
    alpha, sigma = path.alpha(t), path.sigma(t)
    return torch.where(beyond, torch.ones_like(alpha), alpha), torch.where(beyond, torch.zeros_like(sigma), sigma)


def defined_at_data(path: ConditionalPath, prediction_type: str, coordinates: Coordinates) -> bool:
    """Whether a stage may lie at t = 0: the prediction determines the derivative there, and both are finite."""
    zero = torch.zeros((), dtype=torch.float64)
    if coordinates.derivative == "flow_prediction" and not math.isfinite(path.d_sigma(zero).item()):
        return False
    return bool(path.determines(zero, prediction_type, coordinates.derivative))


def _runge_kutta(
    path: ConditionalPath,
    prediction_type: str,
    coordinates: Coordinates,
    tableau: ButcherTableau,
    ratios: torch.Tensor,
) -> list[Stage]:
    nodes = coordinates.node(ratios)
    steps = nodes.diff()
    t = coordinates.time(nodes[:-1, None] + steps[:, None] * nodes.new_tensor(tableau.c))
    scale = coordinates.scale(path.alpha(t), path.sigma(t))
    on_sample, on_output = path.coefficients(t, prediction_type, coordinates.derivative)
    end_alpha, end_sigma = end_point(path, ratios[1:])
    # Stage j leads to stage j + 1, the last one to the end of the step.
    arrival = torch.cat([scale[:, 1:], coordinates.scale(end_alpha, end_sigma)[:, None]], dim=1)
    keep = arrival / scale[:, :1]
    keep = torch.where((keep - 1).abs() < 1e-14, torch.ones_like(keep), keep)
    increments = arrival * steps[:, None]

    rows = [*tableau.a[1:], tableau.b]
    columns = [tensor.tolist() for tensor in (t, path.ratio(t), on_sample, on_output, keep, increments)]
    ends = list(zip(end_alpha.tolist(), end_sigma.tolist()))
    return [
        Stage(
            *(column[i][j] for column in columns[:5]),
            weights=tuple(columns[5][i][j] * weight for weight in rows[j]),
            first=j == 0,
            last=j == tableau.stages - 1,
            end=ends[i],
        )
        for i in range(len(steps))
        for j in range(tableau.stages)
    ]


def plan_sampling(
    path: ConditionalPath, prediction_type: str, solver: str, sampling_path: str, ratios: torch.Tensor
) -> list[Stage]:
    """Lay out a solver over a grid.

    Where the last step leads beyond the path's own end (`ratio_min` above 0), or its last stage would lie where the
    derivative is undefined, it is one straight Euler step: a jump to the data estimate.

    Args:
        path (`ConditionalPath`): The path.
        prediction_type (`str`): What the network answers.
        solver (`str`): A name in `TABLEAUX`.
        sampling_path (`str`): `"ot"` (straight coordinates) or `"native"`.
        ratios (`torch.Tensor` of shape `(steps + 1,)`): Straight times in float64, descending, the end included.

    Returns:
        `list[Stage]`: The turns of the loop.

    Raises:
        ValueError: If the derivative is undefined where the grid begins.
    """
    tableau = TABLEAUX[solver]
    straight = straight_coordinates(path)
    coordinates = straight if sampling_path == "ot" else native_coordinates(path)
    end = ratios[-1].item()
    reaches_data = end == 0.0 and max(tableau.c) == 1.0
    if end < path.ratio_min or (reaches_data and not defined_at_data(path, prediction_type, coordinates)):
        body = _runge_kutta(path, prediction_type, coordinates, tableau, ratios[:-1])
        return body + _runge_kutta(path, prediction_type, straight, TABLEAUX["euler"], ratios[-2:])
    return _runge_kutta(path, prediction_type, coordinates, tableau, ratios)
