# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: losses by time, speed, gradients, and the log and trackers that they go to."""

import json
import logging
import math
import os
import re
import secrets
import sys
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType, gather_object
from torch import nn
from torch.distributed.tensor import DTensor

from ..data.streams import StreamPosition
from ..files import replace_text, written_for_run
from ..models.costs import forward_flops, measured_call, with_backward
from ..precision import to_float64
from .arguments import TrainingArguments


logger = logging.getLogger(__name__)

# Steps of a run whose speed is said at once.
FIRST_STEPS = 10

T = TypeVar("T")

TIME_BINS = 10


class GPU(NamedTuple):
    """Memory in GiB, and TFLOP/s of dense matrix products in bfloat16 or float16, TF32 and float32: data sheets."""

    memory: int
    half: float
    tf32: float
    single: float


GPUS = {
    "T4": GPU(16, 65.0, 8.1, 8.1),
    "RTX 3090": GPU(24, 71.0, 35.6, 35.6),
    "RTX 4090": GPU(24, 165.2, 82.6, 82.6),
    "L4": GPU(24, 121.0, 60.0, 30.3),
    "A10": GPU(24, 125.0, 62.5, 31.2),
    "A10G": GPU(24, 70.0, 35.0, 35.0),
    "A100": GPU(40, 312.0, 156.0, 19.5),
    "L40": GPU(48, 181.0, 90.5, 90.5),
    "L40S": GPU(48, 362.0, 183.0, 91.6),
    "A100 80GB": GPU(80, 312.0, 156.0, 19.5),
    "H100": GPU(80, 989.0, 494.0, 67.0),
    "H100 PCIe": GPU(80, 756.0, 378.0, 51.0),
    "H100 NVL": GPU(94, 835.0, 417.0, 60.0),
    "H200": GPU(141, 989.0, 494.0, 67.0),
    "H200 NVL": GPU(141, 835.0, 417.0, 60.0),
    "B200": GPU(180, 2250.0, 1100.0, 75.0),
}


def find_gpu(device_name: str) -> GPU | None:
    """GPU of `GPUS` by the driver's name of a device: all of its words are in that, and no other has more of them."""
    words = set(re.findall(r"\w+", device_name.casefold()))
    found = [name for name in GPUS if words.issuperset(name.casefold().split())]
    return GPUS[max(found, key=lambda name: len(name.split()))] if found else None


def peak_flops(gpu: GPU, mixed_precision: str, allow_tf32: bool) -> float:
    """Peak of a GPU in FLOP/s."""
    return 1e12 * (gpu.half if mixed_precision in ("fp16", "bf16") else gpu.tf32 if allow_tf32 else gpu.single)


def rounded(value: float) -> float:
    """Seven significant digits, as many as a float32 has."""
    return float(f"{value:.7g}")


