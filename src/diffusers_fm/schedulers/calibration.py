# SPDX-License-Identifier: Apache-2.0
"""
Calibration: fit the steps of a sampling loop to a network, by the places and weights of its calls.

A step adds the sample and the latest derivatives, each by its weight. Adams methods take the weights of polynomials;
here they are fitted by least squares to fine trajectories of the network itself, step by step, each on what the steps
before have left (non-stationary solvers: Shaul et al., arXiv 2403.01329). The times of the calls are searched.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from ..coordinates import angle_of_ratio, ratio_of_angle
from ..precision import to_float64
from .multistep import adams_increments
from .scheduling_flow_match import FlowMatchScheduler
from .watchers import Recorder, Run, Watcher


# Least squares are pulled towards the weights of abm3 by this share of the mean square of a column: enough for columns
# that are multiples of each other, too little to keep the fit from small ones.
RIDGE = 1e-6

# Angles of the calls: high (1 - u^a)^b, u = (i + c) / (steps - 1 + c + g). Where the search for (a, b, c, g) begins,
# its first moves, and the least values.
GRID_START = (1.5, 1.6, 1.0, 1.0)
GRID_MOVES = (0.4, 0.4, 0.3, 0.3)
GRID_LEAST = (0.6, 0.6, 0.2, 0.1)


@dataclass(frozen=True)
class Calibration:
    """
    What [`calibrate`] returns.

    Args:
        scheduler (`FlowMatchScheduler`):
            A scheduler with the solver `calibrated`, ready for the pipeline and its file.
        errors (`dict[int, dict[str, float]]`):
            By number of steps the relative errors, `|x - reference| / |reference|`, of the calibrated steps
            (`calibrated`) and of `abm3` in the angle on the graded grid (`abm3`), on noise that was not fitted to.
        calls (`int`):
            Calls of the network, each for the whole batch, that the calibration and these errors took.
    """

    scheduler: FlowMatchScheduler
    errors: dict[int, dict[str, float]]
    calls: int


def calibrate(
    run: Run,
    scheduler: FlowMatchScheduler,
    num_inference_steps: int | Sequence[int],
    *,
    reference_steps: int = 64,
    max_runs: int = 32,
    history: int = 6,
) -> Calibration:
    """
    Fit a sampling loop of few steps to a network, as it is used: guidance, prompts and resolution included.

    The network itself is not needed, only a function that runs the pipeline; the schedulers that it is given watch.

    Args:
        run (`Callable`):
            `run(scheduler, num_inference_steps, seed)` draws noise by the seed and runs one sampling loop over one
            batch of it with that scheduler, from pure noise, without randomness on the way. The result is not used.
            Seed 0 is fitted to, seed 1 measured.
        scheduler (`FlowMatchScheduler`):
            The scheduler of the pipeline; it is not changed. Its shift is not needed any more: the times are searched.
        num_inference_steps (`int` or `Sequence[int]`):
            The numbers of steps to calibrate for, each a loop of its own.
        reference_steps (`int`, *optional*, defaults to 64):
            Steps of the trajectories that are fitted to; more than the calibrated ones.
        max_runs (`int`, *optional*, defaults to 32):
            How many grids are tried for each number of steps, each by a run of so many calls.
        history (`int`, *optional*, defaults to 6):
            How many derivatives a step may use; so many tensors of the sample's size are kept.

    Returns:
        [`Calibration`]: A scheduler, its errors on other noise, and what it cost.

    Raises:
        ValueError: If a number is out of range, `run` does not do what it should, or its pipeline hands timesteps to
            the scheduler (CogView4).
    """
    if scheduler.config.solver == "flow_map":
        raise ValueError(
            "Calibration needs a flow, and the scheduler samples a flow map: take the flow that it contains, with"
            " `scheduler.with_settings(solver='euler')`."
        )
    counts = [num_inference_steps] if isinstance(num_inference_steps, int) else list(num_inference_steps)
    if not counts:
        raise ValueError("`num_inference_steps` must name at least one number of steps, got none.")
    for name, value, least in (
        *(("num_inference_steps", count, 1) for count in counts),
        ("reference_steps", reference_steps, max(4, max(counts) + 1)),
        ("max_runs", max_runs, 1),
        ("history", history, 1),
    ):
        if value < least:
            raise ValueError(f"`{name}` must be at least {least}, got {value!r}.")
    # What changes a grid has no part in the ones that are tried here.
    config: dict[str, Any] = {
        **scheduler.config,
        **{"shift": 1.0, "use_dynamic_shifting": False, "shift_terminal": None, "use_karras_sigmas": False},
        **{
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
            "calibration": None,
            "default_num_inference_steps": None,
        },
        **{"solver": "abm3", "sampling_path": "angle", "timestep_spacing": "graded"},
    }
    calls = 0

    def watch(watcher: Any, steps: int, seed: int) -> Any:
        nonlocal calls
        watcher.path = scheduler.path
        calls += watcher.watch(run, steps, seed)
        return watcher

    fitted, tested = (watch(Recorder.from_config(config), reference_steps, seed) for seed in (0, 1))
    entries: dict[str, dict[str, Any]] = {}
    errors: dict[int, dict[str, float]] = {}
    for count in counts:

        def attempt(shape: Sequence[float], count: int = count) -> tuple[float, _Fitter]:
            fitter: Any = _Fitter.from_config(config)
            fitter.prepare(_angles(scheduler, count, shape), history, fitted)
            return watch(fitter, count, 0).error(fitted.end), fitter

        best = _search(attempt, max_runs, from_prior=scheduler.path.prior_std != 1.0)
        entries[str(count)] = {"sigmas": best.called_at, "keep": best.keep, "weights": best.weights}
        calibrated = config | {"solver": "calibrated", "calibration": {str(count): entries[str(count)]}}
        errors[count] = {
            "calibrated": watch(Recorder.from_config(calibrated), count, 1).error(tested.end),
            "abm3": watch(Recorder.from_config(config), count, 1).error(tested.end),
        }
    result: Any = type(scheduler).from_config(config, solver="calibrated", calibration=entries)
    return Calibration(result, errors, calls)


def _angles(scheduler: FlowMatchScheduler, num_steps: int, shape: Sequence[float]) -> list[float]:
    ends = torch.tensor([scheduler.path.ratio_min, scheduler.path.ratio_max], dtype=torch.float64)
    low, high = angle_of_ratio(ends, scheduler.sigma_data).tolist()
    a, b, c, g = shape
    places = ((i + c) / (num_steps - 1 + c + g) for i in range(num_steps))
    return [low + (high - low) * (1 - u**a) ** b for u in places]


def _search(
    attempt: "Callable[[Sequence[float]], tuple[float, _Fitter]]", max_runs: int, from_prior: bool
) -> "_Fitter":
    """Moves along each parameter in turn, halved when none helps (Hooke and Jeeves, 1961)."""
    point, moves, runs = list(GRID_START), list(GRID_MOVES), 1
    if from_prior:
        # On a path that grows (VE) the noise differs from points of earlier times by more than a network bears.
        point[2] = moves[2] = 0.0
    error, best = attempt(point)
    while runs < max_runs and max(moves) > 0.02:
        improved = False
        for k, move in enumerate(moves):
            for trial_move in (move, -move):
                trial = [*point[:k], point[k] + trial_move, *point[k + 1 :]]
                if runs == max_runs or move == 0.0 or trial[k] < GRID_LEAST[k]:
                    continue
                runs += 1
                trial_error, fitter = attempt(trial)
                if trial_error < error:
                    error, best, point, improved = trial_error, fitter, trial, True
                    break
        if not improved:
            moves = [move / 2 for move in moves]
    return best


class _Fitter(Watcher):
    """Finds the weights of each step when it comes to it, by least squares on a reference."""

    def prepare(self, angles: list[float], history: int, reference: Recorder) -> None:
        self.angles, self.history, self.reference = [*angles, 0.0], history, reference
        self.called_at = ratio_of_angle(torch.tensor(angles, dtype=torch.float64), self.sigma_data).tolist()
        high = angle_of_ratio(torch.tensor(self.path.ratio_max, dtype=torch.float64), self.sigma_data).item()
        self.prior = adams_increments(high, angles, 0.0, order=3, corrected_steps=2)
        self.keep: list[float] = []
        self.weights: list[list[float]] = []
        self.derivatives: list[torch.Tensor] = []

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        stage, point = self._stages[self.turns], self.normalised(sample)
        if self.turns == 0 and not torch.allclose(point, to_float64(self.reference.points[0]), rtol=1e-3, atol=1e-3):
            raise ValueError("`run` must draw the same noise for the same seed, whatever the number of steps.")
        derivative = stage.on_sample * to_float64(sample) + stage.on_output * to_float64(model_output)
        self.derivatives = [*self.derivatives, derivative][-self.history :]
        target = self.reference.at(self.angles[self.turns + 1])

        # The last column is the sample, whose weight is 1 before the fit.
        columns = torch.stack([tensor.flatten() for tensor in (*self.derivatives, point)])
        prior = self.prior[self.turns][-len(self.derivatives) :]
        start = columns.new_tensor([0.0] * (len(self.derivatives) - len(prior)) + [*prior, 1.0])
        gram = columns @ columns.T
        ridge = RIDGE * gram.trace() / len(columns) + torch.finfo(gram.dtype).tiny
        missing = columns @ (target.flatten() - start @ columns)
        fitted = start + torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), missing)
        *weights, keep = fitted.tolist()
        self.weights.append(weights)
        self.keep.append(keep)
        moved = (fitted @ columns).reshape(point.shape)
        self.end = (self.scale(*stage.end) * moved).to(sample.device, sample.dtype)
        self.turns += 1
        return (self.end,) if kwargs.get("return_dict") is False else FlowMatchEulerDiscreteSchedulerOutput(self.end)
