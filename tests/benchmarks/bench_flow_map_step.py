# SPDX-License-Identifier: Apache-2.0
"""Cost of a training step of each loss of flow maps, in time and memory, in steps of flow matching.

    python tests/benchmarks/bench_flow_map_step.py pipelines/dit-digits

The network is the pipeline's, untrained. A step is the loss, its gradient and the optimizer's step; the losses take
turns in one process, and the figure is the median of the ratios to the flow matching step of the same turn. Memory is
the most that tensors of a step take at once beside weights, gradients and the optimizer's state.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffusers_fm import FlowMatchPipeline, init_pipeline
from diffusers_fm.flow_maps import average_velocity, flow_map_loss, sample_intervals
from diffusers_fm.models.interval import IntervalConditioning
from diffusers_fm.paths import OTPath


LOSSES: dict[str, dict[str, Any]] = {
    "flow matching": {"equal_share": 1.0},
    "semigroup, a quarter of the rows": {"objective": "semigroup", "equal_share": 0.75},
    "semigroup": {"objective": "semigroup"},
    "semigroup, all rows": {"objective": "semigroup", "equal_share": 0.0},
    "lagrangian": {"objective": "lagrangian"},
    "lagrangian, jvp": {"objective": "lagrangian", "derivative": "jvp"},
    "mean_flow": {"objective": "mean_flow"},
    "mean_flow, jvp": {"objective": "mean_flow", "derivative": "jvp"},
    "improved_mean_flow": {"objective": "improved_mean_flow"},
}


def peak_bytes(step: Callable[[], Any]) -> int:
    """Most bytes that a function holds at once of what it allocates on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=15)
    args = parser.parse_args()

    pipeline = init_pipeline(args.folder, seed=0, pipeline_class=FlowMatchPipeline)
    network = pipeline.denoiser.train()
    conditioning = IntervalConditioning(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    labels = pipeline.prepare_class_labels([i % 10 for i in range(args.batch_size)])

    def predict(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        conditioning.end = r
        return pipeline.predict(x, t, labels)

    u = average_velocity(predict, OTPath(), time_scale=1000.0)
    data, noise = torch.randn(2, args.batch_size, *pipeline.sample_shape)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    memory: dict[str, int] = {}
    for turn in range(args.turns + 2):
        for name, options in LOSSES.items():
            options = dict(options)
            r, t = sample_intervals("uniform", args.batch_size, equal_share=options.pop("equal_share", 0.5))
            x = (1 - t.float()[:, None, None, None]) * data + t.float()[:, None, None, None] * noise

            def step(r: torch.Tensor = r, t: torch.Tensor = t, x: torch.Tensor = x, options: Any = options) -> None:
                flow_map_loss(u, x, r, t, noise - data, args=(labels,), **options).mean().backward()

            # Gradients and state of the optimizer are there from the first turn on.
            if turn == 1:
                memory[name] = peak_bytes(step)
            begin = time.process_time()
            optimizer.zero_grad(set_to_none=False)
            step()
            optimizer.step()
            if turn > 1:
                seconds[name].append(time.process_time() - begin)
    print("| loss | CPU time of a step | memory | MiB |\n|---|---|---|---|")
    for name, times in seconds.items():
        ratios = [one / base for one, base in zip(times, seconds["flow matching"])]
        part, size = memory[name] / memory["flow matching"], memory[name] / 2**20
        print(f"| {name} | {statistics.median(ratios):.2f} | {part:.2f} | {size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
