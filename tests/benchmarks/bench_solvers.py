# SPDX-License-Identifier: Apache-2.0
"""Calls of the network that a solver needs for a given error.

    python tests/benchmarks/bench_solvers.py                    # exact Gaussian mixtures on OT, VP and VE
    python tests/benchmarks/bench_solvers.py --pipeline FOLDER  # a trained pipeline, on its own path

The error is `|x - reference| / |reference|` over a batch of starting noises; the reference is a dopri5 solution of the
same ODE from the same noise down to clean data. The calls for an error are those from which on a solver stays below
it, read off a list of step counts, log-linear between its entries. For each problem our solvers are divided by the
best existing one.

Existing are the schedulers of diffusers with the grids that they offer, and midpoint and RK4 with equal steps in the
path's own time. Stock schedulers are helped where they would fail for reasons other than the solver: the field is
evaluated at the exact noise level of their `sigmas` although some round `timesteps` to integers, they start at the
right scale, their betas are those of the path, EDM is told the data's standard deviation, and DEIS, which stops at its
last noise level, ends in the data estimate of its last call. Those that integrate in the coordinates of diffusion (VP,
EDM) are given every path in them.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import GaussianMixture, draw_mixture, ring_mixture

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.paths import OTPath, make_path
from diffusers_fm.schedulers.calibration import calibrate
from diffusers_fm.solvers import odeint


LEVELS = (1e-1, 1e-2, 1e-3)
# Numbers of steps that are tried, and calls up to which.
STEPS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 48, 57, 68, 80, 96, 114)
MOST_CALLS = 114
# Steps of the trajectories that calibrated steps are fitted to, and grids that are tried for each number of them.
FIT = {"reference_steps": 2 * MOST_CALLS, "max_runs": 32}

GRADED = {"sampling_path": "angle", "timestep_spacing": "graded"}
OURS: dict[str, dict[str, str]] = {
    **{f"{solver} angle graded": {"solver": solver} | GRADED for solver in ("abm3", "abm2", "ab3", "ab2")},
    **{f"{solver} ot trailing": {"solver": solver} for solver in ("abm3", "abm2", "ab3", "ab2", "dpmpp_2m")},
    **{f"{solver} ot trailing": {"solver": solver} for solver in ("euler", "midpoint", "heun", "rk4", "dopri5")},
}
NATIVE = ("euler", "midpoint", "rk4")
# Fitted to each problem, on other noise than that of the measurement; the fit's own calls are stated apart.
CALIBRATED = "calibrated"
CALIBRATED_STEPS = ((1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 17, 20, 24, 28, 34), (40, 48, 57), (80, 114))

Curve = list[tuple[int, float]]
Table = dict[str, tuple[float, ...]]
INDICES = range(len(LEVELS))


@dataclass(frozen=True)
class Problem:
    """
    An ODE with a known solution.

    Args:
        name (`str`):
            What it is called.
        config (`dict`):
            The configuration of `FlowMatchScheduler`: the path and what the model answers.
        model (`Callable`):
            `model(x, timestep)`: the model's answer at `x_t`.
        straight (`Callable`):
            `straight(r, x)`: noise minus data in the straight coordinates.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Standard normal noise.
        reference (`torch.Tensor` of shape `(batch_size, ...)`):
            The data that it leads to.
    """

    name: str
    config: dict[str, Any]
    model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    straight: Callable[[float, torch.Tensor], torch.Tensor]
    noise: torch.Tensor
    reference: torch.Tensor

    def error(self, x: torch.Tensor) -> float:
        """The relative error of a solution; infinite if it is not finite."""
        error = ((x - self.reference).norm() / self.reference.norm()).item()
        return error if math.isfinite(error) else math.inf

    def estimates(self, x: torch.Tensor, alpha: float, sigma: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The estimates of data and noise at `x = alpha * data + sigma * noise`."""
        scale = alpha + sigma
        velocity = self.straight(sigma / scale, x / scale)
        return (x - sigma * velocity) / scale, (x + alpha * velocity) / scale


