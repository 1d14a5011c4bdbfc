# SPDX-License-Identifier: Apache-2.0
"""Errors of the marginals of stochastic samplers, for Gaussian data.

    python tests/benchmarks/bench_marginals.py

Data with mean 0.8 and standard deviation 0.5, an exact network, 20,000 samples. A sampler that keeps the marginals
ends at these two numbers as the number of steps grows.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import gaussian

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.paths import OTPath


MEAN, STD = 0.8, 0.5


def samplers() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Schedulers, and what their `step` is given."""
    table: dict[str, tuple[Any, dict[str, Any]]] = {
        "stock FlowMatchEuler": (FlowMatchEulerDiscreteScheduler(), {}),
        "stock FlowMatchEuler, `stochastic_sampling`": (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), {}),
    }
    for churn in (5.0, 20.0):
        table[f"stock FlowMatchHeun, `s_churn={churn:g}`"] = (FlowMatchHeunDiscreteScheduler(), {"s_churn": churn})
    options: list[dict[str, Any]] = [{"eta": 0.5}, {"eta": 1.0}]
    options += [{"solver": "heun", "s_churn": churn} for churn in (5.0, 20.0)]
    options += [{"solver": "euler_maruyama"}, {"solver": "euler_maruyama", "sampling_path": "angle"}]
    for option in options:
        label = ", ".join(f"`{key}={value!r}`" for key, value in option.items())
        for path in ("ot", "vp"):
            table[f"ours on {path}, {label}"] = (FlowMatchScheduler(path=path, **option), {})
    return table


def moments(scheduler: Any, options: dict[str, Any], num_steps: int, num_samples: int) -> tuple[float, float]:
    """Mean and standard deviation of what a sampler makes."""
    problem = gaussian((1,), MEAN, STD)
    path = scheduler.path if isinstance(scheduler, FlowMatchScheduler) else OTPath()
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    x = torch.randn(num_samples, 1, generator=generator)
    for timestep in scheduler.timesteps:
        t = (timestep.double() / 1000).expand(num_samples)
        answer = problem.predict(path, x.double(), t, "flow_prediction").float()
        x = scheduler.step(answer, timestep, x, generator=generator, return_dict=False, **options)[0]
    return x.mean().item(), x.std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--num_samples", type=int, default=20_000)
    args = parser.parse_args()
    print(f"Mean and standard deviation, exactly {MEAN:.3f} and {STD:.3f}\n")
    print("| sampler | " + " | ".join(f"{steps} steps" for steps in args.num_steps) + " |")
    print("|---" + "|---:" * len(args.num_steps) + "|")
    for name, (scheduler, options) in samplers().items():
        cells = [moments(scheduler, options, steps, args.num_samples) for steps in args.num_steps]
        print(f"| {name} | " + " | ".join(f"{mean:.3f}, {std:.3f}" for mean, std in cells) + " |")


if __name__ == "__main__":
    main()
