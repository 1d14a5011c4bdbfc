# SPDX-License-Identifier: Apache-2.0
"""Base of the pipelines: the sampling loop, and the flow in both directions."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor, unwrap_module

from ..coordinates import Coordinates
from ..models.autoencoding import decode_latents
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..solvers import Solution
from ..transport import transport
from .checks import Generators, check_finite, check_output, is_whole
from .components import MARGIN, FlowMatchComponents
from .flow_map import check_flow, interval_of_step
from .guidance import Guidance
from .sampling import CALLS, SamplingCall, SamplingOptions, begin_call


GuidedPredict = Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], float], torch.Tensor]


@dataclass
class FlowMatchPipelineOutput(BaseOutput):
    """
    Output of [`FlowMatchPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            PIL images; an array of shape `(batch_size, height, width, channels)` or a tensor of shape
            `(batch_size, channels, height, width)` with values in [0, 1]; or latents.
        nfe (`int`):
            Number of calls of the network. A guided call evaluates twice the batch and counts once.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nfe: int


def flow_end(scheduler: FlowMatchScheduler, t: float) -> float:
    """A time in [0, 1], or a time near it for an end where the network's answer determines no velocity."""
    at = torch.tensor(t, dtype=torch.float64)
    derivative = Coordinates(scheduler.path, "ot").derivative(at)
    if bool(scheduler.path.determines(at, scheduler.config.prediction_type, derivative)):
        return t
    return MARGIN if t == 0.0 else 1 - MARGIN


class NetworkField:
    """The network of a pipeline as a field of the path's time, with the guidance that sampling would use."""

    def __init__(
        self, pipeline: "FlowMatchPipelineBase", guidance_scale: float = 1.0, predict: GuidedPredict | None = None
    ) -> None:
        self.scheduler, self.guidance_scale = pipeline.scheduler, guidance_scale
        self.predict = pipeline.predict_guided if predict is None else predict

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        inverted = self.scheduler.config.invert_sigmas
        timestep = self.scheduler.timestep(t)
        output = self.predict(x_t, timestep, args, self.guidance_scale).to(x_t.dtype)
        return -output if inverted else output


class FlowMatchPipelineBase(FlowMatchComponents):
    """
    Guidance and integration of the pipelines of this package.

    All state of a call is its own, so calls of one pipeline may overlap, in threads or in a callback. In a call,
    `scheduler` is the call's copy, with its loop laid out.
    """

    _callback_tensor_inputs = ["latents"]
    _last_call: SamplingCall | None = None
    # Pipelines that call the network by ways of their own do not.
    _takes_guider = True

    @property
    def scheduler(self) -> FlowMatchScheduler:
        """The scheduler; in a call, the call's own copy of it."""
        call = CALLS.get().get(id(self))
        return self.__dict__["scheduler"] if call is None else call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: FlowMatchScheduler) -> None:
        self.__dict__["scheduler"] = scheduler

    @property
    def _own_scheduler(self) -> FlowMatchScheduler:
        """The pipeline's scheduler, in a call too: what another call from a callback begins with."""
        return self.__dict__["scheduler"]

    @property
    def _call(self) -> SamplingCall:
        """The call in progress in this thread; elsewhere the one that began last, so that any thread can stop it."""
        return CALLS.get().get(id(self)) or self._last_call or SamplingCall(self.scheduler)

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance of the call in progress; 1 is off."""
        return self._call.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the call in progress evaluates the null class beside the wanted one."""
        return self.guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of times at which the call in progress evaluates the network."""
        return self._call.num_timesteps

    @property
    def interrupt(self) -> bool:
        """True if a callback has asked to stop, by setting `_interrupt`."""
        return self._call.interrupt

    # diffusers' names of what callbacks set.
    _interrupt = property(interrupt.fget, lambda self, value: setattr(self._call, "interrupt", value))
    _guidance_scale = property(guidance_scale.fget, lambda self, value: setattr(self._call, "guidance_scale", value))

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device | str,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Standard normal noise, drawn or given, scaled to the prior of the path at t = 1, in float32."""
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

    def check_inputs(self, batch_size: int, latent_shape: tuple[int, ...], options: SamplingOptions) -> None:
        """Raise a `ValueError` for arguments of a call that cannot work, before any work."""
        if not is_whole(batch_size):
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size!r}.")
        check_output(batch_size, options.output_type, options.generator)
        if options.output_type != "latent" and len(latent_shape) != 3:
            raise ValueError(
                f"Samples of the shape {latent_shape} are no images: `output_type` must be latent, got"
                f" {options.output_type!r}."
            )
        if options.output_type == "pil" and self.image_channels not in (1, 3, 4):
            raise ValueError(
                f"An image of {self.image_channels} channels cannot be a PIL image: use `output_type` np, pt or"
                " latent."
            )
        scale, latents = options.guidance_scale, options.latents
        self._check_guider()
        if self.guider is not None:
            if scale != 1.0:
                raise ValueError(
                    f"`guidance_scale` {scale} does not go with the pipeline's {type(self.guider).__name__}, which has"
                    " a scale of its own: set that, or `pipeline.guider` to None."
                )
            if options.is_adaptive:
                raise ValueError(
                    f"The solver {options.solver!r} chooses its own steps, and a `guider` needs one with fixed steps."
                )
            # A model of the null class alone has no labels in whose place that could stand.
            if self.guiding_network is None and (self.null_class is None or self.num_classes == 0):
                raise ValueError(
                    "A `guider` needs classes and a null class, or a `guiding_network`, and this pipeline has neither."
                )
        if scale != 1.0 and self.num_classes == 0:
            raise ValueError(f"`guidance_scale` {scale} needs classes, and this pipeline has none: use 1.")
        if scale != 1.0 and self.null_class is None:
            raise ValueError(
                f"`guidance_scale` {scale} needs a null class, and this network has none: use 1, or train one"
                " with `num_class_embeds == num_classes + 1`."
            )
        if latents is not None and tuple(latents.shape) != (batch_size, *latent_shape):
            raise ValueError(
                f"`latents` must have the shape {(batch_size, *latent_shape)}, got {tuple(latents.shape)}."
            )
        names = options.tensor_inputs
        unknown = [n for n in names if n not in self._callback_tensor_inputs] if isinstance(names, list) else names
        if unknown or not isinstance(names, list):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown!r}."
            )
        if not isinstance(self.scheduler, FlowMatchScheduler):
            raise ValueError(
                f"The scheduler must be a FlowMatchScheduler, got {self.scheduler.__class__.__name__}: convert it with"
                " `FlowMatchScheduler.from_config(scheduler.config)`."
            )

    def _check_guider(self) -> None:
        if self.guider is not None and not self._takes_guider:
            raise ValueError(f"A {type(self).__name__} takes no `guider`: set `pipeline.guider` to None.")

    def integrate(
        self,
        latents: torch.Tensor,
        args: tuple[torch.Tensor, ...],
        options: SamplingOptions,
        predict: GuidedPredict | None = None,
    ) -> tuple[torch.Tensor, int]:
        """
        Integrate from noise to data, by the scheduler's solver or that of the call.

        `latents` are x_t at t = 1, as [`prepare_latents`] gives them; `args` follow the timestep in [`predict`];
        `predict` takes the place of [`predict_guided`]. Returns x_t at t = 0, in float32, and the number of calls of
        the network.
        """
        scheduler = self._own_scheduler
        if options.is_adaptive:
            check_flow(scheduler, f"The solver {options.solver!r}")
            # Each sample takes its own steps.
            steps = {"num_steps": None, "rtol": options.rtol, "atol": options.atol, "step_control": "per_sample"}
            with self._begin(SamplingCall(scheduler, options.guidance_scale)):
                field = NetworkField(self, options.guidance_scale, predict)
                solution = self._transport(field, latents, 1.0, 0.0, args, method=options.solver, **steps)
            return solution.x.float(), int(solution.evaluations.max())

        scheduler = copy.copy(scheduler) if options.solver is None else scheduler.with_settings(solver=options.solver)
        self._lay_out(scheduler, latents, options)
        answer = self.predict_guided if predict is None else predict
        if self.guider is not None:
            answer, latents = self._guided(answer, scheduler, latents)
        with (
            self._begin(SamplingCall(scheduler, options.guidance_scale, len(scheduler.timesteps))) as call,
            interval_of_step(self.denoiser, scheduler, self.interval_embedding),
        ):
            return self._sample(
                scheduler,
                lambda x_t, i: answer(x_t, scheduler.timesteps[i], args, call.guidance_scale).float(),
                latents,
                options,
            )

    def _guided(
        self, predict: GuidedPredict, scheduler: FlowMatchScheduler, latents: torch.Tensor
    ) -> tuple[GuidedPredict, torch.Tensor]:
        """Prediction by the guider in place of a guidance scale, and x_t at which the loop begins after zero steps."""
        network, null_class = self.guiding_network, self.null_class
        guidance = Guidance(
            self.guider,
            scheduler,
            unwrap_module(self.denoiser),
            self.config.get("guidance_space"),
            self.config.get("guidance_interval"),
        )

        def guided(
            x_t: torch.Tensor, timestep: torch.Tensor, args: tuple[torch.Tensor, ...], _: float
        ) -> torch.Tensor:
            def unconditional() -> torch.Tensor:
                if network is None:
                    null = torch.full_like(args[-1], null_class)  # pyright: ignore[reportArgumentType]
                    return predict(x_t, timestep, (*args[:-1], null), 1.0).float()
                self._call.network = network
                try:
                    return predict(x_t, timestep, args, 1.0).float()
                finally:
                    self._call.network = None

            return guidance(x_t, timestep, lambda: predict(x_t, timestep, args, 1.0).float(), unconditional)

        return guided, guidance.skip_zero_steps(latents)

    @property
    def _network_of_call(self) -> ModelMixin:
        call = CALLS.get().get(id(self))
        return self.denoiser if call is None or call.network is None else call.network

    def _begin(self, call: SamplingCall) -> AbstractContextManager[SamplingCall]:
        self._last_call = call
        return begin_call(self, call)

    def _lay_out(self, scheduler: FlowMatchScheduler, latents: torch.Tensor, options: SamplingOptions) -> None:
        options.set_timesteps(scheduler, latents, unwrap_module(self.denoiser).config.get("patch_size", 1))

    def _sample(
        self,
        scheduler: FlowMatchScheduler,
        answer: Callable[[torch.Tensor, int], torch.Tensor],
        latents: torch.Tensor,
        options: SamplingOptions,
    ) -> tuple[torch.Tensor, int]:
        """The sampling loop: `answer` is what the scheduler's step takes, at x_t and the index of the time."""
        nfe = 0
        order, last = scheduler.order, len(scheduler.timesteps) - 1
        with self.progress_bar(total=scheduler.num_inference_steps) as progress_bar:  # pyright: ignore[reportCallIssue]
            for i, timestep in enumerate(scheduler.timesteps):
                if i < (scheduler.begin_index or 0):
                    continue
                if self.interrupt:
                    break
                output = answer(latents, i)
                nfe += 1
                latents = scheduler.step(output, timestep, latents, generator=options.generator, return_dict=False)[0]

                # Every step has `order` stages, except the last, which is a single one where the path asks for it.
                if (i + 1) % order == 0 or i == last:
                    if options.callback_on_step_end is not None:
                        begin = scheduler.timesteps[i // order * order]
                        tensors = {"latents": latents} if "latents" in options.tensor_inputs else {}
                        outputs = options.callback_on_step_end(self, i // order, begin, tensors)
                        latents = outputs.pop("latents", latents)
                    progress_bar.update()
        check_finite(unwrap_module(self.denoiser), latents)
        return latents, nfe

    @torch.no_grad()
    def to_images(self, data: torch.Tensor, output_type: str = "pil", size: tuple[int, int] | None = None) -> Any:
        """
        What the flow ends in, as images: the way back of [`to_data`].

        Args:
            data (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Pixels in about [-1, 1], or latents.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for `data` itself.
            size (`tuple[int, int]`, *optional*):
                Height and width of the images, where they are cut from something larger at the bottom and the right.

        Returns:
            PIL images; an array `(batch_size, height, width, channels)` or a tensor
            `(batch_size, channels, height, width)` with values in [0, 1]; or `data`.
        """
        if output_type == "latent":
            return data
        pixels = data if self.vae is None else decode_latents(self.vae, data)
        check_finite(self.denoiser if self.vae is None else self.vae, pixels)
        if size is not None:
            pixels = pixels[..., : size[0], : size[1]]
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @torch.no_grad()
    def transport(
        self,
        x_t: torch.Tensor,
        start: float,
        end: float,
        args: tuple[torch.Tensor, ...] = (),
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Solution:
        """
        Carry points of the path from one time to another, in either direction (arXiv 2210.02747, equation 1).

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Points of the path at `start`: data at t = 0; at t = 1, standard normal noise times the scheduler's
                `init_noise_sigma`.
            start (`float`):
                The time of `x_t`, in [0, 1], 0 = data, 1 = noise.
            end (`float`):
                The time to go to, in [0, 1].
            args (`tuple[torch.Tensor, ...]`, *optional*):
                What [`predict`] takes after the timestep, labels last.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale of classifier-free guidance, 1 is off.
            options:
                Arguments of [`~transport.transport`]: `method`, `num_steps`, `rtol`, `step_control`, ...

        Returns:
            [`~solvers.Solution`]: The points at `end`, and the calls of the network for each sample.

        Raises:
            ValueError: If an argument is out of range.
        """
        check_flow(self.scheduler, "Transport of points in both directions")
        return self._transport(NetworkField(self, guidance_scale), x_t, start, end, args, **options)

    def _transport(
        self,
        field: Callable[..., torch.Tensor],
        x_t: torch.Tensor,
        start: float,
        end: float,
        args: tuple[torch.Tensor, ...],
        **options: Any,
    ) -> Solution:
        solution = transport(
            field,
            x_t,
            self.scheduler.path,
            start=flow_end(self.scheduler, start),
            end=flow_end(self.scheduler, end),
            prediction_type=self.scheduler.config.prediction_type,
            args=args,
            **options,
        )
        check_finite(unwrap_module(self.denoiser), solution.x)
        return solution