def mixtures(seed: int) -> dict[str, GaussianMixture]:
    """Nine mixtures: in 2, 8 and 64 dimensions, with narrow, wide and both kinds of modes, and a single Gaussian."""
    one = draw_mixture(seed + 8, (8,), modes=1, narrowest=0.3, widest=1.0)
    slanted = torch.linspace(0.3, 1.5, 8, dtype=torch.float64).expand(1, 8)
    image = draw_mixture(seed + 6, (1, 8, 8), modes=6, narrowest=0.05, widest=0.5)
    return {
        "2-D ring, narrow": ring_mixture(5 + seed % 5, 1.2, std=0.1).standardized(),
        "2-D, narrow": draw_mixture(seed + 1, (2,), modes=6, narrowest=0.03, widest=0.1),
        "2-D, wide": draw_mixture(seed + 2, (2,), modes=4, narrowest=0.4, widest=0.8),
        "8-D, narrow and wide": draw_mixture(seed + 3, (8,), modes=5),
        "8-D, wide": draw_mixture(seed + 4, (8,), modes=4, narrowest=0.4, widest=0.8),
        "8x8 image, narrow": draw_mixture(seed + 5, (1, 8, 8), modes=8, narrowest=0.05, widest=0.15),
        "8x8 image, narrow and wide": image,
        "4x4x4 image, wide, half the scale": scaled(draw_mixture(seed + 7, (4, 4, 4), 4, 0.4, 0.8), 0.5),
        "8-D, one Gaussian": GaussianMixture(one.weights, one.means, one.stds * slanted),
    }


def scaled(mixture: GaussianMixture, scale: float) -> GaussianMixture:
    """The mixture times a number."""
    return GaussianMixture(mixture.weights, scale * mixture.means, scale * mixture.stds)


def standard_deviation(mixture: GaussianMixture) -> float:
    """Standard deviation of a coordinate, averaged over all; mixtures here have mean zero."""
    second = mixture.means.square() + mixture.stds.square()
    return math.sqrt(torch.einsum("m,m...->...", mixture.weights, second).mean().item())


def straight_velocity(mixture: GaussianMixture) -> Callable[[float, torch.Tensor], torch.Tensor]:
    """
    `GaussianMixture.straight_field` at one time for the whole batch, by products of matrices: many times as fast.

    The log-densities of the modes are squares completed, `x^2 / v - 2 x a m / v + a^2 m^2 / v`, in float64.
    """
    means, squared_stds = mixture.means.flatten(1), mixture.stds.flatten(1).square()
    log_weights = mixture.weights.log()

    def velocity(ratio: float, x: torch.Tensor) -> torch.Tensor:
        alpha, points = 1 - ratio, x.flatten(1)
        variance = alpha**2 * squared_stds + ratio**2
        precision = 1 / variance
        constant = log_weights - (alpha**2 * means.square() * precision + variance.log()).sum(1) / 2
        log_modes = constant + points @ (alpha * means * precision).T - points.square() @ precision.T / 2
        shares = torch.softmax(log_modes, 1)
        gain = alpha * squared_stds * precision
        data = shares @ (means - gain * alpha * means) + points * (shares @ gain)
        slope = points * (shares @ precision) - shares @ (alpha * means * precision)
        return (ratio * slope - data).reshape(x.shape)

    return velocity


