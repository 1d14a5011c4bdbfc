# SPDX-License-Identifier: Apache-2.0
"""Dry run: the memory, disk and time of a run, measured on its own objects before they have contents."""

import dataclasses
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from ..data.cache import DryAccelerator
from ..data.loading import TrainingData
from ..data.randomness import BatchSlice
from ..data.streams import StreamData, StreamedRow
from ..models.costs import (
    block_calls,
    checkpointed_modules,
    forward_flops,
    measured_call,
    saved_bytes,
    tensor_bytes,
    with_backward,
)
from .arguments import TrainingArguments
from .metrics import GPU, GPUS, peak_flops
from .optimizers import state_bytes
from .run import TrainingRun


A = TypeVar("A", bound=TrainingArguments)
PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

GIB = 2**30

# Part of a GPU's peak that training of transformers usually reaches, and GiB of the driver, the libraries and gaps
# between allocations.
USUAL_MFU = 0.4
OVERHEAD = 1.5


@dataclass(frozen=True)
class Plan:
    """Needs of a run; numbers of bytes are those of one device."""

    description: str
    parameters: int
    trained_parameters: int
    # Bytes of the model in training, of other models that stay on the device, and of float32 gradients.
    weights: int
    frozen: int
    gradients: int
    # Bytes of the gradients that processes exchange, and of the states of optimizer and average.
    buckets: int
    optimizer: int
    average: int
    # Bytes of weights that autocast casts to 16 bits, and of what the forward pass of a batch keeps.
    copies: int
    activations: int
    # Whether gradients of earlier passes are there while the next is made.
    accumulates: bool
    # Operations of an optimizer step on one device, recomputation and frozen models included.
    flops: int
    # Images of an epoch, where that is known.
    num_samples: int | None
    samples_per_step: int
    num_steps: int
    precision: str
    allow_tf32: bool
    # Bytes that are written, by name.
    disk: Mapping[str, int]

    @property
    def peak(self) -> int:
        """
        Bytes at the worst moment. In the backward pass gradients come as activations go; only with accumulation are
        all of both there at once.
        """
        held = self.weights + self.frozen + self.buckets + self.optimizer + self.average
        passing = self.copies + self.activations
        return held + (passing + self.gradients if self.accumulates else max(passing, self.gradients))

    def seconds_per_step(self, gpu: GPU) -> float:
        """Seconds of an optimizer step at the usual part of a GPU's peak."""
        return self.flops / (USUAL_MFU * peak_flops(gpu, self.precision, self.allow_tf32))

    def __str__(self) -> str:
        rows = {
            "weights": self.weights,
            "frozen models": self.frozen,
            "gradients": self.gradients,
            "exchange of gradients": self.buckets,
            "optimizer": self.optimizer,
            "average": self.average,
            "16-bit copies of weights": self.copies,
            "activations": self.activations,
        }
        unit, size = ("GiB", GIB) if self.peak >= GIB else ("MiB", 2**20)
        epoch = ""
        if self.num_samples is not None:
            epoch = f"{self.num_samples:,} images, {self.num_samples / self.samples_per_step:,.1f} steps an epoch."
        lines = [
            self.description,
            f"{self.parameters / 1e6:,.2f} M parameters, {self.trained_parameters / 1e6:,.2f} M of them trained.",
            epoch,
            f"{self.num_steps:,} steps of {self.samples_per_step} in all, each {self.flops / 1e12:,.3f} TFLOP on a"
            " device.",
            "",
            f"Memory of each device, {unit}",
            *(f"  {name:<26}{value / size:10.2f}" for name, value in rows.items() if value),
            f"  {'at the worst moment':<26}{self.peak / size:10.2f}",
            "",
            f"On disk, {unit}",
            *(f"  {name:<26}{value / size:10.2f}" for name, value in self.disk.items()),
            "",
            f"GPUs (fits: with {OVERHEAD} GiB for the driver and gaps; time: at {USUAL_MFU:.0%} of its peak)",
            f"  {'':<12}{'GiB':>6}{'fits':>7}{'s a step':>12}{'hours in all':>15}",
        ]
        for name, gpu in GPUS.items():
            fits = self.peak / GIB + OVERHEAD <= gpu.memory
            lines.append(self.row(name, str(gpu.memory), "yes" if fits else "no", self.seconds_per_step(gpu)))
        return "\n".join(lines)

    def row(self, name: str, memory: str, fits: str, seconds: float) -> str:
        """Line of the table of devices."""
        return f"  {name:<12}{memory:>6}{fits:>7}{seconds:>12.3g}{seconds * self.num_steps / 3600:>15.3g}"


