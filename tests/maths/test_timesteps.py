# SPDX-License-Identifier: Apache-2.0
"""Training times against the closed-form distributions of SD3 (arXiv 2403.03206, section 3.1) and their strata."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from diffusers_fm.timesteps import DENSITIES, dimension_shift, register_density, sample_timesteps, shift_time


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Distribution functions, written from the paper's densities rather than from inverse functions.


def uniform_cdf(t: np.ndarray) -> np.ndarray:
    return t


def logit_normal_cdf(mean: float, std: float) -> Callable[[np.ndarray], np.ndarray]:
    # Equation 19: logit(t) is normal.
    return lambda t: stats.norm.cdf((np.log(t) - np.log1p(-t) - mean) / std)


def mode_cdf(scale: float) -> Callable[[np.ndarray], np.ndarray]:
    # Equation 20: t = f(u) with f falling from 1 to 0, so P(f(U) <= t) = 1 - f^-1(t).
    u = np.linspace(0, 1, 400_001)
    f = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    assert (np.diff(f) <= 1e-12).all()
    return lambda t: 1 - np.interp(t, f[::-1], u[::-1])


def cosmap_cdf(t: np.ndarray) -> np.ndarray:
    # Equation 21: the integral of 2 / (pi - 2 pi t + 2 pi t^2).
    return 2 / np.pi * np.arctan(2 * t - 1) + 0.5


def u_shaped_cdf(steepness: float) -> Callable[[np.ndarray], np.ndarray]:
    # The integral of exp(a t) + exp(a (1 - t)), over its value at 1.
    a = steepness
    return lambda t: (np.exp(a * t) - 1 + np.exp(a) - np.exp(a * (1 - t))) / (2 * (np.exp(a) - 1))


def unshifted(cdf: Callable[[np.ndarray], np.ndarray], shift: float) -> Callable[[np.ndarray], np.ndarray]:
    # Equation 23, solved for the time before the shift.
    return lambda t: cdf(t / (shift - (shift - 1) * t))


CASES = {
    "uniform": ("uniform", {}, uniform_cdf),
    "logit_normal": ("logit_normal", {}, logit_normal_cdf(0.0, 1.0)),
    "logit_normal to the noise": ("logit_normal", {"logit_mean": 1.2, "logit_std": 0.6}, logit_normal_cdf(1.2, 0.6)),
    "logit_normal to the data": ("logit_normal", {"logit_mean": -0.5, "logit_std": 1.4}, logit_normal_cdf(-0.5, 1.4)),
    "mode": ("mode", {}, mode_cdf(1.29)),
    "mode light": ("mode", {"mode_scale": -0.8}, mode_cdf(-0.8)),
    "mode heaviest": ("mode", {"mode_scale": 2 / (math.pi - 2)}, mode_cdf(2 / (math.pi - 2))),
    "mode zero": ("mode", {"mode_scale": 0.0}, uniform_cdf),
    "cosmap": ("cosmap", {}, cosmap_cdf),
    "beta": ("beta", {"alpha": 2.0, "beta": 0.7}, stats.beta(2.0, 0.7).cdf),
    "beta uniform": ("beta", {}, uniform_cdf),
    "u_shaped": ("u_shaped", {}, u_shaped_cdf(4.0)),
    "u_shaped flat": ("u_shaped", {"steepness": 1.0}, u_shaped_cdf(1.0)),
}
every_case = pytest.mark.parametrize(("density", "options", "cdf"), CASES.values(), ids=CASES.keys())


def test_every_density_has_a_case() -> None:
    assert {density for density, _, _ in CASES.values()} == set(DENSITIES)


@every_case
@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
def test_independent_draws_follow_the_density(density: str, options: dict, cdf: Callable, shift: float) -> None:
    # A true density fails with probability 1e-4; a mean of the wrong sign or an inverse shift gives p below 1e-100.
    t = sample_timesteps(density, 20_000, generator=seeded(1), shift=shift, stratified=False, **options)
    assert stats.kstest(t.numpy(), unshifted(cdf, shift)).pvalue > 1e-4


@every_case
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_one_draw_in_each_stratum(density: str, options: dict, cdf: Callable, shift: float) -> None:
    n = 500
    t = sample_timesteps(density, n, generator=seeded(2), shift=shift, **options)
    strata = np.floor(unshifted(cdf, shift)(t.numpy()) * n).astype(int)
    assert sorted(strata) == list(range(n))
    assert not np.array_equal(strata, np.arange(n))  # in random order
    # Within its stratum a draw is uniform.
    inside = np.concatenate(
        [
            unshifted(cdf, shift)(sample_timesteps(density, n, generator=seeded(seed), shift=shift, **options).numpy())
            * n
            % 1
            for seed in range(10)
        ]
    )
    assert stats.kstest(inside, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("stratified", [True, False])
def test_slices_are_the_global_draw(density: str, stratified: bool) -> None:
    def draw(size: int, **options: int) -> torch.Tensor:
        return sample_timesteps(density, size, generator=seeded(3), stratified=stratified, shift=2.0, **options)

    whole = draw(24)
    # Three processes with two accumulation steps of four samples each.
    parts = torch.cat([draw(4, offset=offset, total=24) for offset in range(0, 24, 4)])
    assert torch.equal(parts, whole)
    assert torch.equal(draw(4, offset=20), whole[20:])  # the default total ends with the slice
    assert torch.equal(draw(1, offset=7, total=24), whole[7:8])


def test_ranks_that_draw_alike_leave_their_generators_alike() -> None:
    first, second = seeded(4), seeded(4)
    for _ in range(3):
        a = sample_timesteps("uniform", 2, generator=first, offset=0, total=6)
        b = sample_timesteps("uniform", 4, generator=second, offset=2, total=6)
        strata = (torch.cat([a, b]) * 6).floor().long()
        assert sorted(strata.tolist()) == list(range(6))


def test_draws_are_determined_by_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = sample_timesteps("logit_normal", 8, generator=seeded(6))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(sample_timesteps("logit_normal", 8, generator=seeded(6)), one)
    assert not torch.equal(sample_timesteps("logit_normal", 8, generator=seeded(7)), one)
    generator = seeded(6)
    sample_timesteps("logit_normal", 8, generator=generator)
    assert not torch.equal(sample_timesteps("logit_normal", 8, generator=generator), one)
    torch.manual_seed(5)
    default = sample_timesteps("logit_normal", 8)
    torch.manual_seed(5)
    assert torch.equal(sample_timesteps("logit_normal", 8), default)


# The shift


def test_the_shift_moves_the_logit() -> None:
    t = torch.linspace(0.001, 0.999, 99, dtype=torch.float64)
    for shift in (0.2, 1.0, 3.0, 11.0):
        moved = shift_time(t, shift)
        torch.testing.assert_close(moved.logit(), t.logit() + math.log(shift), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(shift_time(moved, 1 / shift), t, rtol=1e-12, atol=1e-13)
    assert torch.equal(shift_time(torch.tensor([0.0, 1.0]), 3.0), torch.tensor([0.0, 1.0]))
    assert torch.equal(shift_time(t, 1.0), t)
    assert shift_time(t.reshape(3, 33), 2.0).shape == (3, 33)


def test_the_shift_is_the_one_of_the_paper() -> None:
    # Equation 23 with sqrt(m / n) = 3: t_m = 3 t_n / (1 + (3 - 1) t_n); the middle of the noise moves to 3 / 4.
    assert shift_time(torch.tensor(0.5, dtype=torch.float64), 3.0).item() == 0.75


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 3.0), (0.7, 0.5, 0.25), (-1.0, 1.5, 6.0)])
def test_a_shifted_logit_normal_is_a_logit_normal(mean: float, std: float, shift: float) -> None:
    options = {"generator": seeded(8), "logit_std": std}
    shifted = sample_timesteps("logit_normal", 64, logit_mean=mean, shift=shift, **options)
    options["generator"] = seeded(8)
    moved = sample_timesteps("logit_normal", 64, logit_mean=mean + math.log(shift), **options)
    torch.testing.assert_close(shifted, moved, rtol=1e-11, atol=1e-13)


def test_a_positive_logit_mean_and_a_shift_above_one_lie_towards_the_noise() -> None:
    plain = sample_timesteps("logit_normal", 1000, generator=seeded())
    assert abs(plain.mean() - 0.5) < 0.01
    assert sample_timesteps("logit_normal", 1000, generator=seeded(), logit_mean=1.0).mean() > 0.65
    assert sample_timesteps("logit_normal", 1000, generator=seeded(), shift=3.0).mean() > 0.65
    assert sample_timesteps("logit_normal", 1000, generator=seeded(), logit_mean=-1.0).mean() < 0.35


# Range and type

EXTREMES = [
    ("uniform", {"shift": 1e6}),
    ("uniform", {"shift": 1e-6}),
    ("logit_normal", {"logit_std": 50.0}),
    ("logit_normal", {"logit_mean": 1000.0}),
    ("logit_normal", {"logit_mean": -1000.0}),
    ("mode", {"mode_scale": -1.0}),
    ("mode", {"mode_scale": 2 / (math.pi - 2)}),
    ("cosmap", {"shift": 1e-9}),
    ("beta", {"alpha": 0.02, "beta": 0.02}),
    ("beta", {"alpha": 500.0, "beta": 0.01}),
]


@pytest.mark.parametrize(("density", "options"), EXTREMES, ids=str)
@pytest.mark.parametrize("stratified", [True, False])
def test_times_lie_strictly_inside_in_every_dtype(density: str, options: dict, stratified: bool) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        t = sample_timesteps(density, 3000, generator=seeded(9), stratified=stratified, dtype=dtype, **options)
        assert t.dtype == dtype and t.shape == (3000,) and t.device.type == "cpu"
        assert (t > 0).all() and (t < 1).all()
        # What a loop does with the default dtype: the float32 time is inside too.
        single = sample_timesteps(density, 3000, generator=seeded(9), stratified=stratified, **options).float()
        assert (single > 0).all() and (single <= 1).all()


@pytest.mark.parametrize("density", DENSITIES)
def test_a_large_draw_reaches_both_ends_and_neither(density: str) -> None:
    t = sample_timesteps(density, 200_000, generator=seeded(10), dtype=torch.float32)
    assert 0 < t.min() < 0.05 and 0.95 < t.max() < 1


def test_times_are_doubles_and_one_is_enough() -> None:
    assert sample_timesteps("uniform", 5).dtype == torch.float64
    assert sample_timesteps("uniform", 1, generator=seeded()).shape == (1,)


# What strata are for


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "cosmap"])
def test_strata_lower_the_variance_of_a_smooth_loss_fiftyfold(density: str) -> None:
    # Theory: 16 strata leave the variance inside each, about 16^-2 of the whole for a smooth monotone loss.
    def variance(stratified: bool) -> float:
        generator = seeded(11)
        means = [
            torch.exp(-2 * sample_timesteps(density, 16, generator=generator, stratified=stratified)).mean()
            for _ in range(600)
        ]
        return torch.stack(means).var().item()

    # 600 draws know each variance to about 6 %, the ratio to 8 %.
    assert variance(False) > 50 * variance(True)


# Bad input

NAN, INF = float("nan"), float("inf")
BAD = [
    *({"density": density} for density in ("normal", "", None, 3)),
    *({"batch_size": size} for size in (0, -3)),
    *({"batch_size": 4, "offset": offset} for offset in (-1, -4)),
    {"batch_size": 4, "offset": 2, "total": 5},
    {"batch_size": 4, "total": 3},
    {"batch_size": 4, "total": 0},
    *({"shift": shift} for shift in (0.0, -1.0, NAN, INF)),
    *({"logit_mean": mean} for mean in (NAN, INF, -INF)),
    *({"logit_std": std} for std in (0.0, -1.0, NAN, INF)),
    *({"density": "mode", "mode_scale": scale} for scale in (-1.1, 1.8, NAN, INF)),
    *({"density": "beta", "alpha": alpha} for alpha in (0.0, -2.0, NAN, INF)),
    *({"density": "beta", "beta": beta} for beta in (0.0, -2.0, NAN, INF)),
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_input(options: dict) -> None:
    arguments = {"density": "logit_normal", "batch_size": 4} | options
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"{name}`? ") as raised:
        sample_timesteps(arguments.pop("density"), arguments.pop("batch_size"), **arguments)
    message = str(raised.value)
    assert repr(value) in message and "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("shift", [0.0, -2.0, NAN, INF])
def test_bad_shifts(shift: float) -> None:
    with pytest.raises(ValueError, match="`shift` must be a number above 0|`shift` must be a finite number above 0"):
        shift_time(torch.tensor([0.5]), shift)


def test_a_registered_density_is_sampled() -> None:
    register_density("late", torch.sqrt)
    t = sample_timesteps("late", 1000, generator=torch.Generator().manual_seed(0))
    # Stratified: the empirical distribution function is off by 1 / 1000 at most.
    assert (t.sort().values.square() - torch.arange(1000) / 1000).abs().max() <= 1e-3
    for name, quantile in (("late", torch.square), ("logit_normal", torch.sqrt)):
        with pytest.raises(ValueError, match="is taken by"):
            register_density(name, quantile)
    for quantile in (3, torch.log, lambda u: 1 - u, torch.sum):
        with pytest.raises(ValueError, match="must be a function that maps"):
            register_density("mine", quantile)  # type: ignore[arg-type]


def test_the_shift_by_dimension_is_the_root_of_the_ratio() -> None:
    # RAE: 16 x 16 tokens of 768 channels.
    assert dimension_shift(16 * 16 * 768) == pytest.approx(6.928, abs=1e-3)
    assert dimension_shift(4096) == 1.0
    with pytest.raises(ValueError, match="must be at least 1, got 0 and 4096"):
        dimension_shift(0)
