# SPDX-License-Identifier: Apache-2.0
"""Flow of a stock pipeline in both directions: densities, inversion, editing and inverse problems for any family."""

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from ..applications.inverse_problems import LinearMeasurement
from ..applications.operators import LinearOperator, check_operator
from ..likelihood import Likelihood, log_likelihood
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..transport import transport
from .base import FlowMatchPipelineOutput, flow_end
from .checks import Generators, Images, check_finite, check_noise, check_output, read_frames, write_frames
from .conditioned import Conditioned, Prompts, for_each, prompted, rows_of
from .decode_map import DecodeMap
from .edits import EditOptions, FlowMatchInversionOutput, edit_images, invert
from .flow_map import check_flow
from .measurements import InverseOptions, MeasuredEstimate, estimate_scheduler, masked_images, meet
from .one_step import straight_scheduler
from .pipeline_flow_match_inverse import FlowMatchInversePipelineOutput
from .prompt_memo import remembered
from .velocity_field import VelocityField, guidance_call


class StockFlow:
    """
    Flow of any stock flow matching pipeline of diffusers, through its own call: what [`FlowMatchPipeline`] and its kin
    do for classes, by prompts.

    ```python
    flow = StockFlow(FluxPipeline.from_pretrained(folder), max_sequence_length=256)
    edited = flow.edit(image, "a cat on a bench", "a dog on a bench", strength=0.7)
    noise = flow.encode(image, "a cat on a bench")
    ```

    Images keep their size, which has to be one that the pipeline takes. Videos are tensors of shape
    `(batch_size, frames, channels, height, width)`. The pipeline is never changed. Its scheduler decides path and
    grid: a [`FlowMatchScheduler`], or a stock one, which is read as that.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline with a flow matching scheduler.
        network (`str`, *optional*, defaults to `"transformer"`):
            Name of its network.
        call:
            Arguments of the pipeline's call that are the same in all calls, such as `max_sequence_length`.

    Raises:
        ValueError: If the pipeline is no [`VelocityField`], or its scheduler samples a flow map.
    """

    def __init__(self, pipeline: DiffusionPipeline, network: str = "transformer", **call: Any) -> None:
        scheduler = pipeline.scheduler
        self.pipeline = copy.copy(pipeline)
        if isinstance(scheduler, FlowMatchScheduler):
            check_flow(scheduler, "A flow in both directions")
            vars(self.pipeline)["scheduler"] = straight_scheduler(scheduler)
        else:
            scheduler = FlowMatchScheduler.from_stock(scheduler)
        # The field's velocity is noise - data whichever way the pipeline's time runs.
        self.scheduler = scheduler.with_settings(invert_sigmas=False) if scheduler.config.invert_sigmas else scheduler
        self.name, self.call = network, call
        self._maps: dict[Any, DecodeMap] = {}
        self._arguments = self.field().arguments

    @property
    def network(self) -> Any:
        """The network."""
        return self.pipeline.components[self.name]

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    def field(self, guidance_scale: float | None = None, **call: Any) -> VelocityField:
        """
        Velocity field of the pipeline.

        Args:
            guidance_scale (`float`, *optional*):
                Guidance by the pipeline's own scale, under whichever name; off by default.
            call:
                Further arguments of every call, such as `height` and `width`.
        """
        guided = guidance_scale is not None
        scale = guidance_call(self.pipeline, self.network, guidance_scale) if guided else {}
        if guided and not scale and guidance_scale != 1:
            raise ValueError(f"{type(self.pipeline).__name__} takes no scale of guidance, got {guidance_scale}.")
        scale.pop("negative_prompt", None)
        field = VelocityField(self.pipeline, self.name, guidance=guided, **{**self.call, **scale, **call})
        if field.encode_prompt is not None:
            field.encode_prompt = remembered(field.encode_prompt)
        return field

    @torch.no_grad()
    def to_data(self, images: Images, **call: Any) -> torch.Tensor:
        """
        Images as the pipeline's loop ends with them, by the mode of the autoencoder's posterior.

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch; arrays and tensors with values in [0, 1].
            call:
                Arguments of the pipeline's call for one sample, where it needs more than an empty prompt.

        Returns:
            `torch.Tensor` of shape `(batch_size, ...)`: States at t = 0, float32.

        Raises:
            ValueError: If channels or size do not fit the pipeline.
        """
        pixels = self._read(images)
        return self._decode_map(self._size(pixels), prompted([""], call)).encode(pixels)

    @torch.no_grad()
    def to_images(self, data: torch.Tensor, size: dict[str, int], output_type: str = "pil", **call: Any) -> Any:
        """
        What the flow ends in, as images: the way back of [`to_data`].

        Args:
            data (`torch.Tensor` of shape `(batch_size, ...)`):
                States at t = 0.
            size (`dict[str, int]`):
                `height` and `width` in pixels, and `num_frames` of a video.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for `data` itself.
            call:
                As in [`to_data`].
        """
        if output_type == "latent":
            return data
        return write_frames(_pixels(self._decode_map(size, prompted([""], call)), data), _processor(), output_type)

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        prompt: Prompts = "",
        num_inference_steps: int | None = 64,
        solver: str | None = None,
        **call: Any,
    ) -> torch.Tensor:
        """
        Carry images along the flow to the noise that they come from, without guidance (arXiv 2210.02747, equation 1).

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as in [`to_data`].
            prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What they show: one prompt, or one for each.
            num_inference_steps (`int`, *optional*, defaults to 64):
                Number of steps; `None` for adaptive steps, to 1e-5.
            solver (`str`, *optional*):
                A method of [`~solvers.odeint`]; `"abm3"` by default, and `"dopri5"` for adaptive steps.
            call:
                Further arguments of the pipeline's call, lists and tensors with an entry for each image.

        Returns:
            `torch.Tensor` of shape `(batch_size, ...)`: About standard normal noise in the shape of the pipeline's
            loop, float32.

        Raises:
            ValueError: If images or arguments do not fit the pipeline.
        """
        data, predict = self._begin(images, prompt, call)
        noise = self._carry(predict, data, 0.0, 1.0, num_inference_steps, solver)
        return noise / self.scheduler.init_noise_sigma

    @torch.no_grad()
    def decode(
        self,
        noise: torch.Tensor,
        prompt: Prompts = "",
        size: dict[str, int] | None = None,
        num_inference_steps: int | None = 64,
        output_type: str = "pil",
        solver: str | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Prompts = "",
        **call: Any,
    ) -> Any:
        """
        Carry noise along the flow to images: the way back of [`encode`], where guidance is off.

        Args:
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise in the shape of the pipeline's loop, such as [`encode`] returns.
            prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What to draw: one prompt, or one for each.
            size (`dict[str, int]`, *optional*):
                `height` and `width` in pixels, and `num_frames` of a video, where they are not the pipeline's own.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            guidance_scale (`float`, *optional*), negative_prompt (`str` or `list[str]`, *optional*):
                Guidance as in [`edit`].
            num_inference_steps, solver, call (*optional*):
                As for [`encode`].

        Returns:
            The images, as `output_type` says.

        Raises:
            ValueError: If noise or arguments do not fit the pipeline.
        """
        check_noise("noise", noise)
        check_output(len(noise), output_type, None)
        size = size or {}
        noise = noise.to(self.device, torch.float32)
        predict = self.velocity(size, noise.shape, prompt, call, guidance_scale, negative_prompt)
        x_1 = noise * self.scheduler.init_noise_sigma
        data = self._carry(predict, x_1, 1.0, 0.0, num_inference_steps, solver)
        return self.to_images(data, size, output_type, **rows_of(predict.call, [0], len(noise)))

    @torch.no_grad()
    def log_likelihood(self, images: Images, prompt: Prompts = "", **options: Any) -> Likelihood:
        """
        Log-density of images' latents under the plain flow, by change of variables (arXiv 2210.02747, appendix C).

        It is that of the states of the pipeline's loop, in nats. It says nothing of pixels, which an autoencoder
        stands before; and a guided velocity has no density that belongs to it, so there is no guidance here.

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as in [`to_data`].
            prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What they show: one prompt, or one for each.
            options:
                Arguments of [`~likelihood.log_likelihood`], such as `divergence`, `num_probes` and `generator`; and
                further arguments of the pipeline's call.

        Returns:
            [`~likelihood.Likelihood`]: Log-densities of shape `(batch_size,)`, the noise, and the work it took.

        Raises:
            ValueError: If images or arguments do not fit the pipeline.
        """
        own = inspect.signature(log_likelihood).parameters
        call = {name: options.pop(name) for name in list(options) if name in self._arguments and name not in own}
        # A network may be asked for some samples of a batch.
        data, predict = self._begin(images, prompt, call, single=True)
        ends = {"start": flow_end(self.scheduler, 0.0), "end": flow_end(self.scheduler, 1.0)}
        kind, numbers = self.scheduler.config.prediction_type, torch.arange(len(data))
        path = self.scheduler.path
        result = log_likelihood(predict, data, path, prediction_type=kind, args=(numbers,), **ends | options)
        check_finite(self.network, result.log_prob)
        return result

    @torch.no_grad()
    def invert(
        self,
        images: Images,
        prompt: Prompts = "",
        num_inference_steps: int = 25,
        solver: str = "heun",
        **call: Any,
    ) -> FlowMatchInversionOutput:
        """
        Find the noise that images come from, without guidance, and the error of the way there and back.

        Args:
            images, prompt, call:
                As for [`encode`].
            num_inference_steps, solver (*optional*):
                As in [`FlowMatchEditPipeline.invert`].

        Returns:
            [`FlowMatchInversionOutput`]: The noise, and the errors in units of latents.

        Raises:
            ValueError: If images or arguments do not fit the pipeline.
        """
        data, predict = self._begin(images, prompt, call)
        return invert(self.network, self.scheduler, predict, data, num_inference_steps, solver)

    @torch.no_grad()
    def edit(
        self,
        images: Images,
        source_prompt: Prompts,
        prompt: Prompts,
        negative_prompt: Prompts = "",
        method: str = "flowedit",
        strength: float = 0.66,
        num_inference_steps: int = 50,
        source_guidance_scale: float | None = None,
        guidance_scale: float | None = None,
        num_averages: int = 1,
        num_free_steps: int = 0,
        solver: str = "ab2",
        mu: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        **call: Any,
    ) -> FlowMatchPipelineOutput:
        """
        Edit images by two prompts (FlowEdit, arXiv 2412.08629, or by inversion).

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as in [`to_data`].
            source_prompt (`str` or `list[str]`):
                What they show: one prompt, or one for each.
            prompt (`str` or `list[str]`):
                What they shall show, likewise. An image for which this is the same is returned bit for bit.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from, on both sides.
            source_guidance_scale (`float`, *optional*):
                Scale of guidance under the source prompt, as the pipeline's call takes it, be it classifier-free or
                embedded in the network; off by default.
            guidance_scale (`float`, *optional*):
                The same under the wanted prompt.
            mu (`float`, *optional*):
                Dynamic shift, where the scheduler uses it; defaults to what the pipeline gives it at this size.
            method, strength, num_inference_steps, num_averages, num_free_steps, solver, generator,
            output_type (*optional*):
                As in [`FlowMatchEditPipeline`].
            call:
                As for [`encode`].

        Returns:
            [`FlowMatchPipelineOutput`]: The images and the number of evaluations of the velocity, two for each step; a
            guided one counts once.

        Raises:
            ValueError: For arguments that do not fit the pipeline or each other, before any work.
        """
        # 1. A check of everything
        options = EditOptions(
            method,
            num_inference_steps,
            strength,
            num_averages,
            num_free_steps,
            solver,
            generator,
            output_type,
            source_guidance_scale,
            guidance_scale,
        )
        pixels = self._read(images)
        count, size = len(pixels), self._size(pixels)
        check_output(count, output_type, generator)
        prompts = [
            for_each(count, name, each) for name, each in (("source_prompt", source_prompt), ("prompt", prompt))
        ]
        for_each(count, "negative_prompt", negative_prompt)

        # 2. The edit; images that are to stay as they are take no part in what is returned
        one = rows_of(prompted(prompts[1], call), [0], count)
        decode_map = self._decode_map(size, one)
        data = decode_map.encode(pixels)
        unchanged = torch.tensor([a == b for a, b in zip(*prompts)], device=data.device)

        def timesteps() -> dict[str, Any]:
            given = self.field(guidance_scale, **size).timesteps(num_inference_steps, **one)
            return given if mu is None else {**given, "mu": mu}

        def under(side: int, scale: float | None) -> Callable[[], Conditioned]:
            return lambda: self.velocity(size, data.shape, prompts[side], call, scale, negative_prompt)

        edited, nfe = edit_images(
            self.pipeline,
            self.network,
            self.scheduler,
            images,
            data,
            unchanged,
            (under(0, source_guidance_scale), under(1, guidance_scale)),
            options,
            timesteps,
            partial(_pixels, decode_map),
        )
        return FlowMatchPipelineOutput(images=edited, nfe=nfe)

    @torch.no_grad()
    def restore(
        self,
        measurement: torch.Tensor | None = None,
        operator: LinearOperator | None = None,
        image: Images | None = None,
        mask_image: Images | None = None,
        prompt: Prompts = "",
        size: dict[str, int] | None = None,
        noise_level: float = 0.0,
        method: str = "guided",
        covariance: str = "isotropic",
        num_covariance_iterations: int = 3,
        sigma_data: float | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        negative_prompt: Prompts = "",
        eta: float | None = None,
        solver: str | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        **call: Any,
    ) -> FlowMatchInversePipelineOutput:
        """
        Draw images that fit a measurement: inpainting, superresolution, deblurring.

        Args:
            measurement (`torch.Tensor` of shape `(batch_size, ...)`, *optional*):
                The measurement `y` of images with values in [-1, 1].
            operator ([`~operators.LinearOperator`], *optional*):
                The linear map `A` of pixels.
            image (PIL images, `np.ndarray` or `torch.Tensor`, *optional*), mask_image (the same, *optional*):
                In their place: images of which a part, white in the mask, is to be drawn anew.
            prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What is in the images: one prompt, or one for each.
            size (`dict[str, int]`, *optional*):
                `height` and `width` in pixels, where they are neither those of `image` nor the pipeline's own.
            guidance_scale, negative_prompt (*optional*):
                As in [`edit`].
            noise_level, method, covariance, num_covariance_iterations, sigma_data, num_inference_steps, eta, solver,
            generator, output_type (*optional*):
                As in [`FlowMatchInversePipeline`]. `"guided"` goes backwards through the network.
            call:
                As for [`encode`].

        Returns:
            [`FlowMatchInversePipelineOutput`]: The images, the work, and how well they fit.

        Raises:
            ValueError: For arguments that do not fit the pipeline or each other.
        """
        # 1. The measurement
        sigma_data = self.scheduler.sigma_data if sigma_data is None else sigma_data
        inverse = InverseOptions(method, covariance, noise_level, sigma_data, num_covariance_iterations)
        if (image is None) != (mask_image is None) or (measurement is None) != (operator is None):
            raise ValueError("`image` and `mask_image` go together, and so do `measurement` and `operator`.")
        if (image is None) == (measurement is None):
            raise ValueError("Give `image` and `mask_image`, or `measurement` and `operator`, and not both pairs.")
        if image is not None:
            processor, channels = _processor(normalize=True), self._image_channels
            measurement, operator = masked_images(image, mask_image, processor, self.device, channels=channels)
            size = self._size(measurement)
        assert measurement is not None and operator is not None
        measurement, size = measurement.to(self.device, torch.float32), size or {}
        count = len(measurement)
        check_output(count, output_type, generator)
        given = prompted(for_each(count, "prompt", prompt), call)
        decode_map = self._decode_map(size, rows_of(given, [0], count))
        shape = (count, *decode_map.map.x_shape)
        decode = partial(_pixels, decode_map)
        pixels = decode(torch.zeros(1, *shape[1:], device=self.device))
        if pixels.ndim != 4:
            raise ValueError(f"{type(self.pipeline).__name__} makes videos, and measurements are those of images.")
        check_operator(operator, tuple(pixels.shape[1:]), measurement)
        measured = LinearMeasurement(measurement, operator, noise_level, decode, decode_map.encode)

        # 2. Noise and timesteps: the corrected estimate of the data takes the network's place
        predict = self.velocity(size, shape, prompt, call, guidance_scale, negative_prompt)
        given = predict.field.timesteps(num_inference_steps, **rows_of(predict.call, [0], count))
        scheduler = estimate_scheduler(self.scheduler, eta, solver)
        scheduler.set_timesteps(**given, device=self.device)
        times = scheduler.time(to_float64(scheduler.timesteps))
        estimate = MeasuredEstimate(scheduler.path, self.scheduler.config.prediction_type, measured, inverse, times)

        # 3. Integration from noise to data
        latents = randn_tensor(shape, generator=generator, device=self.device, dtype=torch.float32)
        latents = latents * scheduler.init_noise_sigma
        for i, timestep in enumerate(scheduler.timesteps):
            answer = estimate(predict, latents, i)
            latents = scheduler.step(answer, timestep, latents, generator=generator, return_dict=False)[0]
        check_finite(self.network, latents)

        # 4. Images, which meet the measurement
        pixels, residuals = meet(decode(latents), measured, clip=output_type != "latent")
        images = latents if output_type == "latent" else write_frames(pixels, _processor(), output_type)
        return FlowMatchInversePipelineOutput(images, len(times), estimate.num_backward, residuals)

    @property
    def _image_channels(self) -> int | None:
        vae: Any = self.pipeline.components.get("vae")
        return None if vae is None else vae.config.get("in_channels")

    def _read(self, images: Images) -> torch.Tensor:
        """Pixels in [-1, 1] at their own size."""
        channels = self._image_channels
        pixels = read_frames("image", images, _processor(normalize=True), channels).to(self.device, torch.float32)
        # Some autoencoders count the channels of patches.
        if channels in (1, 3, 4) and pixels.shape[1] != channels:
            raise ValueError(f"`image` must have {channels} channels, got {pixels.shape[1]}.")
        return pixels

    def _size(self, pixels: torch.Tensor) -> dict[str, int]:
        """Arguments of a call for the size of images or videos."""
        frames = pixels.shape[2] if pixels.ndim == 5 else 1
        sides = {"height": pixels.shape[-2], "width": pixels.shape[-1], "num_frames": frames, "frames": frames}
        return {name: side for name, side in sides.items() if name in self._arguments}

    def _decode_map(self, size: dict[str, int], call: dict[str, Any]) -> DecodeMap:
        """Map between latents and states at a size, which the pipeline has to take as it is."""
        key = tuple(size.items())
        if key not in self._maps:
            name = type(self.pipeline).__name__
            try:
                found = DecodeMap(self.field(**size), **call)
            except (ValueError, RuntimeError) as error:
                if not size:
                    raise
                words = " x ".join(str(each) for each in size.values())
                raise ValueError(f"{name} takes no images of {words} pixels: {error}") from error
            self._maps[key] = found
        return self._maps[key]

    def _begin(
        self, images: Images, prompt: Prompts, call: dict[str, Any], single: bool = False
    ) -> tuple[torch.Tensor, Conditioned]:
        """Data of images, and the plain velocity under their prompts."""
        pixels = self._read(images)
        size = self._size(pixels)
        given = prompted(for_each(len(pixels), "prompt", prompt), call)
        data = self._decode_map(size, rows_of(given, [0], len(pixels))).encode(pixels)
        return data, self.velocity(size, data.shape, prompt, call, single=single)

    def velocity(
        self,
        size: dict[str, int],
        shape: Sequence[int],
        prompt: Prompts,
        call: dict[str, Any],
        guidance_scale: float | None = None,
        negative_prompt: Prompts = "",
        single: bool = False,
    ) -> Conditioned:
        """
        Velocity of a batch under prompts: a function of x_t, of t and, of some samples alone, of their numbers.

        Args:
            size (`dict[str, int]`), shape (`Sequence[int]`):
                As in [`to_images`], and the shape of a batch of states.
            prompt, call, guidance_scale, negative_prompt (*optional*):
                As in [`decode`], further arguments of the call as a dictionary.
            single (`bool`, *optional*, defaults to `False`):
                Whether parts of the batch will be asked for.
        """
        count = shape[0]
        field = self.field(guidance_scale, **size)
        given = prompted(for_each(count, "prompt", prompt), call)
        if guidance_scale is not None and "negative_prompt" in field.arguments and "prompt" in given:
            given["negative_prompt"] = for_each(count, "negative_prompt", negative_prompt)
        scale = self.scheduler.timestep_scale / self.scheduler.config.num_train_timesteps
        return Conditioned(field, given, tuple(shape), scale, single)

    def _carry(
        self,
        predict: Conditioned,
        x: torch.Tensor,
        start: float,
        end: float,
        num_steps: int | None,
        solver: str | None,
    ) -> torch.Tensor:
        solution = transport(
            predict,
            x,
            self.scheduler.path,
            start=flow_end(self.scheduler, start),
            end=flow_end(self.scheduler, end),
            prediction_type=self.scheduler.config.prediction_type,
            method=solver or ("abm3" if num_steps is not None else "dopri5"),
            num_steps=num_steps,
        )
        check_finite(self.network, solution.x)
        return solution.x.float()


def _processor(normalize: bool = False) -> VaeImageProcessor:
    return VaeImageProcessor(do_resize=False, do_normalize=normalize, vae_latent_channels=0)


def _pixels(decode_map: DecodeMap, data: torch.Tensor) -> torch.Tensor:
    """Images or videos of states; a video of one frame is an image."""
    pixels = decode_map.decode(data).float()
    return pixels.squeeze(2) if pixels.ndim == 5 else pixels
