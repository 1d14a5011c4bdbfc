# SPDX-License-Identifier: Apache-2.0
"""What the arguments of a text-to-image script leave open and the pipeline decides."""

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

from diffusers import SchedulerMixin, StableDiffusion3Pipeline

from ..data.buckets import make_buckets, parse_buckets
from ..data.captions import CaptionColumn
from ..data.streams import StreamData
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .arguments import TextToImageArguments
from .prompts import PromptEncoder


logger = logging.getLogger(__name__)

# Sides of buckets are multiples of about this part of the resolution, as 64 of 1024.
BUCKET_STEPS = 16


def choose_resolution(pipeline: StableDiffusion3Pipeline, resolution: int | None) -> int:
    """
    Side of the square images, by default the one that the transformer is configured for.

    Raises:
        ValueError: if the model does not take such images.
    """
    multiple, largest = _sides(pipeline)
    if resolution is None:
        return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    if resolution % multiple or resolution > largest:
        raise ValueError(
            f"--resolution must be a multiple of {multiple} up to {largest} for this model, got {resolution}."
        )
    return resolution


def _sides(pipeline: StableDiffusion3Pipeline) -> tuple[int, int]:
    """Sides of images must be multiples of the first number, up to the second."""
    multiple = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    return multiple, pipeline.transformer.config.pos_embed_max_size * multiple


def choose_sizes(
    pipeline: StableDiffusion3Pipeline, args: TextToImageArguments, resolution: int
) -> list[tuple[int, int]]:
    """
    Heights and widths of the images: a square, or buckets of about its area.

    Raises:
        ValueError: if the model does not take such images.
    """
    multiple, largest = _sides(pipeline)
    sizes = [(resolution, resolution)]
    if args.aspect_ratio_buckets is not None:
        sizes = parse_buckets(args.aspect_ratio_buckets)
    elif args.use_aspect_ratio_buckets:
        step = max(1, round(resolution / BUCKET_STEPS / multiple)) * multiple
        while resolution % step:
            step -= multiple
        sizes = make_buckets(resolution, step, args.max_aspect_ratio)
    refused = [size for size in sizes if any(side % multiple or side > largest for side in size)]
    if refused:
        raise ValueError(f"The sides of buckets must be multiples of {multiple} up to {largest}, got {refused}.")
    return sizes


