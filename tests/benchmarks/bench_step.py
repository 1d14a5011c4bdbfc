# SPDX-License-Identifier: Apache-2.0
"""Cost of a scheduler step, against stock schedulers.

    python tests/benchmarks/bench_step.py

Time in `step()` for each call of the network, and in one `set_timesteps()`, on a float32 latent of 1x16x128x128, as a
multiple of that of diffusers' `FlowMatchEulerDiscreteScheduler`. It is the CPU time of one thread; all schedulers take
turns in one run, and medians are compared.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffusers_fm import FlowMatchScheduler


SHAPE = (1, 16, 128, 128)
CALLS = 24
FLOW: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ANGLE = {"sampling_path": "angle", "timestep_spacing": "graded"}

# At most this many times stock's Euler in `step()`. Solvers that look back copy the answers, which are the caller's.
TARGETS = {"euler": 0.8, "ab2": 1.4, "midpoint": 1.5, "heun": 1.5, "rk4": 1.5, "abm3 angle": 4.0, "dpmpp_2m": 2.5}


def schedulers() -> dict[str, Any]:
    """Schedulers to compare, stock Euler first."""
    ours = {name: FlowMatchScheduler(solver=name) for name in ("euler", "ab2", "midpoint", "heun", "rk4")}
    ours |= {f"{name} angle": FlowMatchScheduler(solver=name, **ANGLE) for name in ("abm2", "abm3")}
    return {
        "stock FlowMatchEuler": FlowMatchEulerDiscreteScheduler(),
        **ours,
        "dpmpp_2m": FlowMatchScheduler(solver="dpmpp_2m"),
        "euler, vp": FlowMatchScheduler(path="vp"),
        "stock FlowMatchHeun": FlowMatchHeunDiscreteScheduler(),
        "stock DPM++2M": DPMSolverMultistepScheduler(**FLOW),
        "stock UniPC": UniPCMultistepScheduler(**FLOW),
    }


def time_loop(scheduler: Any, x: torch.Tensor, answer: torch.Tensor) -> tuple[float, list[float]]:
    """Seconds of `set_timesteps`, and of each `step`, in one sampling loop of about `CALLS` calls."""
    began = time.thread_time()
    scheduler.set_timesteps(CALLS // scheduler.order)
    laid_out = time.thread_time() - began
    scheduler.set_begin_index(0)
    seconds = []
    for timestep in scheduler.timesteps:
        began = time.thread_time()
        x = scheduler.step(answer, timestep, x, return_dict=False)[0]
        seconds.append(time.thread_time() - began)
    return laid_out, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x, answer = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    compared = schedulers()
    times: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in compared}
    for i in range(arguments.rounds + 1):
        for name, scheduler in compared.items():
            measured = time_loop(scheduler, x, answer)
            if i > 0:
                times[name].append(measured)
    medians = {}
    for name, rounds in times.items():
        laid_out, turns = zip(*rounds)
        # The turns of a solver differ: the median of each, then their mean.
        step = statistics.fmean(statistics.median(seconds) for seconds in zip(*turns))
        medians[name] = (statistics.median(laid_out), step)
    laid_out, step = medians["stock FlowMatchEuler"]
    print(f"stock FlowMatchEuler: step {1e6 * step:.0f} us, set_timesteps {1e6 * laid_out:.0f} us\n")
    print("| scheduler | step() | at most | set_timesteps() |\n|---|---:|---:|---:|")
    for name, (grid, turn) in medians.items():
        print(f"| {name} | {turn / step:.2f} | {TARGETS.get(name, '')} | {grid / laid_out:.1f} |")


if __name__ == "__main__":
    main()
