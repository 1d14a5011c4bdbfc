# SPDX-License-Identifier: Apache-2.0
"""Inpainting and other linear inverse problems with a trained flow matching model, without training it again."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..applications.inverse_problems import LinearMeasurement
from ..applications.operators import LinearOperator, MaskOperator, check_operator
from ..models.autoencoding import decode_latents, encode_latents
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .base import FlowMatchPipelineOutput, NetworkField
from .checks import Callback, Generators, Images, Labels, is_whole
from .measurements import InverseOptions, MeasuredEstimate, estimate_scheduler, masked_images, meet, size_text
from .pipeline_flow_match import FlowMatchPipeline
from .sampling import SamplingCall, SamplingOptions


@dataclass
class FlowMatchInversePipelineOutput(FlowMatchPipelineOutput):
    """
    Output of [`FlowMatchInversePipeline`]: that of [`FlowMatchPipeline`], and

    Args:
        num_backward (`int`):
            Number of backward passes through the network, each of the cost of about two calls; 0 for `"projection"`.
        residuals (`torch.Tensor` of shape `(batch_size,)`):
            The largest absolute value of `y - A x` of each image, for pixels in [-1, 1] before they are rounded to 8
            bits.
    """

    num_backward: int
    residuals: torch.Tensor


class FlowMatchInversePipeline(FlowMatchPipeline):
    r"""
    Draws images that fit a measurement `y = A x + noise_level * noise`, by a [`FlowMatchPipeline`] that knows nothing
    of measurements: inpainting, superresolution, deblurring, compressed sensing.

    It has the components of a [`FlowMatchPipeline`] and loads every folder of one;
    `FlowMatchInversePipeline.from_pipe(pipeline)` shares the weights of one that is loaded.
    """

    _takes_guider = False

    @torch.no_grad()
    def __call__(
        self,
        measurement: torch.Tensor | None = None,
        operator: LinearOperator | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        noise_level: float = 0.0,
        method: str = "guided",
        covariance: str = "isotropic",
        num_covariance_iterations: int = 3,
        sigma_data: float | None = None,
        class_labels: Labels = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        num_images_per_measurement: int = 1,
        eta: float | None = None,
        solver: str | None = None,
        mu: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> FlowMatchInversePipelineOutput | tuple[Any, int, int, torch.Tensor]:
        """
        Draws images given a measurement.

        Either `image` and `mask_image` are given, or `measurement` and `operator`.

        Args:
            measurement (`torch.Tensor` of shape `(num_measurements, ...)`, *optional*):
                The measurement `y` of images with values in [-1, 1].
            operator ([`~operators.LinearOperator`], *optional*):
                The linear map `A`. For latent models too it acts on pixels.
            image (PIL images, `np.ndarray` or `torch.Tensor`, *optional*):
                Images of which a part is to be drawn anew; arrays and tensors with values in [0, 1].
            mask_image (PIL images, `np.ndarray` or `torch.Tensor`, *optional*):
                Where: white is drawn anew, black is kept. One mask, or one for each image, of the size of the images;
                it is split into black and white at one half.
            noise_level (`float`, *optional*, defaults to 0.0):
                Standard deviation of the noise in the measurement, for pixels in [-1, 1]. At 0 the images meet it.
            method (`str`, *optional*, defaults to `"guided"`):
                `"guided"`: the velocity is corrected by the gradient of `log p(y | x_t)` through the network, see
                [`~inverse_problems.guide`]. `"projection"`: the data estimate is projected on what fits the
                measurement and noised again, without gradients, see [`~inverse_problems.project`].
            covariance (`str`, *optional*, defaults to `"isotropic"`):
                What the guided method takes for the covariance of the data given `x_t`: `"isotropic"`, at the cost of
                one backward pass a call, or `"jacobian"`, which knows which pixels belong together, at the cost of one
                for each iteration.
            num_covariance_iterations (`int`, *optional*, defaults to 3):
                The most iterations of conjugate gradients, for `"jacobian"` and for latents. The Jacobian of a trained
                network is not quite a covariance, so more of them need not be better.
            sigma_data (`float`, *optional*):
                Standard deviation of the data, pixels in [-1, 1] or latents: how far the first estimates may be off.
                Defaults to the scheduler's, which is 1 if nobody has set it; the deviation from the mean of the class
                or data set, where it is known, gives better images.
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                What is in the images: one label, or one for each measurement. Needed exactly if the model has classes;
                `null_class`, where there is one, stands for any.
            num_images_per_measurement (`int`, *optional*, defaults to 1):
                How many images to draw for each measurement; they stand side by side in the batch.
            eta (`float`, *optional*):
                How much the estimate is noised anew in each step: from not at all (0, the ordinary differential
                equation) to the ancestral step of DDPM (1), which mends errors of earlier steps. Defaults to 1, with a
                `solver` to 0. Other values than 0 need the solver `"euler"`.
            solver (`str`, *optional*):
                Solver of this call, one of those with fixed steps. Defaults to `"euler"` where `eta` is not 0, and to
                the scheduler's otherwise.
            height (`int`, *optional*), width (`int`, *optional*):
                Size of the images in pixels, where it is not that of `image` or the network's own.
            output_type (`str`, *optional*, defaults to `"pil"`):
                As in [`FlowMatchPipeline`]. Of latent models, all but the latents themselves meet a measurement
                without noise.
            guidance_scale, num_inference_steps, mu, generator, latents, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs (*optional*):
                As in [`FlowMatchPipeline`].

        Returns:
            [`FlowMatchInversePipelineOutput`] or `tuple`: The images, the work, and how well they fit.

        Raises:
            ValueError: For arguments that do not fit the pipeline or each other, before any work.
        """
        # 1. The measurement, labels, sizes, and a check of everything else
        options = SamplingOptions(
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            mu=mu,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        sigma_data = self.scheduler.sigma_data if sigma_data is None else sigma_data
        inverse = InverseOptions(method, covariance, noise_level, sigma_data, num_covariance_iterations)
        if not is_whole(num_images_per_measurement):
            raise ValueError(
                "`num_images_per_measurement` must be a whole number of at least 1, got"
                f" {num_images_per_measurement!r}."
            )
        copies = num_images_per_measurement
        if image is not None or mask_image is not None:
            if measurement is not None or operator is not None:
                raise ValueError("Give `image` and `mask_image`, or `measurement` and `operator`, not both pairs.")
            measurement, operator = self.prepare_mask(image, mask_image, copies)
            height, width = self._agree(measurement, height, width)
        elif measurement is None or operator is None:
            raise ValueError("`measurement` and `operator` must be given, or `image` and `mask_image`.")
        elif not isinstance(measurement, torch.Tensor) or not isinstance(operator, LinearOperator):
            kinds = f"{type(measurement).__name__} and {type(operator).__name__}"
            raise ValueError(f"`measurement` must be a tensor and `operator` a LinearOperator, got {kinds}.")
        else:
            measurement = measurement.to(device, torch.float32).repeat_interleave(copies, 0)
        batch_size = len(measurement)
        labels = self.prepare_class_labels(class_labels, batch_size // copies, device, allow_null=True)
        args = () if labels is None else (labels.repeat_interleave(copies),)
        shape = self.latent_shape(height, width)
        self.check_inputs(batch_size, shape, options)
        image_shape = (self.image_channels, shape[1] * self.vae_scale_factor, shape[2] * self.vae_scale_factor)
        check_operator(operator, image_shape, measurement)
        measured = LinearMeasurement(measurement, operator, noise_level, *self._autoencoder())

        # 2. Noise and timesteps: the corrected estimate of the data takes the network's place
        scheduler = self.prepare_scheduler(eta, solver)
        latents = self.prepare_latents((batch_size, *shape), device, generator, latents)
        self._lay_out(scheduler, latents, options)
        times = scheduler.time(to_float64(scheduler.timesteps))
        estimate = MeasuredEstimate(scheduler.path, self.scheduler.config.prediction_type, measured, inverse, times)

        # 3. Integration from noise to data
        def answer(x_t: torch.Tensor, i: int) -> torch.Tensor:
            network = NetworkField(self, self.guidance_scale)
            return estimate(lambda x_t, t: network(x_t, t.to(x_t), *args), x_t, i)

        with self._begin(SamplingCall(self._own_scheduler, guidance_scale, len(times))):
            latents, nfe = self._sample(scheduler, answer, latents, options)
        num_backward = estimate.num_backward

        # 4. Images, which meet the measurement
        pixels = latents if self.vae is None else decode_latents(self.vae, latents)
        pixels, residuals = meet(pixels, measured, clip=output_type != "latent")
        if output_type == "latent":
            images = pixels if self.vae is None else latents
        else:
            images = self.image_processor.postprocess(pixels, output_type=output_type)

        # 5. Offloading
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, nfe, num_backward, residuals)
        return FlowMatchInversePipelineOutput(images, nfe, num_backward, residuals)

    def prepare_mask(
        self, image: Images | None, mask_image: Images | None, num_images_per_image: int = 1
    ) -> tuple[torch.Tensor, MaskOperator]:
        """Measurement of shape `(batch_size, channels, height, width)` and operator of inpainting, as in a call."""
        device, channels = self._execution_device, self.image_channels
        return masked_images(image, mask_image, self.image_processor, device, num_images_per_image, channels)

    def prepare_scheduler(self, eta: float | None = None, solver: str | None = None) -> FlowMatchScheduler:
        """Copy of the scheduler for a call, whose steps take estimates of the data."""
        return estimate_scheduler(self._own_scheduler, eta, solver)

    def _autoencoder(self) -> tuple[Callable[..., torch.Tensor] | None, Callable[..., torch.Tensor] | None]:
        vae = self.vae
        if vae is None:
            return None, None
        return lambda data: decode_latents(vae, data), lambda images: encode_latents(vae, images, sample=False)

    @staticmethod
    def _agree(measurement: torch.Tensor, height: int | None, width: int | None) -> tuple[int, int]:
        given = (
            measurement.shape[-2] if height is None else height,
            measurement.shape[-1] if width is None else width,
        )
        if given != tuple(measurement.shape[-2:]):
            raise ValueError(
                f"`height` and `width` must be those of `image`, {size_text(measurement)}, got"
                f" {given[0]} x {given[1]}."
            )
        return given
