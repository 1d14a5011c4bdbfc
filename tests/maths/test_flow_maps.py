# SPDX-License-Identifier: Apache-2.0
"""Flow maps: the identities on exact average velocities, the gradients of their losses, the draws and the samplers."""

import math
from collections.abc import Callable

import pytest
import torch
from benchmarks.bench_flow_maps import Setting, distance, train
from helpers import GaussianMixture, draw_mixture, flow_of_gaussian, gaussian

from diffusers_fm.flow_maps import (
    OBJECTIVES,
    average_velocity,
    eulerian_target,
    flow_map,
    flow_map_loss,
    guided_velocity,
    lagrangian_velocity,
    moment_matching_losses,
    sample_flow_map,
    sample_intervals,
    semigroup_target,
)
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.paths import PREDICTION_TYPES, ConditionalPath, CosinePath, OTPath, VEPath, VPPath, lift
from diffusers_fm.solvers import TABLEAUX


class AlphaSigma(ConditionalPath):
    """A path of one's own, without derivatives or inverse in closed form."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t.square()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t * (1 + t) / 2


PATHS = [OTPath(), OTPath(sigma_min=0.05), VPPath(), VEPath(), CosinePath(), AlphaSigma()]
SHAPES = [(), (3,), (2, 3, 3)]
AverageVelocity = Callable[..., torch.Tensor]


def name(value: object) -> str:
    return type(value).__name__ if isinstance(value, ConditionalPath) else str(value)


def gaussian_velocity(problem: GaussianMixture) -> AverageVelocity:
    """The exact average velocity of one Gaussian: the map keeps `(x - mean) / std`; its limit at r = t is the flow."""
    mean, std = problem.means[0], problem.stds[0]

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        r, t = lift(r, x), lift(t, x)
        start, end = ((((1 - s) * std).square() + s.square()).sqrt() for s in (t, r))
        # (start - end) / (t - r) without the division: the difference of the squares has the factor t - r.
        slope = ((t + r) * (1 + std.square()) - 2 * std.square()) / (start + end)
        return -mean + slope / start * (x - (1 - t) * mean)

    return u


def mixture_velocity(problem: GaussianMixture, steps: int = 32) -> AverageVelocity:
    """The exact average velocity of a mixture by steps of order 5, differentiable in x, r and t; the flow at r = t."""
    field, tableau = problem.straight_field(), TABLEAUX["dopri5"].without_error_estimate()

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h, total = (r - t) / steps, torch.zeros_like(x)
        for i in range(steps):
            slopes: list[torch.Tensor] = []
            for row, c in zip(tableau.a, tableau.c):
                stage = sum((weight * slope for weight, slope in zip(row, slopes)), total)
                slopes.append(field(t + (i + c) * h, x + lift(h, x) * stage))
            total = sum((weight * slope for weight, slope in zip(tableau.b, slopes)), total)
        return total / steps

    return u


def network(u: AverageVelocity, path: ConditionalPath, prediction_type: str) -> AverageVelocity:
    """The perfect network of a path and a prediction type, `(x_t, r, t)`, by the inverse of its conversion."""

    def predict(x_t: torch.Tensor, r: torch.Tensor, t: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        x, s = path.to_straight(x_t, t)
        row = -torch.ones_like(t), torch.ones_like(t)
        on_sample, on_output = path.coefficients(t, prediction_type, row)
        return (u(x, path.ratio(r), s, *args) - lift(on_sample, x) * x_t) / lift(on_output, x)

    return predict


def intervals(path: ConditionalPath, count: int = 12, ends: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight times of intervals, inside the path's own; with `ends`, one of them is the whole path."""
    low, high = path.ratio_min, path.ratio_max
    r, t = sample_intervals("uniform", count, generator=torch.Generator().manual_seed(0), equal_share=0)
    r, t = (low + (high - low) * (0.02 + 0.96 * s) for s in (r, t))
    if ends:
        r[0], t[0] = low, high
    return r, t


