# SPDX-License-Identifier: Apache-2.0
"""More channels at the input of a trained network, for an image beside its state."""

from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn


@torch.no_grad()
def widen_input(network: ModelMixin, in_channels: int) -> ModelMixin:
    """
    Give a trained network further input channels, in place. Their weights are zero, so that it answers as before,
    whatever they hold: how control models of FLUX begin (diffusers' `train_control_flux.py`).

    Args:
        network ([`~diffusers.ModelMixin`]):
            Network with `in_channels` in its configuration, such as a transformer of packed latents.
        in_channels (`int`):
            Channels that it takes from now on; the first ones are those that it had.

    Returns:
        [`~diffusers.ModelMixin`]: The network.

    Raises:
        ValueError: If it has as many already, has none in its configuration, or they do not enter by one layer.
    """
    config: dict[str, Any] = dict(network.config)  # pyright: ignore
    before = config.get("in_channels")
    if before is None:
        raise ValueError(f"{type(network).__name__} has no `in_channels` in its configuration.")
    if in_channels <= before:
        raise ValueError(
            f"`in_channels` must be more than the {before} of {type(network).__name__}, got {in_channels}."
        )
    changes = {"in_channels": in_channels, "out_channels": config.get("out_channels") or before}
    with torch.device("meta"):
        wide: Any = type(network).from_config({**config, **changes})  # pyright: ignore
    shapes = {name: parameter.shape for name, parameter in wide.named_parameters()}
    grown = [name for name, parameter in network.named_parameters() if parameter.shape != shapes.get(name)]
    layer: Any = network.get_submodule(grown[0].rpartition(".")[0]) if len(grown) == 1 else None
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or layer.weight.shape[1] != before:
        raise ValueError(f"The channels of {type(network).__name__} do not enter by one layer, but by {grown}.")
    shape = list(layer.weight.shape)
    shape[1] = in_channels - before
    more = torch.zeros(shape, dtype=layer.weight.dtype, device=layer.weight.device)
    layer.weight = nn.Parameter(torch.cat([layer.weight, more], 1), layer.weight.requires_grad)
    if isinstance(layer, nn.Linear):
        layer.in_features = in_channels
    else:
        layer.in_channels = in_channels
    network.register_to_config(**changes)  # pyright: ignore
    return network
