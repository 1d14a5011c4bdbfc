# SPDX-License-Identifier: Apache-2.0
"""
Densities of the training time, as inverse distribution functions, and the shift that training and sampling
share.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from .registry import add_entry


def _uniform(u: torch.Tensor) -> torch.Tensor:
    return u


def _logit_normal(u: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    return torch.sigmoid(mean + std * torch.special.ndtri(u))


def _mode(u: torch.Tensor, scale: float) -> torch.Tensor:
    # The paper draws t = f(1 - u); the inverse distribution function must rise, and f falls on [0, 1].
    u = 1 - u
    return 1 - u - scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)


def _cosmap(u: torch.Tensor) -> torch.Tensor:
    return 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)


def _beta(u: torch.Tensor, alpha: float, beta: float) -> torch.Tensor:
    from scipy.stats import beta as distribution  # scipy takes longer to import than the rest of the module

    return torch.from_numpy(distribution.ppf(u.cpu().numpy(), alpha, beta)).to(u)


def _u_shaped(u: torch.Tensor, steepness: float) -> torch.Tensor:
    return 0.5 + torch.asinh((2 * u - 1) * math.sinh(steepness / 2)) / steepness


DENSITIES: dict[str, Callable[..., torch.Tensor]] = {
    "uniform": _uniform,
    "logit_normal": _logit_normal,
    "mode": _mode,
    "cosmap": _cosmap,
    "beta": _beta,
    "u_shaped": _u_shaped,
}
"""
Inverse distribution functions of the densities of SD3 (arXiv 2403.03206, section 3.1), of the beta density, and of the
U-shaped one of 2-rectified flow++ (arXiv 2405.20320).
"""


def register_density(name: str, quantile: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """
    Give a density of training times of one's own a name, for [`sample_timesteps`] and `--timestep_density`.

    Args:
        name (`str`):
            The name.
        quantile (`Callable`):
            The inverse distribution function: takes a float64 tensor of any shape in (0, 1), and returns times in
            [0, 1], 0 = data, 1 = noise, elementwise and without falling. `u ** 2` has the density `1 / (2 sqrt(t))`.

    Raises:
        ValueError: If the name is taken, or the function is not an inverse distribution function of times.
    """
    u = torch.linspace(0, 1, 67, dtype=torch.float64)[1:-1]
    t: Any = quantile(u) if callable(quantile) else None
    are_times = isinstance(t, torch.Tensor) and t.shape == u.shape and bool(((t >= 0) & (t <= 1)).all())
    if not are_times or bool((t.diff() < 0).any()):
        raise ValueError(
            f"The density {name!r} must be a function that maps a tensor of (0, 1) to times in [0, 1] without falling,"
            f" got {quantile!r}."
        )
    add_entry(DENSITIES, name, quantile, "density")


def shift_time(t: torch.Tensor, shift: float) -> torch.Tensor:
    """
    Move times towards the noise: `shift t / (1 + (shift - 1) t)`, that is `logit(t) + log(shift)`.

    SD3 takes `shift = sqrt(tokens / base_tokens)` (arXiv 2403.03206, equation 23), Flux `shift = exp(mu)`. The same
    function shifts the grid of `FlowMatchScheduler.set_timesteps`.

    Args:
        t (`torch.Tensor`):
            Times in [0, 1], 0 = data, 1 = noise, any shape.
        shift (`float`):
            Above 0; 1 changes nothing.

    Returns:
        `torch.Tensor`: Shifted times.

    Raises:
        ValueError: If `shift` is not above 0.
    """
    if not 0 < shift < math.inf:
        raise ValueError(f"`shift` must be a number above 0, got {shift!r}.")
    return t if shift == 1 else shift * t / (1 + (shift - 1) * t)


def dimension_shift(dimension: int, base: int = 4096) -> float:
    """
    Shift of [`shift_time`] by the number of values in a sample, `sqrt(dimension / base)` (RAE, arXiv 2510.11690): the
    more values, the more noise is needed to hide what they share.

    Args:
        dimension (`int`):
            Values of a sample, channels and places.
        base (`int`, *optional*, defaults to 4096):
            Number of values at which the times are as they are.

    Returns:
        `float`: the shift.

    Raises:
        ValueError: If a number is below 1.
    """
    if dimension < 1 or base < 1:
        raise ValueError(f"`dimension` and `base` must be at least 1, got {dimension!r} and {base!r}.")
    return math.sqrt(dimension / base)


def sample_timesteps(
    density: str,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    shift: float = 1.0,
    stratified: bool = True,
    offset: int = 0,
    total: int | None = None,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
    alpha: float = 1.0,
    beta: float = 1.0,
    steepness: float = 4.0,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """
    Draw training times, stratified over a batch of any extent.

    All `total` times of a global batch are drawn from `generator`, one from each of `total` strata of equal
    probability, in random order, and `[offset, offset + batch_size)` of them are returned. Processes and accumulation
    steps that pass equal generators and their own offset share one stratified draw.

    Args:
        density (`str`):
            One of `DENSITIES`, or one of [`register_density`]. `logit_normal`: `sigmoid(logit_mean + logit_std *
            normal)`; a positive mean lies towards the noise, as in the paper (the diffusers scripts have the opposite
            sign). `mode`: heavy at the middle by `mode_scale`. `cosmap`: uniform in the log-SNR of the cosine path.
            `beta`: `Beta(alpha, beta)`.
            `u_shaped`: heavy at both ends, as `cosh(steepness * (t - 1/2))`, for reflow.
        batch_size (`int`):
            Number of times to return, at least 1.
        generator (`torch.Generator`, *optional*):
            A CPU generator.
        shift (`float`, *optional*, defaults to 1.0):
            `shift_time` after the draw.
        stratified (`bool`, *optional*, defaults to `True`):
            Whether to stratify.
        offset (`int`, *optional*, defaults to 0):
            Where the returned part of the global batch begins.
        total (`int`, *optional*):
            Size of the global batch, by default `offset + batch_size`.
        logit_mean (`float`, *optional*, defaults to 0.0):
            For `logit_normal`.
        logit_std (`float`, *optional*, defaults to 1.0):
            For `logit_normal`, above 0.
        mode_scale (`float`, *optional*, defaults to 1.29):
            For `mode`, in [-1, 2 / (pi - 2)].
        alpha (`float`, *optional*, defaults to 1.0):
            For `beta`, above 0.
        beta (`float`, *optional*, defaults to 1.0):
            For `beta`, above 0.
        steepness (`float`, *optional*, defaults to 4.0):
            For `u_shaped`, above 0 and at most 100.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float64`):
            Of the result.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: Times strictly inside (0, 1), 0 = data, 1 = noise, on the CPU.

    Raises:
        ValueError: If the density is unknown, or a number is out of range.
    """
    total = offset + batch_size if total is None else total
    if density not in DENSITIES:
        raise ValueError(f"`density` must be one of {list(DENSITIES)}, got {density!r}.")
    if batch_size < 1 or offset < 0 or offset + batch_size > total:
        raise ValueError(
            f"`batch_size` must be at least 1 and [offset, offset + batch_size) must lie in [0, total), "
            f"got batch_size {batch_size}, offset {offset} and total {total}."
        )
    high = 2 / (math.pi - 2)
    for name, value, valid, accepted in (
        ("logit_mean", logit_mean, math.isfinite(logit_mean), "that is finite"),
        ("logit_std", logit_std, 0 < logit_std < math.inf, "above 0"),
        ("mode_scale", mode_scale, -1 <= mode_scale <= high, f"in [-1, {high:.4f}]"),
        ("alpha", alpha, 0 < alpha < math.inf, "above 0"),
        ("beta", beta, 0 < beta < math.inf, "above 0"),
        ("steepness", steepness, 0 < steepness <= 100, "above 0 and at most 100"),
    ):
        if not valid:
            raise ValueError(f"`{name}` must be a number {accepted}, got {value!r}.")

    parameters = {
        "logit_normal": {"mean": logit_mean, "std": logit_std},
        "mode": {"scale": mode_scale},
        "beta": {"alpha": alpha, "beta": beta},
        "u_shaped": {"steepness": steepness},
    }.get(density, {})
    u = torch.rand(total, generator=generator, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(total, generator=generator) + u) / total
    tiny = torch.finfo(torch.float64).eps
    t = shift_time(DENSITIES[density](u[offset : offset + batch_size].clamp(tiny, 1 - tiny), **parameters), shift)
    # Inside the interval in the dtype of the result too: a density may round to an end.
    eps = torch.finfo(dtype).eps
    return t.to(dtype).clamp(eps, 1 - eps)