def cpu_speed() -> float:
    """FLOP/s of this CPU and torch's threads in products of float32 matrices, the best of those of 0.1 s."""
    matrix, best, end = torch.randn(512, 512, device="cpu"), 0.0, time.perf_counter() + 0.1
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        best = max(best, 2 * 512**3 / (time.perf_counter() - start))
    return best


class _Part(BatchSlice):
    """Part of a batch on the meta device, in which nothing is dropped."""

    def uniform(self, purpose: str) -> torch.Tensor:
        return torch.ones(self.size)

    def sample_generators(self, purpose: str, device: torch.device | str = "cpu") -> list[torch.Generator]:
        return super().sample_generators(purpose)

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        return torch.empty(self.size, *shape, device=device)


class DryRun(TrainingRun[A]):
    """
    Dry run of a script, in the place of its [`TrainingRun`]: goes through its loop with batches of one and two samples
    and models without contents, and prints the [`Plan`]. Writes nothing.
    """

    def __init__(self, args: A) -> None:
        self.args = dataclasses.replace(args, seed=args.seed or 0)
        self.seed = self.args.seed or 0
        self.output_dir = Path(args.output_dir).expanduser()
        # Processes that were launched, though each makes the plan by itself.
        self._num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        self.global_batch_size = args.train_batch_size * self._num_processes * args.gradient_accumulation_steps
        precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        self.accelerator: Any = DryAccelerator(precision)
        self._measures, self._size, self._saved = False, 1, {1: 0, 2: 0}
        self._flops = self._frozen = 0

    def init_pipeline(self, pipeline_class: type[PipelineT], text_encoders: str | None = None) -> PipelineT:
        """Pipeline of the arguments, its models on the meta device."""
        pipeline = super().init_pipeline(pipeline_class, text_encoders)
        self._models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
        return pipeline

    def begin(
        self,
        model: nn.Module,
        data: TrainingData,
        validate: Any,
        export: Any,
        description: str,
        *_: object,
        **settings: object,
    ) -> Any:
        """Keep model, data and description; returns a stand-in for the model, which is measured and not called."""
        self.model, self._data, self._description = model, data, description
        return self._call

    def __enter__(self) -> "DryRun[A]":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def steps(self) -> Iterator[int]:
        """A pass for the operations of frozen models, and two, of one and two samples, for the models in training."""
        trained = set(self.model.modules())
        called: set[nn.Module] = set()
        for model in self._models:
            for module in model.modules():
                module.register_forward_pre_hook(lambda *_, model=model: called.add(model))
            # Text encoders in training are called before the model.
            if model in trained and isinstance(model, PreTrainedModel):
                model.register_forward_pre_hook(self._measure, with_kwargs=True)
        with block_calls(self.model, lambda block, *args: block(*args)):
            with FlopCounterMode(display=False) as counter:
                yield 0
            self._flops += counter.get_total_flops()
            # Text-to-image scripts can fetch frozen models for each call.
            if not self.args.saved().get("offload"):
                self._frozen = sum(map(tensor_bytes, called - trained))
            self._measures = True
            yield 0
            self._size = 2
            yield 0

    def averaged_weights(self) -> AbstractContextManager[None]:
        """The average has the shape of the weights."""
        return nullcontext()

    def _call(self, sample: torch.Tensor, *args: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            # Targets, by the model itself: work without memory of activations.
            return self.model(sample, *args)
        self._measure(self.model, (sample, *args), {})
        return torch.empty_like(sample)

    def _measure(self, part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add the activations and, of one sample, the operations of a call of a trained part."""
        if not self._measures:
            return
        # The passes here call the same hooks.
        self._measures, own = False, part is self.model
        part, args, kwargs = measured_call(part, args, kwargs)
        self._saved[self._size] += saved_bytes(part, args, kwargs, self.accelerator.mixed_precision if own else "no")
        if self._size == 1:
            forward = forward_flops(part, args, kwargs)
            again = forward if checkpointed_modules(part) else 0
            # The first pass has counted the calls of encoders.
            self._flops += with_backward(part, forward) + again - (0 if own else forward)
        self._measures = True

    def parts(self, step: int) -> Iterator[tuple[BatchSlice, dict[str, Any]]]:
        """A batch of the first image or, in buckets, the first of the largest, of which all of a batch may be."""
        size, data = self._size, self._data
        if isinstance(data, StreamData):
            largest = max(data.transform.buckets or [data.transform.size], key=math.prod)
            row = StreamedRow(0, 0, 0, next(data.read(0))[1], {})
            batch = data.batch([row] * size, [data.decode(row, largest)] * size, largest)
        else:
            index = max(range(len(data)), key=lambda index: math.prod(data.size(index)))
            batch = data[torch.tensor([[0, index]] * size).numpy()]
        if "captions" in batch:
            # Equal captions would be encoded once.
            batch["captions"] = [f"{number} {caption}" for number, caption in enumerate(batch["captions"])]
        yield _Part(self.seed, 0, 0, size, size), batch

    def draw_noise(self, part: BatchSlice, data: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Noise without contents."""
        return torch.empty_like(data)

    def backward(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Do nothing: the backward pass follows from the forward pass."""

    def finish(self) -> None:
        """Print the plan, in the main process."""
        if int(os.environ.get("RANK", "0")) == 0:
            plan = self.plan()
            print(plan)
            print(plan.row("this CPU", "", "", plan.flops / (USUAL_MFU * cpu_speed())))

    def plan(self) -> Plan:
        """Plan of the run, after the loop."""
        args, model, precision = self.args, self.model, self.accelerator.mixed_precision
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        trained_bytes = sum(4 * parameter.numel() for parameter in trained)
        optimizer = sum(state_bytes(args.optimizer, parameter.shape) for parameter in trained)
        tracks = len(args.ema_sigma_rel) if args.ema_profile == "power" else 1
        average = tracks * trained_bytes if args.use_ema else 0
        # What autocast makes, for the time of a pass, of layers in float32.
        layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
        weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
        copies = sum(2 * weight.numel() for weight in weights if weight.dtype == torch.float32)
        all_samples = args.num_train_epochs * (self._data.num_samples or 0)
        return Plan(
            description=self._description,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained_parameters=sum(parameter.numel() for parameter in trained),
            weights=tensor_bytes(model),
            frozen=self._frozen + self.accelerator.frozen,
            gradients=trained_bytes,
            buckets=trained_bytes if self._num_processes > 1 else 0,
            optimizer=optimizer,
            average=0 if args.offload_ema else average,
            copies=0 if precision == "no" else copies,
            activations=args.train_batch_size * (self._saved[2] - self._saved[1]),
            accumulates=args.gradient_accumulation_steps > 1,
            flops=self._flops * args.train_batch_size * args.gradient_accumulation_steps,
            num_samples=self._data.num_samples,
            samples_per_step=self.global_batch_size,
            num_steps=args.max_train_steps or math.ceil(all_samples / self.global_batch_size),
            precision=precision,
            allow_tf32=args.allow_tf32,
            disk={**self.accelerator.cached, "each checkpoint": trained_bytes + optimizer + average},
        )
