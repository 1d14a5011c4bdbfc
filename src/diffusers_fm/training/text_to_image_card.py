# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained text-to-image pipeline."""

import argparse
from pathlib import Path
from typing import Any

from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard, ModelCardData

from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .publishing import data_source


CARD = """
# {title}

A text-to-image generator in the style of Stable Diffusion 3, trained by flow matching with diffusers-fm.

{grid}```python
{imports}from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained("{repo}")
image = pipeline(
    "{prompt}",
    height={side},
    width={side},
    num_inference_steps={steps},
    guidance_scale={guidance},
    max_sequence_length={length},
).images[0]
```

| | |
|---|---|
| transformer | `{network}`, {parameters:.2f} M parameters |
| scheduler | `{scheduler}`, {shift} |
| started from | `{source}` |
| data | {data} |
| steps | {train_steps:,} of {batch:,} samples |
{figures}
`training_args.json` holds all arguments of the run, `log.jsonl` its losses.
"""


def text_to_image_card(
    pipeline: StableDiffusion3Pipeline,
    args: argparse.Namespace,
    repo: str,
    global_batch_size: int,
    figures: dict[str, Any],
) -> ModelCard:
    """
    A short card from what the pipeline and the run say of themselves.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            The trained pipeline, as it is saved.
        args (`argparse.Namespace`):
            Arguments of the script.
        repo (`str`):
            Hub id or folder that the example loads.
        global_batch_size (`int`):
            Samples to an optimizer step.
        figures (`dict[str, Any]`):
            Measured numbers, for more rows of the table.

    Returns:
        `ModelCard`: the card; `save` writes it.
    """
    own = isinstance(pipeline.scheduler, FlowMatchScheduler)
    config = pipeline.scheduler.config
    prompt = args.validation_prompts[0] if args.validation_prompts else "a photo of a cat"
    data, datasets = data_source(args)
    text = CARD.format(
        title=Path(repo).name,
        grid="![Samples](grid.png)\n\n" if args.validation_prompts and args.num_validation_images else "",
        imports="import diffusers_fm  # teaches diffusers the scheduler\n" if own else "",
        repo=repo,
        prompt=prompt.replace("\\", "\\\\").replace('"', '\\"'),
        side=args.resolution,
        steps=args.num_inference_steps,
        guidance=args.guidance_scale,
        length=args.max_sequence_length,
        network=pipeline.transformer.__class__.__name__,
        parameters=sum(parameter.numel() for parameter in pipeline.transformer.parameters()) / 1e6,
        scheduler=pipeline.scheduler.__class__.__name__,
        shift="shift by the size of the image" if config.use_dynamic_shifting else f"shift {config.shift:g}",
        source=args.pretrained_model_name_or_path,
        data=data,
        train_steps=args.max_train_steps,
        batch=global_batch_size,
        figures="".join(f"| {name} | {value} |\n" for name, value in figures.items()),
    )
    head = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["diffusers-fm", "flow-matching", "text-to-image", "stable-diffusion-3"],
        datasets=datasets,
    )
    return ModelCard(f"---\n{head.to_yaml()}\n---\n{text}")
