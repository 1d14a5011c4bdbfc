# SPDX-License-Identifier: Apache-2.0
"""Optimizers and learning-rate schedules."""

import importlib.util
import logging
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from diffusers.optimization import get_scheduler
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ..arguments import install
from .ema import local_part


logger = logging.getLogger(__name__)

# Package of each, and the extra that installs it.
OPTIMIZERS = {
    "adamw": ("torch", ""),
    "adamw8bit": ("bitsandbytes", "8bit"),
    "adafactor": ("torch", ""),
    "prodigy": ("prodigyopt", "prodigy"),
    "schedule_free": ("schedulefree", "schedule_free"),
}

# Below this a learning rate is one that was meant for AdamW.
PRODIGY_LEARNING_RATE = 0.1
# Of a parameter group, what arguments say. The rest is state, such as Prodigy's step size.
_SETTINGS = ("initial_lr", "betas", "eps", "weight_decay")


def check_optimizer(name: str) -> None:
    """Refuse an unknown optimizer, and one whose package is not installed."""
    if name not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
    package, extra = OPTIMIZERS[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{package} is not installed: --optimizer {name} needs {install(extra)}.")


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """
    Optimizer by name, over float32 parameters. `betas` and `epsilon` do not concern `adafactor`.

    | name | | bytes of state for a parameter |
    |---|---|---|
    | `adamw` | arXiv 1711.05101, torch's fused one | 8 |
    | `adamw8bit` | with moments in 8 bits (arXiv 2110.02861), of bitsandbytes | 2 |
    | `adafactor` | second moment by rows and columns (arXiv 1804.04235), torch's; no first moment | next to none |
    | `prodigy` | AdamW that finds its step size (arXiv 2306.06101), of prodigyopt; `learning_rate` is 1 | 16 |
    | `schedule_free` | AdamW that averages and needs no schedule (arXiv 2405.15682), of schedulefree | 8 |
    """
    check_optimizer(name)
    moments = {"betas": betas, "eps": epsilon}
    if name == "adamw":
        return torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay, fused=True, **moments)
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, learning_rate, weight_decay=weight_decay)
    if name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        return AdamW8bit(parameters, learning_rate, weight_decay=weight_decay, **moments)
    if name == "schedule_free":
        from schedulefree import AdamWScheduleFree  # pyright: ignore[reportMissingImports]

        return AdamWScheduleFree(parameters, learning_rate, weight_decay=weight_decay, **moments)
    from prodigyopt import Prodigy  # pyright: ignore[reportMissingImports]

    if learning_rate < PRODIGY_LEARNING_RATE:
        logger.warning(
            "Prodigy finds its step size by itself, and --learning_rate multiplies it: %s is far below the usual 1.",
            learning_rate,
        )
    # The first three as diffusers' own scripts have them.
    return Prodigy(
        parameters,
        learning_rate,
        decouple=True,
        use_bias_correction=True,
        safeguard_warmup=True,
        weight_decay=weight_decay,
        **moments,
    )


def make_lr_scheduler(
    optimizer: torch.optim.Optimizer,
    num_steps: int,
    restarts: Mapping[int, float],
    name: str,
    num_warmup_steps: int,
    num_cycles: int,
    power: float,
) -> LambdaLR:
    """
    Learning-rate schedule of diffusers. It ends at each step of `restarts`, and begins anew there with a share of the
    learning rate, which it reaches in a tenth of the steps that follow if the warm-up is longer.
    """
    stages = {0: 1.0, **restarts}
    starts = sorted(stages)
    schedules = []
    for start, end in zip(starts, [*starts[1:], num_steps]):
        warmup = min(num_warmup_steps, (end - start) // 10) if start in restarts else num_warmup_steps
        schedules.append(get_scheduler(name, optimizer, None, warmup, end - start, num_cycles, power))
    if not restarts:
        return schedules[0]
    rates = {start: schedule.lr_lambdas[0] for start, schedule in zip(starts, schedules)}

    def rate(step: int) -> float:
        start = starts[bisect_right(starts, step) - 1]
        return stages[start] * rates[start](step - start)

    return LambdaLR(optimizer, rate)


def state_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes that an optimizer keeps for a float32 parameter of a shape, its counters left out."""
    size = math.prod(shape)
    if name == "prodigy":
        return 16 * size
    if name == "adafactor":
        return 4 * (size // shape[-1] + size // shape[-2]) if len(shape) > 1 else 4 * size
    if name == "adamw8bit" and size >= 4096:
        # A byte for each moment, and the largest of each block of 256 as a float32; smaller tensors are not worth it.
        return 2 * (size + 4 * math.ceil(size / 256))
    return 8 * size


def restart_optimizer(optimizer: AcceleratedOptimizer) -> None:
    """Begin anew: no moments, and groups as at first. Learning rates and what arguments say stay."""
    inner = optimizer.optimizer
    inner.state.clear()
    kept = ("params", "lr", "train_mode", *_SETTINGS)
    for group in inner.param_groups:
        group.update({name: value for name, value in inner.defaults.items() if name not in kept})


@contextmanager
def schedule_free_weights(optimizer: AcceleratedOptimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within this context the parameters are a schedule-free optimizer's average; afterwards as before, to the bit."""
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in parameters], kept)


@contextmanager
def kept_settings(optimizer: AcceleratedOptimizer, lr_scheduler: LambdaLR) -> Iterator[None]:
    """Load a checkpoint in this context: learning rates, schedule, betas, epsilon and weight decay stay as now."""
    settings = [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]
    base_lrs = list(lr_scheduler.base_lrs)
    yield
    rates = [base * factor(lr_scheduler.last_epoch) for base, factor in zip(base_lrs, lr_scheduler.lr_lambdas)]
    lr_scheduler.base_lrs, lr_scheduler._last_lr = base_lrs, rates
    for group, kept, rate in zip(optimizer.param_groups, settings, rates, strict=True):
        group.update(kept, lr=rate)


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the trained parameters with numbers that are not finite, in the part that this process holds."""
    trained = {name: local_part(parameter) for name, parameter in model.named_parameters() if parameter.requires_grad}
    finite = {name: tensor.isfinite().all() for name, tensor in trained.items()}
    return [name for name, is_finite in finite.items() if not is_finite]
