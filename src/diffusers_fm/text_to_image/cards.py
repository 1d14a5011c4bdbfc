# SPDX-License-Identifier: Apache-2.0
"""Model cards of text-to-image pipelines and of LoRA weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from ..arguments import INSTALL
from ..hub.cards import CardContent, Picture, hub_id, model_card
from ..hub.portable import last_part
from ..paths import OTPath
from ..pipelines.cards import describe_network, family_tags, solver_rows
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.publishing import has_picture, with_run
from .arguments import TextToImageArguments, parse_columns
from .field import TrainedField


TAGS = ("diffusers-training",)
IMPORT = f"import diffusers_fm  # {INSTALL} in a clone of it; teaches diffusers the scheduler\n"


def text_to_image_card(
    pipeline: DiffusionPipeline,
    args: TextToImageArguments,
    repo_id: str,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
    field: TrainedField | None = None,
) -> ModelCard:
    """
    Card of a trained text-to-image pipeline of diffusers; see [`~training.publishing.with_run`]. `field` knows the
    arguments of its call, and what was found about its step.
    """
    name, scheduler = type(pipeline).__name__, pipeline.scheduler
    ours = isinstance(scheduler, FlowMatchScheduler)
    content = _content(
        pipeline,
        args,
        repo_id,
        folder,
        args.validation_prompts or (),
        field,
        f'{name}.from_pretrained("{repo_id}")',
        summary=f"A {_task(args)} model, `{name}`, trained by flow matching with `diffusers-fm`.",
        tags=(_task(args), *TAGS),
        path=scheduler.path if ours else OTPath(),
        solvers=solver_rows(scheduler, args.num_inference_steps) if ours else (),
    )
    return model_card(with_run(content, args, global_batch_size, figures, folder))


def lora_card(
    pipeline: DiffusionPipeline,
    args: TextToImageArguments,
    repo_id: str,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
    instance_prompt: str | None = None,
    field: TrainedField | None = None,
) -> ModelCard:
    """
    Card of LoRA weights of a pipeline, with the metadata that diffusers' own scripts write; see
    [`~training.publishing.with_run`]. `instance_prompt` is the prompt that brings out what was learned,
    and `field` knows the arguments of the call, and what was found about the pipeline's step.
    """
    base = args.pretrained_model_name_or_path
    name = f"[{base}](https://huggingface.co/{base})" if hub_id(base) else f"`{last_part(base)}`"
    content = _content(
        pipeline,
        args,
        repo_id,
        folder,
        args.validation_prompts or ([instance_prompt] if instance_prompt else ()),
        field,
        f'DiffusionPipeline.from_pretrained("{base}")\npipeline.load_lora_weights("{repo_id}")',
        summary=f"LoRA weights for {name}, trained by flow matching with `diffusers-fm`.",
        tags=(
            _task(args),
            *TAGS,
            "diffusers",
            "lora",
            "template:sd-lora",
            *family_tags(type(pipeline)),
        ),
        instance_prompt=instance_prompt,
    )
    return model_card(with_run(content, args, global_batch_size, figures, folder))


def _task(args: TextToImageArguments) -> str:
    """The Hub's name of the task."""
    if args.audio_seconds is not None:
        return "text-to-audio"
    return "text-to-video" if args.num_frames > 1 else "text-to-image"


def _written(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _content(
    pipeline: DiffusionPipeline,
    args: TextToImageArguments,
    repo_id: str,
    folder: Path | None,
    prompts: Sequence[str],
    field: TrainedField | None,
    load: str,
    **content: Any,
) -> CardContent:
    """Content of both cards, with the pictures of the prompts that the output folder or `folder` has."""
    config, scheduler_class = pipeline.scheduler.config, type(pipeline.scheduler)
    call = {
        **({"max_sequence_length": args.max_sequence_length} if field is None else field.call),
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        "height": args.resolution,
        "width": args.resolution,
        "output_type": None if args.audio_seconds is None else "np",
    }
    prompt = json.dumps(prompts[0] if prompts else "a photo of a cat", ensure_ascii=False)
    words = ", ".join([prompt, *(f"{name}={_written(value)}" for name, value in call.items() if value is not None)])
    images = parse_columns(args.call_columns)
    words = ", ".join([words, *(f"{name}={name}" for name in images)])
    imports, output = "", f'image = pipeline({words}).images[0]\nimage.save("sample.png")'
    if args.num_frames > 1:
        imports = f"from diffusers.utils import export_to_video{', load_image' if images else ''}\n"
        output = f'video = pipeline({words}).frames[0]\nexport_to_video(video, "sample.mp4")'
    elif images:
        imports = "from diffusers.utils import load_image\n"
    output = "".join(f'{name} = load_image("{name}.png")\n' for name in images) + output
    if field is not None and field.sounds is not None:
        imports = "import soundfile\n"
        rate = field.sounds.sampling_rate
        output = f'audio = pipeline({words}).audios[0]\nsoundfile.write("sample.wav", audio.T, {rate})'
    shift = "by the size of the image" if config.use_dynamic_shifting else f"{config.shift:g}"
    few_steps = "pipeline = diffusers_fm.with_flow_map(pipeline)\n" if config.get("solver") == "flow_map" else ""
    return CardContent(
        repo_id=repo_id,
        snippet=f"""
import torch
from diffusers import {load.partition(".")[0]}
{imports}
{IMPORT if issubclass(scheduler_class, FlowMatchScheduler) else ""}pipeline = {load}
{few_steps}pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
{output}
""",
        scheduler=config,
        pipeline_tag=_task(args),
        pictures=[
            Picture(name, prompt)
            for i, prompt in enumerate(prompts)
            for name in (f"image_{i}.png", f"sound_{i}_0.wav")
            if has_picture(name, args, folder)
        ],
        facts={
            "network": describe_network(pipeline.components[args.network]),
            "scheduler": f"`{scheduler_class.__name__}`, shift {shift}",
            **({} if field is None else {"velocity field": field.describe()}),
        },
        **content,
    )
