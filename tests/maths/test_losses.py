# SPDX-License-Identifier: Apache-2.0
"""The loss against each paper's own formula, and its minimiser against the closed-form velocity of Gaussian data."""

import math

import numpy as np
import pytest
import torch
from helpers import draw_mixture, gaussian

from diffusers_fm.losses import (
    WEIGHTINGS,
    alignment_loss,
    flow_matching_loss,
    loss_weight,
    normalize_patches,
    slowed_sample,
    undo_contrastive,
)
from diffusers_fm.paths import PREDICTION_TYPES, ConditionalPath, CosinePath, DiscreteVPPath, OTPath, VEPath, VPPath


class ParabolaPath(ConditionalPath):
    """A path that gives alpha and sigma and nothing else."""

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t.square()

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t


ALL = {
    "ot": OTPath(),
    "ot sigma_min": OTPath(0.05),
    "vp": VPPath(),
    "ve": VEPath(0.1, 10.0),
    "cosine": CosinePath(),
    "vp_discrete": DiscreteVPPath(beta_schedule="scaled_linear"),
    "custom": ParabolaPath(),
}
every_path = pytest.mark.parametrize("path", ALL.values(), ids=ALL.keys())
# Losses are float32: the errors they square carry a few roundings, amplified by small alpha or sigma.
TOLERANCE = {"rtol": 2e-4, "atol": 1e-6}


