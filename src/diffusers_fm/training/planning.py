# SPDX-License-Identifier: Apache-2.0
"""What a run will take, in memory, on disk and in time, before it starts."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from .activations import activations_per_sample
from .arguments import TrainingArguments
from .metrics import GPU, GPUS, forward_flops, peak_flops, with_backward
from .optimizers import state_bytes


GIB = 2**30

# The part of a card's arithmetic that training of transformers usually gets, and what the driver, the libraries and
# pieces of memory between others take, in GiB.
USUAL_MFU = 0.4
OVERHEAD = 1.5


def is_main_process() -> bool:
    """Whether this process may speak, before there is an accelerator."""
    return int(os.environ.get("RANK", "0")) == 0


def planned_precision(args: TrainingArguments) -> str:
    """
    The mixed precision that a run would have.

    Args:
        args ([`TrainingArguments`]):
            Of the script; what it leaves open, `accelerate launch` has said.

    Returns:
        `str`: `"no"`, `"fp16"` or `"bf16"`.
    """
    return args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


@dataclass(frozen=True)
class Plan:
    """
    What a run takes. Numbers of bytes are those of one device.

    Args:
        what (`str`):
            The run, in a few words.
        parameters (`int`), trained_parameters (`int`):
            Of the model in training.
        weights (`int`):
            Bytes of them, in their precisions.
        frozen (`int`):
            Bytes of other models that stay on the device.
        gradients (`int`):
            Bytes, in float32.
        buckets (`int`):
            Bytes in which processes exchange gradients.
        optimizer (`int`), average (`int`):
            Bytes of their states.
        copies (`int`):
            Bytes of the weights in 16 bits, which a forward pass makes of weights in 32.
        activations (`int`):
            Bytes that the forward pass of a batch keeps.
        accumulates (`bool`):
            Whether gradients of earlier passes are there while the next is made.
        flops (`int`):
            Floating point operations of an optimizer step on one device, recomputation and frozen models included.
        num_samples (`int`, *optional*), samples_per_step (`int`), num_steps (`int`):
            Of the run; the first is not known of every stream.
        precision (`str`):
            `"no"`, `"fp16"` or `"bf16"`.
        allow_tf32 (`bool`):
            Of the run.
        disk (`Mapping[str, int]`):
            Bytes of what is written, by its name.
    """

    what: str
    parameters: int
    trained_parameters: int
    weights: int
    frozen: int
    gradients: int
    buckets: int
    optimizer: int
    average: int
    copies: int
    activations: int
    accumulates: bool
    flops: int
    num_samples: int | None
    samples_per_step: int
    num_steps: int
    precision: str
    allow_tf32: bool
    disk: Mapping[str, int] = field(default_factory=dict)

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
            self.what,
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
            f"Cards (fits: with {OVERHEAD} GiB for the driver and gaps; time: at {USUAL_MFU:.0%} of its peak)",
            f"  {'':<12}{'GiB':>6}{'fits':>7}{'s a step':>12}{'hours in all':>15}",
        ]
        for name, gpu in GPUS.items():
            fits = self.peak / GIB + OVERHEAD <= gpu.memory
            seconds = self.seconds_per_step(gpu)
            lines.append(
                f"  {name:<12}{gpu.memory:>6}{'yes' if fits else 'no':>7}{seconds:>12.3g}"
                f"{seconds * self.num_steps / 3600:>15.3g}"
            )
        return "\n".join(lines)


def make_plan(
    args: TrainingArguments,
    what: str,
    model: nn.Module,
    network: ModelMixin,
    inputs: Callable[[int], tuple[Any, ...]],
    num_samples: int | None,
    frozen: int = 0,
    extra_flops: int = 0,
    extra_activations: int = 0,
    disk: Mapping[str, int] | None = None,
) -> Plan:
    """
    The plan of a run.

    Args:
        args ([`TrainingArguments`]):
            With the arguments of `add_optimisation_arguments` and `add_average_arguments`.
        what (`str`):
            The run, in a few words.
        model (`nn.Module`):
            All that is trained, as it would be given to [`TrainingRun.prepare`], on the meta device.
        network ([`~diffusers.ModelMixin`]):
            The part of it that gradient checkpointing is for.
        inputs (`Callable`):
            The arguments of the model's call for a batch of a given size.
        num_samples (`int`, *optional*):
            Images to train on, where that is known.
        frozen (`int`, *optional*, defaults to 0):
            Bytes of other models on the device.
        extra_flops (`int`, *optional*, defaults to 0):
            Operations besides, for a sample.
        extra_activations (`int`, *optional*, defaults to 0):
            Bytes besides, for a sample.
        disk (`Mapping[str, int]`, *optional*):
            Bytes of what is written besides checkpoints.

    Returns:
        [`Plan`]: the plan.
    """
    precision = planned_precision(args)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    global_batch_size = args.train_batch_size * processes * args.gradient_accumulation_steps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trained_bytes = sum(4 * parameter.numel() for parameter in trained)
    optimizer = sum(state_bytes(args.optimizer, parameter.shape) for parameter in trained)
    tracks = len(args.ema_sigma_rel) if args.ema_profile == "power" else 1
    average = tracks * trained_bytes if args.use_ema else 0
    kept = activations_per_sample(model, inputs, precision, network if args.gradient_checkpointing else None)
    flops = forward_flops(model, inputs(1))
    flops = with_backward(model, flops) + (flops if args.gradient_checkpointing else 0)
    micro_batches = args.gradient_accumulation_steps
    return Plan(
        what=what,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(parameter.numel() for parameter in trained),
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        frozen=frozen,
        gradients=trained_bytes,
        buckets=trained_bytes if processes > 1 else 0,
        optimizer=optimizer,
        average=0 if args.offload_ema else average,
        copies=0 if precision == "no" else _copies(model),
        activations=args.train_batch_size * (kept + extra_activations),
        accumulates=micro_batches > 1,
        flops=(flops + extra_flops) * args.train_batch_size * micro_batches,
        num_samples=num_samples,
        samples_per_step=global_batch_size,
        num_steps=args.max_train_steps or -(-args.num_train_epochs * (num_samples or 0) // global_batch_size),
        precision=precision,
        allow_tf32=args.allow_tf32,
        disk={**(disk or {}), "each checkpoint": trained_bytes + optimizer + average},
    )


def _copies(model: nn.Module) -> int:
    """What autocast makes of layers in float32, for the time of a pass."""
    layers = (module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
    return sum(2 * p.numel() for layer in layers for p in layer.parameters(recurse=False) if p.dtype == torch.float32)


def linear_flops(model: nn.Module, num_tokens: int) -> int:
    """
    Operations of a forward pass of a text encoder, those of its attention's products of tokens left out.

    Args:
        model (`nn.Module`):
            The encoder.
        num_tokens (`int`):
            What it reads.

    Returns:
        `int`: the number.
    """
    weights = (module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return 2 * num_tokens * sum(weights)


def empty(*shape: int) -> torch.Tensor:
    """A tensor of which only the shape counts."""
    return torch.empty(shape)