def points(problem: GaussianMixture, t: torch.Tensor, seed: int = 1) -> torch.Tensor:
    data = problem.sample(len(t), seed)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=data.dtype)
    return OTPath().sample(data, noise, t)


@pytest.mark.parametrize("prediction_type", ["flow_prediction", "sample"])
@pytest.mark.parametrize("path", PATHS, ids=name)
def test_identities_hold_on_every_path(path: ConditionalPath, prediction_type: str) -> None:
    problem = gaussian((2,), mean=0.7, std=0.4)
    # Where the path ends in clean data, a prediction of the data says nothing of the velocity there, and the straight
    # time is a root of VP's.
    ends = path.ratio_min > 0 or (prediction_type == "flow_prediction" and path != VPPath())
    assert_identities(problem, gaussian_velocity(problem), path, prediction_type, ends)


@pytest.mark.parametrize("path", [OTPath(), VPPath(), VEPath(), CosinePath()], ids=name)
def test_identities_hold_for_a_mixture(path: ConditionalPath) -> None:
    problem = draw_mixture(0, (2,), 2, narrowest=0.5, widest=0.6)
    assert_identities(problem, mixture_velocity(problem), path, "flow_prediction", path != VPPath())


def assert_identities(
    problem: GaussianMixture, exact: AverageVelocity, path: ConditionalPath, prediction_type: str, ends: bool
) -> None:
    r, t = intervals(path, 6, ends)
    x = points(problem, t)
    u = average_velocity(network(exact, path, prediction_type), path, prediction_type)
    v = problem.straight_field()(t, x)
    torch.testing.assert_close(u(x, t, t), v, rtol=1e-9, atol=1e-9)
    average = u(x, r, t)
    fraction = torch.linspace(0.1, 0.9, len(t), dtype=t.dtype)
    torch.testing.assert_close(semigroup_target(u, x, r, t, fraction), average, rtol=0, atol=1e-8)
    end_velocity = problem.straight_field()(r, x - lift(t - r, x) * average)
    torch.testing.assert_close(lagrangian_velocity(u, x, r, t, "jvp"), end_velocity, rtol=0, atol=1e-8)
    torch.testing.assert_close(eulerian_target(u, x, r, t, v, v, "jvp"), average, rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS[:5], ids=name)
def test_map_is_the_flow_of_the_path(path: ConditionalPath) -> None:
    # The reference never hears of straight coordinates.
    problem = gaussian((3,), mean=0.7, std=0.4)
    u = average_velocity(network(gaussian_velocity(problem), path, "sample"), path, "sample")
    start = problem.marginal_sample(path, 0.9, 6)
    x, t = path.to_straight(start, torch.full((6,), 0.9, dtype=torch.float64))
    r = path.ratio(torch.full((6,), 0.2, dtype=torch.float64))
    end, _ = path.from_straight(flow_map(u, x, r, t), r)
    torch.testing.assert_close(end, flow_of_gaussian(problem, path, start, 0.9, 0.2), rtol=1e-10, atol=1e-10)


def test_every_prediction_type_makes_the_map_inside_the_path() -> None:
    problem = gaussian((3,), mean=0.7, std=0.4)
    exact = gaussian_velocity(problem)
    r, t = intervals(OTPath())
    x = points(problem, t)
    for prediction_type in PREDICTION_TYPES:
        u = average_velocity(network(exact, OTPath(), prediction_type), OTPath(), prediction_type)
        torch.testing.assert_close(u(x, r, t), exact(x, r, t), rtol=1e-9, atol=1e-9)
    u = average_velocity(lambda x, r, t: x, OTPath(), "epsilon")
    with pytest.raises(ValueError, match="has no limit at t = 1"):
        u(x, r, torch.ones_like(t))


