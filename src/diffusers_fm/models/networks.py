# SPDX-License-Identifier: Apache-2.0
"""Networks of one's own: what they must look like, and how they are called."""

import functools
import inspect
import sys
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import nn

from ..registry import add_entry, full_name


NETWORKS: dict[str, type[ModelMixin]] = {}
"""Registered networks by module and name, as a pipeline's `model_index.json` has them."""

# What a network may be given besides the sample, by the names of its arguments.
ARGUMENTS = ("timestep", "class_labels", "encoder_hidden_states", "pooled_projections", "return_dict")


def add_network(network_class: type[ModelMixin]) -> None:
    """Check a class of networks and put it among those that pipelines take, see [`~diffusers_fm.register_network`]."""
    if not (isinstance(network_class, type) and issubclass(network_class, ModelMixin)):
        raise ValueError(
            f"A network must be a subclass of diffusers' ModelMixin and ConfigMixin, got {network_class!r}."
        )
    name = full_name(network_class)
    if not issubclass(network_class, ConfigMixin):
        raise ValueError(f"{name} must be a subclass of ConfigMixin too: its configuration is saved with it.")
    if not hasattr(sys.modules[network_class.__module__], "ModelMixin"):
        raise ValueError(f"The module of {name} must import ModelMixin by that name: diffusers looks for it there.")
    first, *others = list(inspect.signature(network_class.forward).parameters.values())[1:]
    missing = [p.name for p in others if p.default is p.empty and p.name not in ARGUMENTS and p.kind < p.VAR_KEYWORD]
    if "timestep" not in (p.name for p in others) or missing:
        raise ValueError(
            f"The forward of {name} must take the sample first, `timestep`, and of other arguments without a default"
            f" only {list(ARGUMENTS[1:])}, got {[first.name, *(p.name for p in others)]}: a class that calls it can."
        )
    for key in ("in_channels", "sample_size"):
        if key not in inspect.signature(network_class.__init__).parameters:
            raise ValueError(f"The configuration of {name} must have the keys `in_channels` and `sample_size`.")
    add_entry(NETWORKS, name, network_class, "network")


def is_registered(network: nn.Module) -> bool:
    """Return whether a network is one of [`~diffusers_fm.register_network`]."""
    return isinstance(network, tuple(NETWORKS.values()))


def argument_names(network: nn.Module) -> list[str]:
    """Names of the arguments of a network's forward, compiled or not; the first is its state."""
    plain: Any = network._orig_mod if is_compiled_module(network) else network
    return _forward_names(type(plain))


@functools.cache
def _forward_names(kind: type[nn.Module]) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def call_network(network: nn.Module, sample: torch.Tensor, **arguments: torch.Tensor | None) -> torch.Tensor:
    """
    Call a network with those of the arguments that its forward has.

    Args:
        network (`nn.Module`):
            Its first argument is the sample.
        sample (`torch.Tensor` of shape `(batch_size, channels, ...)`):
            x_t.
        arguments:
            `timestep`, `class_labels`, `encoder_hidden_states`, `pooled_projections`.

    Returns:
        `torch.Tensor`: The answer: a tensor, or the first entry of a tuple or of diffusers' outputs.
    """
    names = argument_names(network)
    # A wrapper that shards the network takes what the network takes.
    passes_all = "kwargs" in names
    given: dict[str, Any] = {name: value for name, value in arguments.items() if passes_all or name in names}
    if passes_all or "return_dict" in names:
        given["return_dict"] = False
    output = network(sample, **given)
    return output if isinstance(output, torch.Tensor) else output[0]
