# SPDX-License-Identifier: Apache-2.0
"""The trainable part of a pipeline, and its optimizer."""

import copy
import importlib.util
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor

from ..pipelines.base import FlowMatchPipelineBase


logger = logging.getLogger(__name__)

# Where each is, and the extra that installs it.
OPTIMIZERS = {
    "adamw": ("torch", ""),
    "adamw8bit": ("bitsandbytes", "8bit"),
    "adafactor": ("torch", ""),
    "prodigy": ("prodigyopt", "prodigy"),
    "schedule_free": ("schedulefree", "schedule_free"),
}

# Below this a learning rate is one that was meant for AdamW.
PRODIGY_LEARNING_RATE = 0.1

# On the CPU the norms of many small gradients take longer than one of a copy of them all, up to about this size.
COPIED_NUMBERS = 2**20


class TrainableModel(nn.Module):
    """
    All trainable models of a pipeline as one, for `accelerator.prepare`: the network and, where there is one, the
    class embedder. A call is the pipeline's own `predict`.

    Args:
        pipeline ([`FlowMatchPipelineBase`]):
            Whose models are trained in place.
    """

    def __init__(self, pipeline: FlowMatchPipelineBase) -> None:
        super().__init__()
        self.denoiser = pipeline.denoiser
        self.class_embedder = pipeline.class_embedder
        # In a tuple because a pipeline is no part of a module: its autoencoder is not trained.
        self._predict = (pipeline.predict,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainableModel":
        """A copy of what is trained, in a pipeline of its own that shares the rest."""
        pipeline = copy.copy(self._predict[0].__self__)
        for name, component in pipeline.components.items():
            if component is self.denoiser or component is self.class_embedder:
                setattr(pipeline, name, copy.deepcopy(component, memo))
        return TrainableModel(pipeline)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
        """
        The network's answer at x_t.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t, float32.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                `timestep_scale * t`, continuous.
            conditions (`torch.Tensor`, *optional*):
                What the pipeline's `predict` takes besides, such as labels of shape `(batch_size,)`.

        Returns:
            `torch.Tensor` of the shape of `sample`: of the scheduler's `prediction_type`.
        """
        return self._predict[0](sample, timestep, *conditions)


def check_optimizer(name: str) -> None:
    """
    Refuses an optimizer whose package is not installed.

    Args:
        name (`str`):
            One of `OPTIMIZERS`.

    Raises:
        ValueError: if it is unknown, or needs a package that is not there; the sentence names the extra.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
    package, extra = OPTIMIZERS[name]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f'{package} is not installed: --optimizer {name} needs `pip install "diffusers-fm[{extra}]"`.'
        )


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
    name: str = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
) -> torch.optim.Optimizer:
    """
    An optimizer by its name.

    | name | | bytes of state for a parameter |
    |---|---|---|
    | `adamw` | arXiv 1711.05101, torch's fused one | 8 |
    | `adamw8bit` | with moments in 8 bits (arXiv 2110.02861), of bitsandbytes | 2 |
    | `adafactor` | second moment by rows and columns (arXiv 1804.04235), torch's; no first moment | next to none |
    | `prodigy` | AdamW that finds its step size (arXiv 2306.06101), of prodigyopt; `learning_rate` is 1 | 16 |
    | `schedule_free` | AdamW that averages and needs no schedule (arXiv 2405.15682), of schedulefree | 8 |

    Args:
        parameters (`Iterable[nn.Parameter]` or `Iterable[dict]`):
            What is trained, in float32; in groups, where some have settings of their own.
        learning_rate (`float`):
            Its step size.
        name (`str`, *optional*, defaults to `"adamw"`):
            One of `OPTIMIZERS`.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of its two averages; `adafactor` has a rule of its own.
        weight_decay (`float`, *optional*, defaults to 0.01):
            Decoupled weight decay.
        epsilon (`float`, *optional*, defaults to 1e-8):
            Added to the denominator; `adafactor` has its own.

    Returns:
        `torch.optim.Optimizer`: the optimizer.

    Raises:
        ValueError: as [`check_optimizer`].
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


def state_bytes(name: str, shape: Sequence[int]) -> int:
    """
    What an optimizer keeps of a parameter, its counters left out.

    Args:
        name (`str`):
            One of `OPTIMIZERS`.
        shape (`Sequence[int]`):
            The shape of the parameter, which is float32.

    Returns:
        `int`: bytes.
    """
    size = math.prod(shape)
    if name == "prodigy":
        return 16 * size
    if name == "adafactor":
        return 4 * (size // shape[-1] + size // shape[-2]) if len(shape) > 1 else 4 * size
    if name == "adamw8bit" and size >= 4096:
        # A byte for each moment, and the largest of each block of 256 as a float32; smaller tensors are not worth it.
        return 2 * (size + 4 * math.ceil(size / 256))
    return 8 * size


@contextmanager
def schedule_free_weights(optimizer: AcceleratedOptimizer, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """
    Within this context the parameters are the average that a schedule-free optimizer is for, and afterwards what they
    were, to the bit.

    Args:
        optimizer (`AcceleratedOptimizer`):
            A prepared `schedule_free` one, in its mode of training.
        parameters (`Sequence[nn.Parameter]`):
            What it trains.
    """
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()
        with torch.no_grad():
            torch._foreach_copy_([parameter.detach() for parameter in parameters], kept)


def is_plain(accelerator: Accelerator) -> bool:
    """
    Whether gradients and optimizer are torch's own. What accelerate has between is for scalers, shards and other
    engines, and takes a part of a small model's step, for it looks for a package on the disk each time.
    """
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    return accelerator.scaler is None and accelerator.distributed_type in plain


class GradientClipping:
    """
    Clips the gradient of all parameters together, over all processes, to a norm.

    Args:
        accelerator (`Accelerator`):
            What prepared the model.
        optimizer (`AcceleratedOptimizer`):
            A fused one is told to divide the gradients on its way through them.
        parameters (`list[nn.Parameter]`):
            What is trained.
        max_norm (`float`):
            The norm to clip to; infinity for none.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: AcceleratedOptimizer,
        parameters: list[nn.Parameter],
        max_norm: float,
    ) -> None:
        self._accelerator, self._parameters, self._max_norm = accelerator, parameters, max_norm
        self._is_plain = is_plain(accelerator)
        self._on_cpu = accelerator.device.type == "cpu"
        self._copies = self._on_cpu and sum(parameter.numel() for parameter in parameters) < COPIED_NUMBERS
        self._optimizer = optimizer.optimizer
        self._divides = getattr(self._optimizer, "_step_supports_amp_scaling", False)

    def before_step(self) -> torch.Tensor:
        """
        Called when the gradient is complete.

        Returns:
            `torch.Tensor` of shape `()`: the norm before clipping, on the device, the same in every process.
        """
        if not self._is_plain:
            norm = self._accelerator.clip_grad_norm_(self._parameters, self._max_norm)
            if isinstance(norm, DTensor):
                return norm.full_tensor()
            # DeepSpeed clips by itself, and tells the norm as a number or, before its first step, not at all.
            return norm if isinstance(norm, torch.Tensor) else torch.tensor(0.0 if norm is None else float(norm))
        gradients = [grad for parameter in self._parameters if (grad := parameter.grad) is not None]
        if self._copies:
            norm = torch.linalg.vector_norm(torch._utils._flatten_dense_tensors(gradients))
        else:
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        # On the CPU nothing is waited for, and to look costs less than to divide all gradients by 1.
        is_short = self._on_cpu and norm.numpy() <= self._max_norm
        if self._divides:
            # As torch.amp.GradScaler tells it.
            self._optimizer.grad_scale = None if is_short else (norm / self._max_norm).clamp(min=1.0)
        elif not is_short:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._max_norm, norm)
        return norm
