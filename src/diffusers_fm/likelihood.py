# SPDX-License-Identifier: Apache-2.0
"""Exact and stochastic likelihoods of a flow.

Along the flow from data (t = 0) to noise (t = 1) the log-density changes by the divergence of the velocity
(Chen et al., arXiv 1806.07366; Lipman et al., arXiv 2210.02747, appendix C):
`log p(data) = log N(x_1; 0, prior_std^2) + integral over t of div dx/dt`.

The integral may run in other coordinates of the same flow, which differ from x_t by a scale c(t) and a change of time:
the log-density then gains `d * log(c(1) / c(0))`. In the straight coordinates every Gaussian path is the optimal
transport one, so that one grid of times serves all, and no path has a singular start.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .coordinates import Coordinates
from .divergence import MODES, PROBES, choose_mode, draw_probes, exact_trace, hutchinson_trace
from .paths import ConditionalPath, lift
from .precision import widest_float
from .solvers import ButcherTableau, find_method, odeint, quadrature_weights
from .transport import Flow, check_batch, check_steps, model_dtype


DIVERGENCES = ("hutchinson", "exact")


@dataclass(frozen=True)
class Likelihood:
    """
    What [`log_likelihood`] returns. All tensors are on the device of the data, in float64 where it has it.

    Args:
        log_prob (`torch.Tensor` of shape `(batch_size,)`):
            Natural logarithm of the density of each sample.
        log_det (`torch.Tensor` of shape `(batch_size,)`):
            The part of it that is the logarithm of the volume change from data to noise.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Where the flow takes each sample at the end; the prior at t = 1 is normal of deviation `path.prior_std`.
        standard_error (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            The standard error of `log_prob` by the spread of several probes. `None` with one probe or an exact trace.
        nfe (`torch.LongTensor` of shape `(batch_size,)`):
            Evaluations of the network for each sample, products with its Jacobian not counted.
        work (`torch.Tensor` of shape `(batch_size,)`):
            The same in plain forward passes: a product with the Jacobian counts as one in forward mode, which carries
            one more tangent, and as two in reverse mode, a backward pass.
        mode (`str`):
            `"forward"` or `"reverse"`: how the products were made.
        reason (`str`):
            Why.
    """

    log_prob: torch.Tensor
    log_det: torch.Tensor
    noise: torch.Tensor
    standard_error: torch.Tensor | None
    nfe: torch.Tensor
    work: torch.Tensor
    mode: str
    reason: str


@dataclass(frozen=True)
class BitsPerDim:
    """
    What [`bits_per_dim`] returns.

    Args:
        bits_per_dim (`torch.Tensor` of shape `(batch_size,)`):
            Bits for each value of each image.
        log_prob (`torch.Tensor` of shape `(batch_size,)`):
            The natural logarithm of the probability of each image among all images of its levels.
        nfe (`torch.LongTensor` of shape `(batch_size,)`):
            Evaluations of the network for each image, all samples together.
        work (`torch.Tensor` of shape `(batch_size,)`):
            The same in plain forward passes, as in [`Likelihood`].
        mode (`str`):
            `"forward"` or `"reverse"`.
        reason (`str`):
            Why.
    """

    bits_per_dim: torch.Tensor
    log_prob: torch.Tensor
    nfe: torch.Tensor
    work: torch.Tensor
    mode: str
    reason: str


@torch.no_grad()
def log_likelihood(
    predict: Callable[..., torch.Tensor],
    data: torch.Tensor,
    path: ConditionalPath,
    *,
    prediction_type: str = "flow_prediction",
    divergence: str = "hutchinson",
    num_probes: int | None = None,
    probe: str | None = None,
    mode: str | None = None,
    coordinates: str = "ot",
    method: str | ButcherTableau = "abm3",
    num_steps: int | None = 64,
    grading: float | None = None,
    divergence_every: int | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    step_control: str | None = None,
    start: float = 0.0,
    end: float = 1.0,
    batch_size: int = 64,
    args: Sequence[torch.Tensor] = (),
    generator: torch.Generator | None = None,
) -> Likelihood:
    """
    The log-density of samples under a flow, by integration from data to noise.

    With fixed steps the divergence, the dear part, is asked only at every `divergence_every`-th step and integrated by
    polynomials of degree five, so that trajectory and integral each get the accuracy that they need. Guidance, and
    distillation to few steps, change the velocity to one that no density belongs to: give the plain network.

    Args:
        predict (`Callable`):
            `predict(x_t, t, *args)` gives the network's output at points `(batch_size, ...)` of the path and times
            `(batch_size,)` in [0, 1], both in the precision of the data. It must treat samples independently.
        data (`torch.Tensor` of shape `(batch_size, ...)`):
            The samples; also taken as the points of the path at `start`.
        path (`ConditionalPath`):
            The path on which the network was trained.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network predicts, one of `PREDICTION_TYPES`.
        divergence (`str`, *optional*, defaults to `"hutchinson"`):
            `"hutchinson"`, an unbiased estimate by random probes that stay fixed along a trajectory
            (arXiv 1810.01367), or `"exact"`, a product with the Jacobian for each dimension.
        num_probes (`int`, *optional*, defaults to 1):
            Hutchinson: how many probes; two or more give a standard error.
        probe (`str`, *optional*, defaults to `"rademacher"`):
            Hutchinson: `"rademacher"`, exact where the Jacobian is diagonal, or `"gaussian"`.
        mode (`str`, *optional*):
            How products with the Jacobian are made: `"reverse"`, a backward pass each, or `"forward"`, many tangents
            in one pass. If not given, the one that costs less: reverse mode for fewer than 16 products at a point,
            and for networks that do not run in forward mode. The result tells.
        coordinates (`str`, *optional*, defaults to `"ot"`):
            The name of the [`~coordinates.Coordinates`] of the integration: `"ot"`, the straight ones, `"angle"` or
            `"native"`, the path's own.
        method (`str` or `ButcherTableau`, *optional*, defaults to `"abm3"`):
            A method of [`~solvers.odeint`].
        num_steps (`int`, *optional*, defaults to 64):
            The number of steps; `None` for adaptive ones, with a method that has an error estimate.
        grading (`float`, *optional*, defaults to 1.5):
            Fixed steps: how much finer the grid is towards the data, see [`~solvers.graded_grid`].
        divergence_every (`int`, *optional*, defaults to 2):
            Fixed steps: how many steps lie between two divergences.
        rtol (`float`, *optional*, defaults to `1e-5`):
            Adaptive steps: relative tolerance of the state and of the log-density per dimension.
        atol (`float`, *optional*, defaults to `1e-5`):
            Adaptive steps: absolute tolerance of both.
        step_control (`str`, *optional*, defaults to `"batch"`):
            Adaptive steps: `"batch"` or `"per_sample"`.
        start (`float`, *optional*, defaults to 0.0):
            The time of the data, in [0, 1]. Later than 0 where the prediction leaves the velocity without a limit
            there (`sample` on OT).
        end (`float`, *optional*, defaults to 1.0):
            The time of the prior, after `start`. Earlier than 1 where the prediction leaves the velocity without a
            limit there (`epsilon` on OT).
        batch_size (`int`, *optional*, defaults to 64):
            How many rows, samples times tangents, a call of the network may have at most.
        args (`Sequence[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors with one row per sample that the network is given too, such as class labels.
        generator (`torch.Generator`, *optional*):
            Draws the probes, on the CPU, sample by sample: `batch_size` does not change them.

    Returns:
        [`Likelihood`]: The log-densities and the work they took.

    Raises:
        ValueError: If an argument is not among the accepted ones, or does not go with the others.
    """
    _check_choice("divergence", divergence, DIVERGENCES)
    if divergence == "exact" and not (num_probes is None and probe is None):
        raise ValueError("`num_probes` and `probe` belong to the 'hutchinson' divergence, not to the 'exact' one.")
    if num_steps is None and not (grading is None and divergence_every is None):
        raise ValueError("`grading` and `divergence_every` belong to fixed steps, but `num_steps` is None.")
    num_probes = 1 if num_probes is None else num_probes
    probe = "rademacher" if probe is None else probe
    divergence_every = 2 if divergence_every is None else divergence_every
    _check_choice("probe", probe, PROBES)
    if mode is not None:
        _check_choice("mode", mode, MODES)
    for name, value in [
        ("num_probes", num_probes),
        ("divergence_every", divergence_every),
        ("batch_size", batch_size),
    ]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be at least 1, not {value!r}.")
    check_batch(data, args)
    check_steps(method, num_steps, grading=grading, rtol=rtol, atol=atol, start=start, end=end)
    if not start < end:
        raise ValueError(f"`start` must lie before `end`, but they are {start} and {end}.")
    flow = Flow(predict, Coordinates(path, coordinates), prediction_type, model_dtype(data))
    span = flow.time(start), flow.time(end)
    state = data.to(widest_float(data)) / flow.scale(start)

    num_products = data[0].numel() if divergence == "exact" else num_probes
    if mode is None:
        t, scale, _, _ = flow.point(torch.full((1,), span[0], dtype=torch.float64))
        function = flow.model(t, [arg[:1] for arg in args])
        mode, reason = choose_mode(function, flow.input(state[:1], scale), num_products)
    else:
        reason = "asked for"
    tangents = min(num_products, batch_size) if mode == "forward" else 1
    rates = _Rates(flow, divergence, mode, tangents)
    rows = max(1, batch_size // tangents)
    options = {"method": method, "rtol": rtol, "atol": atol, "step_control": step_control}
    results = []
    for first in range(0, len(data), rows):
        x, *conditions = (tensor[first : first + rows] for tensor in (state, *args))
        exact = divergence == "exact"
        probes = x.new_empty(len(x), 0) if exact else draw_probes(x, num_probes, probe, generator)
        conditions = (probes, *conditions)
        if num_steps is None:
            results.append(_adaptive_log_det(rates, x, span, conditions, options))
        else:
            grid = flow.grid(*span, num_steps, grading)
            results.append(_fixed_log_det(rates, x, grid, divergence_every, conditions, options))
    noise, log_dets, nfe, divergences = (torch.cat(parts) for parts in zip(*results))

    noise = noise * flow.scale(end)
    log_det = log_dets.mean(1) + data[0].numel() * math.log(flow.scale(end) / flow.scale(start))
    last = torch.tensor(end, dtype=torch.float64)
    prior_std = torch.hypot(path.alpha(last), path.sigma(last)).item()
    log_prior = -((noise / prior_std).square() + math.log(2 * math.pi * prior_std**2)).flatten(1).sum(1) / 2
    several = divergence == "hutchinson" and num_probes > 1
    standard_error = log_dets.std(1) / math.sqrt(num_probes) if several else None
    work = nfe + divergences * num_products * (1 if mode == "forward" else 2)
    return Likelihood(log_prior + log_det, log_det, noise, standard_error, nfe, work.to(noise.dtype), mode, reason)


@torch.no_grad()
def bits_per_dim(
    predict: Callable[..., torch.Tensor],
    images: torch.Tensor,
    path: ConditionalPath,
    *,
    num_samples: int = 1,
    levels: int = 256,
    spacing: float | None = None,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
    **options: Any,
) -> BitsPerDim:
    """
    Bits per dimension of images of whole levels, by uniform dequantisation (arXiv 2210.02747, appendix E.1).

    An image `x` becomes `2 (x + u) / levels - 1`, in [-1, 1], with `u` uniform in [0, 1). The probability of the
    image is the mean density over its `num_samples` values of `u` times the volume `(2 / levels)^d`; its logarithm is
    a lower bound in expectation, which rises with `num_samples` to the true one. For 256 levels and one sample the
    result is `7 - log2(p) / d`.

    Args:
        predict (`Callable`):
            The network, as for [`log_likelihood`], trained on images in [-1, 1].
        images (`torch.Tensor` of shape `(batch_size, ...)`):
            Whole numbers from 0 to `levels - 1`, of an integer type.
        path (`ConditionalPath`):
            The path on which the network was trained.
        num_samples (`int`, *optional*, defaults to 1):
            How many values of `u` an image gets: the K of the paper.
        levels (`int`, *optional*, defaults to 256):
            The number of levels of a value.
        spacing (`float`, *optional*, defaults to `2 / levels`):
            The distance of two levels in the range of the network, symmetric about 0. `2 / (levels - 1)` is for a
            network that was trained on images whose lowest level is -1 and whose highest is 1.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            The precision in which the network is called.
        generator (`torch.Generator`, *optional*):
            Draws `u` and the probes, on the CPU.
        options:
            Further arguments of [`log_likelihood`].

    Returns:
        [`BitsPerDim`]: Bits per dimension and the work they took.

    Raises:
        ValueError: If the images are not whole levels, or an argument is out of range.
    """
    if not (isinstance(num_samples, int) and num_samples >= 1 and isinstance(levels, int) and levels >= 2):
        raise ValueError(
            f"`num_samples` must be at least 1 and `levels` at least 2, not {num_samples!r} and {levels!r}."
        )
    if images.is_floating_point() or images.is_complex() or images.dtype == torch.bool:
        raise ValueError(f"`images` must hold whole levels in an integer type, not {images.dtype}.")
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"`images` must be a batch of at least one image, got the shape {tuple(images.shape)}.")
    lowest, highest = images.min().item(), images.max().item()
    if lowest < 0 or highest >= levels:
        raise ValueError(f"`images` must hold levels from 0 to {levels - 1}, not {lowest} to {highest}.")
    spacing = 2 / levels if spacing is None else spacing
    results = []
    for _ in range(num_samples):
        noise = torch.rand(images.shape, generator=generator, dtype=torch.float64)
        data = (images.cpu() + noise - levels / 2) * spacing
        results.append(log_likelihood(predict, data.to(images.device, dtype), path, generator=generator, **options))
    log_probs = torch.stack([result.log_prob for result in results])
    dims = images[0].numel()
    log_prob = log_probs.logsumexp(0) - math.log(num_samples) + dims * math.log(spacing)
    return BitsPerDim(
        bits_per_dim=-log_prob / (dims * math.log(2)),
        log_prob=log_prob,
        nfe=sum(result.nfe for result in results),
        work=sum(result.work for result in results),
        mode=results[0].mode,
        reason=results[0].reason,
    )


def _check_choice(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise ValueError(f"`{name}` must be one of {list(accepted)}, not {value!r}.")


@dataclass(frozen=True)
class _Rates:
    """The velocity and its divergence at a point, from one evaluation of the network."""

    flow: Flow
    divergence: str
    mode: str
    tangents: int

    def __call__(
        self, u: torch.Tensor, y: torch.Tensor, probes: torch.Tensor, *args: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`dy/du`, and its divergence of shape `(batch_size, num_probes)`, or `(batch_size, 1)` if it is exact."""
        t, scale, on_state, on_output = self.flow.point(u)
        function, x = self.flow.model(t, args), self.flow.input(y, scale)
        if self.divergence == "exact":
            output, traces = exact_trace(function, x, self.mode, self.tangents)
        else:
            output, traces = hutchinson_trace(function, x, probes, self.mode, self.tangents)
        velocity = lift(on_state, y) * y + lift(on_output, y) * output
        # The part that is linear in y is known exactly; only the network's own trace is estimated.
        linear = (y[0].numel() * on_state)[:, None].to(y)
        return velocity, linear + (scale * on_output)[:, None].to(y) * traces.to(y)


def _fixed_log_det(
    rates: _Rates,
    y: torch.Tensor,
    grid: list[float],
    divergence_every: int,
    conditions: Sequence[torch.Tensor],
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state at the end of the grid, its log-determinants by probe, and the evaluations and divergences made."""
    tableau = find_method(options["method"])
    stages = 1 if tableau is None else tableau.without_error_estimate().stages
    nodes = [*range(0, len(grid) - 1, divergence_every), len(grid) - 1]
    divergences: list[torch.Tensor] = []
    calls = 0

    def field(u: torch.Tensor, state: torch.Tensor, probes: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        step, stage = divmod(calls, stages)
        calls += 1
        if stage != 0 or step % divergence_every != 0:
            return rates.flow.velocity(u, state, *args)
        velocity, divergence = rates(u, state, probes, *args)
        divergences.append(divergence)
        return velocity

    solution = odeint(field, y, grid[0], grid[-1], grid=grid, args=conditions, **options)
    last = torch.full((len(y),), grid[-1], dtype=torch.float64)
    divergences.append(rates(last, solution.x, *conditions)[1])
    weights = quadrature_weights([grid[node] for node in nodes])
    log_dets = torch.stack([weight * divergence for weight, divergence in zip(weights, divergences)]).sum(0)
    made = torch.full((len(y),), len(nodes), device=y.device)
    return solution.x, log_dets, torch.full_like(made, solution.nfe + 1), made


def _adaptive_log_det(
    rates: _Rates,
    y: torch.Tensor,
    span: tuple[float, float],
    conditions: Sequence[torch.Tensor],
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integrate by an adaptive solver, with the log-determinants per dimension as further components of the state."""
    dims = y[0].numel()

    def field(u: torch.Tensor, state: torch.Tensor, *conditions: torch.Tensor) -> torch.Tensor:
        velocity, divergence = rates(u, state[:, :dims].reshape(-1, *y.shape[1:]), *conditions)
        return torch.cat([velocity.flatten(1), divergence / dims], 1)

    def norm(error: torch.Tensor) -> torch.Tensor:
        parts = [part.square().mean(1).sqrt() for part in (error[:, :dims], error[:, dims:])]
        return torch.maximum(*parts)

    log_dets = y.new_zeros(len(y), max(1, conditions[0].shape[1]))
    state = torch.cat([y.flatten(1), log_dets], 1)
    solution = odeint(field, state, *span, args=conditions, norm=norm, **options)
    evaluations = solution.evaluations.to(y.device)
    return solution.x[:, :dims].reshape(y.shape), solution.x[:, dims:] * dims, evaluations, evaluations
