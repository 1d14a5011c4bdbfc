# SPDX-License-Identifier: Apache-2.0
"""The test of encoded noise: level on noise, power against what is not noise."""

import pytest
import torch
from scipy import stats
from tiny_pipelines import images_of, tiny_pipeline

from diffusers_fm.applications.anomaly import alarm_threshold, larger_deviation, noise_test


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


def test_threshold_is_passed_as_often_as_asked() -> None:
    # Of 19 and one more, each is the largest equally often.
    assert alarm_threshold(torch.arange(19.0), 0.05) == 18
    assert alarm_threshold(torch.arange(99.0), 0.05) == 94
    assert alarm_threshold(torch.arange(99.0), 0.0599) == 94
    # Of 49 held-out scores the second largest: the chance to pass it is distributed as Beta(2, 48).
    thresholds = [alarm_threshold(scores, 0.05) for scores in draw(2000, 49)]
    chances = stats.norm.sf(thresholds)
    assert abs(chances.mean() - 0.04) < 4 * stats.beta(2, 48).std() / 2000**0.5
    assert stats.kstest(chances, stats.beta(2, 48).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        (torch.zeros(18), 0.05, "at least 1 / 19 with 18 held-out images, got 0.05"),
        (torch.zeros(18), 0.0, "got 0.0"),
        (torch.zeros(18), 1.0, "must be below 1 .* got 1.0"),
        (torch.tensor([1.0, float("nan")]), 0.5, "`scores` must be finite"),
        (torch.zeros(9, 2), 0.5, r"one for each image, got the shape \(9, 2\)"),
    ],
)
def test_thresholds_that_cannot_be_are_refused(scores: torch.Tensor, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alarm_threshold(scores, rate)


def test_larger_deviation_puts_scores_on_one_scale() -> None:
    reference = torch.stack([torch.arange(101.0), 1000 - 10 * torch.arange(101.0)], dim=1)
    # Medians 50 and 500, 95 % quantiles 95 and 950.
    table = torch.tensor([[50.0, 500.0], [95.0, 500.0], [0.0, 1400.0]])
    torch.testing.assert_close(larger_deviation(table, reference), torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match="must vary in every score"):
        larger_deviation(table, torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"got \(3, 2\) and \(101, 1\)"):
        larger_deviation(table, reference[:, :1])


def test_pipeline_scores_by_its_density_and_its_noise() -> None:
    pipeline = tiny_pipeline("unet-classes", path="ve", path_kwargs={"sigma_max": 5.0})
    images = images_of(pipeline)
    options = {"num_steps": 4, "divergence": "exact"}
    score = pipeline.anomaly_score(images, **options)
    result = pipeline.log_likelihood(images, pipeline.null_class, **options)
    torch.testing.assert_close(score.likelihood, -result.log_prob / 64)
    torch.testing.assert_close(
        score.noise_test.score, noise_test(result.noise / pipeline.scheduler.init_noise_sigma).score
    )
    assert score.table.shape == (3, 2)
    latent = tiny_pipeline("dit-vae")
    assert latent.anomaly_score(images_of(latent), [1, 2, 3], num_steps=1).table.isfinite().all()