def test_time_scale_multiplies_the_times_of_the_network() -> None:
    seen = []
    u = average_velocity(lambda x, r, t: seen.append((r, t)) or x, VPPath(), time_scale=1000.0)
    times = torch.tensor([0.25], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    u(torch.zeros(1, 2, dtype=torch.float64), *(VPPath().ratio(time) for time in times))
    torch.testing.assert_close(seen[0], (1000 * times[0], 1000 * times[1]), rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_finite_differences_agree_with_jvp(shape: tuple[int, ...]) -> None:
    for path in (OTPath(), VEPath()):
        problem = gaussian(shape, mean=0.7, std=0.4)
        u = average_velocity(network(gaussian_velocity(problem), path, "sample"), path, "sample")
        span = (path.ratio_min, path.ratio_max)
        r, t = intervals(path)
        x = points(problem, t)
        v = u(x, t, t)
        errors = []
        for step in (4e-3, 2e-3):
            end = lagrangian_velocity(u, x, r, t, "finite_difference", step, span)
            mean = eulerian_target(u, x, r, t, v, v, "finite_difference", step, span)
            end_error = (end - lagrangian_velocity(u, x, r, t, "jvp")).abs().max()
            mean_error = (mean - eulerian_target(u, x, r, t, v, v, "jvp")).abs().max()
            errors.append((end_error, mean_error))
        # Of second order, so a quarter at half the step.
        for coarse, fine in zip(*errors):
            assert coarse < 1e-2 and 3.5 < coarse / fine < 4.5


def test_finite_differences_stay_within_the_span() -> None:
    seen: list[torch.Tensor] = []

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.extend([r, t])
        return x * lift(r + t, x)

    r, t = torch.tensor([0.1, 0.1, 0.6, 0.4]).double(), torch.tensor([0.7, 0.1, 0.7, 0.6]).double()
    x = torch.ones(4, 2, dtype=torch.float64)
    lagrangian_velocity(u, x, r, t, step=0.01, span=(0.1, 0.7))
    value = eulerian_target(u, x, r, t, x, 0 * x, step=0.01, span=(0.1, 0.7))
    assert all(bool(((time >= 0.1 - 1e-12) & (time <= 0.7 + 1e-12)).all()) for time in seen)
    torch.testing.assert_close(value, x - lift(t - r, x) * x)


class Planted(torch.nn.Module):
    """The exact average velocity plus `strength` times an error."""

    def __init__(self, exact: AverageVelocity, error: str) -> None:
        super().__init__()
        self.exact, self.error = exact, error
        self.strength = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        exact, length = self.exact(x, r, t), lift(t - r, x)
        shape = {
            "factor": lambda: exact,
            "offset": lambda: torch.ones_like(x),
            "length": lambda: length * torch.ones_like(x),
            "end velocity in place of the average": lambda: self.exact(x, t, t) - exact,
            "velocity at r": lambda: self.exact(x, r, r) - exact,
            "time": lambda: lift(t, x) * x,
        }[self.error]()
        return exact + self.strength * shape


def planted_gradient(u: Planted, strength: float, objective: str, derivative: str) -> tuple[float, float]:
    """The loss's gradient in the strength of the error, and the loss, on exact velocities of fixed points."""
    problem = gaussian((2,), mean=0.7, std=0.4)
    r, t = intervals(OTPath(), 64)
    r, t = torch.cat([r, t[:32]]), torch.cat([t, t[:32]])
    x = points(problem, t)
    velocity = u.exact(x, t, t)
    with torch.no_grad():
        u.strength.fill_(strength)
    loss = flow_map_loss(u, x, r, t, velocity, objective, derivative=derivative).mean()
    return torch.autograd.grad(loss, u.strength)[0].item(), loss.item()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "error",
    ["factor", "offset", "length", "end velocity in place of the average", "velocity at r", "time"],
)
def test_gradient_vanishes_at_the_exact_average_velocity_alone(objective: str, error: str) -> None:
    u = Planted(gaussian_velocity(gaussian((2,), mean=0.7, std=0.4)), error)
    gradient, loss = planted_gradient(u, 0.0, objective, "jvp")
    assert abs(gradient) < 1e-8 and loss < 1e-15
    for strength in (-0.2, 0.2):
        gradient, loss = planted_gradient(u, strength, objective, "jvp")
        # Descent leads back to the exact one.
        assert gradient * strength > 1e-5 and loss > 1e-6


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_finite_difference_losses_have_nearly_that_gradient(objective: str) -> None:
    u = Planted(gaussian_velocity(gaussian((2,), mean=0.7, std=0.4)), "length")
    for strength in (0.0, 0.2):
        gradient, loss = planted_gradient(u, strength, objective, "finite_difference")
        exact_gradient, exact_loss = planted_gradient(u, strength, objective, "jvp")
        # The step is 5e-3, and the error of first order at the ends of the span.
        assert abs(gradient - exact_gradient) < 5e-3 and abs(loss - exact_loss) < 5e-3


@pytest.mark.parametrize("objective", ["mean_flow", "improved_mean_flow"])
def test_conditional_velocity_gives_the_gradient_of_the_exact_one(objective: str) -> None:
    """Many draws of data and noise through one point: the mean gradient is that of their mean velocity."""
    problem = gaussian((1,), mean=0.7, std=0.4)
    u = Planted(gaussian_velocity(problem), "length")
    with torch.no_grad():
        u.strength.fill_(0.3)
    rows = 4096
    x, t = torch.full((rows, 1), 0.9, dtype=torch.float64), torch.full((rows,), 0.8, dtype=torch.float64)
    r = 0.3 * torch.ones_like(t)
    # The posterior of the data at x, by quantiles; the velocity noise - data is linear in it.
    quantiles = torch.special.ndtri((torch.arange(rows, dtype=torch.float64) + 0.5) / rows)[:, None]
    variance = (0.2 * 0.4) ** 2 + 0.8**2
    data = 0.7 + 0.2 * 0.4**2 / variance * (x - 0.2 * 0.7) + 0.4 * 0.8 / math.sqrt(variance) * quantiles
    gradients = []
    for velocity in ((x - data) / 0.8, u.exact(x, t, t)):
        loss = flow_map_loss(u, x, r, t, velocity, objective, derivative="jvp").mean()
        gradients.append(torch.autograd.grad(loss, u.strength)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_is_flow_matching_where_r_is_t(shape: tuple[int, ...], objective: str) -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 6, *shape, generator=generator)
    t = torch.rand(6, generator=generator, dtype=torch.float64)
    r = torch.where(torch.arange(6) % 2 == 0, t, t / 2)
    weight = torch.nn.Parameter(torch.tensor(0.3))
    calls: list[tuple[int, bool]] = []

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        calls.append((len(x), torch.is_grad_enabled()))
        assert len(x) == len(r) == len(t) == len(label)
        return weight * x * lift(1 + t - r, x) + lift(label, x)

    x, label = OTPath().sample(data, noise, t), torch.arange(6.0)
    loss = flow_map_loss(u, x, r, t, noise - data, objective, args=(label,))
    assert loss.shape == (6,) and loss.dtype == torch.float32
    prediction = u(x, t, t, label)
    expected = flow_matching_loss(OTPath(), prediction, data, noise, t)
    torch.testing.assert_close(loss[::2], expected[::2])
    assert (loss[1::2] - expected[1::2]).abs().min() > 1e-6
    # Targets come first, on the three rows with r < t and without gradients; one call with gradients ends it.
    *targets, last, _ = calls
    assert all(call == (3, False) for call in targets)
    assert last == ((12 if objective == "lagrangian" else 6), True)
    loss.mean().backward()
    assert weight.grad is not None


def test_teacher_makes_the_targets_of_the_semigroup() -> None:
    r, t = intervals(OTPath(), 8)
    x = torch.ones(8, 2, dtype=torch.float64)
    loss = flow_map_loss(lambda x, r, t: 0 * x, x, r, t, x, teacher=lambda x, r, t: 0 * x + 3, fraction=t)
    torch.testing.assert_close(loss, torch.full_like(t, 9.0))


def test_adaptive_weight_is_that_of_mean_flow() -> None:
    x = torch.arange(1.0, 9.0, dtype=torch.float64).reshape(2, 4).requires_grad_()
    t = torch.tensor([0.3, 0.6], dtype=torch.float64)
    loss = flow_map_loss(lambda x, r, t: x, x, t, t, torch.zeros(2, 4).double(), power=0.5, offset=0.04)
    squares = x.detach().square().sum(1)
    torch.testing.assert_close(loss, squares / 4 * (squares + 0.04).pow(-0.5) * 4**0.5)
    gradient = torch.autograd.grad(loss.sum(), x)[0]
    torch.testing.assert_close(gradient, x.detach() / 2 * ((squares + 0.04).pow(-0.5) * 2)[:, None])


def test_guided_target_has_guidance_as_its_fixed_point() -> None:
    velocity, unconditional = torch.tensor([0.7, -0.2]), torch.tensor([0.1, 0.4])
    guided = unconditional + 2.5 * (velocity - unconditional)
    torch.testing.assert_close(guided_velocity(velocity, guided, unconditional, 2.5), guided)
    # A scale for each row.
    rows = (torch.stack([value, value]) for value in (velocity, guided, unconditional))
    targets = guided_velocity(*rows, torch.tensor([2.5, 1.0]))
    torch.testing.assert_close(targets, torch.stack([guided, velocity]))
    with pytest.raises(ValueError, match="`guidance_scale` must be a number above 0, got 0"):
        guided_velocity(velocity, guided, unconditional, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_maps_compose(shape: tuple[int, ...]) -> None:
    problem = gaussian(shape, mean=0.7, std=0.4)
    u = gaussian_velocity(problem)
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = sample_flow_map(u, x, [1.0, 0.0])
    torch.testing.assert_close(one, 0.7 + 0.4 * x)
    for grid in ([1.0, 0.5, 0.0], torch.tensor([1.0, 0.9, 0.6, 0.3, 0.0])):
        torch.testing.assert_close(sample_flow_map(u, x, grid), one)


def test_map_that_heeds_no_end_is_euler() -> None:
    problem = draw_mixture(0, (3,))
    field = problem.straight_field()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    half = x - 0.5 * field(torch.ones(5).double(), x)
    expected = half - 0.5 * field(torch.full((5,), 0.5).double(), half)
    torch.testing.assert_close(sample_flow_map(lambda x, r, t: field(t, x), x, [1.0, 0.5, 0.0]), expected)


@pytest.mark.parametrize("times", [[1.0, 0.6, 0.2, 0.0], [50 / 51, 0.6, 0.2, 0.01 / 1.01]], ids=["ot", "ve"])
@pytest.mark.parametrize("renoise", [0.3, 0.8, 1.0])
def test_noise_between_the_steps_keeps_the_marginals(renoise: float, times: list[float]) -> None:
    """The exact map of one Gaussian: means and deviations at the end are those of the marginal."""
    problem, rows = gaussian((1,), mean=0.7, std=0.4), 100_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    high, low = times[0], times[-1]
    x = (1 - high) * 0.7 + math.hypot((1 - high) * 0.4, high) * noise
    exact = gaussian_velocity(problem)

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert low <= float(r.min()) < float(t.max()) <= high
        return exact(x, r, t)

    end = sample_flow_map(u, x, times, renoise=renoise, generator=generator)
    std = math.hypot((1 - low) * 0.4, low)
    assert abs(end.mean().item() - (1 - low) * 0.7) < 4 * std / math.sqrt(rows)
    assert abs(end.std().item() / std - 1) < 4 / math.sqrt(2 * rows)
    correlation = torch.corrcoef(torch.stack([end[:, 0], x[:, 0]]))[0, 1].item()
    # All else is new noise.
    kept = 1.0
    for r in times[1:-1]:
        m = max(math.sqrt(1 - renoise**2) * r / (1 - r + math.sqrt(1 - renoise**2) * r), low)
        kept *= (1 - r) / (1 - m) * math.hypot((1 - m) * 0.4, m) / math.hypot((1 - r) * 0.4, r)
    assert abs(correlation - kept) < 4 / math.sqrt(rows)


def test_intervals_have_the_shares_asked_for() -> None:
    total = 4000
    options = {"equal_share": 0.75, "noise_share": 0.2, "data_share": 0.1, "total": total}
    r, t = sample_intervals("logit_normal", total, generator=torch.Generator().manual_seed(0), **options)
    assert bool(((r <= t) & (r >= 0) & (t <= 1)).all())
    equal = r == t
    assert equal.sum() == 3000 and bool((equal.reshape(-1, 4).sum(1) == 3).all())
    others = 1000
    for share, hit in ((0.2, t[~equal] == 1), (0.1, r[~equal] == 0)):
        assert abs(hit.double().mean().item() - share) < 4 * math.sqrt(share * (1 - share) / others)
    assert bool((t[equal] < 1).all())
    # The greater of two draws: the median solves F(t)^2 = 1/2.
    inner = t[~equal & (t < 1)]
    median = torch.sigmoid(torch.special.ndtri(torch.tensor(0.5, dtype=torch.float64).sqrt()))
    assert abs((inner < median).double().mean().item() - 0.5) < 4 * math.sqrt(0.25 / len(inner))
    short = sample_intervals(
        "logit_normal", total, generator=torch.Generator().manual_seed(0), max_length=0.25, **options
    )
    torch.testing.assert_close(short[1] - short[0], (t - r) / 4)
    torch.testing.assert_close(short[1], t)
    # Parts of a global batch.
    parts = [
        sample_intervals("logit_normal", 1000, generator=torch.Generator().manual_seed(0), offset=1000 * i, **options)
        for i in range(4)
    ]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), r, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), t, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": "consistency"}, "`objective` must be one of"),
        ({"derivative": "exact"}, "`derivative` must be one of"),
        ({"step": 0.6}, "`step` must lie above 0 and twice in the span"),
        ({"power": -1.0}, "`power` must be at least 0"),
        ({"velocity": torch.zeros(2, 4)}, "must have one shape"),
        ({"r": torch.tensor([0.1, 0.9])}, "`r` must be at most `t`, got r = 0.9 with t = 0.5"),
    ],
)
def test_refusals_of_the_loss(changed: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "r": torch.tensor([0.1, 0.2]), "t": torch.tensor([0.5, 0.5])}
    arguments = {**arguments, "velocity": torch.zeros(2, 3), **changed}
    with pytest.raises(ValueError, match=message):
        flow_map_loss(lambda x, r, t: x, **arguments)


