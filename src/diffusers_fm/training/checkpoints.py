# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there: written aside, listed in a manifest, renamed, and only then rotated."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file

from ..files import PARTIAL, checksum, sync_to_disk
from .distributed import failures


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
# So many checkpoints in a row that cannot be written end the run.
MAX_FAILED_IN_A_ROW = 3

_RUN_FILES = ("model_index.json", "training_args.json", "log.jsonl")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def _checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of all folders named like a checkpoint, rising."""
    if not output_dir.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def damage(checkpoint: Path, thorough: bool = True) -> str | None:
    """
    What is wrong with a checkpoint.

    Args:
        checkpoint (`Path`):
            Its folder.
        thorough (`bool`, *optional*, defaults to `True`):
            Read every file and compare its checksum. Otherwise only sizes are looked at.

    Returns:
        `str`, *optional*: the fault in a few words, or `None` if each file that the manifest lists is as it was
        written.
    """
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        return f"it holds no {MANIFEST}"
    try:
        files = read_manifest(checkpoint)["files"]
        listed = {checkpoint / name: (entry["bytes"], entry["xxh3_128"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for path, (size, digest) in listed.items():
        name = path.relative_to(checkpoint).as_posix()
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes of {size}"
        try:
            if thorough and checksum(path) != digest:
                return f"{name} is not what was written: its checksum has changed"
        except OSError as error:
            return f"{name} cannot be read: {error}"
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


def agree_on_checkpoint(
    accelerator: Accelerator, output_dir: Path, resume_from_checkpoint: str | None
) -> tuple[Path | None, dict[str, Any]]:
    """
    [`find_checkpoint`] by the main process, for all. Every process calls it.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        output_dir (`Path`):
            Folder of the run.
        resume_from_checkpoint (`str`, *optional*):
            As [`find_checkpoint`] takes it.

    Returns:
        `tuple[Path | None, dict[str, Any]]`: the checkpoint's folder, or `None` to start afresh, and its manifest.

    Raises:
        ValueError: as [`find_checkpoint`].
    """
    found: list[Any] = [None, {}, None]
    if accelerator.is_main_process:
        try:
            checkpoint = find_checkpoint(output_dir, resume_from_checkpoint)
            found = [checkpoint, {} if checkpoint is None else read_manifest(checkpoint), None]
        except ValueError as error:
            found[2] = str(error)
    checkpoint, manifest, refusal = broadcast_object_list(found)
    if refusal is not None:
        raise ValueError(refusal)
    return checkpoint, manifest


def handle_model_files(accelerator: Accelerator) -> None:
    """
    Make the accelerator's checkpoints hold the bare model's weights, so that a run can be resumed with another number
    of processes. Of a model that is trained in part they hold that part alone, such as its adapters. Sharded engines
    keep their own format.

    Args:
        accelerator (`Accelerator`):
            Whose `save_state` and `load_state` are meant; one model is prepared with it.
    """

    def save_model(models: list[torch.nn.Module], weights: list[dict], output_dir: str) -> None:
        if weights:
            weights.clear()
            if accelerator.is_main_process:
                state = trained_state(accelerator.unwrap_model(models[0], keep_torch_compile=False))
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(output_dir) / MODEL_FILE)

    def load_model(models: list[torch.nn.Module], input_dir: str) -> None:
        if (Path(input_dir) / MODEL_FILE).is_file():
            model = accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
            state = load_file(Path(input_dir) / MODEL_FILE)
            expected = trained_state(model)
            differing = sorted(
                name
                for name in state.keys() | expected.keys()
                if name not in state or name not in expected or state[name].shape != expected[name].shape
            )
            if differing:
                raise ValueError(
                    f"{input_dir} and the model differ in {len(differing)} tensors, such as {differing[0]!r}: it is of"
                    " another model, or of other adapters."
                )
            model.load_state_dict(state, strict=False)

    accelerator.register_save_state_pre_hook(save_model)
    accelerator.register_load_state_pre_hook(load_model)


def trained_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """
    What training changes of a model.

    Args:
        model (`nn.Module`):
            The bare model.

    Returns:
        `dict[str, torch.Tensor]`: its state; of a model that is trained in part, the parameters that are.
    """
    state = model.state_dict()
    parameters = dict(model.named_parameters())
    if all(parameter.requires_grad for parameter in parameters.values()):
        return state
    return {name: state[name] for name, parameter in parameters.items() if parameter.requires_grad}


def _write_manifest(folder: Path, state: dict[str, Any]) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sync_to_disk(*files)
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": checksum(path)}
        for path in files
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({**state, "files": entries}, indent=2) + "\n", encoding="utf-8")
    sync_to_disk(manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder)


def _remove(folder: Path) -> None:
    """Remove a folder under a name that is no checkpoint's, so that no half of one is ever seen."""
    doomed = folder.with_name(f"{PARTIAL}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _put_in_place(partial: Path, checkpoint: Path) -> None:
    """Rename a folder that is whole; one of that name is gone no longer than between two renames."""
    former = checkpoint.with_name(f"{PARTIAL}removed-{checkpoint.name}")
    shutil.rmtree(former, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(former)
    partial.rename(checkpoint)
    sync_to_disk(checkpoint.parent)
    shutil.rmtree(former, ignore_errors=True)


def _rotate(output_dir: Path, step: int, total_limit: int) -> None:
    """
    Remove what is older than the newest `total_limit` whole checkpoints up to a step. Damaged ones are not counted,
    and later ones, of a run that was resumed from an earlier checkpoint, are none of ours.
    """
    steps = [old for old in _checkpoint_steps(output_dir) if old <= step]
    whole = [old for old in steps if damage(output_dir / f"checkpoint-{old}", thorough=False) is None]
    for old in steps:
        if old < min(whole[-total_limit:], default=0):
            try:
                _remove(output_dir / f"checkpoint-{old}")
            except OSError as error:
                logger.warning("An old checkpoint could not be removed: %s.", error)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], total_limit: int | None = None
) -> Path:
    """
    Saves everything that the accelerator prepared or was given to keep, as `checkpoint-STEP`. Every process calls it.

    The files are written to a folder beside it, which is renamed when it is whole. Only then are the oldest
    checkpoints beyond the limit removed.

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
            Whole checkpoints to keep, at least 1.

    Returns:
        `Path`: the checkpoint's folder.

    Raises:
        CheckpointError: in every process, if one could not write. The earlier checkpoints are as they were.
    """
    checkpoint = output_dir / f"checkpoint-{step}"
    partial = output_dir / f"{PARTIAL}{checkpoint.name}"
    if accelerator.is_main_process:
        for leftover in output_dir.glob(f"{PARTIAL}*checkpoint-*"):
            shutil.rmtree(leftover, ignore_errors=True)
    accelerator.wait_for_everyone()
    error: Exception | None = None
    # What cannot be written is an OSError, a RuntimeError or a SafetensorError, as the writer likes.
    try:
        accelerator.save_state(str(partial))
    except Exception as caught:
        error = caught
    faults = failures(accelerator, error)
    if not faults:
        if accelerator.is_main_process:
            try:
                _write_manifest(partial, {"step": step, **state})
                _put_in_place(partial, checkpoint)
            except OSError as caught:
                error = caught
            else:
                if total_limit is not None:
                    _rotate(output_dir, step, total_limit)
        faults = failures(accelerator, error)
    if faults:
        if accelerator.is_main_process:
            # Room for the log, at least.
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{checkpoint} could not be written: {'; '.join(faults)}.") from error
    return checkpoint


