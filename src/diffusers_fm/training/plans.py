# SPDX-License-Identifier: Apache-2.0
"""The plans of the training scripts, from their arguments: configs and data are read, weights are not."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKL, ModelMixin

from ..data.loading import load_images
from ..pipelines import FlowMatchPipeline
from ..pipelines.meta_pipeline import meta_pipeline
from .arguments import TrainingArguments
from .metrics import forward_flops
from .objective import TrainableModel, choose_resolution
from .planning import Plan, empty, make_plan


A = TypeVar("A", bound=TrainingArguments)


def flow_matching_plan(args: TrainingArguments) -> Plan:
    """
    The plan of train_flow_matching.py.

    Args:
        args ([`TrainingArguments`]):
            Its arguments, which are not changed.

    Returns:
        [`Plan`]: the plan.

    Raises:
        ValueError: if there is no such pipeline or data.
    """
    args = _with_seed(args)
    pipeline = meta_pipeline(
        args.pretrained_model_name_or_path, FlowMatchPipeline, args.vae_name_or_path, args.revision
    )
    resolution = choose_resolution(pipeline, args.resolution)
    data, _ = load_images(args, pipeline, resolution)
    model = TrainableModel(pipeline).requires_grad_(True)
    shape = pipeline.sample_shape
    vae = pipeline.vae
    pixels = (1, pipeline.image_channels, resolution, resolution)

    def inputs(size: int) -> tuple[Any, ...]:
        labels = torch.zeros(size, dtype=torch.int64) if pipeline.num_classes else None
        return empty(size, *shape), empty(size), labels

    return make_plan(
        args,
        f"{type(pipeline.denoiser).__name__} of {args.pretrained_model_name_or_path},"
        f" batches of {args.train_batch_size} x {resolution} x {resolution}.",
        model,
        pipeline.denoiser,
        inputs,
        data.num_samples,
        frozen=0 if vae is None or args.cache_latents else _bytes(vae),
        extra_flops=0 if vae is None or args.cache_latents else forward_flops(vae.encoder, (empty(*pixels),)),
        disk=_latents_bytes(data, args.random_flip, vae, shape) if args.cache_latents else {},
    )


def _with_seed(args: A) -> A:
    """Arguments with a seed, which a plan does not depend on."""
    return dataclasses.replace(args, seed=args.seed or 0)


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _latents_bytes(data: Any, random_flip: bool, vae: ModelMixin, shape: Sequence[int]) -> dict[str, int]:
    """Means and variances of all latents, where the autoencoder has both; `shape` is that of the largest."""
    channels, height, width = shape
    pixels = [height * width * data.num_samples]
    if data.bucket_rows is not None:
        largest = max(h * w for h, w in data.transform.buckets)
        counted = zip(data.transform.buckets, data.bucket_rows)
        pixels = [height * width * h * w * len(rows) // largest for (h, w), rows in counted]
    channels *= 2 if isinstance(vae, AutoencoderKL) else 1
    return {"cache of latents": (1 + random_flip) * sum(pixels) * channels * vae.dtype.itemsize}