class LossMeter:
    """Mean loss since the last report, over all samples and by time. The device is waited for by `reduce` alone."""

    def __init__(self) -> None:
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        # Sums and numbers of the finite losses, and numbers of those that are not finite.
        self._sums = torch.zeros(3, TIME_BINS, dtype=torch.float64)

    def add(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Add times, on the CPU, and losses of a batch, both `(batch_size,)`."""
        self._pending.append((t, losses.detach()))

    def reduce(self, accelerator: Accelerator) -> None:
        """Sum over all processes into the main one. Every process calls it."""
        if self._pending:
            t = to_float64(torch.cat([t for t, _ in self._pending]))
            losses = to_float64(torch.cat([losses for _, losses in self._pending]))
            bins = (t * TIME_BINS).long().clamp(0, TIME_BINS - 1)
            finite = losses.isfinite()
            self._sums[0].index_add_(0, bins, losses.where(finite, torch.zeros_like(losses)))
            self._sums[1].index_add_(0, bins, to_float64(finite))
            self._sums[2].index_add_(0, bins, to_float64(~finite))
            self._pending.clear()
        if accelerator.num_processes > 1:
            # Losses are of order one: float32, which every device can add, is exact enough for them.
            sums = accelerator.reduce(self._sums.float().to(accelerator.device), reduction="sum")
            self._sums = to_float64(sums) * accelerator.is_main_process

    def report(self) -> dict[str, Any]:
        """
        Mean `loss`, and its means `loss_by_time` in equal parts of [0, 1] from data to noise, `None` where one is
        empty; start anew. Losses that are not finite are counted, if there are any, in `non_finite_by_time` alone.
        """
        sums, counts, others = self._sums.tolist()
        self.clear()
        by_time = [rounded(total / count) if count else None for total, count in zip(sums, counts)]
        report = {"loss": rounded(sum(sums) / sum(counts)) if sum(counts) else None, "loss_by_time": by_time}
        return {**report, "non_finite_by_time": [int(count) for count in others]} if any(others) else report

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State for checkpoints: what has been reduced since the last report."""
        return {"sums": self._sums}

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Load a state."""
        self._sums = state_dict["sums"].clone()

    def clear(self) -> None:
        """Start anew."""
        self._sums.zero_()


def _step_of(line: str) -> float:
    """Step of a line of the log, infinity for a line that a killed run did not finish."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


def tracker_options(name: str, run_id: str, first_step: int) -> dict[str, dict[str, Any]]:
    """
    Keyword arguments by tracker, for `Accelerator.init_trackers`, that continue a resumed run. Steps beyond the
    checkpoint are written twice: TensorBoard drops the former ones, wandb the new ones.
    """
    options: dict[str, dict[str, Any]] = {"trackio": {"name": f"{name}-{run_id}", "resume": "allow"}}
    # A user who sets the variable has chosen the run to continue.
    if "WANDB_RUN_ID" not in os.environ:
        options["wandb"] = {"id": run_id, "resume": "allow"}
    if first_step:
        options["tensorboard"] = {"purge_step": first_step + 1}
    return options


class RunLog:
    """
    Log file `log.jsonl` in the output folder, one JSON object a line, and the same numbers to the trackers, by the
    main process. Lines after the `first_step` of a resumed run are removed; trackers know the run by `run_id`.
    """

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, first_step: int = 0, run_id: str | None = None
    ) -> None:
        self.run_id = run_id or secrets.token_hex(4)
        self._accelerator, self._first_step = accelerator, first_step
        self._output_dir = output_dir
        self._file = output_dir / "log.jsonl"
        self._unwritten = ""
        # A run that was killed at its end had logged some figures already.
        self._logged: set[tuple[int, tuple[str, ...]]] = set()
        if accelerator.is_main_process and self._file.exists():
            lines = self._file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= first_step]
            replace_text(self._file, "".join(kept))
            self._logged = {(first_step, tuple(json.loads(line))) for line in kept if _step_of(line) == first_step}

    def start_trackers(self, project_name: str, arguments: dict[str, Any]) -> None:
        """Open the trackers with the arguments of the script; TensorBoard takes no lists and no `None`."""
        config = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in arguments.items()}
        init_kwargs = tracker_options(self._output_dir.resolve().name, self.run_id, self._first_step)
        self._accelerator.init_trackers(project_name, config=config, init_kwargs=init_kwargs)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write numbers, and lists of numbers by time bin, of a step."""
        line = {"step": step, **values}
        if not self._accelerator.is_main_process or (step, tuple(line)) in self._logged:
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
        """Append a line, with those before it that a full disk did not take. A full disk does not end the run."""
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
        """Save a picture grid in the output folder, by default as `samples/step-STEP.png`, and log it to trackers."""
        name = name or f"samples/step-{step}.png"
        try:
            (self._output_dir / name).parent.mkdir(parents=True, exist_ok=True)
            with written_for_run(self._output_dir, name) as file:
                grid.save(file)
        except OSError as error:
            logger.error("%s could not be written: %s.", self._output_dir / name, error)
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(grid.convert("RGB"))[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [grid]}, step=step)


def peak_memory(device: torch.device) -> float | None:
    """Most GiB that tensors took on a GPU, or that this process took on the CPU; `None` where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "cpu" and sys.platform != "win32":
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return None


