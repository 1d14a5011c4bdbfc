# SPDX-License-Identifier: Apache-2.0
"""Checkpoint writer and reader: written aside, listed in a manifest, renamed, and only then rotated."""

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

from ..files import PARTIAL, checksum, lock_folder, set_aside, sweep, sync_to_disk
from .distributed import failures


logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
MODEL_FILE = "model.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
# So many checkpoints in a row that cannot be written end the run.
MAX_FAILED_IN_A_ROW = 3

_RUN_FILES = ("model_index.json", "training_args.json", "log.jsonl")
_TRAINED = ("model_index.json", "pytorch_lora_weights.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


def _checkpoint_steps(output_dir: Path) -> list[int]:
    """Steps of all folders named like a checkpoint, rising."""
    if not output_dir.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in output_dir.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Manifest of a whole checkpoint: `step`, the state given to [`save_checkpoint`], and the `files`."""
    return json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))


def damage(checkpoint: Path, thorough: bool = True) -> str | None:
    """Fault of a checkpoint in a few words, or `None`. Not `thorough`: sizes alone, no checksums."""
    if not (checkpoint / MANIFEST).is_file():
        return f"it holds no {MANIFEST}"
    try:
        manifest = read_manifest(checkpoint)
        listed = {name: (entry["bytes"], entry["xxh3_128"]) for name, entry in manifest["files"].items()}
        int(manifest["step"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    for name, (size, digest) in listed.items():
        path = checkpoint / name
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
    """Newest whole checkpoint of a run. Damaged ones are named in a warning and passed over."""
    for step in reversed(_checkpoint_steps(output_dir)):
        checkpoint = output_dir / f"checkpoint-{step}"
        fault = damage(checkpoint)
        if fault is None:
            return checkpoint
        logger.warning("%s is damaged (%s) and passed over.", checkpoint, fault)
    return None


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | None) -> Path | None:
    """
    Checkpoint that a run starts from, or `None` to start afresh: `"latest"` for the newest whole one in `output_dir`,
    or a checkpoint's folder, by its path or by its name in `output_dir`.

    Raises:
        ValueError: if the folder to resume from is not a whole checkpoint, or `output_dir` holds another run and this
            one does not resume.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"The output folder {str(output_dir)!r} is a file.")
    names = [f"checkpoint-{step}" for step in _checkpoint_steps(output_dir)]
    if resume_from_checkpoint is None:
        held = [*(name for name in _RUN_FILES if (output_dir / name).exists()), *names]
        if held:
            raise ValueError(
                f"The output folder {str(output_dir)!r} holds another run ({', '.join(held[:4])}): choose another"
                " --output_dir, or continue that run with --resume_from_checkpoint latest."
            )
        return None
    if resume_from_checkpoint == "latest":
        checkpoint = latest_checkpoint(output_dir)
        trained = [name for name in _TRAINED if (output_dir / name).exists()]
        if checkpoint is None and names:
            fault = damage(output_dir / names[-1])
            raise ValueError(
                f"No checkpoint in {str(output_dir)!r} is whole ({names[-1]}: {fault}): resume from a copy, or choose"
                " another --output_dir to start anew."
            )
        if checkpoint is None and trained:
            raise ValueError(
                f"The output folder {str(output_dir)!r} holds what a run has trained ({trained[0]}) and no checkpoint"
                " to go on from: choose another --output_dir."
            )
        return checkpoint
    inside = output_dir / resume_from_checkpoint
    checkpoint = inside if inside.is_dir() else Path(resume_from_checkpoint).expanduser()
    fault = damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
    if fault is not None:
        raise ValueError(f"Cannot resume from {resume_from_checkpoint!r}: {fault}.")
    return checkpoint


def agree_on_checkpoint(
    accelerator: Accelerator, output_dir: Path, resume_from_checkpoint: str | None
) -> tuple[Path | None, dict[str, Any]]:
    """Lock, sweep and [`find_checkpoint`], by the main process for all: the folder, or `None`, and its manifest."""
    found: list[Any] = [None, {}, None]
    if accelerator.is_main_process:
        try:
            if output_dir.is_dir():
                lock_folder(output_dir)
                sweep(output_dir)
            checkpoint = find_checkpoint(output_dir, resume_from_checkpoint)
            if checkpoint is None and resume_from_checkpoint is not None:
                logger.info("There is no checkpoint in %s yet: a new run starts.", output_dir)
            found = [checkpoint, {} if checkpoint is None else read_manifest(checkpoint), None]
        except (OSError, ValueError) as error:
            found[2] = str(error)
    checkpoint, manifest, refusal = broadcast_object_list(found)
    if refusal is not None:
        raise ValueError(refusal)
    return checkpoint, manifest


