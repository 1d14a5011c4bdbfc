# SPDX-License-Identifier: Apache-2.0
"""Recommendation: solver and number of steps by which a network is sampled well in few calls."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..solvers import ADAMS
from .calibration import calibrate
from .sampling_plan import RUNGE_KUTTA
from .scheduling_flow_match import FlowMatchScheduler
from .watchers import Run, Watcher


# Error to fall below: that of so many Euler steps on the equally spaced grid.
BASELINE: dict[str, Any] = {"solver": "euler", "sampling_path": "ot", "timestep_spacing": "trailing"}
BASELINE_STEPS = 50
# A setting must fall this far below, so that other noise does not overturn it.
MARGIN = 0.9
# Errors are distances from this, in the coordinates and on the grid that suit Adams methods.
REFERENCE: dict[str, Any] = {"solver": "abm3", "sampling_path": "angle", "timestep_spacing": "graded"}
REFERENCE_STEPS = 128

# Solvers and numbers of calls that are tried.
CANDIDATES = ("abm3", "ab3", "abm2", "ab2", "midpoint")
CALLS = (3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 24, 28, 32, 40)
# So many steps are fitted where no solver does with so few calls, and grids tried for them.
FITTED_CALLS, FITTED_RUNS = 10, 8

# Solvers that do not add noise, need no fit and work with any network.
SOLVERS = (*RUNGE_KUTTA, *ADAMS, "dpmpp_2m")

# Noise that settings are chosen by, and other noise that confirms the choice.
CHOICE, CHECK = 0, 1


def solver_settings(solver: str) -> dict[str, Any]:
    """Settings of a solver with the coordinates and the grid that suit it."""
    return {**(REFERENCE if solver in ADAMS else BASELINE), "solver": solver}


@dataclass(frozen=True)
class Recommendation:
    """
    What [`recommend`] returns.

    Args:
        scheduler (`FlowMatchScheduler`):
            Scheduler with the settings, `default_num_inference_steps` among them.
        error (`float`):
            Relative error `|x - reference| / |reference|`, on noise that the settings were not chosen by.
        baseline (`float`):
            That of 50 Euler steps.
    """

    scheduler: FlowMatchScheduler
    error: float
    baseline: float

    def __str__(self) -> str:
        config = self.scheduler.config
        calls = config.default_num_inference_steps * self.scheduler.order
        return (
            f"`{config.solver}`, {calls} calls: relative error {self.error:.2g}, of 50 Euler calls {self.baseline:.2g}"
        )


def recommend(
    run: Run, scheduler: FlowMatchScheduler, *, solver: str | None = None, calibrate_steps: Sequence[int] = ()
) -> Recommendation:
    """
    Find the settings by which a network is sampled in the fewest calls with less error than in 50 Euler steps.

    Solvers and numbers of steps are tried on one batch of noise; the first that falls below there and on another batch
    is taken. If none does in 10 calls, 10 steps are fitted to the first batch ([`calibrate`]) and taken if they fall
    below on the other. If they do not, and no solver does in 40 calls, 50 Euler steps are taken.

    Args:
        run (`Callable`):
            `run(scheduler, num_inference_steps, seed)` draws noise by the seed and runs one sampling loop over one
            batch of it with that scheduler, as for [`calibrate`]. The result is not used.
        scheduler (`FlowMatchScheduler`):
            Scheduler of the pipeline, with its `sigma_data` and shift; it is not changed.
        solver (`str`, *optional*):
            Only solver to try.
        calibrate_steps (`Sequence[int]`, *optional*):
            Numbers of steps to fit, see [`calibrate`], in place of other solvers. The fewest that fall below are the
            default, or the most.

    Returns:
        [`Recommendation`]: scheduler and errors.

    Raises:
        ValueError: if the solver or a number is not accepted, or `run` does not do what it should.
    """
    reference, baseline = (scheduler.with_settings(**settings) for settings in (REFERENCE, BASELINE))

    def watched(candidate: FlowMatchScheduler, steps: int, seed: int) -> Watcher:
        watcher: Any = Watcher.from_config(candidate.config)
        watcher.path = scheduler.path
        watcher.watch(run, steps, seed)
        return watcher

    @cache
    def exact(seed: int) -> torch.Tensor:
        return watched(reference, REFERENCE_STEPS, seed).end

    @cache
    def error(candidate: FlowMatchScheduler, steps: int, seed: int) -> float:
        return watched(candidate, steps, seed).error(exact(seed))

    def falls_below(candidate: FlowMatchScheduler, steps: int, seed: int) -> bool:
        return error(candidate, steps, seed) < MARGIN * error(baseline, BASELINE_STEPS, seed)

    def choose() -> tuple[FlowMatchScheduler, int]:
        if calibrate_steps:
            fitted = calibrate(run, scheduler, sorted(calibrate_steps)).scheduler
            below = [steps for steps in sorted(calibrate_steps) if falls_below(fitted, steps, CHECK)]
            return fitted, below[0] if below else max(calibrate_steps)
        names = CANDIDATES if solver is None else (solver,)
        candidates = [scheduler.with_settings(**solver_settings(name)) for name in names]
        for calls in CALLS:
            trials = [(each, calls // each.order) for each in candidates if calls % each.order == 0]
            for trial in sorted(trials, key=lambda trial: error(*trial, CHOICE)):
                if falls_below(*trial, CHOICE) and falls_below(*trial, CHECK):
                    return trial
            if calls == FITTED_CALLS and solver is None:
                fitted = calibrate(run, scheduler, FITTED_CALLS, max_runs=FITTED_RUNS).scheduler
                if falls_below(fitted, FITTED_CALLS, CHECK):
                    return fitted, FITTED_CALLS
        last = baseline if solver is None else candidates[0]
        return last, BASELINE_STEPS // last.order

    chosen, steps = choose()
    saved = chosen.with_settings(default_num_inference_steps=steps)
    saved.path = scheduler.path
    return Recommendation(saved, error(chosen, steps, CHECK), error(baseline, BASELINE_STEPS, CHECK))
