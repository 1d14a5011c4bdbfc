# SPDX-License-Identifier: Apache-2.0
"""Cost of a log-likelihood against the usual method, and of an exact trace against a reverse loop.

    python tests/benchmarks/bench_likelihood.py

The first table: plain forward passes per sample (a backward pass counts as two) until the mean error of the
log-density is below 1e-3 nats per dimension, for exact networks of Gaussian mixtures drawn by seed, wide, narrow and
very narrow. The usual way integrates the path's own velocity on equal steps by midpoint or RK4 and takes the
divergence at every stage; the cheaper of the two is the reference. The other usual way is torchdiffeq's adaptive
dopri5, at the loosest tolerance of 1e-2, 1e-2.5, ..., 1e-7 that is good enough. Every
estimate uses the same probe, so that only the error of the integration is seen. The second table: time of the velocity
and its exact divergence, in plain ones.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchdiffeq
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel, UNet2DModel


sys.path.insert(0, str(Path(__file__).parents[1]))

from helpers import GaussianMixture, draw_mixture

from diffusers_fm.divergence import draw_probes, exact_trace, hutchinson_trace
from diffusers_fm.likelihood import log_likelihood
from diffusers_fm.paths import ConditionalPath, make_path
from diffusers_fm.solvers import odeint


TOLERANCE = 1e-3
STEPS = [6, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32, 36, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512, 768]
TOLERANCES = [10 ** (-k / 2) for k in range(4, 15)]
SHAPES = [((2,), 5), ((8,), 5), ((1, 8, 8), 4), ((1, 16, 16), 6)]
WIDTHS = {"wide": (0.1, 0.5), "narrow": (0.03, 0.3), "very narrow": (0.01, 0.1)}
SAMPLES = 16


def usual_field(
    problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor, probes: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The path's own velocity and its divergence, for points and log-densities side by side."""

    def field(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        def velocity(x: torch.Tensor) -> torch.Tensor:
            return problem.predict(path, x, t.expand(len(x)), "flow_prediction")

        output, divergence = hutchinson_trace(velocity, state[:, : problem.dim].reshape(x.shape), probes)
        return torch.cat([output.flatten(1), divergence], 1)

    return field


def usual_start(path: ConditionalPath) -> float:
    """VP's velocity is infinite at t = 0."""
    return 1e-5 if path == make_path("vp") else 0.0


def usual_way(
    problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor, probes: torch.Tensor, method: str, steps: int
) -> tuple[torch.Tensor, float]:
    """The change of log-density by the path's own velocity on equal steps, and its work."""
    field, start = usual_field(problem, path, x, probes), usual_start(path)
    with torch.no_grad():
        state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
        solution = odeint(field, state, start, 1.0, method=method, num_steps=steps)
    return finished(problem, path, solution.x, x), 3 * solution.nfe


def torchdiffeq_way(
    problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor, probes: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, float]:
    """The same by torchdiffeq's adaptive dopri5."""
    field, evaluations = usual_field(problem, path, x, probes), 0

    def counted(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        nonlocal evaluations
        evaluations += 1
        return field(t, state)

    with torch.no_grad():
        state = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
        times = x.new_tensor([usual_start(path), 1.0])
        end = torchdiffeq.odeint(counted, state, times, rtol=tolerance, atol=tolerance, method="dopri5")[-1]
    return finished(problem, path, end, x), 3 * evaluations


def finished(problem: GaussianMixture, path: ConditionalPath, end: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The log-density of data from where the usual ways end."""
    return density(problem, path, end[:, : problem.dim].reshape(x.shape)) + end[:, problem.dim]


def density(problem: GaussianMixture, path: ConditionalPath, noise: torch.Tensor) -> torch.Tensor:
    """The exact marginal at t = 1: the prior's own error is not the solver's."""
    return problem.marginal_log_prob(path, noise, torch.ones(len(noise), dtype=torch.float64))


def ours(
    problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor, **options: object
) -> tuple[torch.Tensor, float]:
    generator = torch.Generator().manual_seed(0)
    result = log_likelihood(problem.model(path), x, path, generator=generator, batch_size=len(x), **options)
    return density(problem, path, result.noise) + result.log_det, result.work.mean().item()


def work_needed(
    solve: Callable[[Any], tuple[torch.Tensor, float]], settings: Sequence[float], exact: torch.Tensor, dims: int
) -> float:
    """The work of the first setting (a step count, a tolerance) from which three in a row are good enough."""
    good: list[float] = []
    for setting in settings:
        log_prob, work = solve(setting)
        good = [*good, work] if (log_prob - exact).abs().mean() / dims < TOLERANCE else []
        if len(good) == 3:
            return good[0]
    return math.inf


def compare(problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor) -> tuple[float, ...]:
    """The work that midpoint, RK4, torchdiffeq's dopri5 and we need."""
    probes = draw_probes(x, 1, "rademacher", torch.Generator().manual_seed(0))
    # The integral of this estimate, with errors that are a thousand times smaller than the tolerance.
    exact, _ = ours(problem, path, x, method="rk4", num_steps=1000, divergence_every=1)

    def usual(method: str) -> float:
        return work_needed(lambda n: usual_way(problem, path, x, probes, method, n), STEPS, exact, problem.dim)

    adaptive = work_needed(lambda tol: torchdiffeq_way(problem, path, x, probes, tol), TOLERANCES, exact, problem.dim)
    best = work_needed(lambda n: ours(problem, path, x, num_steps=n), STEPS, exact, problem.dim)
    return usual("midpoint"), usual("rk4"), adaptive, best


def work_table() -> None:
    against: dict[str, list[list[float]]] = {"midpoint or RK4": [], "torchdiffeq": []}
    print(f"plain forwards for {TOLERANCE} nats per dimension, and ours over midpoint or RK4, over torchdiffeq\n")
    names = ("path", "data", "modes", "midpoint", "rk4", "torchdiffeq", "ours", "fixed", "adaptive")
    print("{:5}{:12}{:13}{:>10}{:>10}{:>13}{:>10}{:>8}{:>10}".format(*names))
    for path_name in ("ot", "vp", "ve"):
        for rows in against.values():
            rows.append([])
        for i, (shape, modes) in enumerate(SHAPES):
            for j, (width, (narrowest, widest)) in enumerate(WIDTHS.items()):
                problem = draw_mixture(300 + 10 * i + j, shape, modes, narrowest, widest)
                midpoint, rk4, adaptive, best = compare(problem, make_path(path_name), problem.sample(SAMPLES, seed=i))
                # Where none arrives, it would need more than the longest run of RK4.
                ratios = [best / min(*other, 12 * STEPS[-1]) for other in ((midpoint, rk4), (adaptive, math.inf))]
                for rows, ratio in zip(against.values(), ratios):
                    rows[-1].append(ratio)
                data = "x".join(map(str, shape))
                works = f"{midpoint:10.0f}{rk4:10.0f}{adaptive:13.0f}{best:10.0f}"
                print(f"{path_name:5}{data:12}{width:13}{works}{ratios[0]:8.2f}{ratios[1]:10.2f}", flush=True)
        for name, rows in against.items():
            mean = math.exp(sum(math.log(value) for value in rows[-1]) / len(rows[-1]))
            print(f"{path_name}: against {name} {mean:.2f} in the geometric mean, {max(rows[-1]):.2f} at worst")


def networks() -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Small networks for 3x8x8 images that run in forward mode."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        add_attention=False,
    )
    dit = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_num_groups=1,
    )
    sd3 = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=3,
        out_channels=3,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=64,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    for model in (unet, dit, sd3):
        model.eval().requires_grad_(False)
    tokens, pooled = torch.randn(1, 1, 32), torch.randn(1, 32)

    def run_sd3(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return sd3(x, tokens.expand(len(x), -1, -1), pooled.expand(len(x), -1), t).sample

    return {
        "UNet2DModel": lambda x, t: unet(x, t).sample,
        "DiTTransformer2DModel": lambda x, t: dit(x, t, torch.zeros(len(x), dtype=torch.long)).sample,
        "SD3Transformer2DModel": run_sd3,
    }


def seconds(function: Callable[[], object], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def trace_costs(model: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> tuple[float, float]:
    """The cost of velocity and exact divergence in reverse and in forward mode, in plain forwards."""
    x, t = torch.randn(2, 3, 8, 8), torch.full((2,), 500.0)
    plain = seconds(lambda: model(x, t), 20)

    def cost(mode: str) -> float:
        return seconds(lambda: exact_trace(lambda x: model(x, t), x, mode, tangents=192), 3) / plain

    return cost("reverse"), cost("forward")


def trace_table() -> None:
    print("\nvelocity and exact divergence in 192 dimensions, in plain forwards (two samples)\n")
    print(f"{'network':24}{'reverse loop':>14}{'forward':>10}{'ratio':>8}")
    for name, model in networks().items():
        reverse, forward = trace_costs(model)
        print(f"{name:24}{reverse:14.1f}{forward:10.1f}{forward / reverse:8.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["work", "trace"], help="print one of the two tables")
    only = parser.parse_args().only
    if only != "trace":
        work_table()
    if only != "work":
        trace_table()
