# SPDX-License-Identifier: Apache-2.0
"""How fast a run is, what its time goes into, and how much of the device it uses."""

import argparse
import logging
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn
from torch.func import functional_call
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode


logger = logging.getLogger(__name__)

T = TypeVar("T")

# Dense matrix products without sparsity, in TFLOP/s by the vendor's data sheet: bfloat16 or float16, TF32, float32.
# A name is looked for in that of the device, the first one found counts.
PEAK_TFLOPS = {
    "B200": (2250.0, 1100.0, 75.0),
    "H200": (989.0, 494.0, 67.0),
    "H100 PCIe": (756.0, 378.0, 51.0),
    "H100 NVL": (835.0, 417.0, 60.0),
    "H100": (989.0, 494.0, 67.0),
    "A100": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L4": (121.0, 60.0, 30.3),
    "A10G": (70.0, 35.0, 35.0),
    "A10": (125.0, 62.5, 31.2),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
    "T4": (65.0, 8.1, 8.1),
}


def peak_flops(device_name: str, mixed_precision: str, allow_tf32: bool) -> float | None:
    """
    What a device can do.

    Args:
        device_name (`str`):
            As the driver says it.
        mixed_precision (`str`):
            `"no"`, `"fp16"` or `"bf16"`.
        allow_tf32 (`bool`):
            Whether float32 products may be made in TF32.

    Returns:
        `float`, *optional*: FLOP/s, `None` of a device that is not in `PEAK_TFLOPS`.
    """
    for name, (half, tf32, single) in PEAK_TFLOPS.items():
        if name in device_name:
            return 1e12 * (half if mixed_precision in ("fp16", "bf16") else tf32 if allow_tf32 else single)
    return None


def forward_flops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> int:
    """
    Floating point operations of a model's forward pass, counted on tensors without contents.

    Args:
        model (`nn.Module`):
            The bare model, not sharded.
        args (`tuple`), kwargs (`dict[str, Any]`, *optional*):
            Of its call.

    Returns:
        `int`: the number.
    """

    def empty(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        # Of one precision, for nothing casts them here.
        dtype = torch.float32 if value.is_floating_point() else value.dtype
        return torch.empty_like(value, device="meta", dtype=dtype)

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(model, tree_map(empty, tensors), tree_map(empty, args), tree_map(empty, kwargs or {}))
    return counter.get_total_flops()


def with_backward(model: nn.Module, flops: int) -> int:
    """
    Floating point operations of a training step's forward and backward pass of a model, those of a recomputation by
    gradient checkpointing not counted: the gradients of inputs take as much as the forward pass, those of weights as
    much for the part of them that is trained (arXiv 2204.02311, appendix B).

    Args:
        model (`nn.Module`):
            The model.
        flops (`int`):
            Of the forward pass, see [`forward_flops`].

    Returns:
        `int`: the number.
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained) / sum(size for size, _ in sizes)
    return round(flops * (2 + trained))


def peak_memory(device: torch.device) -> float | None:
    """
    The most memory that this process has used.

    Args:
        device (`torch.device`):
            On a GPU what its tensors took; otherwise what the process took.

    Returns:
        `float`, *optional*: GiB, `None` where it is not known.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "cpu" and sys.platform != "win32":
        import resource  # not on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    return None


class Stopwatch:
    """
    What the time goes into. Between two marks it belongs to what the second one names.

    On a GPU the marks are events in its stream: the host does not wait for them, and a section's time is what the GPU
    spent on it or, at `data`, spent waiting.

    Args:
        device (`torch.device`):
            Where the work is done.
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
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((section, event))
        else:
            self._marks.append((section, time.perf_counter()))

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
    Speed, time shares, memory and, on a known GPU, the part of its peak that the model's arithmetic uses (MFU).

    Args:
        device (`torch.device`):
            Of this process.
        samples_per_step (`int`):
            Samples in an optimizer step, of all processes.
        calls_per_step (`int`):
            Calls of the model in it, in this process.
        peak (`float`, *optional*):
            FLOP/s that the device can do.
    """

    def __init__(
        self, device: torch.device, samples_per_step: int, calls_per_step: int, peak: float | None = None
    ) -> None:
        self._device, self._peak = device, peak
        self._samples_per_step, self._calls_per_step = samples_per_step, calls_per_step
        self.flops_per_call: int | None = None
        self.stopwatch = Stopwatch(device)
        self._all_seconds: dict[str, float] = defaultdict(float)
        self._num_steps = self._num_reported = 0

    def watch_model(self, model: nn.Module, bare_model: nn.Module) -> None:
        """
        Count the operations of the model at its first call.

        Args:
            model (`nn.Module`):
                What is called.
            bare_model (`nn.Module`):
                The same, unwrapped.
        """

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            handle.remove()
            try:
                self.flops_per_call = with_backward(bare_model, forward_flops(bare_model, args, kwargs))
            except Exception as error:
                # A model may do what tensors without contents cannot; the run goes on without these figures.
                logger.warning("The operations of the model cannot be counted: %s", error)

        handle = model.register_forward_pre_hook(count, with_kwargs=True)

    def watch_data(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches; the time that they are waited for is noted."""
        while True:
            self.stopwatch.mark("other")
            try:
                batch = next(batches)
            except StopIteration:
                return
            self.stopwatch.mark("data")
            yield batch

    def step(self) -> None:
        """A step is done."""
        self._num_steps += 1

    def report(self) -> dict[str, float]:
        """Figures of the steps since the last report."""
        seconds = self.stopwatch.read()
        for section, value in seconds.items():
            self._all_seconds[section] += value
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


def make_throughput(args: argparse.Namespace, accelerator: Accelerator, global_batch_size: int) -> Throughput:
    """
    The figures of a run.

    Args:
        args (`argparse.Namespace`):
            Of the script.
        accelerator (`Accelerator`):
            Of the run.
        global_batch_size (`int`):
            Samples in an optimizer step.

    Returns:
        [`Throughput`]: with the peak of the device, where it is known.
    """
    peak = None
    if accelerator.device.type == "cuda":
        name = torch.cuda.get_device_name(accelerator.device)
        peak = peak_flops(name, accelerator.mixed_precision, args.allow_tf32)
    return Throughput(accelerator.device, global_batch_size, args.gradient_accumulation_steps, peak)