def test_refusals_of_draws_and_samplers() -> None:
    for name, value in (("equal_share", 1.5), ("noise_share", -0.1), ("data_share", 2), ("max_length", 0)):
        with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
            sample_intervals("uniform", 4, **{name: value})
    x = torch.zeros(2, 3)
    for times in ([1.0], [0.0, 1.0], [1.0, 0.5, 0.5], [1.2, 0.0]):
        with pytest.raises(ValueError, match="at least two falling times"):
            sample_flow_map(lambda x, r, t: x, x, times)
    with pytest.raises(ValueError, match="`renoise` must be a number in"):
        sample_flow_map(lambda x, r, t: x, x, [1.0, 0.0], renoise=1.5)


def test_semigroup_loss_learns_a_map_of_one_call() -> None:
    """W1 to a 1-D mixture of two modes; with one call the velocity of the same network draws their mean."""
    u = train(Setting("", {"objective": "semigroup"}, random_split=True), steps=800, seed=0)[0]
    assert all(distance(u, calls) < 0.2 for calls in (1, 2, 4))
    assert distance(lambda x, r, t: u(x, t, t), 1) > 0.5


def test_moment_matching_is_the_discrepancy_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn, real = (
        torch.randn(5, 2, 3, generator=generator).double(),
        torch.randn(4, 2, 3, generator=generator).double(),
    )
    scale = torch.stack([(x - y).norm() for x in real for y in real]).sum() / 12

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.exp(-(x - y).norm() / (width * scale)) for width in (1 / 3, 2 / 3, 4 / 3)]).sum()

    losses = moment_matching_losses(drawn, real)
    for i, loss in enumerate(losses):
        others = torch.stack([kernel(drawn[i], drawn[j]) for j in range(5) if j != i]).mean()
        torch.testing.assert_close(loss, others - 2 * torch.stack([kernel(drawn[i], y) for y in real]).mean())
    before, known = drawn + 0.1 * drawn.roll(1, -1), torch.randn(7, 2, 3, generator=generator).double()
    for i, loss in enumerate(moment_matching_losses(drawn, real, before, known)):
        pairs = torch.stack([kernel(drawn[i], before[j]) for j in range(5) if j != i]).mean()
        more = 2 * (torch.stack([kernel(drawn[i], y) for y in known]).mean() - pairs)
        torch.testing.assert_close(loss, losses[i] + more)
    for wrong in ((before, None), (None, known), (before[1:], known)):
        with pytest.raises(ValueError, match="`before` must have the shape of `drawn`, and goes with `known`"):
            moment_matching_losses(drawn, real, *wrong)
    for few in ((drawn[:1], real), (drawn, real[:0])):
        with pytest.raises(ValueError, match=f"got {len(few[0])} and {len(few[1])}"):
            moment_matching_losses(*few)


