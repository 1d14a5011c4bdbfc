# SPDX-License-Identifier: Apache-2.0
"""
Grids of straight times, `sigma / (alpha + sigma)`: their spacings, checks and inversions.
"""

from itertools import pairwise
from numbers import Integral

import torch

from ..coordinates import angle_of_ratio, ratio_of_angle
from ..paths import ConditionalPath


TIMESTEP_SPACINGS = ("trailing", "linspace", "leading", "graded")
FINAL_SIGMAS_TYPES = ("zero", "sigma_min")

# The angles of the graded grid are (pi / 2) (1 - (i / N)^1.3)^1.75: finest at the data, finer at the noise too, where
# multistep methods start up. Fitted on Gaussian mixtures and digits models, see `tests/benchmarks/bench_solvers.py`.
GRADING = (1.3, 1.75)


def spaced_ratios(
    path: ConditionalPath,
    spacing: str,
    num_steps: int,
    native: bool = False,
    sigma_data: float = 1.0,
    num_train_timesteps: int = 1000,
) -> torch.Tensor:
    """Starts of the steps, before any shift."""
    left = 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    if spacing == "graded":
        low, high = angle_of_ratio(torch.tensor([path.ratio_min, path.ratio_max], dtype=torch.float64), sigma_data)
        at_noise, at_data = GRADING
        return ratio_of_angle(low + (high - low) * (1 - (1 - left) ** at_noise) ** at_data, sigma_data)
    if spacing == "linspace":
        left = torch.linspace(1, 1 / num_train_timesteps, num_steps, dtype=torch.float64)
    return path.ratio(left) if native else path.ratio_min + (path.ratio_max - path.ratio_min) * left


def integer_timesteps(spacing: str, num_steps: int, num_train_timesteps: int, steps_offset: int) -> torch.Tensor:
    """The timesteps of diffusion schedulers by `timestep_spacing` (arXiv 2305.08891, table 2)."""
    if num_steps > num_train_timesteps:
        raise ValueError(
            f"`num_inference_steps` must be at most {num_train_timesteps} on 'vp_discrete', got {num_steps}."
        )
    index = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "trailing":
        timesteps = (num_train_timesteps - index * (num_train_timesteps / num_steps)).round() - 1
    elif spacing == "linspace":
        timesteps = torch.linspace(num_train_timesteps - 1, 0, num_steps, dtype=torch.float64).round()
    else:
        timesteps = index.flip(0) * (num_train_timesteps // num_steps) + steps_offset
    return timesteps.clamp(0, num_train_timesteps - 1)


def check_lengths(num_inference_steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None) -> None:
    """Check that something says how many steps there are, and that all that is given agrees."""
    given = {
        "num_inference_steps": num_inference_steps,
        "sigmas": None if sigmas is None else len(sigmas),
        "timesteps": None if timesteps is None else len(timesteps),
    }
    lengths = {name: length for name, length in given.items() if length is not None}
    if not lengths:
        raise ValueError("One of `num_inference_steps`, `sigmas` and `timesteps` must be given, got none of them.")
    if num_inference_steps is not None and not (isinstance(num_inference_steps, Integral) and num_inference_steps > 0):
        raise ValueError(f"`num_inference_steps` must be an integer of at least 1, got {num_inference_steps!r}.")
    if len(set(lengths.values())) > 1:
        raise ValueError(f"`sigmas`, `timesteps` and `num_inference_steps` must agree in length, got {lengths}.")


def check_times(name: str, values: list[float] | None, high: float, rising: bool = False) -> None:
    """Check a grid that a user gave."""
    if values is None:
        return
    outside = [value for value in values if not 0 <= value <= high * (1 + 1e-6)]
    if not values or outside:
        raise ValueError(f"`{name}` must lie in [0, {high:g}], got {(outside or values)[:3]}.")
    if any(b >= a for a, b in pairwise(values[::-1] if rising else values)):
        order = "rise" if rising else "descend"
        raise ValueError(f"`{name}` must strictly {order}, got {[round(value, 6) for value in values]}.")


def interpolate(x: torch.Tensor, xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
    """Piecewise linear interpolation, constant beyond the ends."""
    order = xs.argsort(stable=True)
    xs, ys = xs[order], ys[order]
    upper = torch.searchsorted(xs, x.contiguous()).clamp(1, len(xs) - 1)
    width = xs[upper] - xs[upper - 1]
    part = torch.where(width > 0, (x - xs[upper - 1]) / width, torch.ones_like(x)).clamp(0, 1)
    return torch.lerp(ys[upper - 1], ys[upper], part)
