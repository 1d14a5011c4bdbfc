# SPDX-License-Identifier: Apache-2.0
"""The model cards that training scripts write: what a pipeline says of itself, and what its run knows."""

import argparse
import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..hub.cards import CardContent, Evaluation, Picture
from ..hub.cards import model_card as render
from ..pipelines.base import FlowMatchPipelineBase
from ..pipelines.cards import pipeline_content
from .arguments import saved_arguments


_IMPORT_OURS = "import diffusers_fm  # pip install diffusers-fm; teaches diffusers the scheduler"

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def model_card(
    pipeline: FlowMatchPipelineBase,
    args: argparse.Namespace,
    repo_id: str,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
) -> ModelCard:
    """
    The card of a trained pipeline of this package.

    Args:
        pipeline (`FlowMatchPipelineBase`):
            The pipeline.
        args (`argparse.Namespace`):
            Arguments of the script.
        repo_id (`str`):
            What the example loads: a Hub id, or a folder.
        global_batch_size (`int`):
            Samples to an optimizer step.
        figures (`Mapping[str, Any]`):
            Of the last validation; what is no held-out loss becomes a row of the table.
        folder (`Path`, *optional*):
            Where `grid.png` is looked for, besides the output folder.

    Returns:
        `ModelCard`: the card; `save` writes it.
    """
    content = pipeline_content(pipeline, repo_id, args.num_inference_steps, args.guidance_scale)
    return render(_with_run(content, args, global_batch_size, figures, folder))


def _with_run(
    content: CardContent,
    args: argparse.Namespace,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None,
) -> CardContent:
    """The content with data, length, losses, evaluation and arguments of the run."""
    source = args.dataset_name or args.train_data_dir
    on_hub = args.dataset_name is not None and _is_hub_id(args.dataset_name)
    name = source if on_hub else Path(source).name
    base = args.pretrained_model_name_or_path
    loss = figures.get("validation_loss")
    return dataclasses.replace(
        content,
        license=args.hub_license,
        datasets=[source] if on_hub else (),
        base_model=base if _is_hub_id(base) else None,
        pictures=[*content.pictures, *([Picture("grid.png")] if _has("grid.png", args, folder) else [])],
        facts={
            **content.facts,
            "data": f"[{source}](https://huggingface.co/datasets/{source})" if on_hub else f"`{name}`",
            "steps": f"{args.max_train_steps:,} of {global_batch_size:,} samples",
            **({} if loss is None else {"held-out loss": f"{loss:.4f}"}),
            **{key: value for key, value in figures.items() if not key.startswith("validation_loss")},
        },
        losses_by_time=figures.get("validation_loss_by_time", ()),
        evaluation=None if loss is None else Evaluation({"held-out loss": loss}, name, source if on_hub else None),
        arguments=saved_arguments(args),
    )


def _has(name: str, args: argparse.Namespace, folder: Path | None) -> bool:
    return any((place / name).is_file() for place in (Path(args.output_dir), folder) if place is not None)


def _is_hub_id(name: str) -> bool:
    """Whether the name is an id on the Hub. One of a local folder means nothing there, and is refused in a card."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()