def image_tokens(pipeline: StableDiffusion3Pipeline, height: int, width: int) -> int:
    """
    Tokens of an image.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            Whose transformer reads it.
        height (`int`), width (`int`):
            Of its latents.

    Returns:
        `int`: the length of the sequence.
    """
    patch = pipeline.transformer.config.patch_size
    return (height // patch) * (width // patch)


def choose_scheduler(
    pipeline: StableDiffusion3Pipeline, args: TextToImageArguments, sizes: Sequence[tuple[int, int]]
) -> FlowMatchScheduler:
    """
    The scheduler that training reads, and sampling after it. It takes the pipeline's place.

    With `--shift`, times are shifted by it whatever the size. With `--shift_base_resolution`, by
    `sqrt(m / n)` (arXiv 2403.03206, equation 23), where `m` are the pixels of an image and `n` those of the base. In
    the scheduler this becomes `use_dynamic_shifting`, which says it in another form: the logarithm of the shift is
    linear in the tokens of the image. Both agree for the smallest and the largest size, and training takes the
    scheduler's form, so that it is what sampling does. With neither, the scheduler stays as it is. With `--save_stock`
    it samples on the grid of diffusers' own.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The pipeline that is trained.
        args ([`TextToImageArguments`]):
            With `shift`, `shift_base_resolution` and `save_stock`.
        sizes (`Sequence[tuple[int, int]]`):
            Heights and widths of the images.

    Returns:
        [`FlowMatchScheduler`]: the scheduler.

    Raises:
        ValueError: if both are given, the scheduler cannot be trained, or `--save_stock` asks for one that diffusers
            does not have.
    """
    if args.shift is not None and args.shift_base_resolution is not None:
        raise ValueError(
            f"--shift {args.shift} is the same for all sizes and --shift_base_resolution {args.shift_base_resolution}"
            " depends on them: give one."
        )
    changes: dict[str, Any] = {}
    if args.shift is not None:
        changes = {"shift": args.shift, "use_dynamic_shifting": False}
    elif args.shift_base_resolution is not None:
        areas = sorted({height * width for height, width in sizes})
        # One size alone: the line goes on to the doubled side.
        ends = (areas[0], areas[-1] if len(areas) > 1 else 4 * areas[0])
        base, largest = (0.5 * math.log(area / args.shift_base_resolution**2) for area in ends)
        area_of_token = (pipeline.vae_scale_factor * pipeline.transformer.config.patch_size) ** 2
        changes = {
            "use_dynamic_shifting": True,
            "time_shift_type": "exponential",
            "base_shift": base,
            "max_shift": largest,
            "base_image_seq_len": ends[0] // area_of_token,
            "max_image_seq_len": ends[1] // area_of_token,
        }
    if args.save_stock:
        changes["timestep_spacing"] = "linspace"
    scheduler: Any = FlowMatchScheduler.from_config(pipeline.scheduler.config, **changes)
    if args.save_stock:
        # Refuses, before any work, what diffusers' own scheduler cannot do.
        scheduler.to_stock()
    if scheduler.config.invert_sigmas:
        raise ValueError("A scheduler with `invert_sigmas` cannot be trained here: its time runs from noise to data.")
    pipeline.scheduler = scheduler
    return scheduler


def shift_of(scheduler: SchedulerMixin, num_tokens: int) -> float:
    """
    The shift of the times of an image.

    Args:
        scheduler ([`FlowMatchScheduler`]):
            With the shift.
        num_tokens (`int`):
            Length of the image's sequence, which counts with `use_dynamic_shifting`.

    Returns:
        `float`: what [`~diffusers_fm.timesteps.shift_time`] takes.
    """
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return config.shift
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (num_tokens - config.base_image_seq_len)
    return mu if config.time_shift_type == "linear" else math.exp(mu)


def choose_encoder_dropout(encoder: PromptEncoder, rates: Sequence[float]) -> list[float]:
    """
    The part of the captions for which each encoder is left out.

    Args:
        encoder ([`PromptEncoder`]):
            The encoders.
        rates (`Sequence[float]`):
            One number for all of them, or one for each.

    Returns:
        `list[float]`: for both CLIPs and the T5.

    Raises:
        ValueError: if the numbers do not fit the encoders.
    """
    count = 2 + encoder.has_t5
    if len(rates) not in (1, count) or not all(0 <= rate <= 1 for rate in rates):
        raise ValueError(
            f"--text_encoder_dropout must be one number in [0, 1], or one for each of the {count} text encoders, got"
            f" {list(rates)}."
        )
    each = list(rates) * count if len(rates) == 1 else list(rates)
    return each if encoder.has_t5 else [*each, 0.0]


def tell_of_long_captions(encoder: PromptEncoder, captions: CaptionColumn | StreamData) -> None:
    """
    Count the captions that lose their end, and say so once.

    Args:
        encoder ([`PromptEncoder`]):
            The encoders.
        captions ([`CaptionColumn`] or [`StreamData`]):
            All captions, or those at the beginning.
    """
    total = 0

    def counted() -> Iterator[str]:
        nonlocal total
        for caption in captions.distinct():
            total += 1
            yield caption

    clip, t5 = encoder.count_too_long(counted())
    if clip or t5:
        of_t5 = f", and {t5} than the {encoder.max_sequence_length} of the T5 (--max_sequence_length)"
        logger.warning(
            "Of %d different captions, %d are longer than the %d tokens of the CLIPs%s; what is beyond is not read.",
            total,
            clip,
            encoder.num_clip_tokens,
            of_t5 if encoder.has_t5 else "",
        )
