# SPDX-License-Identifier: Apache-2.0
"""Findings about a stock pipeline's step: its dependence on x_t and t, measured and verified."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ..precision import to_float64, widest_float
from .one_step import Tree, leaves
from .pipeline_calls import ENTRIES, PROBES, Findings, NetworkCalls, PipelineCalls, TimeMap, same_state


def find(pipe: PipelineCalls, x_t: torch.Tensor, call: dict[str, Any]) -> Findings:
    """Verified findings about a kind of call."""
    name = type(pipe.pipeline).__name__
    probes = pipe.probes(call)

    # 1. How x_t enters
    for entry in ENTRIES[:2]:
        calls, step = pipe.calls(record=True), None
        if entry in pipe.arguments or entry in dir(pipe.pipeline):
            # A fault of the caller's shows in the last way, too.
            with contextlib.suppress(ValueError, RuntimeError, TypeError, IndexError):
                step = pipe.run(probes[1], call, calls, x_t, entry)
        if step is not None and same_state(step.sample, x_t):
            break
    else:
        calls, entry = pipe.calls(record=True), "step"
        step = pipe.run(probes[1], call, calls)
        if step.sample.shape != x_t.shape:
            raise ValueError(
                f"`x_t` must have the shape {tuple(step.sample.shape)} that the loop of {name} holds for this call,"
                f" got {tuple(x_t.shape)}."
            )
        held = pipe.run(probes[1], call, pipe.calls(tuple(calls.outputs)), x_t, entry)
        if not same_state(held.sample, x_t):
            raise ValueError(f"The loop of {name} does not hold the x_t that it is given: it changes every state.")
    if step.velocity.shape != x_t.shape:
        raise ValueError(f"{name} steps by a velocity of shape {tuple(step.velocity.shape)}, not of that of x_t.")
    outputs = tuple(calls.outputs)

    # 2. Guidance
    rows = tuple(len(arguments[pipe.state]) for arguments in calls.seen)
    if not pipe.guidance and rows != (len(x_t),):
        raise ValueError(
            f"{name} calls its network {len(rows)} times a step, with {sum(rows)} samples for a batch of"
            f" {len(x_t)}: guidance is on, turn it off."
        )

    # 3. Time: in 16 bits, not all numbers of the first probes are exact
    probed = probes
    times, sides, wrong = _find_times(pipe, x_t, call, entry, outputs, probed)
    if wrong is not None and not pipe.others:
        probed = PROBES[1]
        times, sides, wrong = _find_times(pipe, x_t, call, entry, outputs, probed)
    if wrong is not None:
        raise ValueError(f"The argument {wrong!r} of the network of {name} is not affine in the time.")
    if not any(times):
        raise ValueError(f"No argument of the network of {name} depends on the time.")
    place = getattr(pipe.pipeline, pipe.name).dtype, pipe.pipeline._execution_device
    found = Findings(tuple(x_t.shape), entry, times, rows, outputs, sides, calls.sign(step.velocity), step.mu, *place)

    # 4. One time a sample against one time a batch
    if len(x_t) > 1:
        mixed = torch.tensor([*probed[1:]] * len(x_t), device=x_t.device)[: len(x_t)]
        velocity = _check(pipe, x_t, mixed, probed[1], call, found)
        for first, t in enumerate(probed[1:]):
            expected = _check(pipe, x_t, None, t, call, found)[first::2]
            error = (velocity[first::2] - expected).abs().max().item()
            if not error <= tolerance(pipe, x_t) * max(expected.abs().max().item(), 1e-6):
                raise ValueError(
                    f"{name} gives another velocity where times differ within a batch (error {error:.1e}): it uses"
                    " the time outside its network."
                )
    return found


def _find_times(
    pipe: PipelineCalls,
    x_t: torch.Tensor,
    call: dict[str, Any],
    entry: str,
    outputs: tuple[Tree, ...],
    probes: tuple[float, ...],
) -> tuple[tuple[dict[str, TimeMap], ...], dict[str, tuple[dict[str, TimeMap], ...]], str | None]:
    """Time arguments of each call in a step of the network and of others beside it, and one that is not affine."""
    runs = []
    for t in probes:
        torch.manual_seed(0)
        asked = pipe.calls(outputs * 2)
        pipe.run(t, call, asked, x_t if entry == "latents" else x_t.float(), entry)
        runs.append(asked)
    maps, beside = find_all(runs, probes, len(outputs), bool(pipe.sides)), {}
    for name in pipe.sides:
        of_side = find_all([run.sides[name] for run in runs], probes, 0, True)
        beside[name] = tuple(times for times, _ in of_side)
    return tuple(times for times, _ in maps), beside, next((wrong for _, wrong in maps if wrong), None)


def _check(
    pipe: PipelineCalls,
    x_t: torch.Tensor,
    t: torch.Tensor | None,
    offered: float,
    call: dict[str, Any],
    found: Findings,
) -> torch.Tensor:
    torch.manual_seed(0)
    return pipe.velocity(x_t, t, offered, call, found).float()


def tolerance(pipe: PipelineCalls, x_t: torch.Tensor) -> float:
    """Relative difference of velocities that rounding explains."""
    dtypes = {x_t.dtype, pipe.pipeline.components[pipe.name].dtype}
    wide = dtypes <= {torch.float32, torch.float64} and not torch.is_autocast_enabled(x_t.device.type)
    return 1e-4 if wide else 5e-2


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
        argument = torch.as_tensor(given[0])
        dtype, device = widest_float(argument), argument.device
        # Normal tensors whatever mode the first call is made in: later ones may need gradients.
        with torch.inference_mode(False):
            maps[name] = TimeMap(*(_scalar(each).clone().to(dtype).to(device) for each in (start, slope)))
    return maps, None


def find_all(
    runs: Sequence[NetworkCalls], t: Sequence[float], last: int, sides: bool
) -> list[tuple[dict[str, TimeMap], str | None]]:
    """Per-call or common treatment of the last calls of a network."""
    return [find_times(calls, t, runs[0].state, sides) for calls in zip(*(run.seen[-last:] for run in runs))]


def _scalar(values: torch.Tensor) -> torch.Tensor:
    """The common value of all elements, or the elements."""
    first = values.flatten()[0]
    return first if (values - first).abs().max() <= 1e-6 * first.abs() else values


def _equal(a: Tree, b: Tree) -> bool:
    tensors = list(zip(leaves(a), leaves(b)))
    if tensors:
        return all(x.shape == y.shape and torch.equal(x, y) for x, y in tensors)
    return isinstance(a, (torch.Tensor, list, tuple, dict)) or a is b or a == b