def num_noises(shape: Sequence[int]) -> int:
    """
    How many noises a problem has: the fewer dimensions, the more.

    Between narrow modes a few noises near the border make most of the error; in a small batch there are none, or one
    that decides by chance which solver is the best.
    """
    return max(256, 8192 // math.prod(shape))


def mixture_problem(name: str, mixture: GaussianMixture, path_name: str, batch_size: int) -> Problem:
    """A mixture on a path, in float64."""
    path = make_path(path_name)
    noise = torch.randn(batch_size, *mixture.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    straight = straight_velocity(mixture)

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.double() / 1000
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        scale = alpha + sigma
        velocity = straight(sigma / scale, x / scale)
        data, noise_estimate = (x - sigma * velocity) / scale, (x + alpha * velocity) / scale
        return path.velocity(data, noise_estimate, t.expand(len(x)))

    start = path.ratio_max
    x = noise * path.prior_std / float(path.alpha(torch.ones(1).double()) + path.sigma(torch.ones(1).double()))
    reference = odeint(lambda r, x: straight(float(r[0]), x), x, start, 0.0, rtol=1e-9, atol=1e-9, max_steps=10000).x
    config = {"path": path_name, "sigma_data": standard_deviation(mixture)}
    return Problem(name, config, model, straight, noise, reference)


def pipeline_problem(folder: str, batch_size: int) -> Problem:
    """A trained pipeline, without guidance, its classes in turn."""
    pipeline = FlowMatchPipeline.from_pretrained(folder)
    pipeline.denoiser.eval()
    scheduler, path = pipeline.scheduler, pipeline.scheduler.path
    shape = pipeline.sample_shape
    labels = None
    if pipeline.num_classes:
        labels = pipeline.prepare_class_labels([i % pipeline.num_classes for i in range(batch_size)])
    noise = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(1))
    prediction_type = scheduler.config.prediction_type

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        # A calibration has several times the samples.
        return pipeline.predict(x.float(), timestep, None if labels is None else labels.repeat(len(x) // len(labels)))

    def at(ratio: float, x: torch.Tensor) -> torch.Tensor:
        x = x.float()
        t = path.time_at(torch.tensor(ratio, dtype=torch.float64).clamp(path.ratio_min, path.ratio_max))
        moved = x * float(path.alpha(t) + path.sigma(t))
        answer = model(moved, scheduler.timestep_scale * t)
        data, noise = (path.convert(answer, moved, t, prediction_type, kind) for kind in ("sample", "epsilon"))
        return noise - data

    one = torch.ones((), dtype=torch.float64)
    x = noise * path.prior_std / float(path.alpha(one) + path.sigma(one))
    # Where the network stops, at the noise that the path leaves, the data estimate is the end.
    end = max(path.ratio_min, 1e-4)
    x = odeint(lambda r, x: at(r[0].item(), x), x, path.ratio_max, end, rtol=1e-6, atol=1e-6, max_steps=5000).x
    reference = x - end * at(end, x)
    config = dict(scheduler.config) | {"solver": "euler", "sampling_path": "ot", "timestep_spacing": "trailing"}
    return Problem(Path(folder).name, config, model, at, noise, reference)


# What runs


def run_ours(problem: Problem, settings: dict[str, Any], num_steps: int) -> tuple[int, torch.Tensor]:
    """Calls of the model, and the solution, of our scheduler."""
    return sample(problem, FlowMatchScheduler.from_config(problem.config | settings), problem.noise, num_steps)


def sample(
    problem: Problem, scheduler: FlowMatchScheduler, noise: torch.Tensor, num_steps: int
) -> tuple[int, torch.Tensor]:
    """Calls of the model, and the solution from some noise, of our scheduler."""
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        x = scheduler.step(problem.model(x, timestep), timestep, x, return_dict=False)[0]
    return len(scheduler.timesteps), x


def measure_calibrated(problem: Problem, batch_size: int, most: int, **fit: int) -> tuple[float, ...]:
    """The calls for each level of steps that were fitted to this problem, each number of them on its own."""
    settings = FlowMatchScheduler.from_config(problem.config)

    def run(scheduler: FlowMatchScheduler, num_steps: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(1000 + seed)
        noise = torch.randn(batch_size, *problem.noise.shape[1:], generator=generator, dtype=problem.noise.dtype)
        sample(problem, scheduler, noise, num_steps)

    curve: Curve = []
    calls = 0
    for group in CALIBRATED_STEPS:
        counts = [steps for steps in group if steps <= most]
        if not counts:
            break
        calibration = calibrate(run, settings, counts, **fit)
        config = dict(calibration.scheduler.config)
        curve += [(steps, problem.error(run_ours(problem, config, steps)[1])) for steps in counts]
        calls += calibration.calls
        if math.isfinite(needs(curve)[-1]):
            break
    print(f"\n{problem.name}: {len(curve)} numbers of steps were calibrated in {calls} calls.")
    return needs(curve)


def run_stock(problem: Problem, scheduler: Any, num_steps: int) -> tuple[int, torch.Tensor]:
    """Calls of the model, and the solution, of a stock scheduler, in the coordinates that it integrates in."""
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    name = type(scheduler).__name__
    edm, exploding = name.startswith("EDM"), name in ("HeunDiscreteScheduler",)
    flow = name.startswith("FlowMatch") or scheduler.config.get("use_flow_sigmas", False)
    sigma_data = scheduler.config.get("sigma_data")
    x = problem.noise
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        # Noise level sigma is `sigma` of the flow, or `sigma / alpha` of a diffusion.
        alpha = 1 - sigma if flow else 1.0 if edm or exploding else 1 / math.sqrt(1 + sigma**2)
        level = sigma * alpha if not (flow or edm or exploding) else sigma
        if i == 0:
            spread = math.hypot(alpha, level) if sigma_data is None else math.hypot(alpha * sigma_data, level)
            x = problem.noise * spread
        data, noise = problem.estimates(x, alpha, level)
        if edm:
            scheduler.scale_model_input(x, timestep)
            total = sigma**2 + sigma_data**2
            answer = (data - sigma_data**2 / total * x) * (math.sqrt(total) / (sigma * sigma_data))
        elif flow:
            answer = noise - data
        else:
            answer = (noise - sigma * data) / math.sqrt(1 + sigma**2)
        if name.startswith("DEIS") and i == len(scheduler.timesteps) - 1:
            x = data
        else:
            x = scheduler.step(answer, timestep, x, return_dict=False)[0]
    return len(scheduler.timesteps), x


def run_native(problem: Problem, method: str, num_steps: int) -> tuple[int, torch.Tensor]:
    """
    Calls of the model, and the solution, of equal steps in the path's own time, as in arXiv 2210.02747.

    VP's velocity is infinite at t = 0, so it is integrated to 1e-5. Where noise is left, the data estimate is the end.
    """
    scheduler = FlowMatchScheduler.from_config(problem.config)
    path = scheduler.path
    zero = torch.zeros((), dtype=torch.float64)
    end = 0.0 if math.isfinite(path.d_sigma(zero).item()) else 1e-5

    def velocity(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        answer = problem.model(x, scheduler.timestep_scale * t[0])
        kind = scheduler.config.prediction_type
        return path.convert(answer, x, t[:1].double(), kind, "flow_prediction")

    x = problem.noise * path.prior_std
    solution = odeint(velocity, x, 1.0, end, method=method, num_steps=num_steps)
    alpha, sigma = (float(coefficient(zero + end)) for coefficient in (path.alpha, path.sigma))
    if sigma == 0:
        return solution.nfe, solution.x
    return solution.nfe + 1, problem.estimates(solution.x, alpha, sigma)[0]


def existing(problem: Problem) -> dict[str, Callable[[int], tuple[int, torch.Tensor]]]:
    """The solvers to beat, each as a function of the number of steps."""
    ours = FlowMatchScheduler.from_config(problem.config)
    path = ours.path
    shared = {"solver_order": 2, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    makers: dict[str, Callable[[], Any]] = {}

    def add(name: str, kind: type, **config: Any) -> None:
        makers[name] = lambda: kind(**config)

    if isinstance(path, OTPath):
        add("FlowMatchEuler", FlowMatchEulerDiscreteScheduler)
        add("FlowMatchEuler Karras", FlowMatchEulerDiscreteScheduler, use_karras_sigmas=True)
        add("FlowMatchEuler exponential", FlowMatchEulerDiscreteScheduler, use_exponential_sigmas=True)
        add("FlowMatchHeun", FlowMatchHeunDiscreteScheduler)
        for order in (2, 3):
            flow = shared | {"solver_order": order}
            add(f"UniPC-{order} flow", UniPCMultistepScheduler, **flow)
            add(f"UniPC-{order} flow Karras", UniPCMultistepScheduler, **flow, use_karras_sigmas=True)
            add(f"DPM++{order}M flow", DPMSolverMultistepScheduler, **flow)
            add(f"DEIS-{order} flow", DEISMultistepScheduler, **flow)

    # The betas that make a discrete schedule of the path; OT has no finite one, so there its stock default.
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    squared = (path.sigma(t) / path.alpha(t)).square()
    alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), 1 / (1 + squared)])
    diffusion: dict[str, Any] = {"prediction_type": "v_prediction"}
    low, high = 0.01, 80.0
    if not isinstance(path, OTPath):
        diffusion["trained_betas"] = (1 - alpha_bar[1:] / alpha_bar[:-1]).tolist()
        low, high = squared[0].sqrt().item(), squared[-1].sqrt().item()
    grids = {"": {}, " Karras": {"use_karras_sigmas": True}, " exponential": {"use_exponential_sigmas": True}}
    for grid, option in grids.items():
        for order in (2, 3):
            add(f"DPM++{order}M{grid}", DPMSolverMultistepScheduler, solver_order=order, **diffusion, **option)
            add(f"UniPC-{order}{grid}", UniPCMultistepScheduler, solver_order=order, **diffusion, **option)
            add(f"DEIS-{order}{grid}", DEISMultistepScheduler, solver_order=order, **diffusion, **option)
        add(f"Heun{grid}", HeunDiscreteScheduler, **diffusion, **option)
    edm = {"sigma_min": low, "sigma_max": high, "sigma_data": ours.sigma_data}
    for schedule in ("karras", "exponential"):
        grid = schedule.replace("karras", "Karras")
        for order in (2, 3):
            config = {"solver_order": order, "sigma_schedule": schedule} | edm
            add(f"EDM-DPM++{order}M {grid}", EDMDPMSolverMultistepScheduler, **config)
    add("EDM-Euler Karras", EDMEulerScheduler, **edm)

    native = {f"{name} native": lambda n, name=name: run_native(problem, name, n) for name in ("midpoint", "rk4")}
    return native | {name: lambda n, make=make: run_stock(problem, make(), n) for name, make in makers.items()}


# What is measured


def error_curve(problem: Problem, solve: Callable[[int], tuple[int, torch.Tensor]], most: int = MOST_CALLS) -> Curve:
    """Errors by calls of the model, until the smallest level is reached."""
    curve: Curve = []
    # Each step is a call, or more.
    for num_steps in [steps for steps in STEPS if steps <= most]:
        try:
            calls, x = solve(num_steps)
        except (ZeroDivisionError, IndexError, RuntimeError, ValueError):
            # Some stock schedulers cannot make so few, or so many, steps.
            continue
        if calls > most:
            break
        curve.append((calls, problem.error(x)))
        if curve[-1][1] < LEVELS[-1]:
            break
    return curve


def calls_for(curve: Curve, level: float) -> float:
    """The calls from which on a curve stays below a level, log-linear between its points; infinite if it does not."""
    above = [i for i, (_, error) in enumerate(curve) if error > level]
    i = above[-1] + 1 if above else 0
    if i == len(curve):
        return math.inf
    calls, error = curve[i]
    if i == 0 or not math.isfinite(curve[i - 1][1]) or error == 0.0:
        return float(calls)
    before, error_before = curve[i - 1]
    return before * (calls / before) ** (math.log(error_before / level) / math.log(error_before / error))


def needs(curve: Curve) -> tuple[float, ...]:
    """The calls for each level."""
    return tuple(calls_for(curve, level) for level in LEVELS)


def measure_ours(problem: Problem, most: int = MOST_CALLS) -> Table:
    """The calls that our solvers need."""
    return {
        name: needs(error_curve(problem, lambda n, settings=settings: run_ours(problem, settings, n), most))
        for name, settings in OURS.items()
    }


def measure_existing(problem: Problem, only_the_best: bool, most: int = MOST_CALLS) -> Table:
    """The calls that existing solvers need; solvers that can no longer be the best may be left unfinished."""
    table: Table = {}
    for name, solve in existing(problem).items():
        table[name] = needs(error_curve(problem, solve, most))
        if only_the_best and math.isfinite(table[name][-1]):
            most = min(most, math.ceil(table[name][-1]))
    return table


def best_of(table: Table, index: int, most: int) -> tuple[str, float]:
    """The solver that needs the fewest calls for a level; `most` if none reaches it, as if one just did there."""
    name = min(table, key=lambda name: table[name][index])
    return name, min(table[name][index], most)


def geometric_mean(values: list[float]) -> float:
    """Infinite if one of the values is."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def row(label: str, cells: list[str], width: int = 34) -> str:
    """A line of a table."""
    return f"| {label:<{width}} | " + " | ".join(f"{cell:>10}" for cell in cells) + " |"


def print_header(columns: list[str]) -> None:
    """The first two lines of a table."""
    print(row("solver", columns))
    print(row("---", ["---:"] * len(columns)))


def number(value: float, digits: int = 2) -> str:
    """A figure, or a dash where there is none."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def print_problem(ours: Table, others: Table, all_others: bool) -> None:
    """Calls for each level."""
    print_header([f"{level:.0e}" for level in LEVELS])
    for name, calls in ours.items():
        print(row(name, [number(value, 1) for value in calls]))
    best = [min(others, key=lambda name: others[name][i]) for i in INDICES]
    shown = others if all_others else {name: others[name] for name in dict.fromkeys(best)}
    for name, calls in shown.items():
        print(row(f"existing: {name}", [number(value, 1) for value in calls]))


def measure_mixtures(path: str, args: argparse.Namespace) -> dict[str, tuple[Table, Table, Table]]:
    """Calls for each mixture on a path: of our solvers, of existing ones, and of equal steps in the path's time."""
    results, most = {}, args.most_calls or MOST_CALLS
    for name, mixture in list(mixtures(args.seed).items())[: args.num_mixtures]:
        began = time.perf_counter()
        problem = mixture_problem(name, mixture, path, args.batch_size or num_noises(mixture.shape))
        native = {
            method: needs(error_curve(problem, lambda n, p=problem, method=method: run_native(p, method, n), most))
            for method in NATIVE
        }
        calibrated = measure_calibrated(
            problem, 2 * len(problem.noise), most, **{name: vars(args)[name] for name in FIT}
        )
        ours = measure_ours(problem, most) | {CALIBRATED: calibrated}
        results[name] = (ours, measure_existing(problem, True, most), native)
        if args.verbose:
            print(f"\n{path}, {name} ({time.perf_counter() - began:.0f} s)\n")
            print_problem(*results[name][:2], all_others=False)
            sys.stdout.flush()
    return results


def print_path(path: str, results: dict[str, tuple[Table, Table, Table]], most: int) -> None:
    """Our calls relative to the best existing solver."""
    print(f"\n## {path}: calls relative to the best existing solver, geometric mean over {len(results)} problems\n")
    print_header([*(f"{level:.0e}" for level in LEVELS), "worst 1e-2"])
    for solver in (CALIBRATED, *OURS):
        ratios = [
            [ours[solver][i] / best_of(others, i, most)[1] for ours, others, _ in results.values()] for i in INDICES
        ]
        print(row(solver, [*(number(geometric_mean(values)) for values in ratios), number(max(ratios[1]))]))
    print("\nCalls for 1e-2 of the best existing solver, calibrated, and of abm3 and ab3 (angle graded):\n")
    for name, (ours, others, _) in results.items():
        best, calls = best_of(others, 1, most)
        own = ", ".join(number(ours[solver][1], 1) for solver in (CALIBRATED, "abm3 angle graded", "ab3 angle graded"))
        print(f"- {name}: {best} {number(calls, 1)}; {own}")
    sys.stdout.flush()


def print_between(path: str, results: dict[str, Any], on_ot: dict[str, Any]) -> None:
    """The calls on two paths, compared problem by problem where both reach the error."""
    for title, part in (
        (f"Our calls on {path} relative to our calls on ot", 0),
        (f"Calls on ot relative to {path}, each in its own time (Lipman et al., section 6)", 2),
    ):
        print(f"\n## {title}; in brackets the problems on which both reach the error\n")
        print_header([f"{level:.0e}" for level in LEVELS])
        for solver in (CALIBRATED, *OURS) if part == 0 else NATIVE:
            cells = []
            for i in INDICES:
                pairs = [(results[name][part][solver][i], on_ot[name][part][solver][i]) for name in results]
                ratios = [a / b if part == 0 else b / a for a, b in pairs if math.isfinite(a + b)]
                cells.append(f"{geometric_mean(ratios):.2f} ({len(ratios)})" if ratios else "-")
            print(row(solver, cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", help="a folder of a trained pipeline, in place of mixtures")
    parser.add_argument("--batch_size", type=int, help="noises: of a pipeline 32, of a mixture the more the flatter")
    parser.add_argument("--most_calls", type=int, help=f"of the network: a pipeline's 64, a mixture's {MOST_CALLS}")
    for name, value in FIT.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="of a calibration")
    parser.add_argument("--num_mixtures", type=int, help="by default all nine")
    parser.add_argument("--seed", type=int, default=100, help="of the mixtures")
    parser.add_argument("--paths", nargs="+", default=["ot", "vp", "ve"], help="paths of the mixtures")
    parser.add_argument("--verbose", action="store_true", help="show the calls on each mixture, or of each solver")
    arguments = parser.parse_args()
    diffusers.logging.set_verbosity_error()
    with torch.no_grad():
        if arguments.pipeline is None:
            results = {}
            for path in arguments.paths:
                results[path] = measure_mixtures(path, arguments)
                print_path(path, results[path], arguments.most_calls or MOST_CALLS)
            for path in arguments.paths:
                if path != "ot" and "ot" in results:
                    print_between(path, results[path], results["ot"])
            return
        batch_size, most = arguments.batch_size or 32, arguments.most_calls or 64
        problem = pipeline_problem(arguments.pipeline, batch_size)
        calibrated = measure_calibrated(problem, 4 * batch_size, most, **{name: vars(arguments)[name] for name in FIT})
        ours = measure_ours(problem, most) | {CALIBRATED: calibrated}
        others = measure_existing(problem, False, most)
        print(f"\n## {problem.name}: calls for a relative error\n")
        print_problem(ours, others, arguments.verbose)
        best = [best_of(others, i, most)[1] for i in INDICES]
        for solver in ("abm3 angle graded", CALIBRATED):
            print(f"\n{solver} relative to the best existing solver: ", end="")
            print(", ".join(number(a / b) for a, b in zip(ours[solver], best)))


if __name__ == "__main__":
    main()
