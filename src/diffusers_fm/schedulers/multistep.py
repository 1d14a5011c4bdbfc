# SPDX-License-Identifier: Apache-2.0
"""Multistep methods on a grid, as the weights of the derivatives in each step: those of Adams, and fitted ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..solvers import adams_weights


# Adams methods look back only over steps that are no shorter than the next one by more than this.
MAX_STEP_GROWTH = 10


@dataclass(frozen=True)
class CalibratedSteps:
    """
    A sampling loop that was fitted to a network (see [`~schedulers.calibration.calibrate`]).

    Args:
        sigmas (`tuple[float, ...]`):
            The straight times of the calls, descending.
        keep (`tuple[float, ...]`):
            For each step the weight of the sample in the angle, near 1.
        weights (`tuple[tuple[float, ...], ...]`):
            For each step the weights of the latest derivatives in the angle, its own last.
    """

    sigmas: tuple[float, ...]
    keep: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]


def adams_increments(
    start: float, calls: Sequence[float], end: float, order: int, corrected_steps: int
) -> list[tuple[float, ...]]:
    """
    The weights of the derivatives in each step of an Adams method on a grid.

    A correction is the difference of two integrals over a step that was made before, so that it is an increment to the
    sample at hand, whatever a pipeline has done to it in between.
    """
    bounds = [start, *calls, end]
    integrals: list[dict[int, float]] = [{} for _ in bounds[1:]]
    increments = []
    for i in range(len(calls)):
        # The newest points of the grid, without those at which it stands still, or so near each other that the
        # polynomial through them says nothing about the length of the step.
        reach = abs(bounds[i + 2] - bounds[i + 1]) / MAX_STEP_GROWTH
        known: list[int] = []
        for j in range(i, -1, -1):
            if len(known) < order and (not known or abs(calls[j] - calls[known[-1]]) > reach):
                known.append(j)
        # Bashforth's order 3 needs the correction of its first step too: left to Euler, that would cap the order.
        corrected = max(corrected_steps, int(i < order - 1))
        total: dict[int, float] = {}
        for k in range(max(i + 1 - corrected, 0), i + 2):
            before, integrals[k] = integrals[k], {}
            if bounds[k] != bounds[k + 1]:
                integrals[k] = dict(zip(known, adams_weights([calls[j] for j in known], bounds[k], bounds[k + 1])))
            for j in {*integrals[k], *before}:
                total[j] = total.get(j, 0.0) + integrals[k].get(j, 0.0) - before.get(j, 0.0)
        increments.append(tuple(total.get(j, 0.0) for j in range(min([i, *total]), i + 1)))
    return increments


def read_calibration(calibration: Mapping[str, Any]) -> dict[int, CalibratedSteps]:
    """Check the calibration in a scheduler's configuration."""
    steps = {}
    for name, entry in calibration.items():
        try:
            count = int(name)
            sigmas, keep = (tuple(float(value) for value in entry[key]) for key in ("sigmas", "keep"))
            weights = tuple(tuple(float(weight) for weight in row) for row in entry["weights"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                "`calibration` must have lists `sigmas`, `keep` and `weights` for each number of steps, got "
                f"{entry!r} for {name!r}."
            ) from None
        falling = all(1 >= a > b >= 0 for a, b in pairwise([*sigmas, 0.0]))
        fitting = len(sigmas) == len(keep) == len(weights) == count and all(
            1 <= len(row) <= i + 1 and all(math.isfinite(value) for value in (keep[i], *row))
            for i, row in enumerate(weights)
        )
        if not (count >= 1 and falling and fitting):
            raise ValueError(
                f"`calibration` for {name} steps must have as many falling `sigmas` in [0, 1], finite `keep` and rows "
                f"of finite `weights`, row i of at most i + 1, got the sigmas {sigmas}, keep {keep} and rows of "
                f"{[*map(len, weights)]}."
            )
        steps[count] = CalibratedSteps(sigmas, keep, weights)
    return steps
