# SPDX-License-Identifier: Apache-2.0
"""Models whose work is that of one network, with Python around it."""

import copy
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from ..data.cache import DryAccelerator


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
        tensors = [*network.named_parameters(), *network.named_buffers()]
        memo: dict[int, Any] = {}
        for _, tensor in tensors:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return copy.deepcopy(network, memo), arguments


def compiles(accelerator: Accelerator | DryAccelerator) -> bool:
    """Return whether accelerate was launched to compile models."""
    if isinstance(accelerator, DryAccelerator):
        return False
    plugin: Any = accelerator.state.dynamo_plugin
    return plugin.backend != DynamoBackend.NO


def with_compiled_network(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """
    Compile the network of a [`OneNetwork`] in place, as accelerate was launched to; what is around it is Python that
    cannot be compiled. Of other models accelerate compiles the whole.
    """
    if compiles(accelerator) and isinstance(model, OneNetwork):
        plugin: Any = accelerator.state.dynamo_plugin
        network = model.main_network
        compile_parts = network.compile_repeated_blocks if plugin.use_regional_compilation else network.compile
        compile_parts(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO
    return model