def test_moment_matching_is_least_where_both_have_one_distribution() -> None:
    """By 1,000 pairs of sets: a mean that is off, a spread that is too small or too large, and the mean alone."""
    generator = torch.Generator().manual_seed(0)
    noise, real = torch.randn(2, 1000, 8, 1, generator=generator, dtype=torch.float64)

    def discrepancy(mean: float, std: float) -> float:
        return (
            torch.stack([moment_matching_losses(mean + std * x, y).mean() for x, y in zip(noise, real)]).mean().item()
        )

    best = discrepancy(0.0, 1.0)
    assert all(
        discrepancy(*wrong) > best + 0.015 for wrong in ((0.3, 1.0), (-0.3, 1.0), (0.0, 0.7), (0.0, 1.4), (0, 0))
    )


@pytest.mark.parametrize(("mean", "std", "noise_left"), [(0.5, 1.0, 0.8), (0.15, 0.8, 1.05)])
def test_a_map_before_takes_noise_out_of_the_gradient_and_keeps_its_mean(
    mean: float, std: float, noise_left: float
) -> None:
    """Gradient of mean and spread by 200 sets of 16, where they are right and where they are not."""
    generator = torch.Generator().manual_seed(0)
    real = 0.5 + torch.randn(500, 1, generator=generator, dtype=torch.float64)
    gradients = []
    for _ in range(200):
        noise, other = (torch.randn(size, 1, generator=generator, dtype=torch.float64) for size in (16, 500))
        for before in ((), (mean - 0.05 + 0.95 * std * noise, mean - 0.05 + 0.95 * std * other)):
            learned = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
            losses = moment_matching_losses(learned[0] + learned[1] * noise, real, *before)
            gradients.append(torch.autograd.grad(losses.mean(), learned)[0])
    plain, controlled = torch.stack(gradients).unflatten(0, (200, 2)).unbind(1)
    error = (plain - controlled).std(0) / 200**0.5
    assert ((plain.mean(0) - controlled.mean(0)).abs() < 3 * error).all()
    assert (controlled.std(0) < noise_left * plain.std(0)).all()


def test_moment_matching_learns_a_distribution() -> None:
    """Mean and spread of a normal distribution, from others, by new samples in each step."""
    generator = torch.Generator().manual_seed(0)
    learned = torch.tensor([0.0, 0.3], requires_grad=True)
    optimizer = torch.optim.Adam([learned], lr=0.03)
    tail = []
    for step in range(600):
        drawn = learned[0] + learned[1] * torch.randn(64, 1, generator=generator)
        loss = moment_matching_losses(drawn, 1.5 + torch.randn(64, 1, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tail += [learned.detach().clone()] if step >= 400 else []
    torch.testing.assert_close(torch.stack(tail).mean(0), torch.tensor([1.5, 1.0]), atol=0.06, rtol=0)
