# SPDX-License-Identifier: Apache-2.0
"""Calls of the network within a stock pipeline: seen, answered, or passed on with a time for each sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..precision import to_float64, widest_float
from .one_step import Tree, leaves, map_tensors


HALF = (torch.float16, torch.bfloat16)


class NetworkReached(Exception):
    """End of the pipeline's call at the network."""


class OtherNetworkReached(Exception):
    """End of the pipeline's call at a network that is not the one asked for."""


def stop_at_other(arguments: dict[str, Any]) -> None:
    """End the call."""
    raise OtherNetworkReached


@dataclass(frozen=True)
class TimeMap:
    """Time argument of the network: start + slope * t, numbers, or tensors where its elements differ."""

    start: torch.Tensor | float
    slope: torch.Tensor | float

    def at(self, given: torch.Tensor, t: torch.Tensor, offered: float, rows: int) -> torch.Tensor:
        """The argument for one time a sample; the pipeline's own value where a sample has the offered time."""
        t = t.to(given.device, widest_float(given))
        t = t.repeat(rows // len(t)).reshape(-1, *[1] * (given.ndim - 1))
        value = (self.start + self.slope * t).broadcast_to(rows, *given.shape[1:])
        own = (t == offered).broadcast_to(value.shape)
        return (value + torch.where(own, given.to(value.dtype) - value, 0.0).detach()).to(given.dtype)

    def __str__(self) -> str:
        if isinstance(self.start, torch.Tensor) or isinstance(self.slope, torch.Tensor):
            return "a map for each token"
        start, slope = round(self.start, 6), round(self.slope, 6)
        line = "t" if abs(slope) == 1 else f"{abs(slope):g} t"
        if slope < 0:
            return f"{start:g} - {line}"
        return f"{start:g} + {line}" if start else line


class NetworkCalls:
    """Calls of the network: the first ones get `answers`, the others the network's own, at the times `t` if given."""

    def __init__(
        self,
        network: nn.Module,
        state: str,
        dtype: torch.dtype,
        answers: Sequence[Tree] = (),
        *,
        stop: bool = False,
        record: bool = False,
        times: Sequence[dict[str, TimeMap]] = (),
        t: torch.Tensor | None = None,
        offered: float = 0.0,
        side_times: dict[str, Sequence[dict[str, TimeMap]]] | None = None,
    ) -> None:
        self.network, self.state, self.dtype, self.answers, self.stop = network, state, dtype, answers, stop
        self.times, self.t, self.offered, self.record = times, t, offered, record
        self.gradients = torch.is_grad_enabled()
        self.seen: list[dict[str, Any]] = []
        self.outputs: list[Tree] = []
        self.cubes: list[torch.Tensor] = []
        self.asked: dict[str, Any] = {}
        self.differentiable = self.is_side = False
        self.side_times = side_times or {}
        self.sides: dict[str, NetworkCalls] = {}

    def __call__(self, arguments: dict[str, Any]) -> Tree:
        """Answer one call."""
        index = len(self.seen)
        self.seen.append(arguments)
        if self.stop:
            raise NetworkReached
        if index < len(self.answers):
            return map_tensors(torch.Tensor.contiguous, self.answers[index])
        if self.t is not None:
            rows = len(arguments[self.state])
            replaced = {
                name: line.at(torch.as_tensor(arguments[name]), self.t, self.offered, rows)
                for name, line in self.times[index % len(self.times)].items()
            }
            arguments = {**arguments, **replaced}
        # From here to the step there are gradients; the pipeline's caller restores the mode.
        torch.set_grad_enabled(self.gradients)
        if self.is_side:
            # A frozen network in 16 bits takes what one in float32 says; times stay exact.
            arguments = map_tensors(lambda tensor: self._cast(tensor) if tensor.ndim > 1 else tensor, arguments)
        arguments = {**arguments, self.state: map_tensors(self._cast, arguments[self.state])}
        if any(leaf.is_meta for leaf in leaves(arguments[self.state])):
            # A dry run has models without contents, and times.
            arguments = map_tensors(lambda tensor: tensor.to("meta"), arguments)
        output = self.network(**map_tensors(self._widen, arguments))
        self.differentiable = any(leaf.requires_grad for leaf in leaves(output))
        if self.record:
            self.outputs.append(map_tensors(_zeros, output))
            self.cubes.append(sum(leaf.to(widest_float(leaf)).pow(3).sum() for leaf in leaves(output)))  # type: ignore[arg-type]
        return output

    def beside(self, network: nn.Module, state: str, name: str) -> "NetworkCalls":
        """Calls of another network at the same times."""
        times = self.side_times.get(name, ({},))
        dtype: Any = network.dtype
        calls = NetworkCalls(network, state, dtype, times=times, t=self.t, offered=self.offered)
        calls.gradients, calls.is_side = self.gradients, True
        return calls

    def sign(self, velocity: torch.Tensor) -> str:
        """Sign of the network's output in terms of the velocity, whatever their order."""
        cube = velocity.to(widest_float(velocity)).pow(3).sum()
        if len(self.cubes) == 1 and torch.isclose(self.cubes[0].abs(), cube.abs(), rtol=1e-3):
            return "+" if self.cubes[0].sign() == cube.sign() else "-"
        return "combined"

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """States in float32 as networks in 16 bits take them."""
        half = self.dtype in HALF and tensor.dtype == torch.float32 and not _autocast(tensor)
        return tensor.to(self.dtype) if half else tensor

    def _widen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Embeddings in 16 bits as networks in float32 take them."""
        wide = self.dtype == torch.float32 and tensor.dtype in HALF and not _autocast(tensor)
        return tensor.float() if wide else tensor


def _autocast(tensor: torch.Tensor) -> bool:
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def find_times(
    calls: Sequence[dict[str, Any]], t: Sequence[float], state: str, sides: bool = False
) -> tuple[dict[str, TimeMap], str | None]:
    """Arguments that differ between calls at three times, and the first of them that is not affine in the time.

    Where other networks are called for this one, lists may hold their answers.
    """
    maps: dict[str, TimeMap] = {}
    for name in calls[0]:
        given = [call[name] for call in calls]
        if all(_equal(given[0], each) for each in given[1:]):
            continue
        numbers = all(isinstance(each, (torch.Tensor, float, int)) for each in given)
        if sides and not numbers:
            continue
        if name == state or not numbers:
            return maps, name
        low, middle, high = (to_float64(torch.as_tensor(each)) for each in given)
        slope = (high - low) / (t[2] - t[0])
        start = low - t[0] * slope
        size = max(high.abs().max().item(), low.abs().max().item())
        if (start + t[1] * slope - middle).abs().max() > 1e-5 * size:
            return maps, name
        maps[name] = TimeMap(_number(start), _number(slope))
    return maps, None


def find_all(
    runs: Sequence[NetworkCalls], t: Sequence[float], last: int, sides: bool
) -> list[tuple[dict[str, TimeMap], str | None]]:
    """Per-call or common treatment of the last calls of a network."""
    return [find_times(calls, t, runs[0].state, sides) for calls in zip(*(run.seen[-last:] for run in runs))]


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of a tensor's shape that take no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


def _number(values: torch.Tensor) -> torch.Tensor | float:
    """The common value of all elements, or the elements."""
    first = values.flatten()[0]
    return first.item() if (values - first).abs().max() <= 1e-6 * first.abs() else values


def _equal(a: Tree, b: Tree) -> bool:
    tensors = list(zip(leaves(a), leaves(b)))
    if tensors:
        return all(x.shape == y.shape and torch.equal(x, y) for x, y in tensors)
    return isinstance(a, (torch.Tensor, list, tuple, dict)) or a is b or a == b
