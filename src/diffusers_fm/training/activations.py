# SPDX-License-Identifier: Apache-2.0
"""What a forward pass keeps for the backward pass, counted without doing either."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}

# What autocast on a GPU does in float32 and that on the CPU, whose rules are at hand, does not.
FLOAT32_ON_GPUS = (functional.layer_norm, functional.group_norm)


class _Saved:
    """Counts the memory behind tensors, each piece of it once."""

    def __init__(self, known: Iterator[torch.Tensor] | tuple[torch.Tensor, ...] = ()) -> None:
        self._storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}
        self.bytes = 0

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._storages:
            # Kept, so that no other one gets the same address.
            self._storages[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def watch(self) -> AbstractContextManager[Any]:
        return saved_tensors_hooks(self.add, lambda tensor: tensor)


class _RulesOfGPUs(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FLOAT32_ON_GPUS:
            args = (args[0].float(), *args[1:])
        return func(*args, **(kwargs or {}))


@contextmanager
def _counting_checkpoints(network: ModelMixin, counted: list[int]) -> Iterator[None]:
    """Within this context each block that would be computed again leaves its inputs, and what it would keep, in
    `counted`: the sum of all inputs and the largest of the rest."""

    def call(block: Callable, *args: Any) -> Any:
        tensors = tuple(value for value in args if isinstance(value, torch.Tensor))
        inputs = _Saved()
        for tensor in tensors:
            inputs.add(tensor)
        inside = _Saved((*tensors, *(block.parameters() if isinstance(block, nn.Module) else ())))
        with inside.watch():
            answer = block(*args)
        counted[0] += inputs.bytes
        counted[1] = max(counted[1], inside.bytes)
        return answer

    network.enable_gradient_checkpointing(call)
    try:
        yield
    finally:
        network.disable_gradient_checkpointing()


def saved_bytes(
    model: nn.Module,
    inputs: Callable[[int], tuple[Any, ...]],
    batch_size: int,
    mixed_precision: str = "no",
    checkpointed: ModelMixin | None = None,
    rules_of_gpus: bool = True,
) -> int:
    """
    Bytes that a forward pass leaves for the backward pass, the weights themselves not counted. With gradient
    checkpointing these are the inputs of the blocks, and what the largest block keeps when it is computed again.

    The pass is made with tensors without contents, by the fused attention that GPUs have too.

    Args:
        model (`nn.Module`):
            On any device, `meta` too.
        inputs (`Callable`):
            The arguments of its call for a batch of a given size, tensors on the CPU.
        batch_size (`int`):
            Samples.
        mixed_precision (`str`, *optional*, defaults to `"no"`):
            `"no"`, `"fp16"` or `"bf16"`.
        checkpointed ([`~diffusers.ModelMixin`], *optional*):
            The network in `model` whose blocks are computed again.
        rules_of_gpus (`bool`, *optional*, defaults to `True`):
            Whether autocast has the rules of GPUs, or those of the CPU.

    Returns:
        `int`: bytes.
    """
    counted = [0, 0]
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, requires_grad=tensor.requires_grad)
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
        }
        args = inputs(batch_size)
        saved = _Saved(tuple(tensors.values()))
        autocast: AbstractContextManager[Any] = nullcontext()
        if mixed_precision != "no":
            autocast = torch.autocast("cpu", DTYPES[mixed_precision])
        rules = _RulesOfGPUs() if mixed_precision != "no" and rules_of_gpus else nullcontext()
        blocks = nullcontext() if checkpointed is None else _counting_checkpoints(checkpointed, counted)
        with blocks, saved.watch(), autocast, rules, torch.enable_grad():
            functional_call(model, tensors, args)
    return saved.bytes + sum(counted)


def activations_per_sample(
    model: nn.Module,
    inputs: Callable[[int], tuple[Any, ...]],
    mixed_precision: str = "no",
    checkpointed: ModelMixin | None = None,
) -> int:
    """
    How much [`saved_bytes`] grows with each sample. What does not grow are, under autocast, weights in 16 bits.

    Args:
        model (`nn.Module`), inputs (`Callable`), mixed_precision (`str`), checkpointed ([`~diffusers.ModelMixin`]):
            As [`saved_bytes`] takes them.

    Returns:
        `int`: bytes.
    """
    one, two = (saved_bytes(model, inputs, size, mixed_precision, checkpointed) for size in (1, 2))
    return two - one
