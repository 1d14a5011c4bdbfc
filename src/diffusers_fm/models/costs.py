# SPDX-License-Identifier: Apache-2.0
"""Costs of a model's passes, counted on tensors without contents: operations, and bytes kept for the backward pass."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Functions that autocast computes in float32 on GPUs, and in 16 bits on the CPU.
FLOAT32_ON_GPUS = (functional.layer_norm, functional.group_norm)


class OneNetwork(nn.Module):
    """Model that mainly calls one network, which is compiled, and by which operations and memory are counted."""

    @property
    def main_network(self) -> Any:
        """The network."""
        raise NotImplementedError

    def network_call(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The network and the arguments that it gets in a call of the model."""
        raise NotImplementedError

    def measured_call(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
        """The same with a network without contents: some keep tables that they have computed, and must not here."""
        network, arguments = self.network_call(*args, **kwargs)
        memo: dict[int, Any] = {}
        for tensor in (*network.parameters(), *network.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return copy.deepcopy(network, memo), arguments


def measured_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Module and arguments by which a call of a bare model is counted: its own, or those of its one network."""
    if not isinstance(model, OneNetwork):
        return model, args, kwargs
    network, arguments = model.measured_call(*args, **kwargs)
    return network, (), arguments


def forward_flops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> int:
    """Floating point operations of a forward pass of a bare model, counted on tensors without contents."""

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
    Floating point operations of a forward pass and its backward pass, recomputation not counted: the gradients of
    inputs take as much as the forward pass, those of weights as much for the part of them that is trained (arXiv
    2204.02311, appendix B).
    """
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trained = sum(size for size, is_trained in sizes if is_trained) / sum(size for size, _ in sizes)
    return round(flops * (2 + trained))


class _Saved:
    """Bytes of the storages of tensors, each storage once, those of `known` tensors left out."""

    def __init__(self, known: tuple[torch.Tensor, ...] = ()) -> None:
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


def checkpointed_modules(model: nn.Module) -> list[Any]:
    """Modules, of diffusers or transformers, for whose blocks gradient checkpointing is on."""
    return [module for module in model.modules() if vars(module).get("gradient_checkpointing")]


@contextmanager
def block_calls(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Within this context `call(block, *args)` stands in for gradient checkpointing."""
    modules = checkpointed_modules(model)
    before = [module._gradient_checkpointing_func for module in modules]
    for module in modules:
        module._gradient_checkpointing_func = call
    try:
        yield
    finally:
        for module, function in zip(modules, before):
            module._gradient_checkpointing_func = function


def saved_bytes(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    mixed_precision: str = "no",
    rules_of_gpus: bool = True,
) -> int:
    """
    Bytes that a forward pass leaves for the backward pass, the weights themselves not counted. With gradient
    checkpointing these are the inputs of the blocks, and what the largest block keeps when it is computed again.

    The pass is made with tensors without contents, by the fused attention that GPUs have too. Model and arguments may
    be on any device, `meta` too. `rules_of_gpus` chooses between autocast of GPUs and that of the CPU.
    """
    inputs, largest = 0, 0

    def empty(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, requires_grad=value.requires_grad)

    def call(block: Callable[..., Any], *args: Any) -> Any:
        nonlocal inputs, largest
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        given, inside = _Saved(), _Saved((*weights.values(), *tensors))
        for tensor in tensors:
            given.add(tensor)
        with inside.watch():
            answer = block(*args)
        inputs, largest = inputs + given.bytes, max(largest, inside.bytes)
        return answer

    mixed = mixed_precision != "no"
    autocast = torch.autocast("cpu", DTYPES.get(mixed_precision), enabled=mixed)
    rules = _RulesOfGPUs() if mixed and rules_of_gpus else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), block_calls(model, call):
        weights = {name: empty(tensor) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        args, kwargs = tree_map(empty, args), tree_map(empty, dict(kwargs or {}))
        saved = _Saved(tuple(weights.values()))
        with saved.watch(), autocast, rules, torch.enable_grad():
            functional_call(model, weights, args, kwargs)
    return saved.bytes + inputs + largest


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers of a model."""
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
