# SPDX-License-Identifier: Apache-2.0
"""Setup of a text-to-image run: sizes, scheduler, frozen models, captioned data, caches and picture grids."""

import itertools
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from torch import nn

from ..data.buckets import make_buckets, parse_buckets
from ..data.captions import CaptionColumn
from ..data.images import ImageData
from ..data.latents import cache_latents
from ..data.loading import make_datasets
from ..data.randomness import make_generator
from ..data.streams import StreamData
from ..pipelines.init_pipeline import ENCODERS, TEXT_PARTS
from ..pipelines.sampling import default_mu
from ..pipelines.stock import with_stock_scheduler
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.validation import EVALUATION_SEED, make_grid
from .arguments import TextToImageArguments
from .prompts import Embeds, EncodeCaptions, PromptEncoder, cache_prompts


logger = logging.getLogger(__name__)

# Sides of buckets are multiples of about this part of the resolution, as 64 of 1024.
BUCKET_STEPS = 16


class TextToImageModel(nn.Module):
    """
    Transformer of a pipeline, with x_t and timestep first, as [`~diffusers_fm.training.validation.held_out_loss`]
    calls it.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            Its transformer is trained in place.
        text_encoders (`Sequence[nn.Module]`, *optional*):
            Text encoders that are trained too. They run before a call, which takes their embeddings.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, text_encoders: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoders = nn.ModuleList(text_encoders)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """
        Prediction of the transformer, of the scheduler's `prediction_type`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t, float32.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                `timestep_scale * t`, continuous; t = 0 is data, 1 is noise.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, joint_attention_dim)`):
                Token embeddings of the captions.
            pooled (`torch.Tensor` of shape `(batch_size, pooled_projection_dim)`):
                Pooled embeddings of the captions.

        Returns:
            `torch.Tensor` of the shape of `sample`.
        """
        return self.transformer(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.to(sample.dtype),
            pooled_projections=pooled.to(sample.dtype),
            return_dict=False,
        )[0]


def choose_resolution(pipeline: StableDiffusion3Pipeline, resolution: int | None) -> int:
    """Side of the square images, by default the transformer's; a `ValueError` if the model does not take it."""
    multiple, largest = _sides(pipeline)
    if resolution is None:
        return pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
    if resolution % multiple or resolution > largest:
        raise ValueError(
            f"--resolution must be a multiple of {multiple} up to {largest} for this model, got {resolution}."
        )
    return resolution


def choose_sizes(
    pipeline: StableDiffusion3Pipeline, args: TextToImageArguments, resolution: int
) -> list[tuple[int, int]]:
    """Heights and widths of the images, a square or buckets; a `ValueError` if the model does not take them."""
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


def _sides(pipeline: StableDiffusion3Pipeline) -> tuple[int, int]:
    """Divisor and maximum of the sides of images."""
    multiple = pipeline.vae_scale_factor * pipeline.transformer.config.patch_size
    return multiple, pipeline.transformer.config.pos_embed_max_size * multiple


def choose_scheduler(
    pipeline: StableDiffusion3Pipeline, args: TextToImageArguments, sizes: Sequence[tuple[int, int]]
) -> FlowMatchScheduler:
    """
    Scheduler of training and of sampling after it; it replaces the pipeline's.

    With `--shift`, times are shifted by it whatever the size. With `--shift_base_resolution`, they are shifted by
    `sqrt(m / n)` (arXiv 2403.03206, equation 23), where `m` are the pixels of an image and `n` those of the base. The
    scheduler does that by `use_dynamic_shifting`, in which the logarithm of the shift is linear in the tokens of the
    image: both agree for the smallest and the largest size, and between them training follows the scheduler, so that
    sampling agrees with it. With neither, the scheduler keeps its shift. With `--save_stock` it samples on the grid of
    diffusers' own.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The pipeline to train.
        args ([`TextToImageArguments`]):
            The script's arguments.
        sizes (`Sequence[tuple[int, int]]`):
            Heights and widths of the images, in pixels.

    Returns:
        [`FlowMatchScheduler`]: the scheduler.

    Raises:
        ValueError: if the scheduler cannot be trained, or diffusers has none like it for `--save_stock`.
    """
    changes: dict[str, Any] = {}
    if args.shift is not None:
        changes = {"shift": args.shift, "use_dynamic_shifting": False}
    elif args.shift_base_resolution is not None:
        areas = sorted(height * width for height, width in sizes)
        # If all areas are equal, the line goes on to the doubled side.
        ends = (areas[0], areas[-1] if areas[-1] > areas[0] else 4 * areas[0])
        base, largest = (0.5 * math.log(area / args.shift_base_resolution**2) for area in ends)
        area_of_token = _sides(pipeline)[0] ** 2
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


def shift_of(scheduler: FlowMatchScheduler, latents: torch.Tensor, patch_size: int) -> float:
    """Shift of the times of latents `(batch_size, channels, height, width)`, the one that sampling uses for them."""
    config = scheduler.config
    if not config.use_dynamic_shifting:
        return config.shift
    mu = default_mu(scheduler, tuple(latents.shape[1:]), patch_size)
    return mu if config.time_shift_type == "linear" else math.exp(mu)


def choose_encoder_dropout(encoder: PromptEncoder, rates: Sequence[float]) -> list[float]:
    """Dropout of both CLIPs and the T5, from one rate for all or one for each; a `ValueError` if the count differs."""
    count = 2 + encoder.has_t5
    if len(rates) not in (1, count):
        raise ValueError(
            f"--text_encoder_dropout must be one number in [0, 1], or one for each of the {count} text encoders, got"
            f" {list(rates)}."
        )
    each = list(rates) * count if len(rates) == 1 else list(rates)
    return each if encoder.has_t5 else [*each, 0.0]


