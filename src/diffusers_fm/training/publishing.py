# SPDX-License-Identifier: Apache-2.0
"""Card of a run: data, length, losses and arguments."""

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from ..hub.cards import CardContent, Evaluation, Picture, hub_id
from ..hub.cards import model_card as render
from ..hub.portable import last_part
from ..pipelines.base import FlowMatchPipelineBase
from .arguments import TrainingArguments


logger = logging.getLogger(__name__)

# Figures of the search for the settings of sampling.
SAMPLING_FIGURES = ("sampling_error", "euler_error")


def model_card(
    pipeline: FlowMatchPipelineBase,
    args: TrainingArguments,
    repo_id: str,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
) -> ModelCard:
    """Card of a trained pipeline of this package, see [`with_run`]; its example loads `repo_id`."""
    content = pipeline.card_content(repo_id, args.num_inference_steps, args.guidance_scale)
    return render(with_run(content, args, global_batch_size, figures, folder))


def with_run(
    content: CardContent,
    args: TrainingArguments,
    global_batch_size: int,
    figures: Mapping[str, Any],
    folder: Path | None = None,
) -> CardContent:
    """The content with data, length, losses and arguments of the run; further `figures` are rows of its table."""
    source = args.dataset_name or args.train_data_dir
    data_id, name, loss = hub_id(args.dataset_name), last_part(source), figures.get("validation_loss")
    facts = {
        "data": f"`{name}`" if data_id is None else f"[{data_id}](https://huggingface.co/datasets/{data_id})",
        "steps": f"{args.max_train_steps:,} of {global_batch_size:,} samples",
        **({} if loss is None else {"held-out loss": f"{loss:.4f}"}),
        **sampling_facts(content.scheduler, figures),
        **{
            key: value
            for key, value in figures.items()
            if not key.startswith("validation_loss") and key not in SAMPLING_FIGURES
        },
    }
    return dataclasses.replace(
        content,
        license=args.hub_license,
        datasets=[] if data_id is None else [data_id],
        base_model=hub_id(args.pretrained_model_name_or_path),
        pictures=[*content.pictures, *([Picture("grid.png")] if has_picture("grid.png", args, folder) else [])],
        facts={**content.facts, **facts},
        losses_by_time=figures.get("validation_loss_by_time", ()),
        evaluation=None if loss is None else Evaluation({"held-out loss": loss}, data_id or name, data_id),
        arguments=args.saved(),
    )


def sampling_facts(scheduler: Mapping[str, Any], figures: Mapping[str, Any]) -> dict[str, str]:
    """Row of a card: how the pipeline samples by default, and its error where it was measured."""
    steps = scheduler.get("default_num_inference_steps")
    if steps is None:
        return {}
    row = f"`{scheduler['solver']}`, {steps} steps by default"
    if figures.get("sampling_error") is not None:
        error, baseline = (figures[name] for name in SAMPLING_FIGURES)
        row += f"; relative error {error:.2g}, of 50 Euler steps {baseline:.2g}"
    return {"sampling": row}


def has_picture(name: str, args: TrainingArguments, folder: Path | None) -> bool:
    """Return whether the output folder, or the folder that is written now, has a picture."""
    return any((place / name).is_file() for place in (Path(args.output_dir), folder) if place is not None)
