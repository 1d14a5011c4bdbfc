# SPDX-License-Identifier: Apache-2.0
"""
Flow maps: the average velocity of a flow, the identities that define it, their losses, and sampling in a few calls.

Everything is in the straight coordinates of [`ConditionalPath.to_straight`], in which every path is
`x = (1 - t) * data + t * noise` with velocity `v = noise - data`, and its times run from 0 = data to 1 = noise, with
`r <= t`. The flow map takes a point at `t` to the point at `r` on the same trajectory:

    X(x, t -> r) = x - (t - r) u(x, r, t)
    u(x, r, t) = 1 / (t - r) * integral of v from r to t,    u(x, t, t) = v

An average velocity is any function `u(x, r, t, *args)`; [`average_velocity`] makes one of a network on any path. Times
reach it as they are given, best on the CPU in float64.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .coordinates import Coordinates
from .paths import ConditionalPath, lift
from .precision import read_numbers
from .timesteps import sample_timesteps


AverageVelocity = Callable[..., torch.Tensor]
"""`u(x, r, t, *args)`: `x` of shape `(batch_size, ...)`, `r` and `t` of `(batch_size,)`; returns the shape of `x`."""

OBJECTIVES = ("semigroup", "lagrangian", "mean_flow", "improved_mean_flow")
DERIVATIVES = ("jvp", "finite_difference")

# Widths of the kernels of moment matching, in mean distances of real samples.
KERNEL_WIDTHS = (1 / 3, 2 / 3, 4 / 3)


def average_velocity(
    predict: Callable[..., torch.Tensor],
    path: ConditionalPath,
    prediction_type: str = "flow_prediction",
    time_scale: float = 1.0,
) -> AverageVelocity:
    """
    Average velocity in the straight coordinates of a network on any path.

    The answer of the network at `t` is converted as that of a flow would be (`ConditionalPath.coefficients`), so the
    map with r = t is the flow. A `sample` prediction D then means `X(x, t -> r) = (r / t) x + (1 - r / t) D`.

    Args:
        predict (`Callable`):
            `predict(x_t, time_scale * r, time_scale * t, *args)` with a point of the path and the path's times, on
            the device of `x_t` and in its dtype. Returns the answer of the network, of the shape of `x_t`.
        path (`ConditionalPath`):
            The path on which the network was trained.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            One of `PREDICTION_TYPES`.
        time_scale (`float`, *optional*, defaults to 1.0):
            What the network's times are multiplied by: 1000 for a network that was trained on diffusers' timesteps.
            The smaller it is, the smaller are the derivatives in time that MeanFlow feeds back.

    Returns:
        `AverageVelocity`: `u(x, r, t, *args)` of straight points and times in `[path.ratio_min, path.ratio_max]`. It
        raises a `ValueError` where the answer does not determine the velocity: `epsilon` at t = 1 on OT.
    """
    straight = Coordinates(path, "ot")

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        r, t = _path_time(path, r), _path_time(path, t)
        on_sample, on_output = path.coefficients(t, prediction_type, straight.derivative(t))
        x_t = (lift(straight.scale(path.alpha(t), path.sigma(t)), x) * x).to(x.dtype)
        output = predict(x_t, (time_scale * r).to(x_t), (time_scale * t).to(x_t), *args)
        return lift(on_sample, x) * x_t + lift(on_output, x) * output

    return u


def _path_time(path: ConditionalPath, s: torch.Tensor) -> torch.Tensor:
    """`path.time_at(s)` with its derivative: one step of Newton has it, also where a path is inverted by bisection."""
    t = path.time_at(s)
    alpha, sigma = path.alpha(t), path.sigma(t)
    rate = (alpha * path.d_sigma(t) - path.d_alpha(t) * sigma) / (alpha + sigma).square()
    return t - torch.where(torch.isfinite(rate) & (rate > 0), (sigma / (alpha + sigma) - s) / rate, 0.0)


def flow_map(
    u: AverageVelocity, x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, args: Sequence[torch.Tensor] = ()
) -> torch.Tensor:
    """
    `X(x, t -> r) = x - (t - r) u(x, r, t)`.

    Args:
        u, x, r, t, args: As for [`flow_map_loss`].

    Returns:
        `torch.Tensor`: The points at `r`, in the dtype of `x`.
    """
    return (x - lift(t - r, x) * u(x, r, t, *args)).to(x.dtype)


def semigroup_target(
    u: AverageVelocity,
    x: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor,
    fraction: float | torch.Tensor = 0.5,
    args: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """
    Average velocity of two steps of the map: `X(x, t -> r) = X(X(x, t -> m), m -> r)` (arXiv 2505.18825).

    `u(x, r, t) = [(t - m) u(x, m, t) + (m - r) u(X(x, t -> m), r, m)] / (t - r)` with `m = t - fraction * (t - r)`;
    `fraction` 1/2 is the shortcut model (arXiv 2410.12557). Two calls of `u` and no derivative.

    Args:
        u, x, r, t, fraction, args: As for [`flow_map_loss`].

    Returns:
        `torch.Tensor`: The right-hand side, of the shape of `x`.
    """
    first_part = torch.as_tensor(fraction, dtype=t.dtype).to(t.device).expand(t.shape)
    middle = t - first_part * (t - r)
    first = u(x, middle, t, *args)
    second = u((x - lift(t - middle, x) * first).to(x.dtype), r, middle, *args)
    return lift(first_part, x) * first + lift(1 - first_part, x) * second


def lagrangian_velocity(
    u: AverageVelocity,
    x: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor,
    derivative: str = "finite_difference",
    step: float = 5e-3,
    span: tuple[float, float] = (0.0, 1.0),
    args: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """
    Velocity of the map at its end, `d/dr X(x, t -> r) = u - (t - r) du/dr`.

    The Lagrangian identity says that it is `v(X(x, t -> r), r)` (arXiv 2505.18825, arXiv 2511.19797).
    Gradients flow through all of it. There is one call of `u`; finite differences add two rows to it for each r < t.

    Args:
        u, x, r, t, derivative, step, span, args: As for [`flow_map_loss`].

    Returns:
        `torch.Tensor`: The velocity, of the shape of `x`.
    """
    if derivative == "jvp":
        with sdpa_kernel(SDPBackend.MATH):
            value, slope, *_ = torch.func.jvp(lambda end: u(x, end, t, *args), (r,), (torch.ones_like(r),))
    else:
        rows = (r < t).nonzero()[:, 0]
        below, above = _neighbours(r[rows], step, span)
        x_, t_, *args_ = (torch.cat([value, *[value[rows.to(value.device)]] * 2]) for value in (x, t, *args))
        answers = u(x_, torch.cat([r, below, above]), t_, *args_)
        value, low, high = answers.split([len(x), len(rows), len(rows)])
        slope = torch.zeros_like(value).index_copy(0, rows.to(x.device), (high - low) / (2 * step))
    return value - lift(t - r, x) * slope


def eulerian_target(
    u: AverageVelocity,
    x: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor,
    velocity: torch.Tensor,
    tangent: torch.Tensor,
    derivative: str = "finite_difference",
    step: float = 5e-3,
    span: tuple[float, float] = (0.0, 1.0),
    args: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """
    Right-hand side of MeanFlow's identity, `u(x, r, t) = v - (t - r) du/dt` (arXiv 2505.13447, equation 6).

    `du/dt` is the total derivative along the trajectory, `(dx, dr, dt) = (v, 0, 1)`. It is linear in `v`, so
    `noise - data` may stand for `v` in both places (MeanFlow); improved MeanFlow's tangent is the predicted
    `u(x, t, t)` (arXiv 2512.02012).

    Args:
        u, x, r, t, velocity, derivative, step, span, args: As for [`flow_map_loss`].
        tangent (`torch.Tensor` of shape `(batch_size, ...)`):
            `v` of the derivative.

    Returns:
        `torch.Tensor`: The right-hand side, of the shape of `x`.
    """
    if derivative == "jvp":
        with sdpa_kernel(SDPBackend.MATH):
            moving = (x, t), (tangent.to(x.dtype), torch.ones_like(t))
            slope = torch.func.jvp(lambda point, start: u(point, r, start, *args), *moving)[1]
    else:
        low, high = (
            u((x + lift(time - t, x) * tangent).to(x.dtype), r, time, *args) for time in _neighbours(t, step, span)
        )
        slope = (high - low) / (2 * step)
    return velocity - lift(t - r, x) * slope


def _neighbours(time: torch.Tensor, step: float, span: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Two times that are `2 * step` apart, around `time` or beside an end of the span."""
    centre = time.clamp(span[0] + step, span[1] - step)
    return centre - step, centre + step


