# SPDX-License-Identifier: Apache-2.0
"""The paths against autograd, finite differences, the papers' formulas and diffusers' noise schedules."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_fm.paths import (
    PATHS,
    PREDICTION_TYPES,
    ConditionalPath,
    CosinePath,
    DiscreteVPPath,
    OTPath,
    VEPath,
    VPPath,
    make_path,
    register_path,
)


class ParabolaPath(ConditionalPath):
    """A path that gives alpha and sigma and nothing else."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t.square()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t


class CirclePath(ConditionalPath):
    """Alpha and sigma alone, where the rate of sigma is infinite at t = 0, as on VP."""

    def __repr__(self) -> str:
        return "CirclePath()"

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(t * (2 - t))


TRAINED_BETAS = [0.02, 0.05, 0.03, 0.2, 0.4, 0.5]
SMOOTH = {
    "ot": OTPath(),
    "ot sigma_min": OTPath(sigma_min=1e-2),
    "vp": VPPath(),
    "vp constant beta": VPPath(beta_min=3.0, beta_max=3.0),
    "ve": VEPath(),
    "cosine": CosinePath(),
    "parabola": ParabolaPath(),
    "circle": CirclePath(),
}
DISCRETE = {
    "linear": DiscreteVPPath(),
    "scaled linear": DiscreteVPPath(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    "squaredcos": DiscreteVPPath(beta_schedule="squaredcos_cap_v2"),
    "sigmoid": DiscreteVPPath(beta_schedule="sigmoid"),
    "trained": DiscreteVPPath(num_train_timesteps=6, trained_betas=tuple(TRAINED_BETAS)),
    "zero snr": DiscreteVPPath(beta_schedule="scaled_linear", rescale_betas_zero_snr=True),
    "two knots": DiscreteVPPath(num_train_timesteps=2, beta_start=0.1, beta_end=0.5),
}
ALL = SMOOTH | DISCRETE
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
PAIRS = [(source, target) for source in PREDICTION_TYPES for target in PREDICTION_TYPES]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def interior(path: ConditionalPath, count: int = 7) -> torch.Tensor:
    """Times inside (0, 1), none of them at a knot of a table, where derivatives have two sides."""
    t = torch.linspace(0.04, 0.96, count, dtype=torch.float64)
    if isinstance(path, DiscreteVPPath):
        last = path.num_train_timesteps - 1
        t = ((t * last).floor() + 0.3) / last
    return t


def batch(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data, noise = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return data, noise


# Derivatives


@every_path
def test_derivatives_equal_autograd(path: ConditionalPath) -> None:
    t = interior(path).requires_grad_()
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        value = function(t)
        # A path with a constant alpha (VE) does not depend on t.
        expected = torch.autograd.grad(value.sum(), t)[0] if value.requires_grad else torch.zeros_like(t)
        torch.testing.assert_close(derivative(t).detach(), expected, rtol=1e-11, atol=1e-11)
    half_variance = torch.autograd.grad(path.sigma(t).square().sum() / 2, t)[0]
    torch.testing.assert_close(path.sigma_d_sigma(t).detach(), half_variance, rtol=1e-11, atol=1e-11)


@every_path
def test_derivatives_equal_central_differences(path: ConditionalPath) -> None:
    # Error: h^2 / 6 times the third derivative (the stiffest: VP, about 10^3 in units of the value) and 2^-53 / h.
    t, h = interior(path), 1e-5
    for function, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        difference = (function(t + h) - function(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), difference, rtol=1e-6, atol=1e-8)


@every_path
def test_velocity_is_the_rate_of_the_sample(path: ConditionalPath) -> None:
    t, h = interior(path), 1e-5
    data, noise = batch(len(t), 3)
    difference = (path.sample(data, noise, t + h) - path.sample(data, noise, t - h)) / (2 * h)
    torch.testing.assert_close(path.velocity(data, noise, t), difference, rtol=1e-6, atol=1e-6)


@every_path
def test_derivatives_are_finite_at_both_ends_or_infinite_but_never_nan(path: ConditionalPath) -> None:
    t = double(0.0, 1.0)
    for values in (path.alpha(t), path.sigma(t), path.d_alpha(t), path.sigma_d_sigma(t)):
        assert values.isfinite().all()
    assert not path.d_sigma(t).isnan().any()


@every_path
def test_the_ratio_rises_and_the_ends_are_data_and_noise(path: ConditionalPath) -> None:
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    alpha, sigma, ratio = path.alpha(t), path.sigma(t), path.ratio(t)
    assert (ratio.diff() > 0).all()
    assert (alpha >= 0).all() and (sigma >= 0).all()
    assert (ratio[0].item(), ratio[-1].item()) == (path.ratio_min, path.ratio_max)
    torch.testing.assert_close(ratio, sigma / (alpha + sigma), rtol=1e-12, atol=1e-15)
    assert path.prior_std == pytest.approx(math.sqrt(alpha[-1] ** 2 + sigma[-1] ** 2), rel=1e-12)


@pytest.mark.parametrize(
    "path", [SMOOTH["vp"], SMOOTH["cosine"], SMOOTH["circle"], *DISCRETE.values()], ids=lambda path: repr(path)[:40]
)
def test_variance_is_preserved_between_the_knots_too(path: ConditionalPath) -> None:
    t = torch.linspace(0, 1, 4001, dtype=torch.float64)
    total = path.alpha(t).square() + path.sigma(t).square()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-14, atol=0)


# Closed forms of the paper, in the paper's own time: t = 0 noise, t = 1 data (arXiv 2210.02747)


def test_optimal_transport_path_of_the_paper() -> None:
    # Equations 20 to 23, transcribed; the paper's time is 1 - t and its field is minus the velocity.
    sigma_min = 0.07
    path = OTPath(sigma_min=sigma_min)
    data, noise = batch(9, 4)
    t_paper = torch.linspace(0, 1, 9, dtype=torch.float64)
    t, column = 1 - t_paper, t_paper[:, None]
    psi = (1 - (1 - sigma_min) * column) * noise + column * data
    torch.testing.assert_close(path.sample(data, noise, t), psi, rtol=1e-13, atol=1e-14)
    field = (data - (1 - sigma_min) * psi) / (1 - (1 - sigma_min) * column)
    torch.testing.assert_close(-path.velocity(data, noise, t), field, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(-path.velocity(data, noise, t), data - (1 - sigma_min) * noise, rtol=1e-13, atol=1e-14)


def test_variance_preserving_path_of_the_paper() -> None:
    # Equations 18 and 19: mu = alpha_{1-t} x_1, sigma^2 = 1 - alpha_{1-t}^2, alpha_t = exp(-T(t) / 2).
    beta_min, beta_max = 0.1, 20.0
    path = VPPath(beta_min, beta_max)
    data, noise = batch(8, 4)
    t_paper = torch.linspace(0, 0.98, 8, dtype=torch.float64)[:, None]
    reverse = 1 - t_paper
    integral = beta_min * reverse + (beta_max - beta_min) * reverse**2 / 2
    rate = beta_min + (beta_max - beta_min) * reverse
    x = torch.exp(-integral / 2) * data + torch.sqrt(1 - torch.exp(-integral)) * noise
    torch.testing.assert_close(path.sample(data, noise, reverse[:, 0]), x, rtol=1e-12, atol=1e-13)
    field = -rate / 2 * (torch.exp(-integral) * x - torch.exp(-integral / 2) * data) / (1 - torch.exp(-integral))
    torch.testing.assert_close(-path.velocity(data, noise, reverse[:, 0]), field, rtol=1e-10, atol=1e-10)


def test_variance_exploding_path_of_the_paper() -> None:
    # Equations 16 and 17: mu = x_1, sigma_{1-t}, and u_t = -(sigma'_{1-t} / sigma_{1-t}) (x - x_1).
    low, high = 0.02, 30.0
    path = VEPath(low, high)
    data, noise = batch(8, 4)
    t_paper = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
    sigma = low * (high / low) ** (1 - t_paper)
    x = data + sigma * noise
    torch.testing.assert_close(path.sample(data, noise, 1 - t_paper[:, 0]), x, rtol=1e-12, atol=1e-12)
    field = -math.log(high / low) * (x - data)
    torch.testing.assert_close(-path.velocity(data, noise, 1 - t_paper[:, 0]), field, rtol=1e-11, atol=1e-11)


def test_theorem_3_gives_the_velocity_of_every_path() -> None:
    # u_t(x | x_1) = (sigma'_t / sigma_t) (x - mu_t) + mu'_t, here in our time.
    for path in ALL.values():
        t = interior(path)
        data, noise = batch(len(t), 4)
        alpha, sigma, d_alpha, d_sigma = (f(t)[:, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
        x = path.sample(data, noise, t)
        field = d_sigma / sigma * (x - alpha * data) + d_alpha * data
        torch.testing.assert_close(path.velocity(data, noise, t), field, rtol=1e-9, atol=1e-9)


# Targets and conversions


def formulas(path: ConditionalPath, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return path.alpha(t)[:, None], path.sigma(t)[:, None], path.d_alpha(t)[:, None], path.d_sigma(t)[:, None]


def written_target(
    path: ConditionalPath, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, kind: str
) -> torch.Tensor:
    alpha, sigma, d_alpha, d_sigma = formulas(path, t)
    return {
        "flow_prediction": d_alpha * data + d_sigma * noise,
        "epsilon": noise,
        "sample": data,
        "v_prediction": (alpha * noise - sigma * data) / (alpha**2 + sigma**2).sqrt(),
        "score": -noise / sigma,
    }[kind]


def written_conversion(
    path: ConditionalPath, output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, source: str, target: str
) -> torch.Tensor:
    """By way of data and noise, each type solved on its own; for times inside (0, 1)."""
    alpha, sigma, d_alpha, d_sigma = formulas(path, t)
    if source == target:
        return output
    norm = (alpha**2 + sigma**2).sqrt()
    d = alpha * d_sigma - d_alpha * sigma
    data, noise = {
        "flow_prediction": lambda: ((d_sigma * x - sigma * output) / d, (alpha * output - d_alpha * x) / d),
        "epsilon": lambda: ((x - sigma * output) / alpha, output),
        "sample": lambda: (output, (x - alpha * output) / sigma),
        "v_prediction": lambda: (
            (alpha * x - sigma * norm * output) / norm**2,
            (sigma * x + alpha * norm * output) / norm**2,
        ),
        "score": lambda: ((x + sigma**2 * output) / alpha, -sigma * output),
    }[source]()
    return written_target(path, data, noise, t, target)


@every_path
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_targets(path: ConditionalPath, kind: str) -> None:
    t = interior(path)
    data, noise = batch(len(t), 3)
    torch.testing.assert_close(
        path.target(data, noise, t, kind), written_target(path, data, noise, t, kind), rtol=1e-11, atol=1e-11
    )


@every_path
def test_the_score_is_the_gradient_of_the_conditional_log_density(path: ConditionalPath) -> None:
    t = interior(path)
    data, noise = batch(len(t), 3)
    x = path.sample(data, noise, t).requires_grad_()
    log_density = -((x - path.alpha(t)[:, None] * data) / path.sigma(t)[:, None]).square().sum() / 2
    score = torch.autograd.grad(log_density, x)[0]
    torch.testing.assert_close(path.target(data, noise, t, "score"), score, rtol=1e-9, atol=1e-9)


@every_path
def test_conversions_reach_the_targets(path: ConditionalPath) -> None:
    # Worst condition: the data from the noise at small alpha, the score from the data at small sigma (1e-4 on VE).
    t = interior(path)
    data, noise = batch(len(t), 3)
    x = path.sample(data, noise, t)
    for source, target in PAIRS:
        output = path.target(data, noise, t, source)
        expected = path.target(data, noise, t, target)
        torch.testing.assert_close(path.convert(output, x, t, source, target), expected, rtol=1e-8, atol=1e-8)


@every_path
def test_conversions_are_inverse_to_each_other_for_any_output(path: ConditionalPath) -> None:
    t = interior(path)
    x, output = batch(len(t), 3, seed=1)
    for source, target in PAIRS:
        there = path.convert(output, x, t, source, target)
        written = written_conversion(path, output, x, t, source, target)
        torch.testing.assert_close(there, written, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(path.convert(there, x, t, target, source), output, rtol=1e-7, atol=1e-7)


@every_path
def test_the_error_scale_is_that_of_the_conversion(path: ConditionalPath) -> None:
    # FORMULAS: |v - v^| = |x0 - x0^| D / s = |e - e^| D / a.
    t = interior(path)
    alpha, sigma, d_alpha, d_sigma = (column[:, 0] for column in formulas(path, t))
    d = alpha * d_sigma - d_alpha * sigma
    torch.testing.assert_close(path.error_scale(t, "sample", "flow_prediction"), d / sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.error_scale(t, "epsilon", "flow_prediction"), d / alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(path.error_scale(t, "epsilon", "score"), 1 / sigma, rtol=1e-9, atol=0)
    x, output = batch(len(t), 3)
    for source, target in PAIRS:
        moved = path.convert(output + 1, x, t, source, target) - path.convert(output, x, t, source, target)
        scale = path.error_scale(t, source, target)[:, None].expand_as(moved)
        torch.testing.assert_close(moved.abs(), scale, rtol=1e-7, atol=1e-9)


def smooth_network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Outputs of any type are smooth functions of x and t, and know nothing of the path."""
    return torch.tanh(x) + 0.3 * torch.sin(2 * t)[:, None] - 0.2


def limit_at(path: ConditionalPath, end: float, x: torch.Tensor, source: str, target: str) -> torch.Tensor | None:
    """The limit of a conversion as t goes to an end, by the written formulas; `None` if the values run away.

    Where there is a limit, the last two values differ by at most about the square root of 1e-6 (sigma on VP); where
    there is none, they grow at least as 1 / sqrt(distance), tenfold.
    """
    values = []
    for distance in (1e-6, 1e-8):
        t = torch.full((len(x),), distance if end == 0.0 else 1 - distance, dtype=torch.float64)
        values.append(written_conversion(path, smooth_network(x, t), x, t, source, target))
    before, last = values
    settled = (last - before).abs() < 0.05 * (1 + last.abs())
    if settled.all():
        return last
    assert ((last / before).abs() > 5).any()
    return None


# A table of 1,000 knots is smooth near its ends as it is; conversions there are linear pieces of the angle.
@every_path
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_conversions_at_the_ends_are_the_limits_or_an_error(path: ConditionalPath, end: float) -> None:
    x, _ = batch(4, 3)
    t = torch.full((4,), end, dtype=torch.float64)
    for source, target in PAIRS:
        limit = limit_at(path, end, x, source, target)
        if limit is None:
            assert not path.determines(t, source, target).any()
            with pytest.raises(ValueError, match=f"no limit at t = {end:g}") as raised:
                path.convert(smooth_network(x, t), x, t, source, target)
            assert source in str(raised.value) and target in str(raised.value)
        else:
            assert path.determines(t, source, target).all()
            # At a distance of 1e-8 VP's sigma is 3e-5; a rate of D = 10 multiplies it.
            converted = path.convert(smooth_network(x, t), x, t, source, target)
            torch.testing.assert_close(converted, limit, rtol=2e-3, atol=2e-3)


@every_path
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_targets_at_the_ends_are_the_limits_or_an_error(path: ConditionalPath, end: float) -> None:
    data, noise = batch(4, 3)
    t = torch.full((4,), end, dtype=torch.float64)
    near, nearer = ((t - distance).abs() for distance in (1e-6, 1e-8))
    for kind in PREDICTION_TYPES:
        before = written_target(path, data, noise, near, kind)
        last = written_target(path, data, noise, nearer, kind)
        if ((last - before).abs() < 0.05 * (1 + last.abs())).all():
            torch.testing.assert_close(path.target(data, noise, t, kind), last, rtol=2e-3, atol=2e-3)
        else:
            with pytest.raises(ValueError, match=f"no limit at t = {end:g}"):
                path.target(data, noise, t, kind)


def test_which_paths_have_no_limit_where() -> None:
    # The table in words: without noise left, no score; without data left, the noise does not give the data.
    def undetermined(path: ConditionalPath, end: float) -> set[tuple[str, str]]:
        return {pair for pair in PAIRS if not path.determines(double(end), *pair).all()}

    both = set(PREDICTION_TYPES)
    from_noise = {(source, target) for source in ("epsilon", "score") for target in both - {"epsilon", "score"}}
    assert undetermined(OTPath(), 1.0) == undetermined(CosinePath(), 1.0) == from_noise
    assert undetermined(OTPath(0.1), 1.0) == undetermined(DISCRETE["zero snr"], 1.0) == from_noise
    assert undetermined(VEPath(), 0.0) == undetermined(VEPath(), 1.0) == undetermined(OTPath(0.1), 0.0) == set()
    assert undetermined(VPPath(), 1.0) == undetermined(DISCRETE["linear"], 0.0) == set()
    # At clean data the data say nothing of the noise, and nothing but VP's infinite velocity tells the score.
    assert ("sample", "epsilon") in undetermined(OTPath(), 0.0) and ("epsilon", "score") in undetermined(OTPath(), 0.0)
    assert ("flow_prediction", "score") in undetermined(OTPath(), 0.0)
    assert ("flow_prediction", "score") not in undetermined(VPPath(), 0.0)


@every_path
def test_ends_in_float32_and_one_bad_time_in_a_batch(path: ConditionalPath) -> None:
    # What has a limit has it in float32 too, and a batch is refused for one of its times.
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for end in (0.0, 1.0):
        exact, single = double(0.5, end), torch.tensor([0.5, end])
        for source, target in PAIRS:
            defined = path.determines(exact, source, target)
            assert torch.equal(path.determines(single, source, target), defined)
            if defined.all():
                assert path.convert(x, x, single, source, target).isfinite().all()
            else:
                with pytest.raises(ValueError, match=f"t = {end:g}"):
                    path.convert(x, x, single, source, target)


# Straight coordinates


@every_path
def test_straight_coordinates_lie_on_the_optimal_transport_path(path: ConditionalPath) -> None:
    t = torch.cat([interior(path), double(0.0, 1.0)])
    data, noise = batch(len(t), 2, 3)
    straight, s = path.to_straight(path.sample(data, noise, t), t)
    torch.testing.assert_close(straight, OTPath().sample(data, noise, s), rtol=1e-12, atol=1e-12)
    assert torch.equal(s, path.ratio(t))


def time_tolerance(path: ConditionalPath, dtype: torch.dtype) -> float:
    """The error of a time found from a ratio: a few roundings of the ratio, over the slowest rise of the ratio."""
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    slowest = (path.ratio(t).diff() / t.diff()).min().item()
    return 8 * torch.finfo(dtype).eps * max(1.0, 1 / slowest)


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_time_at_inverts_the_ratio(path: ConditionalPath, dtype: torch.dtype) -> None:
    t = torch.cat([torch.linspace(0, 1, 501, dtype=torch.float64), interior(path)])
    found = path.time_at(path.ratio(t).to(dtype))
    assert found.dtype == dtype and found.shape == t.shape
    torch.testing.assert_close(found.double(), t, rtol=0, atol=time_tolerance(path, dtype))
    assert path.time_at(path.ratio(t).reshape(4, 127).to(dtype)).shape == (4, 127)
    assert path.time_at(torch.tensor(0.5, dtype=dtype)).shape == ()


@every_path
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_time_at_rises_and_ends_at_the_ends(path: ConditionalPath, dtype: torch.dtype) -> None:
    found = path.time_at(torch.linspace(0, 1, 10_001, dtype=dtype))
    tolerance = time_tolerance(path, dtype)
    assert (found.diff() >= -tolerance).all() and found[0] == 0 and 1 - tolerance <= found[-1] <= 1
    ends = path.time_at(double(path.ratio_min, path.ratio_max))
    torch.testing.assert_close(ends, double(0.0, 1.0), rtol=0, atol=time_tolerance(path, torch.float64))


@pytest.mark.parametrize("beta_max", [60.0, 80.0, 150.0, 300.0, 2000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_time_at_of_a_vp_path_whose_data_vanishes_in_rounding(beta_max: float, dtype: torch.dtype) -> None:
    path = VPPath(beta_max=beta_max)
    found = path.time_at(torch.linspace(0, 1, 101, dtype=dtype))
    assert found.isfinite().all() and (found.diff() >= 0).all()
    assert found[0] == 0


@every_path
def test_straight_coordinates_there_and_back(path: ConditionalPath) -> None:
    t = torch.cat([interior(path), double(0.0, 1.0)])
    x, _ = batch(len(t), 3)
    back, time = path.from_straight(*path.to_straight(x, t))
    tolerance = time_tolerance(path, torch.float64)
    torch.testing.assert_close(time, t, rtol=0, atol=tolerance)
    # An error of the time moves the scale alpha + sigma by its rate, at most about 400 (VE) or 1 / sqrt(t) (VP).
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    s = torch.linspace(path.ratio_min, path.ratio_max, 11, dtype=torch.float64)
    x, _ = batch(11, 3)
    again, ratio = path.to_straight(*path.from_straight(x, s))
    torch.testing.assert_close(ratio, s, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(again, x, rtol=1e-9, atol=1e-9)


def test_straight_coordinates_of_the_optimal_transport_path_change_nothing() -> None:
    x, _ = batch(5, 3)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert torch.equal(OTPath().to_straight(x, t)[0], x) and torch.equal(OTPath().to_straight(x, t)[1], t)
    assert torch.equal(OTPath().from_straight(x, t)[0], x) and torch.equal(OTPath().from_straight(x, t)[1], t)


# The tables of diffusion checkpoints

STOCK = {
    "linear": {},
    "linear, other ends": {"beta_start": 0.0015, "beta_end": 0.0195},
    "scaled linear": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "squaredcos": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid"},
    "trained": {"num_train_timesteps": 6, "trained_betas": TRAINED_BETAS},
    "100 steps": {"num_train_timesteps": 100, "beta_end": 0.05},
}


@pytest.mark.parametrize("config", STOCK.values(), ids=STOCK.keys())
def test_knots_are_those_of_a_stock_diffusion_scheduler(config: dict) -> None:
    stock = DDPMScheduler(**config)
    path = DiscreteVPPath(**config)
    n = path.num_train_timesteps
    alpha_bar = path.alpha(torch.arange(n, dtype=torch.float64) / (n - 1)).square()
    # Stock multiplies float32 factors 1 - beta: each product rounds once, and each factor carries the rounding of 1
    # and of its beta, which is large beside a factor near 0.001.
    steps = torch.finfo(torch.float32).eps * (1 + 1 / (1 - path.betas))
    error = (stock.alphas_cumprod.double() - alpha_bar).abs() / alpha_bar
    assert (error <= steps.cumsum(0)).all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_knots_with_zero_terminal_snr(schedule: str) -> None:
    config = {"beta_schedule": schedule, "rescale_betas_zero_snr": True}
    path = DiscreteVPPath(**config)
    knots = torch.arange(1000, dtype=torch.float64) / 999
    assert path.alpha(double(1.0)).item() == 0.0 and path.sigma(double(1.0)).item() == 1.0
    assert path.ratio_max == 1.0
    # Near the end both are differences of nearly equal float32 numbers in stock: the error is absolute there, at most
    # 1,000 roundings of products below one.
    stock = DDPMScheduler(**config).alphas_cumprod.double()
    torch.testing.assert_close(path.alpha(knots).square(), stock, rtol=0, atol=1000 * torch.finfo(torch.float32).eps)


def test_between_the_knots_the_angle_is_linear() -> None:
    path = DISCRETE["trained"]
    knots = torch.arange(6, dtype=torch.float64) / 5
    angle = torch.atan2(path.sigma(knots), path.alpha(knots))
    fraction = torch.linspace(0, 1, 11, dtype=torch.float64)
    for i in range(5):
        t = (i + fraction) / 5
        between = torch.atan2(path.sigma(t), path.alpha(t))
        torch.testing.assert_close(between, torch.lerp(angle[i], angle[i + 1], fraction), rtol=1e-12, atol=1e-13)


def test_a_table_of_extreme_betas_stays_finite() -> None:
    path = DiscreteVPPath(num_train_timesteps=400, trained_betas=(0.999,) * 400)
    t = torch.linspace(0, 1, 999, dtype=torch.float64)
    assert path.alpha(t).isfinite().all() and path.ratio(t).isfinite().all()
    for dtype in (torch.float64, torch.float32):
        found = path.time_at(torch.linspace(0, 1, 999, dtype=dtype))
        assert found.isfinite().all() and (found >= 0).all() and (found <= 1).all()


# What networks are given


def test_only_the_exploding_path_scales_the_network_input() -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    for path in ALL.values():
        variance = (path.alpha(t).square() + path.sigma(t).square()) * path.input_scale(t).square()
        if isinstance(path, VEPath):
            torch.testing.assert_close(variance, torch.ones_like(t), rtol=1e-12, atol=0)
        else:
            assert torch.equal(path.input_scale(t), torch.ones_like(t))


# Shapes, types and devices

SHAPES = [(4,), (4, 3), (4, 5, 3), (4, 3, 2, 5), (4, 3, 2, 2, 5)]


@every_path
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_is_a_batch_of_samples(path: ConditionalPath, shape: tuple[int, ...]) -> None:
    t = interior(path, 4)
    data, noise = batch(*shape)
    flat_data, flat_noise = data.reshape(4, -1), noise.reshape(4, -1)
    x = path.sample(data, noise, t)
    assert torch.equal(x.reshape(4, -1), path.sample(flat_data, flat_noise, t))
    assert torch.equal(path.velocity(data, noise, t).reshape(4, -1), path.velocity(flat_data, flat_noise, t))
    converted = path.convert(noise, x, t, "v_prediction", "sample")
    flat = path.convert(flat_noise, x.reshape(4, -1), t, "v_prediction", "sample")
    assert converted.shape == shape and torch.equal(converted.reshape(4, -1), flat)
    straight, s = path.to_straight(x, t)
    assert straight.shape == shape and s.shape == (4,)
    assert path.from_straight(straight, s)[0].shape == shape
    # One sample alone is the same sample.
    assert torch.equal(path.sample(data[2:3], noise[2:3], t[2:3]), x[2:3])


@every_path
def test_a_scalar_time_is_the_time_of_every_sample(path: ConditionalPath) -> None:
    data, noise = batch(4, 3, 2)
    t = interior(path)[3]
    every = t.expand(4)
    assert torch.equal(path.sample(data, noise, t), path.sample(data, noise, every))
    for source, target in PAIRS:
        assert torch.equal(
            path.convert(noise, data, t, source, target), path.convert(noise, data, every, source, target)
        )
    assert torch.equal(path.to_straight(data, t)[0], path.to_straight(data, every)[0])


@every_path
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_data_with_double_times(path: ConditionalPath, dtype: torch.dtype) -> None:
    # Coefficients are cast once, to float32, and the result once, to the data: the float32 result, rounded.
    t = interior(path, 4)
    data, noise = (tensor.to(dtype) for tensor in batch(4, 3, 2))
    x = path.sample(data, noise, t)
    assert x.dtype == dtype
    assert torch.equal(x, path.sample(data.float(), noise.float(), t).to(dtype))
    assert torch.equal(path.velocity(data, noise, t), path.velocity(data.float(), noise.float(), t).to(dtype))
    converted = path.convert(noise, data, t, "flow_prediction", "sample")
    assert converted.dtype == dtype
    assert torch.equal(converted, path.convert(noise.float(), data.float(), t, "flow_prediction", "sample").to(dtype))
    straight, s = path.to_straight(data, t)
    assert straight.dtype == dtype and s.dtype == torch.float64


@every_path
def test_double_times_lose_nothing_near_the_ends_in_float32_data(path: ConditionalPath) -> None:
    # t = 1 - 1e-9 is 1 in float32; the coefficients are computed where t is.
    t = double(1 - 1e-9, 1e-9)
    data, noise = batch(2, 3)
    exact = path.sample(data, noise, t)
    single = path.sample(data.float(), noise.float(), t)
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=1e-6 * path.prior_std)


@every_path
def test_gradients_pass_through_samples_and_conversions(path: ConditionalPath) -> None:
    t = interior(path, 4)
    data, noise = batch(4, 3)
    data.requires_grad_()
    x = path.sample(data, noise, t)
    path.convert(x.square(), x, t, "flow_prediction", "sample").sum().backward()
    assert data.grad is not None and data.grad.isfinite().all()


# Values, not identities


@pytest.mark.parametrize("name", PATHS)
def test_paths_are_values(name: str) -> None:
    path, same = make_path(name), make_path(name)
    assert path == same and hash(path) == hash(same) and len({path, same}) == 1
    assert path.ratio_max == same.ratio_max  # what is computed on first use does not change equality
    path.time_at(double(0.3))
    assert path == same and copy.deepcopy(path) == same and pickle.loads(pickle.dumps(path)) == same
    with pytest.raises(AttributeError):
        path.sigma_min = 0.5
    assert all(path != make_path(other) for other in PATHS if other != name)


def test_parameters_tell_paths_apart() -> None:
    assert OTPath(0.1) != OTPath(0.2) and VPPath(beta_max=10.0) != VPPath() and VEPath(sigma_max=80.0) != VEPath()
    listed = make_path("vp_discrete", num_train_timesteps=6, trained_betas=TRAINED_BETAS)
    assert listed == DISCRETE["trained"] and hash(listed) == hash(DISCRETE["trained"])
    assert "trained_betas=(0.02" in repr(listed) and repr(OTPath(0.1)) == "OTPath(sigma_min=0.1)"
    array = make_path("vp_discrete", num_train_timesteps=6, trained_betas=np.array(TRAINED_BETAS))
    assert array == listed


@pytest.mark.parametrize("name", PATHS)
def test_make_path_gives_the_class_and_its_defaults(name: str) -> None:
    assert type(make_path(name)) is PATHS[name] and make_path(name) == PATHS[name]()


# Bad input: one clear sentence, with the bad value and what is accepted

NAN, INF = float("nan"), float("inf")
BAD_PARAMETERS = [
    *(("ot", "sigma_min", value) for value in (-0.1, 1.0, 2, NAN, INF, "0.1", True, None, [0.1])),
    *(("vp", "beta_min", value) for value in (0.0, -1.0, NAN, INF, "0.1", False, None, 30.0)),
    *(("vp", "beta_max", value) for value in (0.05, -1, NAN, INF, "20", True, None)),
    *(("ve", "sigma_min", value) for value in (0.0, -0.01, NAN, INF, "0.01", None, 50.0, 60.0)),
    *(("ve", "sigma_max", value) for value in (0.01, 0, NAN, INF, "50", None)),
    *(("vp_discrete", "beta_start", value) for value in (0.0, 1.0, -1e-4, NAN, "1e-4", None)),
    *(("vp_discrete", "beta_end", value) for value in (0.0, 1.0, 2.0, NAN, "0.02", None)),
    *(("vp_discrete", "beta_schedule", value) for value in ("cosine", "", None, 1, ["linear"])),
    *(("vp_discrete", "num_train_timesteps", value) for value in (1, 0, -5, 2.5, 1000.0, "1000", True, None)),
    *(("vp_discrete", "rescale_betas_zero_snr", value) for value in ("yes", None, 2)),
]


def one_sentence(error: ValueError) -> str:
    message = str(error)
    assert "\n" not in message and message.endswith(".") and len(message) < 300
    return message


@pytest.mark.parametrize(("name", "parameter", "value"), BAD_PARAMETERS, ids=str)
def test_bad_parameters(name: str, parameter: str, value: object) -> None:
    with pytest.raises(ValueError, match=parameter) as raised:
        make_path(name, **{parameter: value})
    assert repr(value) in one_sentence(raised.value)


@pytest.mark.parametrize(
    "betas",
    [[0.1] * 5, [0.1] * 7, [], [0.1, 0.2, 0.3, 0.4, 0.5, 1.0], [0.1] * 5 + [0.0], [0.1] * 5 + [NAN], "abcdef", 5],
    ids=str,
)
def test_bad_trained_betas(betas: object) -> None:
    with pytest.raises(ValueError, match="`trained_betas` must be 6 numbers in \\(0, 1\\)") as raised:
        make_path("vp_discrete", num_train_timesteps=6, trained_betas=betas)
    one_sentence(raised.value)


@pytest.mark.parametrize("name", ["rectified", "OT", "", None, 3, ["ot"], OTPath], ids=str)
def test_unknown_paths(name: object) -> None:
    with pytest.raises(ValueError, match=r"`path` must be one of \['ot', 'vp', 've', 'cosine', 'vp_discrete'") as e:
        make_path(name)  # type: ignore[arg-type]
    assert repr(name) in one_sentence(e.value)


@pytest.mark.parametrize("name", PATHS)
def test_unknown_parameters(name: str) -> None:
    with pytest.raises(ValueError, match="may hold .*got \\['sigma_minimum', 'z'\\]") as raised:
        make_path(name, z=1, sigma_minimum=0.1)
    one_sentence(raised.value)
    foreign = "beta_min" if name != "vp" else "sigma_min"
    with pytest.raises(ValueError, match=f"'{name}' path may hold .*got \\['{foreign}'\\]"):
        make_path(name, **{foreign: 0.1})


@pytest.mark.parametrize("kind", ["velocity", "noise", "", None, 1, ["epsilon"]], ids=str)
def test_unknown_prediction_types(kind: object) -> None:
    path, t = OTPath(), double(0.5, 0.6)
    x, output = batch(2, 3)
    calls = [
        lambda: path.target(x, output, t, kind),
        lambda: path.convert(output, x, t, kind, "sample"),
        lambda: path.convert(output, x, t, "sample", kind),
        lambda: path.convert(output, x, t, kind, kind),
        lambda: path.coefficients(t, "sample", kind),
        lambda: path.determines(t, kind, "sample"),
        lambda: path.error_scale(t, kind, "sample"),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="`prediction_type` must be one of") as raised:
            call()
        message = one_sentence(raised.value)
        assert repr(kind) in message and all(name in message for name in PREDICTION_TYPES)


# Paths of one's own


class Power(ConditionalPath):
    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t**self.power

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t**self.power


def test_a_registered_path_is_made_by_its_name() -> None:
    register_path("power", Power)
    register_path("power", Power)
    path = make_path("power", power=3.0)
    assert isinstance(path, Power) and path.power == 3.0
    with pytest.raises(ValueError, match=r"'power' path may hold \['power'\], got \['q'\]"):
        make_path("power", q=1)
    with pytest.raises(ValueError, match=r"'power' must rise with t within \[0, 1\], but at t = 0.0156") as raised:
        make_path("power", power=0.0)
    one_sentence(raised.value)


def test_names_of_paths_are_not_taken_twice() -> None:
    for name, path_class, sentence in (
        ("ot", Power, "'ot' of a path is taken by diffusers_fm.paths.gaussian.OTPath"),
        ("my path", Power, "letters, digits, dots and underscores, got 'my path'"),
        ("power", Power(), "must be a subclass of ConditionalPath, got Power"),
        ("power", str, "must be a subclass of ConditionalPath"),
    ):
        with pytest.raises(ValueError, match=sentence) as raised:
            register_path(name, path_class)  # type: ignore[arg-type]
        one_sentence(raised.value)