def handle_model_files(accelerator: Accelerator) -> None:
    """
    Make the accelerator's checkpoints hold the bare model's weights, so that a run can be resumed with another number
    of processes. Of a model that is trained in part they hold that part alone, such as its adapters. Sharded engines
    keep their own format. One model is prepared with the accelerator.
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
    """State of a bare model; of one that is trained in part, the parameters that are."""
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


def _has_manifest(checkpoint: Path) -> bool:
    """Return whether a run wrote a folder; one that a user made may have the name of a checkpoint."""
    fault = damage(checkpoint, thorough=False)
    return fault is None or MANIFEST not in fault


def _rename(checkpoint: Path) -> Path:
    """Give a checkpoint a name that is no checkpoint's, so that no half of one is ever seen."""
    doomed = checkpoint.with_name(f"{PARTIAL}removed-{checkpoint.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    return checkpoint.rename(doomed)


def _remove(doomed: Path, name: str) -> None:
    """Remove a renamed checkpoint; a user's files in it stay."""
    listed = {MANIFEST, *read_manifest(doomed)["files"]}
    files = {path.relative_to(doomed).as_posix(): path for path in doomed.rglob("*") if path.is_file()}
    for file in files.keys() & listed:
        files[file].unlink()
    if files.keys() <= listed:
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        set_aside(doomed, name)


def _put_in_place(partial: Path, checkpoint: Path) -> None:
    """Rename a folder that is whole; one of that name is gone no longer than between two renames."""
    former = _rename(checkpoint) if _has_manifest(checkpoint) else None
    if checkpoint.exists():
        set_aside(checkpoint)
    partial.rename(checkpoint)
    sync_to_disk(checkpoint.parent)
    if former is not None:
        _remove(former, checkpoint.name)


def _rotate(output_dir: Path, step: int, total_limit: int) -> None:
    """
    Remove what is older than the newest `total_limit` whole checkpoints up to a step. Damaged ones are not counted,
    later ones, of a run that was resumed from an earlier checkpoint, stay, and so does what no run has written.
    """
    steps = [old for old in _checkpoint_steps(output_dir) if old <= step]
    whole = [old for old in steps if damage(output_dir / f"checkpoint-{old}", thorough=False) is None]
    for old in steps:
        checkpoint = output_dir / f"checkpoint-{old}"
        if old < min(whole[-total_limit:], default=0) and _has_manifest(checkpoint):
            try:
                _remove(_rename(checkpoint), checkpoint.name)
            except OSError as error:
                logger.warning("An old checkpoint could not be removed: %s.", error)


def save_checkpoint(
    accelerator: Accelerator, output_dir: Path, step: int, state: dict[str, Any], total_limit: int | None = None
) -> Path:
    """
    Save what the accelerator prepared or registered as `checkpoint-STEP`, with `state` in its manifest. Every process
    calls it, and gets a `CheckpointError` if one could not write; earlier checkpoints are then as they were. The files
    are written aside and renamed, and only then are the oldest beyond `total_limit` whole checkpoints removed.
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
    if accelerator.is_main_process and not faults:
        try:
            _write_manifest(partial, {"step": step, **state})
            _put_in_place(partial, checkpoint)
        except OSError as caught:
            error = caught
        else:
            if total_limit is not None:
                _rotate(output_dir, step, total_limit)
    faults = faults or failures(accelerator, error)
    if faults:
        if accelerator.is_main_process:
            # Room for the log, at least.
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{checkpoint} could not be written: {'; '.join(faults)}.") from error
    return checkpoint


class CheckpointWriter:
    """
    Writer of a run's checkpoints, which knows the `last` good one. What cannot be written does not end the run at
    once: the disk may have room again at the next checkpoint, and the steps until then are worth having.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, total_limit: int | None, last: Path | None) -> None:
        self._accelerator, self._output_dir, self._total_limit = accelerator, output_dir, total_limit
        self._failed_in_a_row = 0
        self.last = last

    def set_later_aside(self, step: int) -> None:
        """Rename the checkpoints of a run that went further than the step from which it is resumed."""
        for later in _checkpoint_steps(self._output_dir):
            if later > step:
                why = f"is later than step {step}, which this run goes on from,"
                set_aside(self._output_dir / f"checkpoint-{later}", why=why)

    def save(self, step: int, state: dict[str, Any], rotate: bool) -> bool:
        """Save a checkpoint; if it cannot be, log it and return `False`, or raise if that was the third in a row."""
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
    """Load what [`save_checkpoint`] saved into the same objects. Every process calls it."""
    accelerator.load_state(str(checkpoint))
    # Checkpoints lie between optimizer steps; the number of accumulation steps may be another now.
    accelerator.step = 0
    accelerator.wait_for_everyone()