def freeze(pipeline: StableDiffusion3Pipeline, mixed_precision: str, transformer: bool = False) -> None:
    """
    Freeze text encoders and autoencoder, and for adapters the transformer. The autoencoder stays in float32, and so do
    a T5's output layers, which overflow in float16; the others run in the precision of training.
    """
    encoders = [pipeline.components[name] for name in ENCODERS if pipeline.components[name] is not None]
    for model in (pipeline.vae, *encoders):
        model.requires_grad_(False).eval()
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)
    for model in encoders:
        model.to(dtype)
    if transformer:
        # Not by diffusers' own `to`, which warns of layers to be kept in float32 where there are none.
        nn.Module.to(pipeline.transformer.requires_grad_(False), dtype)
    if dtype == torch.float16 and pipeline.text_encoder_3 is not None:
        for name, module in pipeline.text_encoder_3.named_modules():
            if name.endswith(".wo"):
                module.float()


def load_captioned_data(
    args: TextToImageArguments, channels: int, resolution: int, sizes: Sequence[tuple[int, int]]
) -> tuple[ImageData | StreamData, ImageData | None]:
    """Captioned images to train on, and those held out, in the sizes of [`choose_sizes`]."""
    buckets = () if list(sizes) == [(resolution, resolution)] else tuple(sizes)
    return make_datasets(args, channels, resolution, buckets=buckets, caption_column=args.caption_column)


def warn_of_long_captions(encoder: PromptEncoder, captions: CaptionColumn | StreamData) -> None:
    """Warn once of captions that are longer than the encoders read; of a stream, of those at its beginning."""
    distinct = list(captions.distinct())
    clip, t5 = encoder.count_too_long(distinct)
    if clip or t5:
        of_t5 = f", and {t5} than the {encoder.max_sequence_length} of the T5 (--max_sequence_length)"
        logger.warning(
            "Of %d different captions, %d are longer than the %d tokens of the CLIPs%s; what is beyond is not read.",
            len(distinct),
            clip,
            encoder.num_clip_tokens,
            of_t5 if encoder.has_t5 else "",
        )


def prepare_prompts(
    accelerator: Accelerator,
    args: TextToImageArguments,
    encoder: PromptEncoder,
    data: Sequence[ImageData | StreamData | None],
    prompts: Sequence[str],
    folder: Path,
) -> EncodeCaptions:
    """Text encoders on the device, or with `--cache_text_embeddings` a cache of all captions and prompts."""
    if args.cache_text_embeddings:
        columns = [each.captions.distinct() for each in data if each is not None and each.captions is not None]
        captions = itertools.chain(prompts, *columns)
        return cache_prompts(accelerator, captions, encoder, folder / "text_embeddings", args.train_batch_size)
    if not args.offload:
        for model in encoder.encoders:
            model.to(accelerator.device)
    return encoder


def prepare_latents(
    accelerator: Accelerator,
    args: TextToImageArguments,
    pipeline: StableDiffusion3Pipeline,
    data: Sequence[ImageData | StreamData | None],
    folder: Path,
) -> None:
    """Put the autoencoder on the device, or with `--cache_latents` have the data read a cache of latents."""
    if args.cache_latents:
        for each in data:
            if isinstance(each, ImageData):
                cache_latents(accelerator, each, pipeline.vae, folder / "latents", args.train_batch_size)
    elif not args.offload:
        pipeline.vae.to(accelerator.device)


def as_saved(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """Pipeline to save: with diffusers' own scheduler where that gives the same images, else with ours."""
    try:
        return with_stock_scheduler(pipeline)
    except ValueError as error:
        logger.info("The pipeline is saved with diffusers-fm's scheduler: %s", error)
        return pipeline


@torch.no_grad()
def prompt_grid(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[Embeds],
    negative: Embeds,
    size: tuple[int, int],
    num_images: int,
    num_inference_steps: int,
    guidance_scale: float,
    device: torch.device,
) -> PIL.Image.Image:
    """
    Sample pictures of prompts from fixed noise, a row for each prompt.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The pipeline to sample from, as it would be saved; it is left as it is.
        prompts (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Token and pooled embeddings of each prompt, batches of one.
        negative (`tuple[torch.Tensor, torch.Tensor]`):
            Embeddings of the empty prompt.
        size (`tuple[int, int]`):
            Height and width in pixels.
        num_images (`int`):
            Pictures in a row.
        num_inference_steps (`int`):
            Steps of the solver.
        guidance_scale (`float`):
            Scale of classifier-free guidance, 1 is off.
        device (`torch.device`):
            Device of the transformer.

    Returns:
        `PIL.Image.Image`: the grid.
    """
    scheduler = pipeline.scheduler
    sampler = StableDiffusion3Pipeline(
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=type(scheduler).from_config(scheduler.config),
        **dict.fromkeys(TEXT_PARTS),
    )
    sampler.set_progress_bar_config(disable=True)
    was_training = pipeline.transformer.training
    pipeline.transformer.eval()
    dtype = pipeline.transformer.dtype
    rows = []
    for row, embeds in enumerate(prompts):
        tokens, pooled, no_tokens, no_pooled = (
            part.to(device, dtype).expand(num_images, *part.shape[1:]) for part in (*embeds, *negative)
        )
        with offload_models(pipeline.vae, device=device):
            images = sampler(
                prompt_embeds=tokens,
                pooled_prompt_embeds=pooled,
                negative_prompt_embeds=no_tokens,
                negative_pooled_prompt_embeds=no_pooled,
                height=size[0],
                width=size[1],
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=[make_generator(EVALUATION_SEED, "grid", row, number) for number in range(num_images)],
            ).images
        rows.append(list(images))
    pipeline.transformer.train(was_training)
    return make_grid(rows)
