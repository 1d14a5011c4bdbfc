# SPDX-License-Identifier: Apache-2.0
"""Validation: the held-out loss and sampled pictures."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from torch import nn

from ..data.images import ImageData
from ..data.latents import latents_of_batch
from ..data.randomness import make_generator
from ..pipelines import FlowMatchPipeline
from ..pipelines.base import FlowMatchPipelineBase
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .metrics import TIME_BINS, rounded
from .run import TrainingRun


# The data of a batch, as the flow sees it, and what the model takes after x_t and the timestep.
Prepare = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, tuple[Any, ...]]]

PipelineT = TypeVar("PipelineT", bound=FlowMatchPipelineBase)

# The seed of noise and times in evaluation is not the run's: runs with different seeds can be compared.
EVALUATION_SEED = 0

# The fractional parts of multiples of the golden ratio are spread evenly, and unlike an even grid they do not rise
# with the row, which in many data sets goes with the class.
_GOLDEN = (5**0.5 - 1) / 2

MAX_ROWS = 10
MIN_TILE = 48


def data_and_labels(
    pipeline: FlowMatchPipeline, batch: dict[str, torch.Tensor], device: torch.device
) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """Data and labels of a batch for [`held_out_loss`]: pixels in [-1, 1] or latents, none drawn; labels if any."""
    labels = batch.get("labels")
    return latents_of_batch(pipeline, batch, device), (None if labels is None else labels.to(device),)


def validate_pipeline(
    run: TrainingRun[Any],
    pipeline: FlowMatchPipeline,
    held_out_data: ImageData | None,
    step: int,
    grid_name: str | None,
) -> dict[str, Any]:
    """Held-out loss of a pipeline in training, and a picture grid of it as it would be saved now."""
    args = run.args
    figures: dict[str, Any] = {}
    if held_out_data is not None:
        figures = held_out_loss(
            run.accelerator,
            run.model,
            pipeline.scheduler,
            held_out_data,
            args.eval_batch_size,
            lambda batch: data_and_labels(pipeline, batch, run.accelerator.device),
        )
    if args.num_validation_images and pipeline.makes_pictures and run.accelerator.is_main_process:
        grid = sample_grid(
            pipeline, args.num_validation_images, args.num_inference_steps, args.guidance_scale, args.eval_batch_size
        )
        run.log.write_grid(step, grid, grid_name)
    return figures


@torch.no_grad()
def held_out_loss(
    accelerator: Accelerator,
    model: nn.Module,
    scheduler: FlowMatchScheduler,
    data: ImageData,
    batch_size: int,
    prepare: Prepare,
) -> dict[str, Any]:
    """
    The velocity loss on held-out images at fixed noise and evenly spread times, each image at one time.

    Times and velocities are those of the straight coordinates (on OT, the path's own), so that the figure means the
    same on every path. It does not depend on the run's seed, density and weighting, nor on the number of processes
    (but for rounding). Every process calls it.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        model (`nn.Module`):
            What is evaluated, called as `model(x_t, timesteps, *conditions)`.
        scheduler ([`FlowMatchScheduler`]):
            With the path and the prediction type.
        data ([`ImageData`]):
            The held-out images.
        batch_size (`int`):
            Images at once.
        prepare (`Callable`):
            Called as `prepare(batch)`: the batch's data, on the model's device, and the tuple of conditions, such as
            [`data_and_labels`].

    Returns:
        `dict[str, Any]`: `validation_loss` and `validation_loss_by_time`, the means of ten bins of the straight time
        from data to noise.
    """
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    was_training = model.training
    model.eval()
    sums = torch.zeros(2, TIME_BINS)
    groups = data.groups(batch_size)
    # All processes call the model equally often, for it may wait for the others; what is one too many is not counted.
    for first in range(0, len(groups), accelerator.num_processes):
        number = first + accelerator.process_index
        rows = groups[min(number, len(groups) - 1)]
        batch = data[np.stack([np.zeros_like(rows), rows], axis=1)]
        clean, conditions = prepare(batch)
        spread = (torch.from_numpy(rows).double() * _GOLDEN + 0.5) % 1
        ratio = path.ratio_min + (path.ratio_max - path.ratio_min) * spread
        t = path.time_at(ratio)
        noise = torch.stack(
            [
                torch.randn(clean.shape[1:], generator=make_generator(EVALUATION_SEED, "held-out", row))
                for row in rows.tolist()
            ]
        ).to(clean)
        with accelerator.autocast():
            timesteps = (scheduler.timestep_scale * t).float().to(accelerator.device)
            prediction = model(path.sample(clean, noise, t), timesteps, *conditions)
        error = prediction.float() - path.target(clean, noise, t, prediction_type)
        # The straight velocity is noise - data; both follow from the prediction, and their errors with them.
        by_noise, by_data = (path.coefficients(t, prediction_type, type_)[1] for type_ in ("epsilon", "sample"))
        losses = (by_noise - by_data).square().float() * error.square().flatten(1).mean(1).cpu()
        bins = (ratio * TIME_BINS).long()
        if number < len(groups):
            sums[0].index_add_(0, bins, losses)
            sums[1].index_add_(0, bins, torch.ones_like(losses))
    model.train(was_training)
    sums = to_float64(accelerator.reduce(sums.to(accelerator.device), reduction="sum"))
    by_time = [rounded(total / count) if count else None for total, count in zip(*sums.tolist())]
    mean = (sums[0].sum() / sums[1].sum()).item()
    return {"validation_loss": rounded(mean), "validation_loss_by_time": by_time}


def make_grid(rows: list[list[PIL.Image.Image]], padding: int = 2) -> PIL.Image.Image:
    """Rows of equally large pictures, small ones enlarged, with `padding` white pixels between and around them."""
    width, height = rows[0][0].size
    factor = max(1, -(-MIN_TILE // min(width, height)))
    width, height = factor * width, factor * height
    columns = max(len(row) for row in rows)
    size = (padding + columns * (width + padding), padding + len(rows) * (height + padding))
    grid = PIL.Image.new(rows[0][0].mode, size, "white")
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            tile = image.resize((width, height), PIL.Image.Resampling.NEAREST)
            grid.paste(tile, (padding + j * (width + padding), padding + i * (height + padding)))
    return grid


@contextmanager
def quiet_copy(pipeline: PipelineT) -> Iterator[PipelineT]:
    """Copy of a pipeline in training, to sample from: its models in evaluation mode, with its own scheduler."""
    sampler = copy.copy(pipeline)
    sampler.scheduler = pipeline.scheduler.with_settings()
    sampler.set_progress_bar_config(disable=True)
    models = [model for model in (pipeline.denoiser, pipeline.class_embedder) if model is not None]
    was_training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield sampler
    finally:
        for model, training in zip(models, was_training):
            model.train(training)


def sample_grid(
    pipeline: FlowMatchPipeline,
    num_images: int,
    num_inference_steps: int | None,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
) -> PIL.Image.Image:
    """
    Sampled pictures from fixed noise: a row for each class, of ten classes at most; near a square without classes.

    Args:
        pipeline ([`FlowMatchPipeline`]):
            Pipeline.
        num_images (`int`):
            Pictures of each class, or of all without classes.
        num_inference_steps (`int`, *optional*):
            Steps of the solver; `None` for the scheduler's own number.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Scale of classifier-free guidance, 1 is off.
        batch_size (`int`, *optional*, defaults to 64):
            Pictures at once.

    Returns:
        `PIL.Image.Image`: the grid.
    """
    num_rows = min(pipeline.num_classes, MAX_ROWS) or 1
    classes = np.linspace(0, max(pipeline.num_classes - 1, 0), num_rows).round().astype(int).tolist()
    labels = np.repeat(classes, num_images).tolist()
    images = []
    with quiet_copy(pipeline) as sampler:
        for start in range(0, len(labels), batch_size):
            numbers = range(start, min(start + batch_size, len(labels)))
            pictures, _ = sampler(
                class_labels=[labels[number] for number in numbers] if pipeline.num_classes else None,
                batch_size=len(numbers),
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[make_generator(EVALUATION_SEED, "grid", number) for number in numbers],
                output_type="pil",
                return_dict=False,
            )
            images += pictures
    columns = num_images if pipeline.num_classes else math.isqrt(num_images - 1) + 1
    return make_grid([images[i : i + columns] for i in range(0, len(images), columns)])
