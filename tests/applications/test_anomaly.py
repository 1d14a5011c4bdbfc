# SPDX-License-Identifier: Apache-2.0
"""The test of encoded noise: level on noise, power against what is not noise."""

import pytest
import torch
from scipy import stats

from diffusers_fm.applications.anomaly import noise_test


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16), (64,), (4, 30)])
def test_noise_passes_as_often_as_it_should(shape: tuple[int, ...]) -> None:
    result = noise_test(draw(20000, *shape))
    assert result.statistics.shape == (20000, max(1, len(shape)))
    # 20,000 draws: the share below each level within four standard errors, and 2 % of it for the normal approximation.
    for level in (0.01, 0.05, 0.5):
        share = (result.p_value < level).double().mean().item()
        assert abs(share - level) < 4 * (level * (1 - level) / 20000) ** 0.5 + 0.1 * level


def test_the_p_value_is_that_of_the_chi_squared_distribution() -> None:
    result = noise_test(draw(10, 1, 8, 8))
    torch.testing.assert_close(result.p_value, torch.from_numpy(stats.chi2.sf(result.score.numpy(), df=3)))


@pytest.mark.parametrize("damage", ["small", "large", "smooth", "striped"])
def test_what_is_not_noise_is_told(damage: str) -> None:
    noise = draw(200, 1, 8, 8)
    if damage == "small":
        noise = 0.5 * noise
    elif damage == "large":
        noise = 1.5 * noise
    elif damage == "smooth":
        noise = (noise + noise.roll(1, -1) + noise.roll(1, -2)) / 3**0.5
    else:
        noise = 0.7 * noise + 0.7 * draw(200, 1, 8, 1)
    # One image in a hundred of noise would fall below.
    assert (noise_test(noise).p_value < 0.01).double().mean() > 0.5


def test_samples_are_judged_alone() -> None:
    noise = draw(5, 1, 8, 8)
    torch.testing.assert_close(noise_test(noise).score[3:4], noise_test(noise[3:4]).score)


@pytest.mark.parametrize("noise", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(2, 4, dtype=torch.int64)])
def test_what_cannot_be_tested_is_refused(noise: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="`noise` must be a floating-point batch"):
        noise_test(noise)


@pytest.mark.parametrize("value", [0.0, 1e-12, 1.0, -3.0])
def test_constants_are_no_noise(value: float) -> None:
    result = noise_test(torch.full((2, 1, 8, 8), value))
    # Neighbours are as alike as can be: all 56 products along either axis are the variance.
    torch.testing.assert_close(result.statistics[:, 1:], torch.full((2, 2), 56**0.5, dtype=torch.float64))
    assert bool((result.p_value < 1e-9).all())


def test_one_constant_among_noise_changes_nothing_of_the_others() -> None:
    noise = draw(3, 2, 4, 4)
    mixed = torch.cat([noise[:1], torch.zeros(1, 2, 4, 4), noise[1:]])
    torch.testing.assert_close(noise_test(mixed).score[[0, 2, 3]], noise_test(noise).score)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_noise_that_is_not_finite_is_refused(value: float) -> None:
    noise = draw(2, 1, 4, 4)
    noise[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match="`noise` must be finite"):
        noise_test(noise)