class CheckpointKeeper:
    """
    Writes a run's checkpoints and knows the last good one. What cannot be written does not end the run at once: the
    disk may have room again at the next checkpoint, and the steps until then are worth having.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        output_dir (`Path`):
            Its folder.
        total_limit (`int`, *optional*):
            Whole checkpoints to keep, at least 1.
        last (`Path`, *optional*):
            The checkpoint that was resumed.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, total_limit: int | None = None, last: Path | None = None
    ) -> None:
        self._accelerator, self._output_dir, self._total_limit = accelerator, output_dir, total_limit
        self._failed_in_a_row = 0
        self.last = last

    def save(self, step: int, state: dict[str, Any], rotate: bool = True) -> bool:
        """
        Save a checkpoint. Every process calls it.

        Args:
            step (`int`):
                Optimizer steps done.
            state (`dict[str, Any]`):
                What else is needed to go on.
            rotate (`bool`, *optional*, defaults to `True`):
                Remove the checkpoints beyond the limit afterwards.

        Returns:
            `bool`: whether there is a new checkpoint; if not, an error is in the log.

        Raises:
            CheckpointError: if this was the third attempt in a row that failed.
        """
        try:
            limit = self._total_limit if rotate else None
            self.last = save_checkpoint(self._accelerator, self._output_dir, step, state, limit)
        except CheckpointError as error:
            self._failed_in_a_row += 1
            good = f"The last good checkpoint is {self.last or 'none'}."
            if self._failed_in_a_row == MAX_FAILED_IN_A_ROW:
                raise CheckpointError(
                    f"{error} Nothing could be saved {MAX_FAILED_IN_A_ROW} times in a row, and the run ends. {good}"
                ) from error
            logger.error("%s The run goes on, and will try again at the next checkpoint. %s", error, good)
            return False
        self._failed_in_a_row = 0
        return True


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
