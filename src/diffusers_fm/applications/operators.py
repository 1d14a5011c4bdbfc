# SPDX-License-Identifier: Apache-2.0
"""Linear measurements of images, `y = A x + noise`: masks, downsampling, blur, compressed sensing, and your own."""

import math
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F

from ..precision import to_float64


class LinearOperator:
    """
    A linear map `A` from images to measurements.

    A subclass gives `forward` and `adjoint`; both act on batches, each sample by itself. `solve` and `pseudo_inverse`
    follow by conjugate gradients, and a subclass that has closed forms replaces `solve`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Measure images of shape `(batch_size, channels, height, width)`: `A x`, of shape `(batch_size, ...)`."""
        raise NotImplementedError

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        """Images `A^T y` of measurements, by the map with `<A x, y> = <x, A^T y>` for all `x` and `y`."""
        raise NotImplementedError

    def solve(self, y: torch.Tensor, data_variance: float, noise_variance: float) -> torch.Tensor:
        """
        `(data_variance * A A^T + noise_variance)^-1 y`, the least-norm solution where that matrix is singular.

        It is the precision, times `y`, of a measurement with noise of images whose pixels are independent. The
        variance of data is above 0, that of noise at least 0.
        """

        def apply(u: torch.Tensor) -> torch.Tensor:
            return data_variance * self.forward(self.adjoint(u)) + noise_variance * u

        return conjugate_gradient(apply, y, max_iterations=200, tolerance=1e-6)

    def pseudo_inverse(self, y: torch.Tensor) -> torch.Tensor:
        """`A^+ y`: of all images that fit a measurement best, the one of least norm."""
        return self.adjoint(self.solve(y, 1.0, 0.0))


class MaskOperator(LinearOperator):
    """
    Keeps some pixels and sets the others to 0.

    Args:
        mask (`torch.Tensor`):
            True, or 1, where a pixel is **known**. Of a shape that broadcasts over `(batch_size, channels, height,
            width)`; a shape of two dimensions is `(height, width)`.

    Raises:
        ValueError: If the mask holds other values than 0 and 1.
    """

    def __init__(self, mask: torch.Tensor) -> None:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"`mask` must hold 0 and 1 alone, got values from {mask.min():g} to {mask.max():g}.")
        self.mask = mask.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask.to(x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return y * self.mask.to(y)

    def solve(self, y: torch.Tensor, data_variance: float, noise_variance: float) -> torch.Tensor:
        return self.forward(y) / (data_variance + noise_variance)


class DownsampleOperator(LinearOperator):
    """
    Averages blocks of pixels: an image of `1 / factor` of the height and of the width.

    Args:
        factor (`int`):
            Side of a block in pixels, at least 1. It divides height and width.

    Raises:
        ValueError: If it is not, or does not.
    """

    def __init__(self, factor: int) -> None:
        if not isinstance(factor, int) or factor < 1:
            raise ValueError(f"`factor` must be a whole number of at least 1, got {factor!r}.")
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"Height and width must be multiples of the factor {self.factor} of the downsampling, got "
                f"{x.shape[-2]} x {x.shape[-1]}."
            )
        return F.avg_pool2d(x, self.factor)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        spread = y.repeat_interleave(self.factor, -2).repeat_interleave(self.factor, -1)
        return spread / self.factor**2

    def solve(self, y: torch.Tensor, data_variance: float, noise_variance: float) -> torch.Tensor:
        return y / (data_variance / self.factor**2 + noise_variance)


