# SPDX-License-Identifier: Apache-2.0
"""Parts of sampling given a measurement, whichever pipeline the flow belongs to."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor

from ..applications.inverse_problems import COVARIANCES, LinearMeasurement, data_variance, guide, project
from ..applications.operators import MaskOperator
from ..paths import ConditionalPath
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .checks import Images, is_number, is_whole, read_images


METHODS = ("projection", "guided")

# A measurement without noise is met to this, in pixels of [-1, 1], or as nearly as a number of rounds allows.
MET = 1e-5
ROUNDS = 100


@dataclass(frozen=True)
class InverseOptions:
    """Arguments of a call, as [`FlowMatchInversePipeline.__call__`] describes them; a `ValueError` for wrong ones."""

    method: str
    covariance: str
    noise_level: float
    sigma_data: float
    num_covariance_iterations: int

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {list(METHODS)}, got {self.method!r}.")
        if self.covariance not in COVARIANCES:
            raise ValueError(f"`covariance` must be one of {list(COVARIANCES)}, got {self.covariance!r}.")
        if not (is_number(self.noise_level) and self.noise_level >= 0):
            raise ValueError(f"`noise_level` must be a number of at least 0, got {self.noise_level!r}.")
        if not (is_number(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"`sigma_data` must be a number above 0, got {self.sigma_data!r}.")
        if not is_whole(self.num_covariance_iterations):
            raise ValueError(
                "`num_covariance_iterations` must be a whole number of at least 1, got"
                f" {self.num_covariance_iterations!r}."
            )


class MeasuredEstimate:
    """Estimate of the data given a measurement at each of the scheduler's times, and the backward passes it takes."""

    def __init__(
        self,
        path: ConditionalPath,
        prediction_type: str,
        measured: LinearMeasurement,
        options: InverseOptions,
        times: torch.Tensor,
    ) -> None:
        # Refuses, before any work, a prediction that does not determine the data at one of the times.
        path.coefficients(times, prediction_type, "sample")
        self.path, self.prediction_type, self.measured = path, prediction_type, measured
        self.options, self.times = options, times
        self.num_backward = 0

    def __call__(
        self, network: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x_t: torch.Tensor, i: int
    ) -> torch.Tensor:
        """The estimate at x_t and the time of number `i`; `network` gives the prediction at x_t and t."""
        t, options = self.times[i], self.options

        def denoise(x_t: torch.Tensor) -> torch.Tensor:
            return self.path.convert(network(x_t, t), x_t, t, self.prediction_type, "sample")

        if options.method == "projection":
            return project(denoise(x_t), self.measured, data_variance(self.path, t, options.sigma_data).item())
        data, backward = guide(
            denoise,
            x_t,
            t,
            self.path,
            self.measured,
            options.covariance,
            options.sigma_data,
            options.num_covariance_iterations,
        )
        self.num_backward += backward
        return data


def masked_images(
    image: Images | None,
    mask_image: Images | None,
    processor: VaeImageProcessor,
    device: torch.device,
    copies: int = 1,
    channels: int | None = None,
) -> tuple[torch.Tensor, MaskOperator]:
    """Measurement of shape `(batch_size, channels, height, width)` and operator of inpainting."""
    if image is None or mask_image is None:
        missing = "image" if image is None else "mask_image"
        raise ValueError(f"`image` and `mask_image` go together, got no `{missing}`.")
    as_mask = VaeImageProcessor(do_resize=False, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    pixels = read_images("image", image, processor, channels).to(device, torch.float32)
    # Masks are often Boolean.
    if isinstance(mask_image, np.ndarray):
        mask_image = mask_image.astype(np.float32)
    elif isinstance(mask_image, torch.Tensor):
        mask_image = mask_image.float()
    unknown = read_images("mask_image", mask_image, as_mask, 1).to(device, torch.float32)
    if unknown.shape[-2:] != pixels.shape[-2:]:
        raise ValueError(
            f"`mask_image` must have the size of `image`, {size_text(pixels)}, got {size_text(unknown)} (height x"
            " width)."
        )
    if unknown.shape[1] != 1 or len(unknown) not in (1, len(pixels)):
        raise ValueError(
            f"`mask_image` must be one mask, or one for each of the {len(pixels)} images, of one channel, got "
            f"{len(unknown)} of {unknown.shape[1]}."
        )
    pixels, unknown = (x.expand(len(pixels), *x.shape[1:]) for x in (pixels, unknown))
    pixels, unknown = (x.repeat_interleave(copies, 0) for x in (pixels, unknown))
    operator = MaskOperator(1 - unknown)
    return operator.forward(pixels), operator


def estimate_scheduler(
    scheduler: FlowMatchScheduler, eta: float | None = None, solver: str | None = None
) -> FlowMatchScheduler:
    """Copy of a scheduler whose steps take estimates of the data."""
    if eta is not None and not is_number(eta):
        raise ValueError(f"`eta` must be a number in [0, 1], got {eta!r}.")
    if eta is None:
        eta = 1.0 if solver in (None, "euler") else 0.0
    # `stochastic_sampling` would take the place of `eta`.
    changes: dict[str, Any] = {"prediction_type": "sample", "invert_sigmas": False}
    changes |= {"stochastic_sampling": False, "eta": eta}
    if eta > 0:
        changes |= {"sampling_path": "ot", "s_churn": 0.0, "solver": "euler"}
    if solver is not None:
        changes["solver"] = solver
    return scheduler.with_settings(**changes)


def meet(pixels: torch.Tensor, measured: LinearMeasurement, clip: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The nearest images that meet a measurement without noise, clipped ones by alternating projections, and the largest
    residual of each.
    """
    for _ in range(ROUNDS):
        if measured.noise_level == 0.0:
            pixels = pixels + measured.explain(pixels, 1.0)
        if not clip:
            break
        pixels = pixels.clamp(-1, 1)
        error = (measured.value - measured.operator.forward(pixels)).abs().max()
        if measured.noise_level > 0.0 or bool(error < MET):
            break
    return pixels, (measured.value - measured.operator.forward(pixels)).abs().flatten(1).amax(1)


def size_text(x: torch.Tensor) -> str:
    """Height and width in words."""
    return f"{x.shape[-2]} x {x.shape[-1]}"
