# SPDX-License-Identifier: Apache-2.0
"""Edits of images: the grid, the two methods, inversion, and images that stay as they are."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..applications.editing import Predict, flow_edit
from ..paths import lift
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..transport import transport
from .base import flow_end
from .checks import (
    Generators,
    Images,
    check_finite,
    check_guidance,
    is_number,
    is_whole,
    read_frames,
    write_frames,
)


EDIT_METHODS = ("flowedit", "inversion")


@dataclass
class FlowMatchInversionOutput(BaseOutput):
    """
    The noise that images come from, and how well it gives them back.

    Args:
        latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            About standard normal noise, in float32, on every path: what `latents` of a call takes.
        nfe (`int`):
            Number of calls of the network for the inversion alone; the way back takes as many.
        round_trip_error (`torch.Tensor` of shape `(batch_size,)`):
            Root mean square of the difference between each image, as the flow sees it, and what the same solver makes
            of its noise: pixels in [-1, 1], or latents.
        round_trip_max (`torch.Tensor` of shape `(batch_size,)`):
            The largest difference.
    """

    latents: torch.Tensor
    nfe: int
    round_trip_error: torch.Tensor
    round_trip_max: torch.Tensor


@dataclass(frozen=True)
class EditOptions:
    """Arguments of a call, as [`FlowMatchEditPipeline.__call__`] describes them; a `ValueError` for wrong ones."""

    method: str
    num_inference_steps: int
    strength: float
    num_averages: int
    num_free_steps: int
    solver: str
    generator: Generators
    output_type: str
    source_guidance_scale: float | None
    guidance_scale: float | None

    def __post_init__(self) -> None:
        if self.method not in EDIT_METHODS:
            raise ValueError(f"`method` must be one of {list(EDIT_METHODS)}, got {self.method!r}.")
        if not (is_number(self.strength) and 0 < self.strength <= 1):
            raise ValueError(f"`strength` must be a number in (0, 1], got {self.strength!r}.")
        if not is_whole(self.num_inference_steps):
            raise ValueError(
                f"`num_inference_steps` must be an integer of at least 1, got {self.num_inference_steps!r}."
            )
        if self.num_steps < 1:
            raise ValueError(
                f"`strength` {self.strength:g} of `num_inference_steps` {self.num_inference_steps} leaves no step."
            )
        if not is_whole(self.num_averages):
            raise ValueError(f"`num_averages` must be at least 1, got {self.num_averages!r}.")
        if not is_whole(self.num_free_steps, 0) or self.num_free_steps > self.num_steps:
            raise ValueError(
                f"`num_free_steps` must be from 0 to the {self.num_steps} steps made, got {self.num_free_steps!r}."
            )
        if self.method == "inversion" and (self.num_averages, self.num_free_steps) != (1, 0):
            raise ValueError("`num_averages` and `num_free_steps` belong to the method 'flowedit', got 'inversion'.")
        scales = {"source_guidance_scale": self.source_guidance_scale, "guidance_scale": self.guidance_scale}
        check_guidance(**{name: scale for name, scale in scales.items() if scale is not None})

    @property
    def num_steps(self) -> int:
        """The steps that are made."""
        return math.floor(self.num_inference_steps * self.strength + 1e-6)


def edit_images(
    pipeline: DiffusionPipeline,
    network: ModelMixin,
    scheduler: FlowMatchScheduler,
    image: Images,
    data: torch.Tensor,
    unchanged: torch.Tensor,
    under: tuple[Callable[[], Predict], Callable[[], Predict]],
    options: EditOptions,
    timesteps: Callable[[], dict[str, Any]],
    decode: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[Any, int]:
    """Edit what is not `unchanged` and make images by `decode`.

    `under` gives the network under source and target, and `timesteps` the arguments of `set_timesteps`, if needed.
    """
    edited, nfe = data, 0
    if not bool(unchanged.all()):
        source, target = under[0](), under[1]()
        edited, nfe = _edit(pipeline, scheduler, source, target, data, options, timesteps())
        check_finite(network, edited)
        edited = torch.where(lift(unchanged, data).bool(), data, edited)
    if options.output_type == "latent":
        images = edited
    else:
        pixels = decode(edited)
        # Scaled to [-1, 1] and back, a number in [0, 1] may lose its last bit; an autoencoder would lose far more.
        processor = VaeImageProcessor(do_resize=False, do_normalize=False, vae_latent_channels=0)
        as_given = read_frames("image", image, processor, pixels.shape[1]).to(pixels).reshape(pixels.shape)
        kept = torch.where(lift(unchanged, pixels).bool(), as_given, pixels)
        images = write_frames(kept, processor, options.output_type, (~unchanged).tolist())
    pipeline.maybe_free_model_hooks()
    return images, nfe


def _edit(
    pipeline: DiffusionPipeline,
    scheduler: FlowMatchScheduler,
    source: Predict,
    target: Predict,
    data: torch.Tensor,
    options: EditOptions,
    timesteps: dict[str, Any],
) -> tuple[torch.Tensor, int]:
    """Carry data from source to target, under the pipeline's progress bar, and count calls of the network."""
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    # A copy with a step for each timestep, whatever the solver of the scheduler.
    grid = scheduler.with_settings(solver="euler", s_churn=0.0, invert_sigmas=False)
    grid.set_timesteps(**timesteps)
    ratios = grid.sigmas[-options.num_steps - 1 :].tolist()
    nfe = 0

    def counted(predict: Predict) -> Predict:
        def call(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            nonlocal nfe
            nfe += 1
            return predict(x_t, t)

        return call

    if options.method == "inversion":
        start = path.time_at(torch.tensor(ratios[0], dtype=torch.float64)).item()
        for predict, ends in ((source, (0.0, start)), (target, (start, 0.0))):
            solution = transport(
                predict,
                data,
                path,
                start=flow_end(scheduler, ends[0]),
                end=flow_end(scheduler, ends[1]),
                prediction_type=prediction_type,
                num_steps=options.num_steps,
                method=options.solver,
            )
            data, nfe = solution.x.float(), nfe + solution.nfe
        return data, nfe

    def draw_noise() -> torch.Tensor:
        return randn_tensor(data.shape, generator=options.generator, device=data.device, dtype=data.dtype)

    steps = flow_edit(
        counted(source),
        counted(target),
        data,
        path,
        ratios,
        draw_noise,
        prediction_type=prediction_type,
        num_averages=options.num_averages,
        num_free_steps=options.num_free_steps,
    )
    edited = data
    with pipeline.progress_bar(total=options.num_steps) as progress_bar:  # pyright: ignore[reportCallIssue]
        for state in steps:
            edited = state
            progress_bar.update()
    return edited, nfe


def invert(
    network: ModelMixin,
    scheduler: FlowMatchScheduler,
    predict: Predict,
    data: torch.Tensor,
    num_inference_steps: int,
    solver: str,
) -> FlowMatchInversionOutput:
    """Carry data to the noise that it comes from, and back again to see how well that went."""
    options = {"prediction_type": scheduler.config.prediction_type, "num_steps": num_inference_steps}
    near, far = flow_end(scheduler, 0.0), flow_end(scheduler, 1.0)
    there = transport(predict, data, scheduler.path, start=near, end=far, method=solver, **options)
    back = transport(predict, there.x.float(), scheduler.path, start=far, end=near, method=solver, **options)
    check_finite(network, there.x, back.x)
    errors = (back.x.float() - data).flatten(1)
    return FlowMatchInversionOutput(
        there.x.float() / scheduler.init_noise_sigma,
        there.nfe,
        errors.square().mean(1).sqrt(),
        errors.abs().amax(1),
    )
