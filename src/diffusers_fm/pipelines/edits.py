# SPDX-License-Identifier: Apache-2.0
"""What the edit pipelines share: the grid, the two methods, inversion, and images that stay as they are."""

import math
from dataclasses import dataclass

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ..applications.editing import Predict, flow_edit
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..transport import transport
from .base import OUTPUT_TYPES, flow_end
from .transport import Images


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
    """
    How an image is edited: arguments that the calls of the edit pipelines have in common.

    Args:
        method (`str`):
            One of `EDIT_METHODS`.
        num_inference_steps (`int`):
            Steps of the whole way from noise to data.
        strength (`float`):
            The part of them that is gone, in (0, 1].
        num_averages (`int`):
            Draws of noise for each step of `"flowedit"`.
        num_free_steps (`int`):
            Last steps of `"flowedit"` that follow the target alone.
        solver (`str`):
            Solver of `"inversion"`.
        generator (`torch.Generator` or a list of them, *optional*):
            Source of the noise of `"flowedit"`.

    Raises:
        ValueError: If a value is out of range.
    """

    method: str
    num_inference_steps: int
    strength: float
    num_averages: int
    num_free_steps: int
    solver: str
    generator: torch.Generator | list[torch.Generator] | None

    def __post_init__(self) -> None:
        if self.method not in EDIT_METHODS:
            raise ValueError(f"`method` must be one of {list(EDIT_METHODS)}, got {self.method!r}.")
        if not 0 < self.strength <= 1:
            raise ValueError(f"`strength` must be a number in (0, 1], got {self.strength!r}.")
        if self.num_steps < 1:
            raise ValueError(
                f"`strength` {self.strength:g} of `num_inference_steps` {self.num_inference_steps} leaves no step."
            )
        if self.num_averages < 1:
            raise ValueError(f"`num_averages` must be at least 1, got {self.num_averages!r}.")
        if not 0 <= self.num_free_steps <= self.num_steps:
            raise ValueError(
                f"`num_free_steps` must be from 0 to the {self.num_steps} steps made, got {self.num_free_steps!r}."
            )
        if self.method == "inversion" and (self.num_averages, self.num_free_steps) != (1, 0):
            raise ValueError("`num_averages` and `num_free_steps` belong to the method 'flowedit', got 'inversion'.")

    @property
    def num_steps(self) -> int:
        """The steps that are made."""
        return math.floor(self.num_inference_steps * self.strength + 1e-6)


def check_batch(
    batch_size: int,
    output_type: str,
    generator: torch.Generator | list[torch.Generator] | None,
    **guidance_scales: float,
) -> None:
    """
    Checks what remains of the arguments of a call.

    Args:
        batch_size (`int`):
            Number of images.
        output_type (`str`):
            One of `OUTPUT_TYPES`.
        generator (`torch.Generator` or a list of them, *optional*):
            One, or one for each image.
        guidance_scales (`float`):
            Scales by name.

    Raises:
        ValueError: If they do not fit.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators were given for a batch of {batch_size}.")
    for name, scale in guidance_scales.items():
        if not math.isfinite(scale):
            raise ValueError(f"`{name}` must be a finite number, got {scale}.")


def edit(
    pipeline: DiffusionPipeline,
    scheduler: FlowMatchScheduler,
    source: Predict,
    target: Predict,
    data: torch.Tensor,
    options: EditOptions,
    mu: float | None = None,
) -> tuple[torch.Tensor, int]:
    """
    Carries data from a source condition to a target condition, by either method.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Whose progress bar tells how far it is.
        scheduler ([`FlowMatchScheduler`]):
            The path, what the network predicts, and the grid.
        source (`Callable`):
            The network under the source condition, a function of `x_t` and `t`.
        target (`Callable`):
            The same under the target condition.
        data (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Pixels in [-1, 1], or latents.
        options ([`EditOptions`]):
            How.
        mu (`float`, *optional*):
            Dynamic shift of the grid.

    Returns:
        `tuple[torch.Tensor, int]`: The edited data, and the number of calls of the network.
    """
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    # A copy with a step for each timestep, whatever the solver of the scheduler.
    grid = scheduler.with_settings(solver="euler", s_churn=0.0, invert_sigmas=False)
    grid.set_timesteps(options.num_inference_steps, mu=mu)
    ratios = grid.sigmas[-options.num_steps - 1 :].double().tolist()
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
    scheduler: FlowMatchScheduler, predict: Predict, data: torch.Tensor, num_inference_steps: int, solver: str
) -> FlowMatchInversionOutput:
    """
    Carries data to the noise that it comes from, and back again to see how well that went.

    Args:
        scheduler ([`FlowMatchScheduler`]):
            The path, and what the network predicts.
        predict (`Callable`):
            The network, a function of `x_t` and `t`.
        data (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Pixels in [-1, 1], or latents.
        num_inference_steps (`int`):
            Steps of each way.
        solver (`str`):
            A method of [`~solvers.odeint`].

    Returns:
        [`FlowMatchInversionOutput`]: The noise, the work, and the error of the round trip.
    """
    options = {"prediction_type": scheduler.config.prediction_type, "num_steps": num_inference_steps}
    near, far = flow_end(scheduler, 0.0), flow_end(scheduler, 1.0)
    there = transport(predict, data, scheduler.path, start=near, end=far, method=solver, **options)
    back = transport(predict, there.x.float(), scheduler.path, start=far, end=near, method=solver, **options)
    errors = (back.x.float() - data).flatten(1)
    return FlowMatchInversionOutput(
        there.x.float() / scheduler.init_noise_sigma,
        there.nfe,
        errors.square().mean(1).sqrt(),
        errors.abs().amax(1),
    )


def to_images(
    image_processor: VaeImageProcessor,
    pixels: torch.Tensor,
    originals: Images,
    unchanged: torch.Tensor,
    output_type: str,
) -> Images:
    """
    Edited pixels as images. Where there was nothing to change, the original is handed back, bit for bit.

    Args:
        image_processor (`VaeImageProcessor`):
            The pipeline's.
        pixels (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
            Edited pixels in about [-1, 1].
        originals (PIL images, `np.ndarray` or `torch.Tensor`):
            The images as they were given.
        unchanged (`torch.BoolTensor` of shape `(batch_size,)`):
            Which of them are to stay.
        output_type (`str`):
            `"pil"`, `"np"` or `"pt"`.

    Returns:
        PIL images, an array or a tensor, as `output_type` says.
    """
    # Scaled to [-1, 1] and back, a number in [0, 1] may lose its last bit; an autoencoder would lose far more.
    as_given = VaeImageProcessor(do_resize=False, do_normalize=False).preprocess(originals).to(pixels)
    keep = unchanged.to(pixels.device)[:, None, None, None]
    kept = torch.where(keep, as_given, pixels)
    return image_processor.postprocess(kept, output_type, [not same for same in unchanged.tolist()])