class Stopwatch:
    """
    Time by section. The time between two marks belongs to the section that the second one names.

    On a GPU the marks are events in its stream: the host does not wait for them, and a section's time is what the GPU
    spent on it or, at `data`, spent waiting.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self.restart()

    def restart(self) -> None:
        """Leave out the time since the last mark."""
        self.mark("")

    def mark(self, section: str) -> None:
        """The time since the last mark belongs to the section."""
        now: Any = torch.cuda.Event(enable_timing=True) if self._on_gpu else time.perf_counter()
        if self._on_gpu:
            now.record()
        self._marks.append((section, now))

    def read(self) -> dict[str, float]:
        """Seconds by section since the last reading. The device is waited for."""
        seconds: dict[str, float] = defaultdict(float)
        if self._on_gpu:
            self._marks[-1][1].synchronize()
        for (_, before), (section, now) in zip(self._marks, self._marks[1:]):
            if section:
                seconds[section] += before.elapsed_time(now) / 1e3 if self._on_gpu else now - before
        del self._marks[:-1]
        return dict(seconds)


class Throughput:
    """
    Speed, time shares, memory and, on a GPU whose `peak` in FLOP/s is known, the part of it that the model's
    arithmetic uses (MFU). Samples are those of all processes, calls of the model those in this one.
    """

    def __init__(
        self, device: torch.device, samples_per_step: int, calls_per_step: int, peak: float | None = None
    ) -> None:
        self._device, self._peak = device, peak
        self._samples_per_step, self._calls_per_step = samples_per_step, calls_per_step
        self.flops_per_call: int | None = None
        self.stopwatch = Stopwatch(device)
        self._all_seconds: dict[str, float] = defaultdict(float)
        self._seconds: dict[str, float] = defaultdict(float)
        self._num_steps = self._num_reported = 0
        self._warm = 0.0

    def watch_model(self, model: nn.Module, bare_model: nn.Module) -> None:
        """Count the operations of a model at its first call; `bare_model` is the same without wrappers."""

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handle.remove()
            try:
                part, args, kwargs = measured_call(bare_model, args, kwargs)
                self.flops_per_call = with_backward(part, forward_flops(part, args, kwargs))
            except Exception as error:
                # A model may do what tensors without contents cannot; the run goes on without these figures.
                logger.warning("The operations of the model cannot be counted: %s", error)

        handle = model.register_forward_pre_hook(count, with_kwargs=True)

    def watch_data(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, and time the wait for them."""
        while True:
            self.stopwatch.mark("other")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.stopwatch.mark("data")
            yield batch

    def step(self) -> None:
        """Count an optimizer step; the speed of the first ones, the very first left out, is logged."""
        self._num_steps += 1
        if self._num_steps == 1:
            self._warm = self._read()
        elif self._num_steps == FIRST_STEPS:
            speed = (FIRST_STEPS - 1) / max(self._read() - self._warm, 1e-9)
            hours = 1000 / speed / 3600
            logger.info("%.3g steps a second in the first %d: 1,000 in %.3g hours.", speed, FIRST_STEPS, hours)

    def _read(self) -> float:
        """Take the stopwatch's times; all seconds since the beginning."""
        for section, value in self.stopwatch.read().items():
            self._seconds[section] += value
            self._all_seconds[section] += value
        return sum(self._all_seconds.values())

    def report(self) -> dict[str, float]:
        """Figures of the steps since the last report."""
        self._read()
        seconds, self._seconds = self._seconds, defaultdict(float)
        num_steps, self._num_reported = self._num_steps - self._num_reported, self._num_steps
        return self._figures(seconds, num_steps)

    def summary(self) -> dict[str, float]:
        """Figures of all steps that were reported."""
        return self._figures(self._all_seconds, self._num_reported)

    def _figures(self, seconds: dict[str, float], num_steps: int) -> dict[str, float]:
        total = sum(seconds.values())
        if not total:
            return {}
        figures = {"images_per_second": round(num_steps * self._samples_per_step / total, 1)}
        for section, value in sorted(seconds.items()):
            figures[f"time_share/{section}"] = round(value / total, 4)
        memory = peak_memory(self._device)
        if memory is not None:
            figures["peak_memory_gib"] = round(memory, 3)
        if self.flops_per_call is not None:
            speed = self.flops_per_call * self._calls_per_step * num_steps / total
            figures["tflops_per_second"] = round(speed / 1e12, 6)
            if self._peak is not None:
                figures["mfu"] = round(speed / self._peak, 4)
        return figures


class UnreadableImages:
    """Rows that cannot be read, numbers or names: each is logged once, and more than `limit` in all are an error."""

    def __init__(self, limit: int, rows: Collection[int | str] = ()) -> None:
        self.rows: set[Any] = set(rows)
        self._limit = limit

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Take the `unreadable` rows out of batches, log and count them; a `ValueError` names them if too many."""
        for batch in batches:
            for row, reason in batch.pop("unreadable", {}).items():
                if row not in self.rows:
                    logger.error("The image in row %s cannot be read (%s); another takes its place.", row, reason)
                    self.rows.add(row)
            self._check()
            yield batch

    def gather(self, accelerator: Accelerator) -> int:
        """Count them over all processes. Every process calls it."""
        if accelerator.num_processes > 1:
            self.rows |= set(gather_object(sorted(self.rows)))
        self._check()
        return len(self.rows)

    def _check(self) -> None:
        if len(self.rows) > self._limit:
            named = ", ".join(map(str, sorted(self.rows)[:20])) + (", ..." if len(self.rows) > 20 else "")
            raise ValueError(
                f"{len(self.rows)} images cannot be read, and --max_unreadable_images is {self._limit}. Their rows are"
                f" {named}."
            )


def clip_gradients(accelerator: Accelerator, parameters: Sequence[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clip the whole gradient, over all processes, to a norm; its norm before, of shape `()` on the device."""
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    # DeepSpeed clips by itself, and gives the norm as a number or, before its first step, not at all.
    return norm if isinstance(norm, torch.Tensor) else torch.tensor(0.0 if norm is None else float(norm))


