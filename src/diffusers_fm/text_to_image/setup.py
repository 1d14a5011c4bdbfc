# SPDX-License-Identifier: Apache-2.0
"""What the text-to-image scripts share: frozen models, captioned data, latents and prompts of a batch, pictures."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from torch import nn

from ..data.images import ImageData
from ..data.latents import cache_latents
from ..data.loading import make_datasets
from ..data.randomness import make_generator
from ..data.streams import StreamData
from ..pipelines.init_pipeline import ENCODERS
from ..pipelines.stock import with_stock_scheduler
from ..text_to_image.precompute import cache_prompts
from ..training.validation import EVALUATION_SEED, make_grid
from .arguments import TextToImageArguments
from .prompts import Embeds, PromptEncoder, ReadPrompts


logger = logging.getLogger(__name__)


class TextToImageModel(nn.Module):
    """
    The transformer of a pipeline, for `accelerator.prepare` and [`held_out_loss`]: x_t and timestep come first.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            Whose transformer is trained in place.
        text_encoders (`Sequence[nn.Module]`, *optional*):
            What is trained with it. A call does not use them: they are called before it, for what it is given.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, text_encoders: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoders = nn.ModuleList(text_encoders)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, prompt_embeds: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        """
        The transformer's answer at x_t.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t, float32.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                `timestep_scale * t`, continuous.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, num_tokens, joint_attention_dim)`):
                Of the captions.
            pooled (`torch.Tensor` of shape `(batch_size, pooled_projection_dim)`):
                Of the captions.

        Returns:
            `torch.Tensor` of the shape of `sample`: of the scheduler's `prediction_type`.
        """
        return self.transformer(
            hidden_states=sample,
            timestep=timestep,
            encoder_hidden_states=prompt_embeds.to(sample.dtype),
            pooled_projections=pooled.to(sample.dtype),
            return_dict=False,
        )[0]


def freeze(pipeline: StableDiffusion3Pipeline, mixed_precision: str, transformer: bool = False) -> None:
    """
    Make ready the models that are not trained. The text encoders run, and are saved, in the precision of training, but
    for a T5's output layers, which overflow in float16 and stay in float32; the autoencoder stays in float32.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The pipeline that is trained.
        mixed_precision (`str`):
            `"no"`, `"fp16"` or `"bf16"`.
        transformer (`bool`, *optional*, defaults to `False`):
            Whether the transformer is frozen as well, in the precision of training: only adapters of it are trained.
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
    args: TextToImageArguments, channels: int, sizes: Sequence[tuple[int, int]]
) -> tuple[ImageData | StreamData, ImageData | None]:
    """
    The captioned images to train on, and those held out.

    Args:
        args ([`TextToImageArguments`]):
            With the arguments of `add_data_arguments` and `add_text_to_image_arguments`.
        channels (`int`):
            Channels of the images.
        sizes (`Sequence[tuple[int, int]]`):
            As [`choose_sizes`] returns them.

    Returns:
        `tuple[ImageData | StreamData, ImageData | None]`: both.

    Raises:
        ValueError: if there are no such data, columns or captions.
    """
    buckets = () if list(sizes) == [(args.resolution, args.resolution)] else tuple(sizes)
    return make_datasets(args, channels, args.resolution, buckets=buckets, caption_column=args.caption_column)


def prepare_prompts(
    accelerator: Accelerator,
    args: TextToImageArguments,
    encoder: PromptEncoder,
    data: Sequence[ImageData | StreamData | None],
    others: Sequence[str],
    folder: Path,
) -> ReadPrompts:
    """
    What gives the embeddings of captions: the encoders, or with `--cache_text_embeddings` a cache of what they say.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        args ([`TextToImageArguments`]):
            With `cache_text_embeddings`, `offload` and `train_batch_size`.
        encoder ([`PromptEncoder`]):
            The encoders, on the CPU.
        data (`Sequence[ImageData | StreamData | None]`):
            Whose captions will be asked for.
        others (`Sequence[str]`):
            Prompts that will be asked for as well.
        folder (`Path`):
            For the cache.

    Returns:
        `Callable`: of a list of captions.
    """
    if args.cache_text_embeddings:
        columns = [each.captions.distinct() for each in data if each is not None and each.captions is not None]
        captions = itertools.chain(others, *columns)
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
    """
    Have the data read latents from a cache with `--cache_latents`; else put the autoencoder where it will be needed.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        args ([`TextToImageArguments`]):
            With `cache_latents`, `offload` and `train_batch_size`.
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            With the autoencoder, on the CPU.
        data (`Sequence[ImageData | StreamData | None]`):
            The images.
        folder (`Path`):
            For the cache.
    """
    if args.cache_latents:
        for each in data:
            if isinstance(each, ImageData):
                cache_latents(accelerator, each, pipeline.vae, folder / "latents", args.train_batch_size)
    elif not args.offload:
        pipeline.vae.to(accelerator.device)


def as_saved(pipeline: StableDiffusion3Pipeline) -> StableDiffusion3Pipeline:
    """
    The pipeline as it is written: with diffusers' own scheduler where that gives the same images, else with ours.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The pipeline that is trained.

    Returns:
        [`~diffusers.StableDiffusion3Pipeline`]: one with the same models.
    """
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
    Pictures of prompts from fixed noise, a row for each prompt.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            What is sampled, as it would be saved. Nothing of it is changed.
        prompts (`Sequence[tuple[torch.Tensor, torch.Tensor]]`):
            Embeddings of each prompt, batches of one.
        negative (`tuple[torch.Tensor, torch.Tensor]`):
            Those of the empty prompt.
        size (`tuple[int, int]`):
            Height and width in pixels.
        num_images (`int`):
            Pictures in a row.
        num_inference_steps (`int`):
            Steps of the solver.
        guidance_scale (`float`):
            Scale of classifier-free guidance, 1 is off.
        device (`torch.device`):
            Where the transformer is.

    Returns:
        `PIL.Image.Image`: the grid.
    """
    scheduler = pipeline.scheduler
    sampler = StableDiffusion3Pipeline(
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        scheduler=type(scheduler).from_config(scheduler.config),
        **dict.fromkeys(
            ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
        ),
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
