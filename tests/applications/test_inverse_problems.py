# SPDX-License-Identifier: Apache-2.0
"""Corrected data estimates: conditional means of Gaussians in closed form, in pixels and through a decoder."""

import pytest
import torch
from tiny_pipelines import tiny_vae

from diffusers_fm.applications.inverse_problems import LinearMeasurement, _Linearised, data_variance, guide, project
from diffusers_fm.applications.operators import CompressedOperator, FunctionOperator, MaskOperator
from diffusers_fm.paths import ConditionalPath, CosinePath, DiscreteVPPath, OTPath, VEPath, VPPath


DIMS = 5
PATHS = [OTPath(), OTPath(0.05), VPPath(), VEPath(), CosinePath(), DiscreteVPPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=str)
every_time = pytest.mark.parametrize("t", [0.02, 0.4, 0.9])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN = random(DIMS, seed=1)
FACTOR = random(DIMS, DIMS, seed=2)
COVARIANCE = FACTOR @ FACTOR.T / DIMS + 0.05 * torch.eye(DIMS)
MATRIX = random(3, DIMS, seed=3)
MEASURE = FunctionOperator(lambda x: x @ MATRIX.T, lambda y: y @ MATRIX)
DECODER = random(DIMS, DIMS, seed=4)


def denoiser(path: ConditionalPath, t: torch.Tensor, covariance: torch.Tensor):
    """The exact data estimate for Gaussian data."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    marginal = alpha**2 * covariance + sigma**2 * torch.eye(DIMS)
    gain = alpha * torch.linalg.solve(marginal, covariance).T
    return lambda x: MEAN + (x - alpha * MEAN) @ gain.T


def conditional_mean(
    path: ConditionalPath,
    t: torch.Tensor,
    covariance: torch.Tensor,
    x_t: torch.Tensor,
    y: torch.Tensor,
    matrix: torch.Tensor,
    noise_level: float,
) -> torch.Tensor:
    """`E[data | x_t, y]` from the joint Gaussian of `x_t` and `y`, which are two measurements of the data."""
    alpha, sigma = path.alpha(t), path.sigma(t)
    both = torch.cat([alpha * torch.eye(DIMS), matrix])
    noise = torch.diag(torch.cat([sigma**2 * torch.ones(DIMS), noise_level**2 * torch.ones(len(matrix))]))
    gain = torch.linalg.solve(both @ covariance @ both.T + noise, both @ covariance).T
    return MEAN + (torch.cat([x_t, y], 1) - MEAN @ both.T) @ gain.T


@every_path
@every_time
@pytest.mark.parametrize("noise_level", [0.0, 0.5])
@pytest.mark.parametrize("latent", [False, True])
def test_guidance_by_the_jacobian_is_exact_for_gaussians(
    path: ConditionalPath, t: float, noise_level: float, latent: bool
) -> None:
    at = torch.tensor(t, dtype=torch.float64)
    x_t, y = random(2, DIMS, seed=5), random(2, 3, seed=6)
    decode = (lambda z: z @ DECODER.T) if latent else None
    measured = LinearMeasurement(y, MEASURE, noise_level, decode)
    found, products = guide(denoiser(path, at, COVARIANCE), x_t, at, path, measured, "jacobian", max_iterations=DIMS)
    matrix = MATRIX @ DECODER if latent else MATRIX
    expected = conditional_mean(path, at, COVARIANCE, x_t, y, matrix, noise_level)
    # Conjugate gradients stop at 1e-4 of the residual.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.std().item())
    assert 2 <= products <= DIMS + 1


@every_path
@every_time
@pytest.mark.parametrize("noise_level", [0.0, 0.5])
def test_three_ways_agree_with_the_posterior_of_independent_values(
    path: ConditionalPath, t: float, noise_level: float
) -> None:
    at = torch.tensor(t, dtype=torch.float64)
    covariance = 0.36 * torch.eye(DIMS, dtype=torch.float64)
    x_t, y = random(2, DIMS, seed=5), random(2, 3, seed=6)
    measured = LinearMeasurement(y, MEASURE, noise_level)
    denoise = denoiser(path, at, covariance)
    expected = conditional_mean(path, at, covariance, x_t, y, MATRIX, noise_level)
    for kind in ("isotropic", "jacobian"):
        found, _ = guide(denoise, x_t, at, path, measured, kind, sigma_data=0.6, max_iterations=DIMS)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    found = project(denoise(x_t), measured, data_variance(path, at, 0.6).item())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@every_path
def test_the_correction_is_that_of_the_velocity(path: ConditionalPath) -> None:
    # v_y = v - (sigma D / alpha) grad log p(y | x_t), with the gradient from the density itself.
    t = torch.tensor(0.6, dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = path.alpha(t), path.sigma(t), path.d_alpha(t), path.d_sigma(t)
    x_t, y = random(1, DIMS, seed=5), random(1, 3, seed=6)
    denoise = denoiser(path, t, COVARIANCE)
    conditional = COVARIANCE - alpha**2 * COVARIANCE @ torch.linalg.solve(
        alpha**2 * COVARIANCE + sigma**2 * torch.eye(DIMS), COVARIANCE
    )
    total = MATRIX @ conditional @ MATRIX.T + 0.3**2 * torch.eye(3)

    def log_density(x: torch.Tensor) -> torch.Tensor:
        gap = y - MEASURE.forward(denoise(x))
        return -(gap @ torch.linalg.solve(total, gap.T)).sum() / 2

    gradient = torch.func.grad(log_density)(x_t)
    velocity = path.convert(denoise(x_t), x_t, t, "sample", "flow_prediction")
    expected = velocity - sigma * (alpha * d_sigma - d_alpha * sigma) / alpha * gradient
    measured = LinearMeasurement(y, MEASURE, 0.3)
    corrected, _ = guide(denoise, x_t, t, path, measured, "jacobian", max_iterations=DIMS)
    found = path.convert(corrected, x_t, t, "sample", "flow_prediction")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * velocity.abs().max().item())


@every_path
def test_both_ends_of_a_path_are_finite(path: ConditionalPath) -> None:
    x_t, y = random(2, DIMS, seed=5), random(2, 3, seed=6)
    for t in (0.0, 1.0):
        at = torch.tensor(t, dtype=torch.float64)
        for noise_level in (0.0, 0.5):
            measured = LinearMeasurement(y, MEASURE, noise_level)
            for kind in ("isotropic", "jacobian"):
                found, _ = guide(denoiser(path, at, COVARIANCE), x_t, at, path, measured, kind)
                assert found.isfinite().all()
            assert project(x_t, measured, data_variance(path, at).item()).isfinite().all()


def test_projection_without_noise_meets_the_measurement_and_moves_no_further() -> None:
    data, y = random(2, DIMS, seed=5), random(2, 3, seed=6)
    moved = project(data, LinearMeasurement(y, MEASURE), 0.7)
    torch.testing.assert_close(MEASURE.forward(moved), y, rtol=1e-4, atol=1e-4)
    # What was added is in the row space of A.
    kernel = torch.linalg.svd(MATRIX).Vh[3:]
    torch.testing.assert_close((moved - data) @ kernel.T, torch.zeros(2, 2, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_lossy_autoencoder_leaves_alone_what_fits() -> None:
    data = random(2, DIMS, seed=5)
    operator = MaskOperator(torch.tensor([1, 1, 0, 0, 1]))

    def decode(z: torch.Tensor) -> torch.Tensor:
        return torch.tanh(z)

    measured = LinearMeasurement(operator.forward(decode(data)), operator, 0.0, decode, encode=lambda x: 0.8 * x)
    torch.testing.assert_close(project(data, measured, 1.0), data, rtol=0, atol=0)


def test_the_decoder_is_linearised_as_forward_derivatives_would() -> None:
    vae = tiny_vae().double()
    latents, direction = random(2, 4, 8, 8, seed=1), random(2, 4, 8, 8, seed=2)

    def decode(z: torch.Tensor) -> torch.Tensor:
        return vae.decode(z).sample

    operator = CompressedOperator((3, 16, 16), 40)
    with torch.enable_grad():
        linear = _Linearised(LinearMeasurement(torch.zeros(2, 40), operator, 0.0, decode), latents.requires_grad_())
    h = 1e-5
    with torch.no_grad():
        moved = operator.forward(decode(latents + h * direction)) - operator.forward(decode(latents - h * direction))
    torch.testing.assert_close(linear.forward(direction), moved / (2 * h), rtol=1e-5, atol=1e-6)
    u = random(2, 40, seed=3)
    left, right = (linear.forward(direction) * u).sum(), (direction * linear.adjoint(u)).sum()
    torch.testing.assert_close(left, right)
