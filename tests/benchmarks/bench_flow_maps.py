# SPDX-License-Identifier: Apache-2.0
"""
Losses of flow maps on a 1-D mixture: distance to the data by number of calls, and the cost of a step.

`python tests/benchmarks/bench_flow_maps.py --seeds 1` prints the table of docs/flow_maps.md; `--time_scale 1000`
makes features of the times that turn about as fast as those of diffusers' networks.
"""

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusers_fm.flow_maps import flow_map_loss, sample_flow_map, sample_intervals
from diffusers_fm.paths import OTPath


MEANS, STD = (-0.82, 0.82), 0.15
CALLS = (1, 2, 4, 64)


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    name: str
    loss: dict[str, Any]
    random_split: bool = False
    equal_share: float = 0.5
    time_scale: float = 1.0


SETTINGS = (
    Setting("flow matching", {}, equal_share=1.0),
    Setting("semigroup, random split", {"objective": "semigroup"}, random_split=True),
    Setting("semigroup, midpoint (shortcut)", {"objective": "semigroup"}),
    Setting("semigroup, a quarter of the batch", {"objective": "semigroup"}, random_split=True, equal_share=0.75),
    Setting("Lagrangian, finite difference", {"objective": "lagrangian"}),
    Setting("Lagrangian, jvp", {"objective": "lagrangian", "derivative": "jvp"}),
    Setting("MeanFlow, finite difference", {"objective": "mean_flow"}),
    Setting("MeanFlow, jvp", {"objective": "mean_flow", "derivative": "jvp"}),
    Setting("MeanFlow, jvp, p = 1", {"objective": "mean_flow", "derivative": "jvp", "power": 1.0}),
    Setting("improved MeanFlow, jvp", {"objective": "improved_mean_flow", "derivative": "jvp"}),
)


class Network(nn.Module):
    """An MLP of x and of sines and cosines of the times, up to the frequency `time_scale`."""

    def __init__(self, time_scale: float, width: int = 128) -> None:
        super().__init__()
        frequencies = 0.5 * max(time_scale, 1.0) ** (torch.arange(8) / 7) if time_scale > 1 else torch.arange(1, 4) / 2
        self.register_buffer("frequencies", torch.pi * frequencies)
        features = 1 + 4 * len(frequencies)
        sizes = [features, width, width, width]
        hidden = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 1))

    def forward(self, x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        angles = torch.cat([r[:, None] * self.frequencies, t[:, None] * self.frequencies], 1)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))


def train(
    setting: Setting, steps: int, seed: int, batch_size: int = 256, decay: float = 0.99
) -> tuple[Callable[..., torch.Tensor], float]:
    """The average velocity that a setting learns, and the CPU time of a step in milliseconds."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = Network(setting.time_scale)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return network(x, r.float(), t.float())

    start = time.process_time()
    for _ in range(steps):
        data = draw_data(batch_size, generator)
        noise = torch.randn(batch_size, 1, generator=generator)
        r, t = sample_intervals("uniform", batch_size, generator=generator, equal_share=setting.equal_share)
        x = OTPath().sample(data, noise, t)
        fraction = torch.rand(batch_size, generator=generator) if setting.random_split else 0.5
        loss = flow_map_loss(u, x, r, t, noise - data, fraction=fraction, **setting.loss).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for kept, value in zip(average.parameters(), network.parameters()):
                kept.lerp_(value, 1 - decay)
    cost = 1000 * (time.process_time() - start) / steps
    # Euler, if no interval was learnt.
    return lambda x, r, t: average(x, (r if setting.loss else t).float(), t.float()), cost


def draw_data(count: int, generator: torch.Generator) -> torch.Tensor:
    modes = torch.randint(len(MEANS), (count,), generator=generator)
    return torch.tensor(MEANS)[modes][:, None] + STD * torch.randn(count, 1, generator=generator)


@torch.no_grad()
def distance(u: Callable[..., torch.Tensor], calls: int, count: int = 20_000) -> float:
    """W1 to the data: the mean distance of sorted samples to sorted data, of evenly spread noise and quantiles."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noise = torch.special.ndtri(levels).float()[:, None]
    grid = torch.linspace(-2.5, 2.5, 100_001, dtype=torch.float64)
    cdf = sum(torch.special.ndtr((grid - mean) / STD) for mean in MEANS) / len(MEANS)
    quantiles = grid[torch.searchsorted(cdf, levels).clamp(max=len(grid) - 1)].float()
    samples = sample_flow_map(u, noise, torch.linspace(1, 0, calls + 1, dtype=torch.float64))
    return (samples[:, 0].sort().values - quantiles).abs().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--time_scale", type=float, default=1.0, help="greatest frequency of the times' features")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| loss | W1 at " + " | ".join(f"{calls}" for calls in CALLS) + " calls | ms a step |")
    print("|---|" + "---|" * (len(CALLS) + 1))
    for setting in SETTINGS:
        if args.only in setting.name:
            setting = Setting(**{**vars(setting), "time_scale": args.time_scale})
            runs = [train(setting, args.steps, seed) for seed in range(args.seeds)]
            cells = []
            for calls in CALLS:
                distances = [distance(u, calls) for u, _ in runs]
                spread = f" to {max(distances):.3f}" if args.seeds > 1 else ""
                cells.append(f"{min(distances):.3f}{spread}")
            cells.append(f"{min(cost for _, cost in runs):.2f}")
            print(f"| {setting.name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