class GradientGuard:
    """
    Skip optimizer steps whose gradient is not finite, and refuse more than `limit` of them in a row.

    The device is not waited for at each step: a fused optimizer reads `found_inf` there, as `torch.amp.GradScaler`
    sets it, and leaves weights, moments and its count of steps alone. Skipped steps are counted when the run logs. The
    norm is that of the whole gradient, so all processes skip the same steps.

    Attributes:
        skipped (`int`), in_a_row (`int`):
            Steps without a finite gradient up to the last count, in all and up to now without a break.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self._limit = limit
        # A scaler skips by itself, and DeepSpeed's step is done when its norm is known.
        self._acts = accelerator.scaler is None and accelerator.distributed_type != DistributedType.DEEPSPEED
        self._pending: list[torch.Tensor] = []
        self.in_a_row = 0
        self.skipped = 0

    def before_step(self, optimizer: AcceleratedOptimizer, norm: torch.Tensor) -> bool:
        """Return whether an optimizer is to step, given the norm of the gradient; one that skips by itself is."""
        self._pending.append(norm)
        if not self._acts:
            return True
        # On the CPU nothing is waited for.
        if norm.device.type == "cpu" or not optimizer.optimizer.defaults.get("fused"):
            return math.isfinite(norm)
        optimizer.optimizer.found_inf = 1 - norm.isfinite().float()
        return True

    def look(self, done: int) -> str | None:
        """Count the steps skipped up to step `done` and log them; a sentence if there are too many in a row."""
        if not self._pending:
            return None
        finite = torch.isfinite(torch.stack(self._pending)).tolist()
        first = done - len(finite) + 1
        self._pending.clear()
        skipped = [step for step, good in enumerate(finite, first) if not good]
        for step, good in enumerate(finite, first):
            self.skipped += not good
            self.in_a_row = 0 if good else self.in_a_row + 1
            if self.in_a_row > self._limit:
                if self._limit == 0:
                    return f"The gradient at step {step} is not finite."
                return f"The gradient is not finite at step {step}, nor was it in the {self._limit} steps before."
        if skipped:
            steps = ", ".join(map(str, skipped))
            logger.warning("The gradient was not finite at step %s: skipped, %d in all.", steps, self.skipped)
        return None

    def state_dict(self) -> dict[str, int]:
        """Counts up to the last look."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from what [`state_dict`] gave."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


class RunMetrics:
    """Losses, gradient norm, skipped steps, speed and unreadable images of a run; `manifest` as it is resumed."""

    def __init__(
        self, args: TrainingArguments, accelerator: Accelerator, global_batch_size: int, manifest: dict[str, Any]
    ) -> None:
        self._accelerator, device = accelerator, accelerator.device
        gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        peak = None if gpu is None else peak_flops(gpu, accelerator.mixed_precision, args.allow_tf32)
        self.losses = LossMeter()
        self.guard = GradientGuard(accelerator, 0 if args.nan_policy == "stop" else args.max_skipped_steps)
        self.throughput = Throughput(device, global_batch_size, args.gradient_accumulation_steps, peak)
        self.unreadable = UnreadableImages(args.max_unreadable_images, manifest.get("unreadable_rows", ()))
        self.stream: StreamPosition | None = None
        self.gradient_norm = torch.zeros(())

    def loaded(self) -> None:
        """Keep the losses of a checkpoint, which are those of all processes, in the main one alone."""
        if not self._accelerator.is_main_process:
            self.losses.clear()

    def gather(self) -> dict[str, Any]:
        """Gather the metrics of all processes; returns those for a checkpoint. Every process calls it."""
        self.losses.reduce(self._accelerator)
        self.unreadable.gather(self._accelerator)
        stream = {} if self.stream is None else {"stream": self.stream.gather(self._accelerator.num_processes)}
        return {"unreadable_rows": sorted(self.unreadable.rows), **stream}

    def report(self) -> dict[str, Any]:
        """Metrics since the last report. Every process calls it."""
        self.losses.reduce(self._accelerator)
        norm = float(self.gradient_norm)
        unreadable = self.unreadable.gather(self._accelerator)
        return {
            **self.losses.report(),
            "gradient_norm": norm if math.isfinite(norm) else None,
            **self.throughput.report(),
            **({"skipped_steps": self.guard.skipped} if self.guard.skipped else {}),
            **({"unreadable_images": unreadable} if unreadable else {}),
        }

    def gradient_fault(self, done: int) -> str | None:
        """Sentences on the fault, if too many gradients in a row were not finite. Every process calls it."""
        fault = self.guard.look(done)
        if fault is None:
            return None
        self.losses.reduce(self._accelerator)
        report = self.losses.report()
        counts = report.get("non_finite_by_time")
        return (
            f"{fault} Losses by time, from data to noise, are {report['loss_by_time']}"
            f"{'' if counts is None else f', and the numbers of those that are not finite {counts}'}."
        )