def flow_map_loss(
    u: AverageVelocity,
    x: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor,
    velocity: torch.Tensor,
    objective: str = "semigroup",
    *,
    teacher: AverageVelocity | None = None,
    fraction: float | torch.Tensor = 0.5,
    derivative: str = "finite_difference",
    step: float = 5e-3,
    span: tuple[float, float] = (0.0, 1.0),
    power: float = 0.0,
    offset: float = 1e-2,
    args: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """
    Loss of each sample: flow matching where r = t, and one of the identities of flow maps elsewhere.

    - `semigroup`: `|u - sg[semigroup_target]|^2`, the self-distillation of two steps into one (arXiv 2505.18825);
    - `lagrangian`: `|lagrangian_velocity - sg[u(X(x, t -> r), r, r)]|^2` (arXiv 2505.18825, 2511.19797);
    - `mean_flow`: `|u - sg[eulerian_target]|^2` along `velocity` (arXiv 2505.13447);
    - `improved_mean_flow`: the same along the predicted `u(x, t, t)` (arXiv 2512.02012), with the gradient of its form
      `|u + (t - r) sg[du/dt] - velocity|^2`.

    The targets (`sg`, no gradient) are made first, on the rows with r < t alone; the call of `u` with gradients is the
    only one and the last.

    Args:
        u (`AverageVelocity`):
            The average velocity that learns.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            Straight points at `t`, `(1 - t) * data + t * noise`.
        r (`torch.Tensor` of shape `(batch_size,)`):
            The end of each interval, at most `t`; 0 = data, 1 = noise. Best on the CPU in float64.
        t (`torch.Tensor` of shape `(batch_size,)`):
            Its start.
        velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            `noise - data`, or the velocity of a trained flow at `x`.
        objective (`str`, *optional*, defaults to `"semigroup"`):
            One of `OBJECTIVES`.
        teacher (`AverageVelocity`, *optional*):
            Makes the targets in place of `u`, an average of its weights for example.
        fraction (`float` or `torch.Tensor` of shape `(batch_size,)`, *optional*, defaults to 0.5):
            For `semigroup`: the first step's part of the interval, in [0, 1].
        derivative (`str`, *optional*, defaults to `"finite_difference"`):
            Of `DERIVATIVES`, for all but `semigroup`.
        step (`float`, *optional*, defaults to 5e-3):
            Of the finite difference.
        span (`tuple[float, float]`, *optional*, defaults to `(0.0, 1.0)`):
            Times that finite differences do not leave: `(path.ratio_min, path.ratio_max)`.
        power (`float`, *optional*, defaults to 0.0):
            p of MeanFlow's weight `1 / (|error|^2 + offset)^p`, here times `d^p` for samples of `d` values. Its
            authors use 1 for images. Above 0 the loss leans towards modes: means are no longer its minimum.
        offset (`float`, *optional*, defaults to 1e-2):
            Of that weight, above 0.
        args (`Sequence[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors with one row per sample that `u` is given too.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: Mean squared error over each sample times its weight.

    Raises:
        ValueError: If an argument is not among the accepted ones.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"`objective` must be one of {list(OBJECTIVES)}, got {objective!r}.")
    if derivative not in DERIVATIVES:
        raise ValueError(f"`derivative` must be one of {list(DERIVATIVES)}, got {derivative!r}.")
    if not 0 < 2 * step <= span[1] - span[0]:
        raise ValueError(f"`step` must lie above 0 and twice in the span {span}, got {step!r}.")
    if not (0 <= power < math.inf and 0 < offset < math.inf):
        raise ValueError(f"`power` must be at least 0 and `offset` above 0, got {power!r} and {offset!r}.")
    if velocity.shape != x.shape or r.shape != x.shape[:1] or t.shape != x.shape[:1]:
        shapes = [tuple(tensor.shape) for tensor in (x, velocity, r, t)]
        raise ValueError(f"`x` and `velocity` must have one shape, `r` and `t` one value for each row, got {shapes}.")
    if bool((r > t).any()):
        raise ValueError(f"`r` must be at most `t`, got r = {r[r > t][0]:g} with t = {t[r > t][0]:g}.")

    rows = (r < t).nonzero()[:, 0]
    x_, r_, t_, v_, *args_ = (value[rows.to(value.device)] for value in (x, r, t, velocity, *args))
    options: dict[str, Any] = {"derivative": derivative, "step": step, "span": span}
    teacher = u if teacher is None else teacher
    target = velocity
    if len(rows):
        with torch.no_grad():
            if objective == "semigroup":
                part = fraction[rows.to(fraction.device)] if isinstance(fraction, torch.Tensor) else fraction
                identity = semigroup_target(teacher, x_, r_, t_, part, args_)
            elif objective == "lagrangian":
                identity = teacher(flow_map(u, x_, r_, t_, args_), r_, r_, *args_)
            else:
                tangent = v_ if objective == "mean_flow" else teacher(x_, t_, t_, *args_)
                identity = eulerian_target(teacher, x_, r_, t_, v_, tangent, **options, args=args_)
            target = velocity.index_copy(0, rows.to(x.device), identity.to(velocity.dtype))
    if objective == "lagrangian":
        prediction = lagrangian_velocity(u, x, r, t, **options, args=args)
    else:
        prediction = u(x, r, t, *args)
    dtype = torch.promote_types(x.dtype, torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)).square().reshape(len(x), -1).mean(1)
    return error if power == 0 else error * (error.detach() + offset / x[0].numel()).pow(-power)


def moment_matching_losses(
    drawn: torch.Tensor,
    real: torch.Tensor,
    before: torch.Tensor | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Squared maximum mean discrepancy of drawn and real samples, as a loss for each drawn one (arXiv 1505.03906,
    equation 2; for the maps of a flow 2503.07565).

    With `k` the sum of Laplace kernels `exp(-|x - y| / width)` of three widths, it is the mean of `k(x_i, x_j)` over
    the other drawn samples `j`, less twice the mean of `k(x_i, y)` over the real `y`. The mean over `i` estimates the
    discrepancy without bias, up to the term of the real samples alone, and is least where both have one distribution:
    a regression learns the mean of what it cannot tell apart, this learns to draw such samples.

    With `before` and `known` a control variate takes the noise of few drawn samples out: the means over them are
    replaced by those of `k(x_i, x_j) - 2 k(x_i, before_j)`, and twice the mean of `k(x_i, y)` over the known `y` is
    added. The gradient has the same expectation, and the less variance the nearer each `before` is to its sample.

    Args:
        drawn (`torch.Tensor` of shape `(num_drawn, ...)`):
            At least two independent samples.
        real (`torch.Tensor` of shape `(num_real, ...)`):
            At least one; values of the same shape, such as features of both.
        before (`torch.Tensor` of shape `(num_drawn, ...)`, *optional*):
            What another map, such as the one before training, draws from the noise of each sample.
        known (`torch.Tensor` of shape `(num_known, ...)`, *optional*):
            What that map draws from other noise, as much as can be had; with `before` alone.

    Returns:
        `torch.Tensor` of shape `(num_drawn,)`: at least float32.

    Raises:
        ValueError: If there are too few samples, or one of `before` and `known` is missing.
    """
    count = len(drawn)
    if count < 2 or len(real) < 1:
        raise ValueError(f"Moment matching needs two drawn samples and a real one, got {count} and {len(real)}.")
    if (before is None) != (known is None) or (before is not None and before.shape != drawn.shape):
        shapes = [None if samples is None else tuple(samples.shape) for samples in (drawn, before, known)]
        raise ValueError(f"`before` must have the shape of `drawn`, and goes with `known`, got {shapes}.")
    dtype = torch.promote_types(drawn.dtype, torch.float32)
    drawn, real = (samples.to(dtype).flatten(1) for samples in (drawn, real))
    across = torch.cdist(drawn, real)
    # Of the real samples alone, so that no drawn one changes the kernel; where they are all alike, of both.
    scale = torch.cdist(real, real).sum() / max(len(real) * (len(real) - 1), 1)
    scale = torch.where(scale > 0, scale, across.detach().mean()).clamp(min=torch.finfo(dtype).tiny)
    # The distance of a sample to itself, and to its own before, counts nothing.
    own = torch.full_like(across[:, 0], math.inf).diag()
    terms = [(torch.cdist(drawn, drawn) + own, 1 / (count - 1)), (across, -2 / len(real))]
    if before is not None and known is not None:
        before, known = (samples.to(dtype).flatten(1) for samples in (before, known))
        terms.append((torch.cdist(drawn, before) + own, -2 / (count - 1)))
        terms.append((torch.cdist(drawn, known), 2 / len(known)))
    losses = torch.zeros_like(across[:, 0])
    for width in KERNEL_WIDTHS:
        for distance, share in terms:
            losses = losses + share * torch.exp(-distance / (width * scale)).sum(1)
    return losses


def guided_velocity(
    velocity: torch.Tensor,
    conditional: torch.Tensor,
    unconditional: torch.Tensor,
    guidance_scale: float | torch.Tensor,
) -> torch.Tensor:
    """
    Target that bakes classifier-free guidance in: `v + (1 - 1 / w) (u_c - u_0)` (arXiv 2512.02012).

    With it as `velocity`, what `u` learns is `u_0 + w (v - u_0)`: guidance at the scale w, in one call.

    Args:
        velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            `noise - data`.
        conditional (`torch.Tensor` of shape `(batch_size, ...)`):
            `u(x, t, t)` of the network that learns, with the condition and without gradient.
        unconditional (`torch.Tensor` of shape `(batch_size, ...)`):
            The same without the condition.
        guidance_scale (`float` or `torch.Tensor` of shape `(batch_size,)`):
            w, above 0, of all samples or of each; 1 changes nothing. A network that is given w learns all scales.

    Returns:
        `torch.Tensor`: The target, of the shape of `velocity`.

    Raises:
        ValueError: If the scale is not above 0.
    """
    scale = torch.as_tensor(guidance_scale)
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise ValueError(f"`guidance_scale` must be a number above 0, got {guidance_scale!r}.")
    part = (1 - 1 / scale).to(velocity)
    return velocity + (lift(part, velocity) if part.ndim else part) * (conditional - unconditional)


def sample_intervals(
    density: str,
    batch_size: int,
    *,
    generator: torch.Generator | None = None,
    equal_share: float = 0.5,
    noise_share: float = 0.15,
    data_share: float = 0.15,
    max_length: float = 1.0,
    offset: int = 0,
    total: int | None = None,
    **density_kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Draw the intervals `r <= t` of a flow map's training.

    Two draws of the density, in order, make an interval; the ends that sampling in few calls begins and ends at have a
    share of their own. The rows with r = t are spread evenly over the batch, so all parts of a global batch have as
    many (see [`~timesteps.sample_timesteps`] for `offset` and `total`).

    Args:
        density (`str`):
            One of `DENSITIES`.
        batch_size (`int`):
            Number of intervals to return, at least 1.
        generator (`torch.Generator`, *optional*):
            A CPU generator.
        equal_share (`float`, *optional*, defaults to 0.5):
            Share of rows with r = t, in [0, 1]. MeanFlow uses 0.75, improved MeanFlow 0.5.
        noise_share (`float`, *optional*, defaults to 0.15):
            Share of the other rows whose t is 1, in [0, 1].
        data_share (`float`, *optional*, defaults to 0.15):
            Share of the other rows whose r is 0, in [0, 1].
        max_length (`float`, *optional*, defaults to 1.0):
            Factor of the lengths t - r, in (0, 1]: `min(1, step / warmup_steps)` lengthens the intervals slowly.
        offset (`int`, *optional*, defaults to 0):
            Where the returned part of the global batch begins.
        total (`int`, *optional*):
            Size of the global batch, by default `offset + batch_size`.
        density_kwargs: Arguments of [`~timesteps.sample_timesteps`], among them `shift` and the density's own.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: `r` and `t`, each of shape `(batch_size,)`, on the CPU, as times of a
        path; `path.ratio` makes straight ones of them.

    Raises:
        ValueError: If the density is unknown, or a number is out of range.
    """
    for name, share in (("equal_share", equal_share), ("noise_share", noise_share), ("data_share", data_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"`{name}` must be a number in [0, 1], got {share!r}.")
    if not 0 < max_length <= 1:
        raise ValueError(f"`max_length` must be a number in (0, 1], got {max_length!r}.")
    total = offset + batch_size if total is None else total
    part = {"generator": generator, "offset": offset, "total": total, **density_kwargs}
    first, second = (sample_timesteps(density, batch_size, **part) for _ in range(2))
    to_noise, to_data = torch.rand(2, total, generator=generator, dtype=torch.float64)[:, offset : offset + batch_size]
    count = equal_share * torch.arange(offset, offset + batch_size + 1, dtype=torch.float64)
    equal = count.floor().diff() > 0
    t = torch.where(to_noise < noise_share, 1.0, torch.maximum(first, second))
    r = torch.where(to_data < data_share, 0.0, torch.minimum(first, second))
    t = torch.where(equal, first, t)
    return torch.where(equal, first, t - max_length * (t - r)), t


def sample_flow_map(
    u: AverageVelocity,
    x: torch.Tensor,
    times: Sequence[float] | torch.Tensor,
    *,
    renoise: float = 0.0,
    generator: torch.Generator | None = None,
    args: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """
    Sample in one call of the map for each interval of a grid, with fresh noise between them or without.

    With `renoise` each step but the last goes deeper than its time r, to m with `m / (1 - m) = sqrt(1 - renoise^2)
    r / (1 - r)`, and noise leads back: `x_r = (1 - r) / (1 - m) x_m + sqrt(r^2 - (m (1 - r) / (1 - m))^2) z`. That
    keeps the marginals (gamma-sampling of arXiv 2310.02279; 1 is the sampler of consistency models, arXiv 2303.01469).

    Args:
        u (`AverageVelocity`):
            The average velocity.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            Straight points at `times[0]`: noise, if that is 1.
        times (`Sequence[float]` or `torch.Tensor` of shape `(num_steps + 1,)`):
            Falling straight times, from `path.ratio_max` to `path.ratio_min` (1 to 0 on OT).
        renoise (`float`, *optional*, defaults to 0.0):
            From 0 for none to 1 for all of the noise at every time between.
        generator (`torch.Generator`, *optional*):
            Source of the noise.
        args (`Sequence[torch.Tensor]`, *optional*, defaults to `()`):
            Tensors with one row per sample that `u` is given too.

    Returns:
        `torch.Tensor`: The points at `times[-1]`.

    Raises:
        ValueError: If the times do not fall within [0, 1], or `renoise` is out of range.
    """
    times = read_numbers("times", times).tolist()
    if len(times) < 2 or not all(0 <= low < high <= 1 for high, low in zip(times, times[1:])):
        raise ValueError(f"`times` must be at least two falling times in [0, 1], got {times}.")
    if not 0 <= renoise <= 1:
        raise ValueError(f"`renoise` must be a number in [0, 1], got {renoise!r}.")

    def map_to(x: torch.Tensor, end: float, start: float) -> torch.Tensor:
        r, t = (torch.full((len(x),), time, dtype=torch.float64) for time in (end, start))
        return flow_map(u, x, r, t, args)

    for t, r in zip(times[:-2], times[1:-1]):
        if renoise == 0:
            x = map_to(x, r, t)
            continue
        rest = math.sqrt(1 - renoise**2)
        m = max(rest * r / (1 - r + rest * r), times[-1])
        kept = (1 - r) / (1 - m)
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        x = kept * map_to(x, m, t) + math.sqrt(max(r**2 - (m * kept) ** 2, 0.0)) * noise
    return map_to(x, times[-1], times[-2])