def batch(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Data, noise and a wrong guess of each, in float64."""
    generator = torch.Generator().manual_seed(seed)
    data, noise, error, wrong = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    return data, noise, data + 0.3 * error, noise + 0.3 * wrong


def times(count: int = 6) -> torch.Tensor:
    return torch.linspace(0.07, 0.93, count, dtype=torch.float64) + 1e-4


def mean_square(error: torch.Tensor) -> torch.Tensor:
    return error.square().flatten(1).mean(1)


def outputs(
    path: ConditionalPath, guess: torch.Tensor, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> dict[str, torch.Tensor]:
    """One wrong velocity, told as every prediction type."""
    x = path.sample(data, noise, t)
    return {kind: path.convert(guess, x, t, "flow_prediction", kind) for kind in PREDICTION_TYPES}


@every_path
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_objective_does_not_depend_on_the_prediction_type(path: ConditionalPath, weighting: str) -> None:
    t = times()
    data, noise, guess, _ = batch(6, 3)
    losses = [
        flow_matching_loss(path, output, data, noise, t, kind, weighting)
        for kind, output in outputs(path, guess, data, noise, t).items()
    ]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], **TOLERANCE)


def written_objective(
    path: ConditionalPath,
    weighting: str,
    data: torch.Tensor,
    noise: torch.Tensor,
    guess: torch.Tensor,
    t: torch.Tensor,
    snr_gamma: float,
) -> torch.Tensor:
    """Each paper's objective in its own quantity, from a guess of the velocity and the rows alpha, sigma."""
    alpha, sigma, d_alpha, d_sigma = (f(t)[:, None] for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    x = alpha * data + sigma * noise
    d = alpha * d_sigma - d_alpha * sigma
    data_guess = (d_sigma * x - sigma * guess) / d
    noise_guess = (alpha * guess - d_alpha * x) / d
    velocity_error = mean_square(d_alpha * data + d_sigma * noise - guess)
    score_error = mean_square((noise - noise_guess) / sigma)
    sigma, alpha = sigma[:, 0], alpha[:, 0]
    if weighting == "none":
        return velocity_error
    if weighting == "epsilon":
        # DDPM's simple loss, and denoising score matching weighted by sigma^2.
        assert torch.allclose(mean_square(noise - noise_guess), sigma**2 * score_error, rtol=1e-9)
        return mean_square(noise - noise_guess)
    if weighting == "sample":
        return mean_square(data - data_guess)
    if weighting == "v_prediction":
        norm = (alpha**2 + sigma**2)[:, None].sqrt()
        v = (alpha[:, None] * noise - sigma[:, None] * data) / norm
        return mean_square(v - (alpha[:, None] * noise_guess - sigma[:, None] * data_guess) / norm)
    if weighting == "likelihood":
        # ScoreFlow: g^2, the squared diffusion, by finite differences of the variance in units of alpha^2.
        h = 1e-6
        variance = [(path.sigma(s) / path.alpha(s)).square() for s in (t - h, t + h)]
        return alpha**2 * (variance[1] - variance[0]) / (2 * h) * score_error
    if weighting == "sigma_sqrt":
        return velocity_error / sigma**2
    if weighting == "cosmap":
        s = sigma / (alpha + sigma)
        return 2 / (math.pi - 2 * math.pi * s + 2 * math.pi * s**2) * velocity_error
    assert weighting == "min_snr"
    snr = (alpha / sigma) ** 2
    return torch.minimum(snr, torch.full_like(snr, snr_gamma)) * mean_square(data - data_guess)


@every_path
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weightings_are_their_papers_objectives(path: ConditionalPath, weighting: str) -> None:
    t = times()
    if isinstance(path, DiscreteVPPath):
        t = ((t * 999).floor() + 0.5) / 999  # between knots, where the difference quotient is a derivative
    data, noise, guess, _ = batch(6, 3, seed=1)
    expected = written_objective(path, weighting, data, noise, guess, t, snr_gamma=2.0)
    for kind, output in outputs(path, guess, data, noise, t).items():
        loss = flow_matching_loss(path, output, data, noise, t, kind, weighting, snr_gamma=2.0)
        torch.testing.assert_close(loss.double(), expected, **TOLERANCE)


def test_scoreflow_weights_the_score_by_beta_on_vp() -> None:
    t = times()
    path = VPPath(0.1, 20.0)
    beta = 0.1 + 19.9 * t
    torch.testing.assert_close(loss_weight(path, t, "score", "likelihood"), beta, rtol=1e-10, atol=0)
    # On the noise's error: beta / sigma^2 with sigma^2 = 1 - exp(-T).
    sigma2 = 1 - torch.exp(-(0.1 * t + 19.9 * t**2 / 2))
    torch.testing.assert_close(loss_weight(path, t, "epsilon", "likelihood"), beta / sigma2, rtol=1e-9, atol=0)


def test_likelihood_weight_on_ve_is_the_rate_of_the_variance() -> None:
    t, path = times(), VEPath(0.1, 10.0)
    rate = 2 * math.log(100.0) * (0.1 * 100.0**t) ** 2
    torch.testing.assert_close(loss_weight(path, t, "score", "likelihood"), rate, rtol=1e-10, atol=0)


def test_score_matching_weights_the_score_by_sigma_squared() -> None:
    t = times()
    for path in ALL.values():
        torch.testing.assert_close(
            loss_weight(path, t, "score", "epsilon"), path.sigma(t).square(), rtol=1e-10, atol=0
        )


def test_min_snr_is_the_one_of_its_paper() -> None:
    # arXiv 2303.09556: min(SNR, gamma) for the data, over SNR for the noise, over SNR + 1 for v; gamma is 5.
    t = times(40)
    path = DiscreteVPPath()
    snr = (path.alpha(t) / path.sigma(t)).square()
    least = snr.clamp(max=5.0)
    assert (snr > 5).any() and (snr < 5).any()
    torch.testing.assert_close(loss_weight(path, t, "sample", "min_snr"), least, rtol=1e-10, atol=0)
    torch.testing.assert_close(loss_weight(path, t, "epsilon", "min_snr"), least / snr, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss_weight(path, t, "v_prediction", "min_snr"), least / (snr + 1), rtol=1e-9, atol=0)
    torch.testing.assert_close(
        loss_weight(path, t, "epsilon", "min_snr", snr_gamma=1.0), snr.clamp(max=1) / snr, rtol=1e-9, atol=0
    )


def test_sd3_weightings_on_the_optimal_transport_path() -> None:
    t = times()
    torch.testing.assert_close(loss_weight(OTPath(), t, weighting="sigma_sqrt"), t**-2.0, rtol=1e-12, atol=0)
    cosmap = 2 / (math.pi * (1 - 2 * t + 2 * t**2))
    torch.testing.assert_close(loss_weight(OTPath(), t, weighting="cosmap"), cosmap, rtol=1e-12, atol=0)
    assert torch.equal(loss_weight(OTPath(), t), torch.ones_like(t))


def test_flow_matching_on_the_optimal_transport_path_is_the_plain_formula() -> None:
    # Rectified flow: |v - (noise - data)|^2, with nothing else.
    data, noise, guess, _ = (tensor.float() for tensor in batch(5, 2, 3))
    loss = flow_matching_loss(OTPath(), guess, data, noise, times(5))
    assert torch.equal(loss, (guess - (noise - data)).square().flatten(1).mean(1))


# The minimiser is the conditional expectation


@every_path
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("time", [0.25, 0.8])
def test_regression_on_gaussian_data_finds_the_closed_form(path: ConditionalPath, kind: str, time: float) -> None:
    # Data N(m, s^2): every target is jointly normal with x_t, so the best answer is linear in x_t, and Gauss-Hermite
    # quadrature with eight nodes integrates the quadratic loss exactly. Its minimum is one Newton step away.
    mean, std = 0.7, 0.4
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    data, noise = (torch.from_numpy(grid.ravel()) for grid in np.meshgrid(mean + std * nodes, nodes))
    mass = torch.from_numpy(np.outer(weights, weights).ravel() / (2 * math.pi))
    t = torch.full((64,), time, dtype=torch.float64)
    x = path.sample(data, noise, t)
    basis = torch.stack([torch.ones_like(x), x / x.abs().max()])

    def objective(parameters: torch.Tensor) -> torch.Tensor:
        output = (parameters[:, None] * basis).sum(0)
        loss = flow_matching_loss(path, output[:, None], data[:, None], noise[:, None], t, kind)
        return (mass * loss).sum()

    start = torch.zeros(2, dtype=torch.float64)
    gradient = torch.autograd.functional.jacobian(objective, start)
    hessian = torch.autograd.functional.hessian(objective, start)
    best = (torch.linalg.solve(hessian, -gradient)[:, None] * basis).sum(0)
    exact = gaussian((1,), mean, std).predict(path, x[:, None], t, kind)[:, 0]
    # The loss is computed in float32: gradient and Hessian carry its rounding.
    torch.testing.assert_close(best, exact, rtol=0, atol=1e-4 * exact.abs().max().item())
    value = objective(torch.linalg.solve(hessian, -gradient))
    assert value <= objective(start) and value >= 0


@every_path
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_exact_network_of_a_mixture_has_no_gradient_on_average(path: ConditionalPath, weighting: str) -> None:
    # Whatever the weight, the mean error of the conditional expectation is zero given x_t, so any test function of
    # x_t is orthogonal to it: the mean over N draws is within five standard errors of zero.
    problem = draw_mixture(3, (2,))
    n = 20_000
    data = problem.sample(n, seed=1)
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    t = torch.linspace(0.1, 0.9, n, dtype=torch.float64)
    x = path.sample(data, noise, t)
    for kind in ("flow_prediction", "epsilon"):
        output = problem.predict(path, x, t, kind).requires_grad_()
        loss = flow_matching_loss(path, output, data, noise, t, kind, weighting)
        gradient = torch.autograd.grad(loss.sum(), output)[0]
        for function in (torch.ones_like(x), torch.tanh(x), torch.cos(2 * x)):
            value = gradient * function
            assert (value.mean(0).abs() < 5 * value.std(0) / math.sqrt(n)).all()


# Shapes and types


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 5, 3), (4, 3, 2, 5), (4, 3, 2, 2, 5)], ids=str)
@pytest.mark.parametrize("weighting", ["none", "min_snr"])
def test_one_loss_for_each_sample_of_any_shape(shape: tuple[int, ...], weighting: str) -> None:
    data, noise, guess, _ = batch(*shape)
    loss = flow_matching_loss(VPPath(), guess, data, noise, times(4), "epsilon", weighting)
    flat = (tensor.reshape(4, -1) for tensor in (guess, data, noise))
    assert loss.shape == (4,) and loss.dtype == torch.float32
    torch.testing.assert_close(
        loss, flow_matching_loss(VPPath(), *flat, times(4), "epsilon", weighting), rtol=1e-6, atol=0
    )
    alone = flow_matching_loss(VPPath(), guess[1:2], data[1:2], noise[1:2], times(4)[1:2], "epsilon", weighting)
    torch.testing.assert_close(alone, loss[1:2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("time_dtype", [torch.float64, torch.float32])
def test_the_loss_is_float32_whatever_the_data(dtype: torch.dtype, time_dtype: torch.dtype) -> None:
    data, noise, guess, _ = (tensor.to(dtype) for tensor in batch(4, 3, 2, 2))
    t = times(4).to(time_dtype)
    loss = flow_matching_loss(VPPath(), guess, data, noise, t, "v_prediction", "likelihood")
    expected = flow_matching_loss(
        VPPath(), guess.float(), data.float(), noise.float(), t, "v_prediction", "likelihood"
    )
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    # Nothing is squared or averaged in half precision.
    exact = flow_matching_loss(
        VPPath(), guess.double(), data.double(), noise.double(), times(4), "v_prediction", "likelihood"
    )
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)


def test_gradients_reach_the_network_in_its_dtype() -> None:
    data, noise, guess, _ = (tensor.to(torch.bfloat16) for tensor in batch(4, 8))
    guess.requires_grad_()
    flow_matching_loss(OTPath(), guess, data, noise, times(4)).mean().backward()
    assert guess.grad.dtype == torch.bfloat16
    expected = 2 * (guess.float() - (noise.float() - data.float())) / 32
    torch.testing.assert_close(guess.grad.float(), expected.detach(), rtol=2**-7, atol=0)


# Ends and bad input


def weight_or_refusal(path: ConditionalPath, end: float, kind: str, weighting: str) -> torch.Tensor | str:
    try:
        return loss_weight(path, torch.tensor([0.5, end], dtype=torch.float64), kind, weighting)
    except ValueError as error:
        return str(error)


@every_path
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_weights_at_the_ends_are_finite_or_refused(path: ConditionalPath, weighting: str, end: float) -> None:
    for kind in PREDICTION_TYPES:
        result = weight_or_refusal(path, end, kind, weighting)
        if isinstance(result, str):
            assert "no limit" in result and f"t = {end:g}" in result
        else:
            assert result.isfinite().all(), (kind, result)


@every_path
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_of_the_smallest_and_largest_training_times_are_finite(path: ConditionalPath, weighting: str) -> None:
    # `sample_timesteps` gives times of at least the resolution of their dtype.
    for dtype in (torch.float64, torch.float32):
        eps = torch.finfo(dtype).eps
        t = torch.tensor([eps, 1 - eps], dtype=dtype)
        for kind in PREDICTION_TYPES:
            assert loss_weight(path, t, kind, weighting).isfinite().all()


@pytest.mark.parametrize("weighting", ["snr", "logit_normal", "", None, 1], ids=str)
def test_unknown_weightings(weighting: object) -> None:
    data, noise, guess, _ = batch(4, 2)
    with pytest.raises(ValueError, match="`weighting` must be one of \\['none', .*'min_snr'\\], got") as raised:
        flow_matching_loss(OTPath(), guess, data, noise, times(4), weighting=weighting)
    assert repr(weighting) in str(raised.value)
    with pytest.raises(ValueError, match="`weighting` must be one of"):
        loss_weight(OTPath(), times(4), weighting=weighting)


@pytest.mark.parametrize("kind", ["velocity", "", None], ids=str)
def test_unknown_prediction_types(kind: object) -> None:
    data, noise, guess, _ = batch(4, 2)
    with pytest.raises(ValueError, match="`prediction_type` must be one of"):
        flow_matching_loss(OTPath(), guess, data, noise, times(4), kind)


@pytest.mark.parametrize("gamma", [0.0, -1.0, float("nan")])
def test_bad_snr_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match="`snr_gamma` must be"):
        loss_weight(OTPath(), times(4), "sample", "min_snr", snr_gamma=gamma)


