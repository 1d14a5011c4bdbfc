# SPDX-License-Identifier: Apache-2.0
"""
Posterior samples of data given a measurement, `y = A x + noise`, by correcting a flow's estimate of the data.

A flow that is steered towards a measurement has the velocity `v - (sigma D / alpha) grad log p(y | x_t)` with
`D = alpha sigma' - alpha' sigma`. The same correction of the data estimate is `(sigma^2 / alpha) grad log p(y | x_t)`,
which is finite on every path and at both of its ends; the two are each other's [`~paths.ConditionalPath.convert`].

With the Gaussian approximation `p(data | x_t) = N(data_hat, C)` the measurement has `p(y | x_t) = N(A data_hat,
A C A^T + noise_level^2)`, and the corrected estimate is the conditional mean `data_hat + C A^T (A C A^T +
noise_level^2)^-1 (y - A data_hat)`. What is taken for `C` makes the method.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..paths import ConditionalPath
from .operators import LinearOperator, conjugate_gradient


COVARIANCES = ("isotropic", "jacobian")

# Below this ratio of data to noise in x_t, the data estimate hardly depends on x_t, and its Jacobian over alpha would
# be the network's error over alpha.
LEAST_SIGNAL = 0.005


@dataclass(frozen=True)
class LinearMeasurement:
    """
    A measurement of images, and how it came about: `value = operator.forward(images) + noise_level * noise`.

    Args:
        value (`torch.Tensor` of shape `(batch_size, ...)`):
            What was measured.
        operator ([`~operators.LinearOperator`]):
            How.
        noise_level (`float`, *optional*, defaults to 0.0):
            Standard deviation of the noise, at least 0.
        decode (`Callable`, *optional*):
            Makes images of data, where the data of the flow are latents.
        encode (`Callable`, *optional*):
            Makes data of images. Needed with `decode`, and only by [`project`].
    """

    value: torch.Tensor
    operator: LinearOperator
    noise_level: float = 0.0
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    encode: Callable[[torch.Tensor], torch.Tensor] | None = None

    def predict(self, data: torch.Tensor) -> torch.Tensor:
        """The measurement, without noise, of data."""
        return self.operator.forward(data if self.decode is None else self.decode(data))

    def explain(self, images: torch.Tensor, variance: float) -> torch.Tensor:
        """Correction of images whose pixels have independent errors of this variance, given the measurement."""
        residual = self.value - self.operator.forward(images)
        if self.noise_level == 0.0:
            return self.operator.pseudo_inverse(residual)
        if variance == 0.0:
            return torch.zeros_like(images)
        return variance * self.operator.adjoint(self.operator.solve(residual, variance, self.noise_level**2))


def data_variance(path: ConditionalPath, t: torch.Tensor, sigma_data: float = 1.0) -> torch.Tensor:
    """
    The variance of data given `x_t` for `data ~ N(mean, sigma_data^2)`, per value.

    `sigma_data^2 sigma^2 / (alpha^2 sigma_data^2 + sigma^2)`: from `sigma_data^2` in pure noise down to 0 at the data;
    with `sigma_data` 1 the `r_t^2` of arXiv 2310.04432.
    """
    signal, noise = (path.alpha(t) * sigma_data).square(), path.sigma(t).square()
    return sigma_data**2 * noise / (signal + noise)


def project(data: torch.Tensor, measurement: LinearMeasurement, variance: float) -> torch.Tensor:
    """
    The data estimate, corrected without a gradient: `C` is the same for all values, whatever the network says.

    Without noise this is the projection on the images that fit the measurement, `data + A^+ (y - A data)` (DDNM,
    arXiv 2212.00490); with noise it moves less, the surer the estimate is.

    For latents the projection is made in pixels. What is added to the latents is the difference of two encodings,
    before and after, so an image that fits already is left alone, however lossy the autoencoder.

    Args:
        data (`torch.Tensor` of shape `(batch_size, ...)`):
            The estimate.
        measurement ([`LinearMeasurement`]):
            The measurement.
        variance (`float`):
            The variance of the data around the estimate, see [`data_variance`].

    Returns:
        `torch.Tensor`: The corrected estimate, of the shape of `data`.
    """
    if measurement.decode is None or measurement.encode is None:
        return data + measurement.explain(data, variance)
    images = measurement.decode(data)
    moved = images + measurement.explain(images, variance)
    return data + (measurement.encode(moved) - measurement.encode(images))


def guide(
    denoise: Callable[[torch.Tensor], torch.Tensor],
    x_t: torch.Tensor,
    t: torch.Tensor,
    path: ConditionalPath,
    measurement: LinearMeasurement,
    covariance: str = "isotropic",
    sigma_data: float = 1.0,
    max_iterations: int = 3,
) -> tuple[torch.Tensor, int]:
    """
    The data estimate, corrected by the gradient of `log p(y | x_t)` through the network.

    `"isotropic"` takes `C = data_variance` inside the inverse (pseudo-inverse guidance, Song et al., ICLR 2023; for
    flows arXiv 2310.04432), which is exact where the data is Gaussian with covariance `sigma_data^2`. `"jacobian"`
    takes `C = (sigma^2 / alpha) d data_hat / d x_t`, the covariance by Tweedie's formula (moment matching,
    arXiv 2405.13712), which is exact for every Gaussian, and solves for it by conjugate gradients, a backward pass for
    each iteration. By either, the gradient leaves out that `C` itself depends on `x_t`, which for Gaussians it does
    not.

    Args:
        denoise (`Callable`):
            The data estimate as a differentiable function of `x_t`. It is called once.
        x_t (`torch.Tensor` of shape `(batch_size, ...)`):
            Points of the path.
        t (`torch.Tensor` of shape `()`):
            Their time, 0 = data, 1 = noise.
        path (`ConditionalPath`):
            The path.
        measurement ([`LinearMeasurement`]):
            The measurement.
        covariance (`str`, *optional*, defaults to `"isotropic"`):
            One of `COVARIANCES`.
        sigma_data (`float`, *optional*, defaults to 1.0):
            Standard deviation of the data.
        max_iterations (`int`, *optional*, defaults to 3):
            The most iterations of conjugate gradients.

    Returns:
        `tuple[torch.Tensor, int]`: The corrected estimate, and the number of backward passes through the network.
    """
    alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
    variance = data_variance(path, t, sigma_data).item()
    noise_variance = measurement.noise_level**2
    depends = alpha * sigma_data > LEAST_SIGNAL * sigma
    with torch.enable_grad():
        start = x_t.detach().requires_grad_()
        data = denoise(start)
        estimate = data.detach().requires_grad_()
        linear = _Linearised(measurement, estimate)
    residual = measurement.value - linear.prediction
    if variance == 0.0:
        return data.detach(), 0
    products = 0

    def gain(u: torch.Tensor) -> torch.Tensor:
        """`C A^T u`."""
        nonlocal products
        slope = linear.adjoint(u)
        if not depends:
            return variance * slope
        products += 1
        (slope,) = torch.autograd.grad(data, start, slope, retain_graph=True)
        return sigma**2 / alpha * slope

    def posterior(u: torch.Tensor) -> torch.Tensor:
        return (linear.forward(gain(u)) + noise_variance * u) / variance

    def isotropic(u: torch.Tensor) -> torch.Tensor:
        return linear.forward(linear.adjoint(u)) + noise_variance / variance * u

    if covariance == "jacobian" and depends:
        precision = conjugate_gradient(posterior, residual / variance, max_iterations)
    elif measurement.decode is None:
        precision = measurement.operator.solve(residual, variance, noise_variance)
    else:
        precision = conjugate_gradient(isotropic, residual / variance, max_iterations)
    return data.detach() + gain(precision), products


class _Linearised:
    """The measurement of data as a linear map around an estimate: the operator, for latents after the decoder."""

    def __init__(self, measurement: LinearMeasurement, estimate: torch.Tensor) -> None:
        self.operator, self.estimate = measurement.operator, estimate
        self.images = None
        if measurement.decode is None:
            self.prediction = self.operator.forward(estimate.detach())
            return
        # The derivative of a derivative: the fused attention kernels have none.
        with sdpa_kernel(SDPBackend.MATH):
            self.images = measurement.decode(estimate)
        self.prediction = self.operator.forward(self.images.detach())
        self.dual = torch.zeros_like(self.images, requires_grad=True)
        (self.pulled,) = torch.autograd.grad(self.images, estimate, self.dual, create_graph=True)

    def forward(self, direction: torch.Tensor) -> torch.Tensor:
        if self.images is not None:
            # `pulled` is linear in `dual`, and its derivative in it is the decoder's, not transposed.
            (direction,) = torch.autograd.grad(self.pulled, self.dual, direction, retain_graph=True)
        return self.operator.forward(direction)

    def adjoint(self, direction: torch.Tensor) -> torch.Tensor:
        direction = self.operator.adjoint(direction)
        if self.images is None:
            return direction
        return torch.autograd.grad(self.images, self.estimate, direction, retain_graph=True)[0]