class BlurOperator(LinearOperator):
    """
    Convolution with a kernel, around the borders of the image (circular).

    Args:
        kernel (`torch.Tensor` of shape `(kernel_height, kernel_width)`):
            The kernel; its centre is at `(kernel_height // 2, kernel_width // 2)`.
        rcond (`float`, *optional*, defaults to `1e-4`):
            Where the kernel's spectrum is below this part of its maximum, a measurement without noise is not divided
            by it.

    Raises:
        ValueError: If the kernel has another number of dimensions, or is larger than an image.
    """

    def __init__(self, kernel: torch.Tensor, rcond: float = 1e-4) -> None:
        if kernel.ndim != 2 or not bool(kernel.isfinite().all()) or not bool(kernel.any()):
            raise ValueError(f"`kernel` must be a finite, non-zero matrix, got one of shape {tuple(kernel.shape)}.")
        self.kernel = to_float64(kernel)
        self.rcond = rcond

    @classmethod
    def gaussian(cls, std: float) -> "BlurOperator":
        """
        Gaussian blur with a kernel of sum 1.

        Args:
            std (`float`):
                Standard deviation in pixels, above 0. The kernel reaches three of them to each side.
        """
        if not (isinstance(std, Real) and 0 < std < math.inf):
            raise ValueError(f"`std` must be a number of pixels above 0, got {std!r}.")
        reach = math.ceil(3 * std)
        line = torch.exp(-torch.arange(-reach, reach + 1, dtype=torch.float64).square() / (2 * std**2))
        kernel = line[:, None] * line
        return cls(kernel / kernel.sum())

    def _spectrum(self, x: torch.Tensor) -> torch.Tensor:
        height, width = self.kernel.shape
        if height > x.shape[-2] or width > x.shape[-1]:
            raise ValueError(
                f"The kernel of the blur, {height} x {width}, is larger than the image, {x.shape[-2]} x {x.shape[-1]}."
            )
        # Rolled, so that the kernel's centre lies at the origin.
        padded = F.pad(self.kernel, (0, x.shape[-1] - width, 0, x.shape[-2] - height))
        spectrum = torch.fft.rfft2(padded.roll((-(height // 2), -(width // 2)), (0, 1)))
        return spectrum.to(device=x.device, dtype=torch.promote_types(x.dtype, torch.complex64))

    @staticmethod
    def _filter(x: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * response, s=x.shape[-2:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._filter(x, self._spectrum(x))

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._filter(y, self._spectrum(y).conj())

    def solve(self, y: torch.Tensor, data_variance: float, noise_variance: float) -> torch.Tensor:
        power = self._spectrum(y).abs().square()
        response = 1 / (data_variance * power + noise_variance)
        if noise_variance == 0:
            # What the blur has erased stays zero.
            response = torch.where(power > self.rcond**2 * power.max(), response, 0.0)
        return self._filter(y, response)


class CompressedOperator(LinearOperator):
    """
    Compressed sensing: random coordinates of a random rotation of the image.

    The signs of the pixels are flipped at random, and of the orthonormal Hartley transform of all of them
    `num_measurements` values are kept. The rows are orthonormal, so `A A^T = 1`, and memory is that of an image.

    Args:
        sample_shape (`tuple[int, ...]`):
            Shape `(channels, height, width)` of an image.
        num_measurements (`int`):
            Length of a measurement, from 1 to the number of values of an image.
        seed (`int`, *optional*, defaults to 0):
            Seed of the signs and of the choice.

    Raises:
        ValueError: If the number is out of range, or an image has another shape.
    """

    def __init__(self, sample_shape: tuple[int, ...], num_measurements: int, seed: int = 0) -> None:
        self.sample_shape = tuple(sample_shape)
        size = math.prod(self.sample_shape)
        if not isinstance(num_measurements, int) or not 1 <= num_measurements <= size:
            raise ValueError(f"`num_measurements` must be from 1 to {size}, got {num_measurements!r}.")
        generator = torch.Generator().manual_seed(seed)
        self.signs = 2.0 * torch.randint(0, 2, (size,), generator=generator) - 1.0
        self.rows = torch.randperm(size, generator=generator)[:num_measurements].sort().values

    @staticmethod
    def _hartley(x: torch.Tensor) -> torch.Tensor:
        """Orthonormal, symmetric, and so its own inverse, for every length."""
        spectrum = torch.fft.fft(x, norm="ortho")
        return spectrum.real - spectrum.imag

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if tuple(x.shape[1:]) != self.sample_shape:
            raise ValueError(f"Images for this operator must have the shape {self.sample_shape}, got {x.shape[1:]}.")
        return self._hartley(x.flatten(1) * self.signs.to(x))[:, self.rows.to(x.device)]

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        spread = y.new_zeros(len(y), len(self.signs))
        spread[:, self.rows.to(y.device)] = y
        return (self._hartley(spread) * self.signs.to(y)).reshape(-1, *self.sample_shape)

    def solve(self, y: torch.Tensor, data_variance: float, noise_variance: float) -> torch.Tensor:
        return y / (data_variance + noise_variance)


class FunctionOperator(LinearOperator):
    """
    Your own linear function with its adjoint.

    Args:
        forward (`Callable`):
            Maps a batch of images to a batch of measurements.
        adjoint (`Callable`):
            Maps a batch of measurements to a batch of images, with `<A x, y> = <x, A^T y>`.
    """

    def __init__(
        self,
        forward: Callable[[torch.Tensor], torch.Tensor],
        adjoint: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._forward = forward
        self._adjoint = adjoint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._forward(x)

    def adjoint(self, y: torch.Tensor) -> torch.Tensor:
        return self._adjoint(y)


def inner_product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Inner products of the samples of two batches, of shape `(batch_size, 1, ...)`."""
    return (x * y).flatten(1).sum(1).reshape(-1, *[1] * (x.ndim - 1))


def conjugate_gradient(
    apply: Callable[[torch.Tensor], torch.Tensor],
    b: torch.Tensor,
    max_iterations: int,
    tolerance: float = 1e-4,
) -> torch.Tensor:
    """
    Solve `M x = b` for a symmetric, positive semi-definite `M`, each sample of a batch by itself.

    `apply` is `M` as a function of a batch. A sample stops where its residual has fallen below `tolerance`, relative
    to `b`, and where `M` turns out not to be positive in the next direction: the Jacobian of a trained network is a
    covariance only approximately.
    """
    x = torch.zeros_like(b)
    residual, direction = b, b
    squared = inner_product(b, b)
    enough = tolerance**2 * squared
    running = squared > 0
    for _ in range(max_iterations):
        # On an accelerator this waits for the device; an application of a network's Jacobian costs far more.
        if not bool(running.any()):
            break
        image = apply(direction)
        curvature = inner_product(direction, image)
        running = running & (curvature > torch.finfo(b.dtype).eps * inner_product(direction, direction))
        step = torch.where(running, squared / torch.where(running, curvature, 1.0), 0.0)
        x = x + step * direction
        residual = residual - step * image
        last, squared = squared, inner_product(residual, residual)
        running = running & (squared > enough)
        direction = residual + torch.where(running, squared / torch.where(running, last, 1.0), 0.0) * direction
    return x


def check_operator(operator: LinearOperator, sample_shape: tuple[int, ...], measurement: torch.Tensor) -> None:
    """Check with an image of noise that measurements fit, and that `adjoint` is the adjoint; else a `ValueError`."""
    generator = torch.Generator().manual_seed(0)
    size = (len(measurement), *sample_shape)
    x = torch.randn(size, generator=generator).to(measurement.device)
    measured = operator.forward(x)
    if measured.shape != measurement.shape:
        raise ValueError(
            f"`measurement` must have the shape {tuple(measured.shape)}, which the operator makes of images of the "
            f"shape {size}, got {tuple(measurement.shape)}."
        )
    if not bool(torch.isfinite(measurement).all()):
        raise ValueError("`measurement` must be finite, got values that are not; a mask says which pixels are known.")
    doubled = operator.forward(2 * x)
    if bool((doubled - 2 * measured).norm() > 1e-3 * measured.norm()):
        raise ValueError("The operator must be linear, but its value at 2 x is not twice its value at x.")
    # Of its two parts, the first makes a wrong adjoint of any size of image show, the second one of any kind.
    spread = measured.norm() / math.sqrt(measured.numel())
    y = measured + spread * torch.randn(measured.shape, generator=generator).to(measurement.device)
    back = operator.adjoint(y)
    if back.shape != x.shape:
        raise ValueError(f"The adjoint of the operator must give images of the shape {size}, got {tuple(back.shape)}.")
    left, right = (measured * y).sum().item(), (x * back).sum().item()
    if abs(left - right) > 1e-3 * abs(left):
        raise ValueError(
            f"`adjoint` is not the adjoint of the operator: <A x, y> is {left:g} and <x, A^T y> is {right:g} at random"
            " x and y."
        )
