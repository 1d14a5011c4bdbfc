# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there: written aside, listed in a manifest, renamed, and only then rotated."""

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"
_RUN_FILES = ("model_index.json", "training_args.json", "log.jsonl")


def _checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of all folders named like a checkpoint, rising."""
    if not output_dir.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def damage(checkpoint: Path) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        checkpoint (`Path`):
            Its folder.

    Returns:
        `str`, *optional*: the fault in a few words, or `None` if each file that the manifest lists has its full size.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"it holds no {MANIFEST}"
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
    return None


def latest_checkpoint(output_dir: Path) -> Path | None:
    """
    The newest whole checkpoint of a run. Damaged ones are named in a warning and passed over.

    Args:
        output_dir (`Path`):
            Folder of the run; it need not exist.

    Returns:
        `Path`, *optional*: the checkpoint's folder.
    """
    for step in reversed(_checkpoint_steps(output_dir)):
        checkpoint = output_dir / f"checkpoint-{step}"
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is damaged (%s) and passed over.", checkpoint, fault)
    return None


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    The checkpoint that a run starts from, and a check that the run may use its output folder.

    Args:
        output_dir (`Path`):
            Folder of the run.
        resume_from_checkpoint (`str`, *optional*):
            `"latest"` for the newest whole checkpoint in `output_dir`, where there is one; or a checkpoint's folder,
            by its path or by its name in `output_dir`.

    Returns:
        `Path`, *optional*: the checkpoint's folder, or `None` to start afresh.

    Raises:
        ValueError: if the folder to resume from is not a whole checkpoint, or `output_dir` holds another run and this
            one does not resume.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"The output folder {str(output_dir)!r} is a file.")
    if resume_from_checkpoint is None:
        held = [name for name in _RUN_FILES if (output_dir / name).exists()]
        held += [f"checkpoint-{step}" for step in _checkpoint_steps(output_dir)]
        if held:
            raise ValueError(
                f"The output folder {str(output_dir)!r} holds another run ({', '.join(held[:4])}): choose another"
                " --output_dir, or continue that run with --resume_from_checkpoint latest."
            )
        return None
    if resume_from_checkpoint == "latest":
        checkpoint = latest_checkpoint(output_dir)
        if checkpoint is None:
            logger.info("There is no checkpoint in %s yet: a new run starts.", output_dir)
        return checkpoint
    inside = output_dir / resume_from_checkpoint
    checkpoint = inside if inside.is_dir() else Path(resume_from_checkpoint)
    fault = damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if fault is not None:
        raise ValueError(f"Cannot resume from {resume_from_checkpoint!r}: {fault}.")
    return checkpoint


def handle_model_files(accelerator: Accelerator) -> None:
    """
    Make the accelerator's checkpoints hold the bare model's weights, so that a run can be resumed with another number
    of processes. Sharded engines keep their own format.

    Args:
        accelerator (`Accelerator`):
            Whose `save_state` and `load_state` are meant; one model is prepared with it.
    """

    def save_model(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                state = accelerator.unwrap_model(models[0], keep_torch_compile=False).state_dict()
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(output_dir) / MODEL_FILE)

    def load_model(models: list[torch.nn.Module], input_dir: str) -> None:
        if (Path(input_dir) / MODEL_FILE).is_file():
            model = accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
            model.load_state_dict(load_file(Path(input_dir) / MODEL_FILE))

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_manifest(folder: Path, state: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**state, "files": sizes}, indent=2) + "\n", encoding="utf-8")
    for path in [*files, manifest, folder]:
        _sync_to_disk(path)


def _remove(folder: Path) -> None:
    """Remove a folder under a name that is no checkpoint's, so that no half of one is ever seen."""
    doomed = folder.with_name(f"{_PARTIAL}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], total_limit: int | None = None
) -> Path:
    """
    Saves everything that the accelerator prepared or was given to keep, as `checkpoint-STEP`. Every process calls it.

    The files are written to a folder beside it, which is renamed when it is whole. Only then are the oldest
    checkpoints beyond the limit removed. If writing fails, the earlier checkpoints are as they were.

    Args:
        accelerator (`Accelerator`):
            What it prepared is saved.
        output_dir (`Path`):
            Folder of the run.
        step (`int`):
            Optimizer steps done.
        state (`dict[str, Any]`):
            What else is needed to go on, for the manifest.
        total_limit (`int`, *optional*):
            Checkpoints to keep, at least 1.

    Returns:
        `Path`: the checkpoint's folder.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"{_PARTIAL}{checkpoint.name}"
    if accelerator.is_main_process:
        for leftover in output_dir.glob(f"{_PARTIAL}*"):
            shutil.rmtree(leftover)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_manifest(partial, {"step": step, **state})
        if checkpoint.exists():
            _remove(checkpoint)
        partial.rename(checkpoint)
        _sync_to_disk(output_dir)
        if total_limit is not None:
            for old in _checkpoint_steps(output_dir)[:-total_limit]:
                if old < step:
                    _remove(output_dir / f"checkpoint-{old}")
    accelerator.wait_for_everyone()
    return checkpoint


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> None:
    """
    Loads what [`save_checkpoint`] saved into the same objects. Called by every process.

    Args:
        accelerator (`Accelerator`):
            With the same objects prepared.
        checkpoint (`Path`):
            Folder of a whole checkpoint.
    """
    accelerator.load_state(str(checkpoint))
    # Checkpoints lie between optimizer steps; the number of accumulation steps may be another now.
    accelerator.step = 0
    accelerator.wait_for_everyone()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """
    What a checkpoint says of itself.

    Args:
        checkpoint (`Path`):
            Folder of a whole checkpoint.

    Returns:
        `dict[str, Any]`: `step`, and the `state` that was given to [`save_checkpoint`].
    """
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
