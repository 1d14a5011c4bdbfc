# SPDX-License-Identifier: Apache-2.0
"""The model cards that training scripts write: what a pipeline says of itself, and what its run knows."""

import argparse
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ..hub.cards import CardContent, Picture
from ..hub.cards import model_card as render
from ..paths import OTPath
from ..pipelines.cards import solver_rows
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.cards import _has, _is_hub_id, _with_run


_IMPORT_OURS = "import diffusers_fm  # pip install diffusers-fm; teaches diffusers the scheduler"

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def text_to_image_card(
    pipeline: DiffusionPipeline,
    args: argparse.Namespace,
    repo_id: str,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
    tags: Sequence[str] = ("stable-diffusion-3",),
) -> ModelCard:
    """
    The card of a trained text-to-image pipeline of diffusers, with our scheduler or its own.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline, as it is saved.
        args (`argparse.Namespace`):
            Arguments of the script.
        repo_id (`str`):
            What the example loads: a Hub id, or a folder.
        global_batch_size (`int`):
            Samples to an optimizer step.
        figures (`Mapping[str, Any]`):
            Of the last validation; what is no held-out loss becomes a row of the table.
        folder (`Path`, *optional*):
            Where `grid.png`, and `image_0.png`, `image_1.png`, ... of the validation prompts are looked for, besides
            the output folder. The prompts and their pictures make the Hub's gallery.
        tags (`Sequence[str]`, *optional*):
            Tags of the family.

    Returns:
        `ModelCard`: the card; `save` writes it.
    """
    ours = isinstance(pipeline.scheduler, FlowMatchScheduler)
    name = type(pipeline).__name__
    load = f'pipeline = {name}.from_pretrained("{repo_id}")'
    if ours:
        load = f"{_IMPORT_OURS}\n{load}"
    content = _text_to_image(
        pipeline, args, repo_id, folder, args.validation_prompts, f"from diffusers import {name}", load
    )
    content = dataclasses.replace(
        content,
        summary=f"A text-to-image model, `{name}`, trained by flow matching with `diffusers-fm`.",
        tags=("text-to-image", "diffusers-training", *tags),
    )
    return render(_with_run(content, args, global_batch_size, figures, folder))


def lora_card(
    pipeline: DiffusionPipeline,
    args: argparse.Namespace,
    repo_id: str,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
    instance_prompt: str | None = None,
    tags: Sequence[str] = ("sd3", "sd3-diffusers", "template:sd-lora"),
) -> ModelCard:
    """
    The card of LoRA weights, with the metadata that diffusers' own scripts write.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            The pipeline that the weights belong to.
        args (`argparse.Namespace`):
            Arguments of the script; `pretrained_model_name_or_path` is the base model.
        repo_id (`str`):
            What the example loads: a Hub id, or a folder.
        global_batch_size (`int`):
            Samples to an optimizer step.
        figures (`Mapping[str, Any]`):
            Of the last validation; what is no held-out loss becomes a row of the table.
        folder (`Path`, *optional*):
            Where `grid.png`, and `image_0.png`, `image_1.png`, ... of the validation prompts are looked for, besides
            the output folder. The prompts and their pictures make the Hub's gallery.
        instance_prompt (`str`, *optional*):
            The prompt that brings out what was learned.
        tags (`Sequence[str]`, *optional*):
            Tags of the family.

    Returns:
        `ModelCard`: the card; `save` writes it.
    """
    base = args.pretrained_model_name_or_path
    load = f'pipeline = DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("{repo_id}")'
    if isinstance(pipeline.scheduler, FlowMatchScheduler):
        load = f"{_IMPORT_OURS}\n{load}"
    shown = args.validation_prompts or ([instance_prompt] if instance_prompt else ())
    content = _text_to_image(pipeline, args, repo_id, folder, shown, "from diffusers import DiffusionPipeline", load)
    name = f"[{base}](https://huggingface.co/{base})" if _is_hub_id(base) else f"`{Path(base).name}`"
    content = dataclasses.replace(
        content,
        summary=f"LoRA weights for {name}, trained by flow matching with `diffusers-fm`.",
        tags=("text-to-image", "diffusers-training", "diffusers", "lora", *tags),
        instance_prompt=instance_prompt,
        path=None,
        solvers=(),
    )
    return render(_with_run(content, args, global_batch_size, figures, folder))


def _text_to_image(
    pipeline: DiffusionPipeline,
    args: argparse.Namespace,
    repo_id: str,
    folder: Path | None,
    prompts: Sequence[str] | None,
    imports: str,
    load: str,
) -> CardContent:
    scheduler = pipeline.scheduler
    ours = scheduler if isinstance(scheduler, FlowMatchScheduler) else None
    prompts = prompts or ()
    call = {
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "height": args.resolution,
        "width": args.resolution,
        "max_sequence_length": args.max_sequence_length,
    }
    words = "".join(f", {name}={value:g}" for name, value in call.items() if value is not None)
    network = pipeline.transformer
    parameters = sum(parameter.numel() for parameter in network.parameters())
    shift = "by the size of the image" if scheduler.config.use_dynamic_shifting else f"{scheduler.config.shift:g}"
    return CardContent(
        repo_id=repo_id,
        summary="",
        snippet=f"""
import torch
{imports}

{load}
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
image = pipeline({json.dumps(prompts[0] if prompts else "a photo of a cat", ensure_ascii=False)}{words}).images[0]
image.save("sample.png")
""",
        scheduler=scheduler.config,
        path=OTPath() if ours is None else ours.path,
        pipeline_tag="text-to-image",
        pictures=[
            Picture(f"image_{i}.png", prompt)
            for i, prompt in enumerate(prompts)
            if _has(f"image_{i}.png", args, folder)
        ],
        facts={
            "network": f"`{type(network).__name__}`, {parameters / 1e6:.2f} M parameters",
            "scheduler": f"`{type(scheduler).__name__}`, shift {shift}",
        },
        solvers=() if ours is None else solver_rows(ours, args.num_inference_steps),
    )
