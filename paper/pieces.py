# SPDX-License-Identifier: Apache-2.0
"""The pieces of the reproduction: each trains a model or measures a trained one, and is a file when it is done."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from objectives import OBJECTIVES, Flow
from problems import LEVELS, PROBLEMS, Checkerboard, Digits
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from diffusers_fm.evaluation.sampling import straightness
from diffusers_fm.files import replace_text
from diffusers_fm.likelihood import bits_per_dim, log_likelihood
from diffusers_fm.solvers import Solution
from diffusers_fm.transport import transport


Figures = dict[str, Any]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Size:
    """
    How much is trained and measured.

    Args:
        steps (`int`):
            Optimizer steps of a training.
        batch_size (`int`):
            Samples in a step.
        learning_rate (`float`):
            At its peak.
        looks (`tuple[int, ...]`):
            Steps at which samples are looked at in training.
        num_early (`int`):
            Samples that are looked at then.
        num_samples (`int`):
            Samples that are compared with data after it.
        num_solver_samples (`int`):
            Samples of each solver and number of calls.
        calls (`tuple[int, ...]`):
            Numbers of calls of the network to sample with.
        num_likelihoods (`int`):
            Held-out samples whose likelihood is measured.
        num_ways (`int`):
            Ways from noise to data that are looked at.
    """

    steps: int
    batch_size: int
    learning_rate: float
    looks: tuple[int, ...]
    num_early: int
    num_samples: int
    num_solver_samples: int
    calls: tuple[int, ...]
    num_likelihoods: int
    num_ways: int


SIZES = {
    "digits": Size(
        steps=2500,
        batch_size=128,
        learning_rate=2e-3,
        looks=(100, 300, 800, 1600, 2500),
        num_early=250,
        num_samples=1000,
        num_solver_samples=200,
        calls=(4, 8, 12, 16, 24, 32, 48),
        num_likelihoods=50,
        num_ways=32,
    ),
    "checkerboard": Size(
        steps=8000,
        batch_size=256,
        learning_rate=2e-3,
        looks=(100, 500, 2000, 4000, 8000),
        num_early=1000,
        num_samples=4000,
        num_solver_samples=1000,
        calls=(4, 8, 10, 12, 16, 20, 32, 64),
        num_likelihoods=1000,
        num_ways=200,
    ),
}
TOLERANCE = 1e-5
REFERENCE_TOLERANCE = 1e-6
LIKELIHOOD_TOLERANCE = 1e-4
# The weights that are measured are an average over about this many of the last steps, whatever the objective.
AVERAGE_DECAY = 0.99
NUM_DRAWS = 20
VIEW_TIMES = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
VIEW_CALLS = (4, 8, 10, 20)
VIEW_CELLS = 48


@dataclass(frozen=True)
class Piece:
    """
    A piece of work: what to do with one model.

    Args:
        problem (`str`):
            Key of `PROBLEMS`.
        objective (`str`):
            Key of `OBJECTIVES`.
        seed (`int`):
            Of weights, data, noise and times.
        kind (`str`):
            Key of `KINDS`.
        folder (`Path`):
            Where results are.
        size ([`Size`]):
            How much.
    """

    problem: str
    objective: str
    seed: int
    kind: str
    folder: Path = field(compare=False)
    size: Size = field(compare=False)

    @property
    def stem(self) -> Path:
        """Path of its files, without their suffixes."""
        return self.folder / self.problem / f"{self.objective}-{self.seed}" / self.kind

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stem.with_suffix(".json").is_file()

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers that do not depend on the objective: all are compared on the same ones."""
        return torch.Generator().manual_seed(1000 * self.seed + purpose)

    def run(self) -> None:
        """Do the work and write its files; the JSON last, so that it stands for the whole."""
        self.stem.parent.mkdir(parents=True, exist_ok=True)
        start = time.process_time()
        figures, arrays = KINDS[self.kind](self)
        figures["cpu_seconds"] = time.process_time() - start
        if arrays:
            np.savez_compressed(self.stem.with_suffix(".npz"), **arrays)
        replace_text(self.stem.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")


@cache
def load_problem(name: str, folder: Path) -> Digits | Checkerboard:
    """The data, once in a process."""
    return PROBLEMS[name](folder)


def load_flow(piece: Piece) -> Flow:
    """The trained model that a piece measures."""
    flow = Flow(OBJECTIVES[piece.objective], PROBLEMS[piece.problem].network())
    flow.network.load_state_dict(load_file(piece.stem.with_name("weights.safetensors")))
    return flow.eval()


def carry(flow: Flow, x: torch.Tensor, start: float, end: float, **options: Any) -> Solution:
    """[`transport`] in the path's own time, at the least to the first time that it admits."""
    start, end = max(start, flow.first_time), max(end, flow.first_time)
    options |= {"prediction_type": flow.objective.prediction_type, "coordinates": "native"}
    return transport(flow, x, flow.path, start=start, end=end, **options)


def prior(piece: Piece, flow: Flow, count: int, purpose: int = 1) -> torch.Tensor:
    """Points at t = 1, of the same standard normal noise for all objectives."""
    noise = torch.randn(count, *PROBLEMS[piece.problem].shape, generator=piece.generator(purpose))
    return noise * flow.path.prior_std


def sample(piece: Piece, flow: Flow, count: int, purpose: int = 1, tolerance: float = TOLERANCE) -> Solution:
    """Samples as the paper makes them: by dopri5 in the path's own time, here each with steps of its own."""
    x = prior(piece, flow, count, purpose)
    options = {"method": "dopri5", "num_steps": None, "rtol": tolerance, "atol": tolerance}
    return carry(flow, x, 1.0, 0.0, step_control="per_sample", **options)


def mean_calls(solution: Solution) -> float:
    """Calls of the network for a sample."""
    return solution.evaluations.double().mean().item()


def view(samples: torch.Tensor) -> np.ndarray:
    """Counts of points in the cells of [-3, 3] x [-3, 3], for pictures."""
    edges = np.linspace(-3, 3, VIEW_CELLS + 1)
    points = samples.double().numpy()
    return np.histogram2d(points[:, 0], points[:, 1], bins=(edges, edges))[0].astype(np.uint16)


def train(piece: Piece) -> tuple[Figures, Arrays]:
    """Train a model, and look at its samples on the way."""
    size, problem = piece.size, load_problem(piece.problem, piece.folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(piece.seed)
        flow = Flow(OBJECTIVES[piece.objective], PROBLEMS[piece.problem].network())
    averaged = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY))
    optimizer = torch.optim.Adam(flow.parameters(), lr=size.learning_rate)
    # The paper's schedule "poly": a linear warm-up, then linear to nothing.
    schedule = get_scheduler("polynomial", optimizer, num_warmup_steps=size.steps // 20, num_training_steps=size.steps)
    generator = piece.generator(0)
    losses, rows, views = [], [], {}
    for step in range(1, size.steps + 1):
        flow.train()
        loss = flow.loss(problem.draw(size.batch_size, generator), generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        averaged.update_parameters(flow)
        losses.append(loss.item())
        if step in size.looks:
            solution = sample(piece, averaged.module.eval(), size.num_early)
            samples = solution.x.float()
            rows.append(
                {
                    "step": step,
                    "loss": float(np.mean(losses[-100:])),
                    "nfe": mean_calls(solution),
                    "distance": problem.distance(samples),
                }
            )
            if piece.problem == "checkerboard":
                views[f"step-{step}"] = view(samples)
    save_file(averaged.module.network.state_dict(), piece.stem.with_name("weights.safetensors"))
    return {"looks": rows}, views


def measure_samples(piece: Piece) -> tuple[Figures, Arrays]:
    """Distance of samples from data, and the calls of the adaptive solver."""
    flow, problem = load_flow(piece), load_problem(piece.problem, piece.folder)
    solution = sample(piece, flow, piece.size.num_samples)
    samples = solution.x.float()
    figures = {
        "distance": problem.distance(samples),
        "nfe": mean_calls(solution),
        "nfe_max": int(solution.evaluations.max()),
    }
    if piece.problem == "digits":
        return figures, {"images": problem.to_pixels(samples[:40]).numpy()}
    return figures, {"final": view(samples)}


def measure_likelihood(piece: Piece) -> tuple[Figures, Arrays]:
    """Bits per dimension of held-out samples: of digits for each K, of points by the exact trace."""
    flow, size = load_flow(piece), piece.size
    options = {
        "prediction_type": flow.objective.prediction_type,
        "coordinates": "native",
        "method": "dopri5",
        "num_steps": None,
        "rtol": LIKELIHOOD_TOLERANCE,
        "atol": LIKELIHOOD_TOLERANCE,
        "start": flow.first_time,
        "batch_size": 1000,
    }
    if piece.problem == "checkerboard":
        data = Checkerboard.draw(size.num_likelihoods, piece.generator(2))
        result = log_likelihood(flow, data, flow.path, divergence="exact", **options)
        bits = -result.log_prob / (2 * math.log(2))
        return {"bits_per_dim": bits.mean().item(), "outside": float((bits > 5).float().mean())}, {}
    images = Digits.load("test")[: size.num_likelihoods]
    # All draws of all images at once: the images over and over, each time with dequantisation noise of its own.
    many = images.repeat(NUM_DRAWS, 1, 1, 1)
    result = bits_per_dim(flow, many, flow.path, levels=LEVELS, generator=piece.generator(2), **options)
    log_probs = result.log_prob.reshape(NUM_DRAWS, len(images))
    nats_per_bit = math.log(2) * images[0].numel()
    by_draws = {}
    for k in (1, 5, 20):
        # As many estimates with K draws as there are disjoint sets of them.
        groups = log_probs.reshape(-1, k, log_probs.shape[1]).logsumexp(1) - math.log(k)
        # From a draw outside of what it has learned a flow may run far away: the median, not the mean, over images.
        by_draws[str(k)] = (-groups.mean(0) / nats_per_bit).median().item()
    return {"bits_per_dim": by_draws, "runaways": float((-log_probs / nats_per_bit > 10).float().mean())}, {}


def measure_solvers(piece: Piece) -> tuple[Figures, Arrays]:
    """Error against the exact flow and distance from data, by calls, with equal steps in the path's own time."""
    flow, problem, size = load_flow(piece), load_problem(piece.problem, piece.folder), piece.size
    x = prior(piece, flow, size.num_solver_samples, purpose=3)
    exact = sample(piece, flow, size.num_solver_samples, purpose=3, tolerance=REFERENCE_TOLERANCE).x
    norm = exact.square().mean().sqrt()
    rows = []
    for solver, stages in (("euler", 1), ("midpoint", 2), ("rk4", 4)):
        for calls in size.calls:
            if calls % stages:
                continue
            options = {"method": solver, "num_steps": calls // stages, "grading": 1.0}
            samples = carry(flow, x, 1.0, 0.0, **options).x
            error = ((samples - exact).square().mean().sqrt() / norm).item()
            rows.append(
                {"solver": solver, "nfe": calls, "error": error, "distance": problem.distance(samples.float())}
            )
    return {"rows": rows, "distance_of_exact": problem.distance(exact.float())}, {}


@torch.no_grad()
def measure_ways(piece: Piece) -> tuple[Figures, Arrays]:
    """Straightness of the trajectories from noise to data, how early they show their end, and pictures of them."""
    flow, size = load_flow(piece), piece.size
    x = prior(piece, flow, size.num_ways, purpose=4)
    times = np.linspace(1.0, 0.0, 21)
    points, guesses = [x.double()], []
    for before, after in zip(times, times[1:]):
        at = torch.full((len(x),), max(before, flow.first_time), dtype=torch.float64)
        state = points[-1].float()
        guesses.append(flow.path.convert(flow(state, at), state, at, flow.objective.prediction_type, "sample"))
        points.append(carry(flow, state, before, after, method="rk4", num_steps=4, grading=1.0).x)
    end = points[-1]
    scale = end.square().mean().sqrt()
    to_end = [((guess - end).square().mean().sqrt() / scale).item() for guess in guesses]
    figures = straightness(times, torch.stack(points).flatten(2).numpy())
    arrays = {"times": times, "ways": torch.stack([point[:200] for point in points]).float().numpy()}
    if piece.problem == "digits":
        arrays["ways"] = arrays["ways"][:, :8]
    else:
        x = prior(piece, flow, size.num_samples, purpose=5)
        for before, after in zip((1.0, *VIEW_TIMES), VIEW_TIMES):
            x = (
                x
                if before == after
                else carry(flow, x, before, after, method="rk4", num_steps=12, grading=1.0).x.float()
            )
            # As the network sees them: points of the exploding path would leave the picture.
            arrays[f"time-{after}"] = view(x * flow.path.input_scale(torch.tensor(after)))
        for calls in VIEW_CALLS:
            options = {"method": "midpoint", "num_steps": calls // 2, "grading": 1.0}
            arrays[f"calls-{calls}"] = view(carry(flow, prior(piece, flow, size.num_samples), 1.0, 0.0, **options).x)
    summary = {name: float(values.mean()) for name, values in figures.items()}
    return {**summary, "error_of_data_by_time": dict(zip(map(str, times[:-1].round(3).tolist()), to_end))}, arrays


KINDS: dict[str, Callable[[Piece], tuple[Figures, Arrays]]] = {
    "training": train,
    "samples": measure_samples,
    "likelihood": measure_likelihood,
    "solvers": measure_solvers,
    "ways": measure_ways,
}


def all_pieces(folder: Path, seeds: list[int], sizes: dict[str, Size]) -> list[list[Piece]]:
    """The pieces in stages: a stage needs those before it."""
    stages = []
    for seed in seeds:
        for kinds in (["training"], [kind for kind in KINDS if kind != "training"]):
            stage = []
            for problem in sizes:
                for objective in OBJECTIVES:
                    for kind in kinds:
                        # As in the paper, the two paths of flow matching.
                        if kind == "solvers" and not objective.startswith("fm-"):
                            continue
                        stage.append(Piece(problem, objective, seed, kind, folder, sizes[problem]))
            stages.append(stage)
    return stages
