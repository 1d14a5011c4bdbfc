# SPDX-License-Identifier: Apache-2.0
"""Solver settings for stock checkpoints: exact mixtures on the paths and shifted grids of their families.

    python tests/benchmarks/bench_stock_families.py

For each family its own scheduler is run at its pipeline's default number of steps, and the settings of
`FlowMatchScheduler.from_config` with fewer and fewer steps, on the same noise. A row is the fewest calls from which on
a setting errs less than the stock scheduler does, averaged over the mixtures by the geometric mean. Errors are
`|x - reference| / |reference|`, the reference a fine solution of the same ODE. The mixtures have the dimensions of
small images and unit variance; real checkpoints are neither exact nor guided by 1.
"""

import argparse
import math
from typing import Any

import diffusers
import torch
from bench_solvers import geometric_mean, mixtures, straight_velocity
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from helpers import GaussianMixture

from diffusers_fm import FlowMatchScheduler


SD1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# Stock scheduler, arguments of `set_timesteps`, default steps of the pipeline.
FAMILIES: dict[str, tuple[Any, dict[str, Any], int]] = {
    "SD 1.5 (DDIM)": (DDIMScheduler(**SD1, clip_sample=False, set_alpha_to_one=False), {}, 50),
    "SDXL (Euler)": (EulerDiscreteScheduler(**SD1), {}, 50),
    "SD3 (shift 3)": (FlowMatchEulerDiscreteScheduler(shift=3.0), {}, 28),
    # mu of 1024 x 1024, 4,096 tokens: a shift of 3.16.
    "FLUX (mu 1.15)": (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), {"mu": 1.15}, 50),
}
GRADED = {"sampling_path": "angle", "timestep_spacing": "graded"}
SETTINGS: dict[str, dict[str, Any]] = {
    "abm3, angle, graded": {"solver": "abm3"} | GRADED,
    "abm2, angle, graded": {"solver": "abm2"} | GRADED,
    "ab2, its own grid": {"solver": "ab2"},
    "dpmpp_2m, its own grid": {"solver": "dpmpp_2m"},
    "midpoint, its own grid": {"solver": "midpoint"},
}
MIXTURES = ("8-D, narrow and wide", "8x8 image, narrow", "8x8 image, narrow and wide", "8-D, wide")
BATCH_SIZE = 128
STEPS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 18, 20, 24, 28, 32, 40, 50)


def sample(scheduler: Any, model: Any, noise: torch.Tensor, num_steps: int, **options: Any) -> torch.Tensor:
    """The sampling loop of a stock pipeline."""
    scheduler.set_timesteps(num_steps, **options)
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, timestep), timestep, x, return_dict=False)[0]
    return x


def measure(family: str, mixture: GaussianMixture) -> tuple[float, list[float]]:
    """Error of a family's stock scheduler on a mixture, and the calls of each setting for less; infinite if none."""
    stock, options, default_steps = FAMILIES[family]
    straight, ours = straight_velocity(mixture), FlowMatchScheduler.from_config(stock.config)
    noise = torch.randn(BATCH_SIZE, *mixture.shape, generator=torch.Generator().manual_seed(1)).double()

    def model(x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = (torch.as_tensor(timestep).double() / ours.timestep_scale).clamp(0, 1)
        alpha, sigma = float(ours.path.alpha(t)), float(ours.path.sigma(t))
        velocity = straight(sigma / (alpha + sigma), x / (alpha + sigma))
        data, noise = (x - sigma * velocity) / (alpha + sigma), (x + alpha * velocity) / (alpha + sigma)
        return ours.path.target(data, noise, t.expand(len(x)), ours.config.prediction_type)

    reference = sample(ours.with_settings(**SETTINGS["abm3, angle, graded"]), model, noise, 400, **options)

    def error(x: torch.Tensor) -> float:
        return ((x - reference).norm() / reference.norm()).item()

    goal, needed = error(sample(stock, model, noise, default_steps, **options)), []
    for settings in SETTINGS.values():
        scheduler, calls = ours.with_settings(**settings), math.inf
        # From the many down, as long as the error stays below.
        for steps in reversed(STEPS):
            x = sample(scheduler, model, noise, steps, **options)
            if error(x) > goal:
                break
            calls = len(scheduler.timesteps)
        needed.append(calls)
    return goal, needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=100, help="of the mixtures")
    found = mixtures(parser.parse_args().seed)
    diffusers.logging.set_verbosity_error()
    print(f"| family | stock error | {' | '.join(SETTINGS)} |\n|{'---|' * (len(SETTINGS) + 2)}")
    for name, (_, _, default_steps) in FAMILIES.items():
        goals, needed = zip(*(measure(name, found[each]) for each in MIXTURES))
        means = [geometric_mean(list(calls)) for calls in zip(*needed)]
        cells = " | ".join(f"{mean:.1f}" if math.isfinite(mean) else "-" for mean in means)
        print(f"| {name}, {default_steps} steps | {geometric_mean(list(goals)):.3f} | {cells} |", flush=True)


if __name__ == "__main__":
    with torch.no_grad():
        main()
