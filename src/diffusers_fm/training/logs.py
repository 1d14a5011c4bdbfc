# SPDX-License-Identifier: Apache-2.0
"""What a run writes down: losses by time, a log of lines, and the trackers."""

import json
import logging
import math
import os
import secrets
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator

from ..files import replace_text, written_for_run


logger = logging.getLogger(__name__)

TIME_BINS = 10


def rounded(value: float) -> float:
    """Seven significant digits: what a float32 holds."""
    return float(f"{value:.7g}")


class LossMeter:
    """
    The mean loss since the last report, over all and by time. It asks nothing of the device until it reports.

    Args:
        bins (`int`, *optional*, defaults to `TIME_BINS`):
            Number of equal parts of [0, 1] that times are sorted into.
    """

    def __init__(self, bins: int = TIME_BINS) -> None:
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Of the finite ones, their number, and the number of those that are not finite.
        self._sums = torch.zeros(3, bins, dtype=torch.float64)

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """
        Note the losses of a batch.

        Args:
            t (`torch.Tensor` of shape `(batch_size,)`):
                Times, 0 = data, 1 = noise, on the CPU.
            losses (`torch.Tensor` of shape `(batch_size,)`):
                Losses of the samples, on any device.
        """
        self._pending.append((t, losses.detach()))

    def reduce(self, accelerator: Accelerator) -> None:
        """Gather what all processes have noted into the main one. Called by every process."""
        if self._pending:
            t = torch.cat([t for t, _ in self._pending]).double()
            losses = torch.cat([losses for _, losses in self._pending]).double().cpu()
            bins = (t * self._sums.shape[1]).long().clamp(0, self._sums.shape[1] - 1)
            finite = losses.isfinite()
            self._sums[0].index_add_(0, bins, losses.where(finite, torch.zeros_like(losses)))
            self._sums[1].index_add_(0, bins, finite.double())
            self._sums[2].index_add_(0, bins, (~finite).double())
            self._pending.clear()
        if accelerator.num_processes > 1:
            # Losses are of order one: float32, which every device can add, is exact enough for them.
            sums = accelerator.reduce(self._sums.float().to(accelerator.device), reduction="sum")
            self._sums = sums.double().cpu() if accelerator.is_main_process else torch.zeros_like(self._sums)

    def report(self) -> dict[str, Any]:
        """
        What has been reduced, after which the meter starts anew.

        Returns:
            `dict[str, Any]`: `loss`, the mean, and `loss_by_time`, the means of the bins from data to noise, `None`
            where a bin is empty. Losses that are not finite are left out and counted, where there are any, in
            `non_finite_by_time`.
        """
        sums, counts, others = self._sums.tolist()
        self.clear()
        by_time = [rounded(total / count) if count else None for total, count in zip(sums, counts)]
        report = {"loss": rounded(sum(sums) / sum(counts)) if sum(counts) else None, "loss_by_time": by_time}
        return {**report, "non_finite_by_time": [int(count) for count in others]} if any(others) else report

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has been reduced since the last report."""
        return {"sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take up what [`state_dict`] gave."""
        self._sums = state_dict["sums"].clone()

    def clear(self) -> None:
        """Start anew."""
        self._sums = torch.zeros_like(self._sums)