def test_a_target_without_a_limit_is_refused() -> None:
    data, noise, guess, _ = batch(2, 3)
    with pytest.raises(ValueError, match="no limit at t = 0"):
        flow_matching_loss(VPPath(), guess, data, noise, torch.tensor([0.3, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("bad", [(4, 3), (3, 2), (4,), (4, 2, 1), (4, 1), (1, 2), (2,)], ids=str)
def test_an_answer_of_another_shape_is_refused(bad: tuple[int, ...]) -> None:
    # Broadcasting would train on the wrong pairs without a word.
    data, noise, _, _ = batch(4, 2)
    with pytest.raises((ValueError, RuntimeError)):
        flow_matching_loss(OTPath(), torch.zeros(bad), data, noise, times(4))


# Options that may learn faster


@pytest.mark.parametrize("kind", ["flow_prediction", "epsilon", "sample"])
def test_the_contrastive_minimiser_is_the_biased_field_and_is_turned_back(kind: str) -> None:
    # Of Gaussian data the minimiser is linear in x, and the loss is quadratic in its two numbers.
    path, weight, t = VPPath(), 0.2, torch.tensor(0.4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    data = 1.5 + 0.5 * torch.randn(2**17, 1, generator=generator, dtype=torch.float64)
    noise = torch.randn(2**17, 1, generator=generator, dtype=torch.float64)
    times = t.expand(len(data))
    x = path.sample(data, noise, times)

    def minimiser(contrastive_weight: float) -> torch.Tensor:
        def loss(line: torch.Tensor) -> torch.Tensor:
            output = line[0] + line[1] * x
            return flow_matching_loss(
                path, output, data, noise, times, kind, SPACE[kind], contrastive_weight=contrastive_weight
            ).mean()

        zero = torch.zeros(2, dtype=torch.float64)
        gradient = torch.func.grad(loss)(zero)
        curvature = torch.func.hessian(loss)(zero)
        return -torch.linalg.solve(curvature.double(), gradient.double())

    exact = gaussian((1,), 1.5, 0.5)
    points = torch.linspace(-1.0, 2.0, 5, dtype=torch.float64)[:, None]
    field = exact.predict(path, points, t.expand(5), kind)
    mean = torch.tensor([1.5], dtype=torch.float64)
    other = path.target(mean.expand(5, 1), torch.zeros(5, 1, dtype=torch.float64), t, kind)
    line = minimiser(weight)
    found = line[0] + line[1] * points
    # Standard errors of means of 2^17 numbers of about unit size: 0.003.
    torch.testing.assert_close(found, (field - weight * other) / (1 - weight), rtol=0, atol=0.02)
    undone = undo_contrastive(path, found, t, mean, weight, kind)
    torch.testing.assert_close(undone, field, rtol=0, atol=0.02)
    assert (found - field).abs().max() > 0.05


SPACE = {"flow_prediction": "none", "epsilon": "epsilon", "sample": "sample"}


def test_a_batch_of_one_has_no_other_sample() -> None:
    one = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        flow_matching_loss(OTPath(), one, one, one, torch.tensor([0.5]), contrastive_weight=0.1)


def test_the_clipped_weight_is_that_of_both_velocities() -> None:
    # JiT: the velocities of data and of its prediction, both with the time clipped.
    t = torch.tensor([0.01, 0.04, 0.05, 0.3], dtype=torch.float64)
    data, noise, guess, _ = batch(4, 3)
    x = OTPath().sample(data, noise, t)
    clipped = t.clamp(min=0.05)[:, None]
    expected = mean_square((x - data) / clipped - (x - guess) / clipped)
    found = flow_matching_loss(OTPath(), guess, data, noise, t, "sample", weight_clip=0.05)
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)
    # Beyond the clip it is the loss without it.
    unclipped = flow_matching_loss(OTPath(), guess, data, noise, t, "sample")
    assert torch.equal(found[2:], unclipped[2:])


@every_path
def test_a_slowed_point_is_that_of_a_later_time_in_the_scale_of_its_own(path: ConditionalPath) -> None:
    t, slowing = times(), torch.tensor([0.0, 0.2, 0.5, 0.7, 0.9, 1.0])
    data, noise, _, _ = batch(6, 3)
    straight, s = path.to_straight(slowed_sample(path, data, noise, t, slowing), t)
    later = s + slowing * (path.ratio_max - s)
    torch.testing.assert_close(straight, (1 - later)[:, None] * data + later[:, None] * noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(slowed_sample(path, data, noise, t, 0 * slowing), path.sample(data, noise, t))


def test_alignment_is_the_mean_cosine_of_the_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, 4, generator=generator)
    scales = 0.1 + torch.rand(2, 1, 3, 4, generator=generator)
    torch.testing.assert_close(alignment_loss(scales * features, features), -torch.ones(2))
    torch.testing.assert_close(alignment_loss(-features, features), torch.ones(2))
    # Features of more patches are averaged over those of one of the network's.
    fine = features.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert alignment_loss(features, fine).max() < -0.9
    patches = normalize_patches(features, 1.0).flatten(2)
    torch.testing.assert_close(patches.mean(2), torch.zeros(2, 5), rtol=0, atol=1e-6)
    torch.testing.assert_close(patches.std(2, correction=0), torch.ones(2, 5), rtol=0, atol=1e-4)
    kept = normalize_patches(features, 0.6).flatten(2).mean(2) * features.flatten(2).std(2, correction=0)
    torch.testing.assert_close(kept, 0.4 * features.flatten(2).mean(2), rtol=1e-4, atol=1e-5)
