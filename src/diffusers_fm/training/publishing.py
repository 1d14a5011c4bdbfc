# SPDX-License-Identifier: Apache-2.0
"""The model card of a trained pipeline, and its way to the Hub."""

import argparse
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from ..pipelines import FlowMatchPipeline
from .arguments import saved_arguments


# Optimizer states, snapshots, logs and pictures under way stay at home.
NOT_UPLOADED = (
    "checkpoint-*",
    "checkpoint-*/**",
    ".partial-*",
    ".partial-*/**",
    "logs/**",
    "samples/**",
    "ema_snapshots/**",
    "precomputed/**",
)

CARD = """
# {title}

A {kind} image generator trained by flow matching with diffusers-fm, in diffusers' own folder format.

![Samples](grid.png)

```python
import diffusers_fm  # teaches diffusers the scheduler and the pipeline
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo}")
images = pipeline({call}).images
```

| | |
|---|---|
| network | `{network}`, {parameters:.2f} M parameters |
| path | {path} |
| prediction | `{prediction_type}` |
| sample | {shape} |
| data | {data} |
| steps | {steps:,} of {batch:,} samples |
{figures}
`training_args.json` holds all arguments of the run, `log.jsonl` its losses.
"""


def save_arguments(args: argparse.Namespace, output_dir: Path) -> None:
    """
    Write `training_args.json`.

    Args:
        args (`argparse.Namespace`):
            Arguments of the script.
        output_dir (`Path`):
            Folder of the run.
    """
    text = json.dumps(saved_arguments(args), indent=2)
    (output_dir / "training_args.json").write_text(text + "\n", encoding="utf-8")


def model_card(
    pipeline: FlowMatchPipeline,
    args: argparse.Namespace,
    repo: str,
    global_batch_size: int,
    figures: dict[str, Any],
) -> ModelCard:
    """
    A short card from what the pipeline and the run say of themselves.

    Args:
        pipeline ([`FlowMatchPipeline`]):
            The trained pipeline.
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
    source, datasets = data_source(args)
    classes = pipeline.num_classes
    scheduler = pipeline.scheduler.config
    channels, height, width = pipeline.sample_shape
    path_kwargs = ", ".join(f"{key} {value}" for key, value in (scheduler.path_kwargs or {}).items())
    call = f"class_labels=[{', '.join(map(str, range(min(classes, 4))))}]" if classes else "batch_size=4"
    text = CARD.format(
        title=Path(repo).name,
        kind="class-conditional" if classes else "unconditional",
        repo=repo,
        call=f"{call}, num_inference_steps={args.num_inference_steps}",
        network=pipeline.denoiser.__class__.__name__,
        parameters=sum(parameter.numel() for parameter in pipeline.denoiser.parameters()) / 1e6,
        path=f"`{scheduler.path}`" + (f" ({path_kwargs})" if path_kwargs else ""),
        prediction_type=scheduler.prediction_type,
        shape=f"{channels} x {height} x {width}" + ("" if pipeline.vae is None else " latents"),
        data=source,
        steps=args.max_train_steps,
        batch=global_batch_size,
        figures="".join(f"| {name} | {value} |\n" for name, value in figures.items()),
    )
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers-fm", "flow-matching", *(["class-conditional"] if classes else [])],
        datasets=datasets,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def data_source(args: argparse.Namespace) -> tuple[str, list[str] | None]:
    """
    What a card says of the data.

    Args:
        args (`argparse.Namespace`):
            With `dataset_name` and `train_data_dir`.

    Returns:
        `tuple[str, list[str] | None]`: Markdown for the table, and ids for the card's head.
    """
    source = args.dataset_name or args.train_data_dir
    # A local folder means nothing on the Hub, and its validation refuses it.
    if args.dataset_name is None or Path(args.dataset_name).exists():
        return f"`{Path(source).name}`", None
    return f"[{source}](https://huggingface.co/datasets/{source})", [source]


def create_repo(args: argparse.Namespace, output_dir: Path) -> str:
    """
    Create the run's repository, before any work, so that a wrong token or name is found at once.

    Args:
        args (`argparse.Namespace`):
            With `hub_model_id`, `hub_token` and `hub_private_repo`.
        output_dir (`Path`):
            Folder of the run; its name is the default id.

    Returns:
        `str`: the id of the repository.
    """
    name = args.hub_model_id or output_dir.resolve().name
    private = True if args.hub_private_repo else None
    return HfApi(token=args.hub_token).create_repo(name, private=private, exist_ok=True).repo_id


def upload(args: argparse.Namespace, output_dir: Path, repo_id: str) -> None:
    """
    Upload the output folder without checkpoints and logs.

    Args:
        args (`argparse.Namespace`):
            With `hub_token`.
        output_dir (`Path`):
            Folder of the run, with everything saved.
        repo_id (`str`):
            The repository.

    Raises:
        RuntimeError: if it fails; the message says how to try again.
    """
    try:
        HfApi(token=args.hub_token).upload_folder(
            repo_id=repo_id,
            folder_path=output_dir,
            commit_message="Add the trained pipeline",
            ignore_patterns=list(NOT_UPLOADED),
        )
    except Exception as error:
        excluded = " ".join(f"--exclude '{pattern}'" for pattern in NOT_UPLOADED)
        raise RuntimeError(
            f"The run is complete and saved in {output_dir}, but it could not be uploaded ({error}). Try again with"
            f" `hf upload {repo_id} {output_dir} . {excluded}`."
        ) from error