def _step_of(line: str) -> float:
    """The step of a line of the log; none has one that was being written when the run was killed."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def tracker_options(name: str, run_id: str, first_step: int) -> dict[str, dict[str, Any]]:
    """
    What makes trackers go on with a run that is resumed. One that holds later steps already, of a run that went
    further than its last checkpoint, is told the same numbers again: TensorBoard drops the former ones, wandb the new
    ones.

    Args:
        name (`str`):
            What the run may be called.
        run_id (`str`):
            Its own, the same when it is resumed.
        first_step (`int`):
            Steps that the trackers have seen already.

    Returns:
        `dict[str, dict[str, Any]]`: keyword arguments by the tracker's name, for `Accelerator.init_trackers`.
    """
    options: dict[str, dict[str, Any]] = {"trackio": {"name": f"{name}-{run_id}", "resume": "allow"}}
    # Who sets the variable knows what to go on with.
    if "WANDB_RUN_ID" not in os.environ:
        options["wandb"] = {"id": run_id, "resume": "allow"}
    if first_step:
        options["tensorboard"] = {"purge_step": first_step + 1}
    return options


class RunLog:
    """
    `log.jsonl` in the output folder, one JSON object a line, and the same numbers to the trackers.

    Args:
        accelerator (`Accelerator`):
            Whose trackers are used. Only the main process writes.
        output_dir (`Path`):
            Folder of the run.
        first_step (`int`, *optional*, defaults to 0):
            Where the run goes on: lines of later steps, of a run that went further than its last checkpoint, are taken
            out.
        run_id (`str`, *optional*):
            What trackers know the run by; a new one by default.

    Attributes:
        run_id (`str`):
            The same.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, first_step: int = 0, run_id: str | None = None
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._accelerator, self._first_step = accelerator, first_step
        self._output_dir = output_dir
        self._file = output_dir / "log.jsonl"
        self._unwritten = ""
        # What a run that was killed at its end had measured already is not told twice.
        self._told: set[tuple[int, tuple[str, ...]]] = set()
        if accelerator.is_main_process and self._file.exists():
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= first_step]
            replace_text(self._file, "".join(kept))
            self._told = {(first_step, tuple(json.loads(line))) for line in kept if _step_of(line) == first_step}

    def start_trackers(self, project_name: str, arguments: dict[str, Any]) -> None:
        """
        Open the trackers, at the run that is resumed.

        Args:
            project_name (`str`):
                What runs of this kind are called there.
            arguments (`dict[str, Any]`):
                Arguments of the script; TensorBoard takes no lists and no `None`.
        """
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in arguments.items()}
        init_kwargs = tracker_options(self._output_dir.resolve().name, self.run_id, self._first_step)
        self._accelerator.init_trackers(project_name, config=config, init_kwargs=init_kwargs)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """
        Write numbers of a step.

        Args:
            step (`int`):
                Optimizer steps done.
            values (`dict[str, Any]`):
                Numbers, and lists of numbers by time bin.
        """
        line = {"step": step, **values}
        if not self._accelerator.is_main_process or (step, tuple(line)) in self._told:
            return
        self._append(json.dumps(line) + "\n")
        flat = {}
        for name, value in values.items():
            if isinstance(value, list):
                for i, entry in enumerate(value):
                    if entry is not None:
                        flat[f"{name}/{i / len(value):.1f}-{(i + 1) / len(value):.1f}"] = entry
            elif value is not None:
                flat[name] = value
        self._accelerator.log(flat, step=step)

    def _append(self, line: str) -> None:
        """Append a line, with those before it that a full disk did not take. It is no reason to end the run."""
        self._unwritten += line
        content = self._unwritten.encode()
        try:
            with self._file.open("ab", buffering=0) as file:
                size = file.tell()
                if file.write(content) == len(content):
                    self._unwritten = ""
                else:
                    file.truncate(size)
                    raise OSError("the disk is full")
        except OSError as error:
            logger.error("%s could not be written: %s. Its lines are kept until it can be.", self._file, error)

    def write_grid(self, step: int, grid: PIL.Image.Image, name: str | None = None) -> None:
        """
        Save a picture grid and show it to the trackers that take pictures.

        Args:
            step (`int`):
                Optimizer steps done.
            grid (`PIL.Image.Image`):
                The picture.
            name (`str`, *optional*):
                File name in the output folder; by default `samples/step-STEP.png`.
        """
        name = name or f"samples/step-{step}.png"
        try:
            (self._output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            with written_for_run(self._output_dir, name) as file:
                grid.save(file)
        except OSError as error:
            logger.error("%s could not be written: %s.", self._output_dir / name, error)
        for tracker in self._accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                pictures = np.asarray(grid.convert("RGB"))[None] if tracker.name == "tensorboard" else [grid]
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"samples": pictures}, step=step, **options)
