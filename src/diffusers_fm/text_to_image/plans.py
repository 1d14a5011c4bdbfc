# SPDX-License-Identifier: Apache-2.0
"""The plans of the training scripts, from their arguments: configs and data are read, weights are not."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from ..pipelines.init_pipeline import ENCODERS
from ..pipelines.meta_pipeline import meta_pipeline
from ..training.activations import activations_per_sample
from ..training.metrics import forward_flops
from ..training.planning import Plan, empty, linear_flops, make_plan, planned_precision
from ..training.plans import _bytes, _latents_bytes, _with_seed
from .arguments import TextToImageArguments
from .lora import adapted_text_encoders, add_adapters
from .setup import (
    TextToImageModel,
    choose_resolution,
    choose_scheduler,
    choose_sizes,
    freeze,
    load_captioned_data,
)


def text_to_image_plan(args: TextToImageArguments, lora: bool = False) -> Plan:
    """
    The plan of train_text_to_image_sd3.py or train_text_to_image_lora_sd3.py.

    Args:
        args ([`TextToImageArguments`]):
            Its arguments, which are not changed.
        lora (`bool`, *optional*, defaults to `False`):
            Whether adapters are trained.

    Returns:
        [`Plan`]: the plan.

    Raises:
        ValueError: if there is no such pipeline or data, or arguments do not fit them.
    """
    args = _with_seed(args)
    pipeline = meta_pipeline(
        args.pretrained_model_name_or_path,
        StableDiffusion3Pipeline,
        args.vae_name_or_path,
        args.revision,
        args.text_encoders_name_or_path,
    )
    resolution = choose_resolution(pipeline, args.resolution)
    sizes = choose_sizes(pipeline, args, resolution)
    choose_scheduler(pipeline, args, sizes)
    freeze(pipeline, planned_precision(args), transformer=lora)
    data, _ = load_captioned_data(args, pipeline.vae.config.in_channels, resolution, sizes)
    clips = [pipeline.text_encoder, pipeline.text_encoder_2]
    clip_tokens = min(clip.config.max_position_embeddings for clip in clips)
    encoders = {name: pipeline.components[name] for name in ENCODERS if pipeline.components[name] is not None}
    tokens = {name: args.max_sequence_length if name == "text_encoder_3" else clip_tokens for name in encoders}

    if lora:
        add_adapters(pipeline, args)
    else:
        pipeline.transformer.requires_grad_(True)
    trained_encoders = adapted_text_encoders(pipeline)
    # The largest image counts, of which all samples of a batch may be.
    height, width = (side // pipeline.vae_scale_factor for side in max(sizes, key=lambda size: size[0] * size[1]))
    config = pipeline.transformer.config

    def inputs(size: int) -> tuple[Any, ...]:
        return (
            empty(size, config.in_channels, height, width),
            empty(size),
            empty(size, clip_tokens + args.max_sequence_length, config.joint_attention_dim),
            empty(size, config.pooled_projection_dim),
        )

    # Frozen models that answer on the way stay on the device, if they are not fetched for each moment.
    on_the_way = [] if args.cache_latents else [pipeline.vae]
    pixels = (pipeline.vae_scale_factor * height, pipeline.vae_scale_factor * width)
    image = empty(1, pipeline.vae.config.in_channels, *pixels)
    flops = 0 if args.cache_latents else forward_flops(pipeline.vae.encoder, (image,))
    for name, encoder in encoders.items():
        if not args.cache_text_embeddings or encoder in trained_encoders:
            flops += linear_flops(encoder, tokens[name]) * (3 if encoder in trained_encoders else 1)
        if not args.cache_text_embeddings and encoder not in trained_encoders:
            on_the_way.append(encoder)
    shape = (pipeline.vae.config.latent_channels, height, width)
    disk = _latents_bytes(data, args.random_flip, pipeline.vae, shape) if args.cache_latents else {}
    if args.cache_text_embeddings:
        assert data.captions is not None
        count = sum(1 for _ in data.captions.distinct()) + 1
        disk["cache of embeddings"] = count * _embeddings_bytes(pipeline, tokens)
    return make_plan(
        args,
        f"{'Adapters of ' if lora else ''}{type(pipeline.transformer).__name__} of"
        f" {args.pretrained_model_name_or_path}, batches of {args.train_batch_size} x {pixels[0]} x {pixels[1]}.",
        TextToImageModel(pipeline, trained_encoders),
        pipeline.transformer,
        inputs,
        data.num_samples,
        frozen=0 if args.offload else sum(map(_bytes, on_the_way)),
        extra_flops=flops,
        extra_activations=sum(_clip_activations(args, encoder, clip_tokens) for encoder in trained_encoders),
        disk=disk,
    )


def _embeddings_bytes(pipeline: StableDiffusion3Pipeline, tokens: dict[str, int]) -> int:
    """What is kept of a caption."""
    size = 0
    for name, count in tokens.items():
        encoder = pipeline.components[name]
        numbers = count * encoder.config.hidden_size
        numbers += 0 if name == "text_encoder_3" else encoder.config.projection_dim
        size += numbers * encoder.dtype.itemsize
    return size


def _clip_activations(args: TextToImageArguments, encoder: Any, num_tokens: int) -> int:
    """What a CLIP with adapters keeps of a caption."""
    kept = activations_per_sample(encoder, lambda size: (torch.zeros(size, num_tokens, dtype=torch.int64),))
    if args.gradient_checkpointing:
        # The inputs of its layers, and what one of them keeps.
        layers = encoder.config.num_hidden_layers
        kept = kept // layers + layers * num_tokens * encoder.config.hidden_size * encoder.dtype.itemsize
    return kept
