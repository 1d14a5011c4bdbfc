# SPDX-License-Identifier: Apache-2.0
"""The network alone, on arguments captured from a stock pipeline: no Python of the pipeline in a step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .one_step import Rearrangement, Tree, leaves
from .pipeline_calls import Findings
from .prompt_memo import find_axes, merge
from .velocity_field import VelocityField


@dataclass(frozen=True)
class CapturedCall:
    """
    Velocity under the conditions of one call: the network on captured arguments, where only x_t and t change.

    Made by `capture`. The calls of single samples make that of a batch by `join`.
    """

    field: VelocityField
    found: Findings
    arguments: dict[str, Any]
    axes: dict[str, Tree]
    enter: Rearrangement
    leave: Rearrangement

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """
        Velocity noise - data at x_t and t.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                States.
            t (`torch.Tensor` of shape `(batch_size,)`):
                Times in [0, 1], 0 = data, 1 = noise.
        """
        state = self.enter(x_t)
        state = list(state) if isinstance(self.arguments[self.field.state], list) else state
        network = self.field.calls(times=self.found.times, t=t, offered=float("nan"))
        return self.leave(_main(network({**self.arguments, self.field.state: state}))).to(x_t.dtype)

    @staticmethod
    def join(calls: Sequence["CapturedCall"]) -> "CapturedCall":
        """
        Call of a batch, of those of its samples.

        Args:
            calls (sequence of [`CapturedCall`]):
                Calls of single samples, alike in all shapes.

        Raises:
            ValueError: If their shapes differ.
        """
        first = calls[0]
        shapes = [[leaf.shape for leaf in leaves(call.arguments)] for call in calls]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("Calls that differ in the shapes of their arguments cannot be joined to a batch.")
        arguments = merge([call.arguments for call in calls], first.axes)
        return CapturedCall(first.field, first.found, arguments, first.axes, first.enter, first.leave)


@torch.no_grad()
def capture(field: VelocityField, x_t: torch.Tensor, **call: Any) -> CapturedCall:
    """
    Capture the arguments of the network in a call, and verify that they alone make the velocity.

    Args:
        field ([`VelocityField`]):
            Velocity field without guidance.
        x_t (`torch.Tensor` of shape `(batch_size, ...)`):
            Any states of the right shape.
        call:
            Arguments of the pipeline's call, as in the field's `forward`.

    Returns:
        [`CapturedCall`]: A function of x_t and t.

    Raises:
        ValueError: If the pipeline does more between x_t, the network and the velocity than a replay can.
    """
    found = field.ask(x_t, **call)
    name = type(field.pipeline).__name__
    if len(found.rows) != 1 or found.rows[0] != len(x_t):
        raise ValueError(f"{name} calls its network for guidance, which cannot be replayed: turn it off.")
    state = field.state
    seen = field.network_arguments(x_t, found, **call)
    in_list = isinstance(seen[state], list)
    axes: dict[str, Tree] = {}
    if len(x_t) == 1:
        twice = {key: _twice(value) for key, value in call.items()}
        pair = x_t.repeat(2, *[1] * (x_t.ndim - 1))
        axes = find_axes(seen, field.network_arguments(pair, field.ask(pair, **twice), **twice))

    def enter(x: torch.Tensor) -> torch.Tensor:
        given = field.network_arguments(x.to(x_t).expand(x_t.shape), found, **call)[state]
        return (torch.stack(given) if in_list else given)[:1]

    def leave(output: torch.Tensor) -> torch.Tensor:
        whole = output.to(x_t.device).expand(len(x_t), *output.shape[1:])
        return field.velocity_of_output(_with_main(found.outputs[0], whole), x_t, found, **call)[:1]

    captured = CapturedCall(
        field,
        found,
        seen,
        axes,
        Rearrangement.ask(enter, tuple(x_t.shape[1:]), f"{name}, before its network,"),
        Rearrangement.ask(leave, tuple(_main(found.outputs[0]).shape[1:]), f"{name}, after its network,"),
    )
    low, high = field.times_range or (0.0, 1.0)
    t = low + (high - low) * torch.linspace(0.4, 0.6, len(x_t), device=x_t.device)
    with field.quiet(x_t):
        expected = field(x_t, t, **call).float()
        error = (captured(x_t, t).float() - expected).abs().max().item()
    if not error <= 1e-4 * expected.abs().max().item():
        raise ValueError(
            f"{name} does more than its network in a step (a replay is off by {error:.1e}): call through."
        )
    return captured


def _twice(value: Any) -> Any:
    """A call's argument for two equal samples."""
    if isinstance(value, torch.Tensor) and len(value) == 1:
        return torch.cat([value, value])
    return value * 2 if isinstance(value, list) and len(value) == 1 else value


def _main(output: Tree) -> torch.Tensor:
    """The tensor of a network's output that becomes the velocity."""
    first = output if isinstance(output, torch.Tensor) else output[0]
    return torch.stack(first) if isinstance(first, list) else first


def _with_main(output: Tree, tensor: torch.Tensor) -> Tree:
    """Rebuild an output around another tensor of its shape."""
    if isinstance(output, torch.Tensor):
        return tensor.to(output.dtype)
    first = list(tensor) if isinstance(output[0], list) else tensor.to(output[0].dtype)
    if isinstance(output, dict):
        return type(output)(**{**output, next(iter(output)): first})
    return (first, *output[1:])
