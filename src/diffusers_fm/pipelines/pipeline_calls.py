# SPDX-License-Identifier: Apache-2.0
"""Calls of a stock pipeline up to one step, with stand-ins for scheduler and network: a time for each sample."""

import contextlib
import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..models.networks import argument_names
from ..precision import widest_float
from .families import PER_PROMPT, REFUSED, by_name, guider_off, without_guidance
from .one_step import (
    OneTimeScheduler,
    StandIn,
    T,
    Tree,
    call_pipeline,
    leaves,
    map_tensors,
    one_time_scheduler,
    precise_encoder,
)


# Times at which the network's arguments are compared; those of the second row and their multiples by 1000 are exact in
# 16 bits, too.
PROBES = ((0.25, 0.5, 0.75), (0.0, 0.5, 1.0))
# How x_t enters: as an argument, in the place of the prepared latents, or as the result of a first step.
ENTRIES = ("latents", "prepare_latents", "step")
RESERVED = {"latents", "num_inference_steps", "timesteps", "sigmas", "callback_on_step_end", "return_dict"}

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
    """Time argument of the network, start + slope * t: scalars, or of its shape where its elements differ."""

    # In the widest dtype, where the argument is.
    start: torch.Tensor
    slope: torch.Tensor

    def at(self, given: torch.Tensor, t: torch.Tensor, offered: float, rows: int) -> torch.Tensor:
        """The argument for one time a sample; the pipeline's own value where a sample has the offered time."""
        t = t.to(self.start)
        t = t.repeat(rows // len(t)).reshape(-1, *[1] * (given.ndim - 1))
        value = (self.start + self.slope * t).broadcast_to(rows, *given.shape[1:])
        own = (t == offered).broadcast_to(value.shape)
        return (value + torch.where(own, given.to(value.dtype) - value, 0.0).detach()).to(given.dtype)

    def __str__(self) -> str:
        if self.start.ndim or self.slope.ndim:
            return "a map for each token"
        start, slope = round(self.start.item(), 6), round(self.slope.item(), 6)
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


@dataclass(frozen=True)
class Step:
    """A step that a pipeline would take."""

    velocity: torch.Tensor
    sample: torch.Tensor
    mu: float | None


@dataclass(frozen=True)
class Findings:
    """Answers of a pipeline for one kind of call."""

    shape: tuple[int, ...]
    entry: str  # one of ENTRIES
    times: tuple[dict[str, TimeMap], ...]  # for each call of the network in a step
    rows: tuple[int, ...]
    outputs: tuple[Tree, ...]  # zeros of the shapes of the network's answers
    sides: dict[str, tuple[dict[str, TimeMap], ...]]  # the same times for other networks
    sign: str
    mu: float | None
    # Stock finds these two by a look at every module of every model.
    dtype: torch.dtype
    device: torch.device

    def for_batch(self, size: int) -> "Findings":
        """The same answers for a batch of another size, where they were those of a batch."""
        own = self.shape[0]
        if size == own:
            return self

        def grow(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:1].expand(len(tensor) * size // own, *tensor.shape[1:])

        rows = tuple(count * size // own for count in self.rows)
        return replace(self, shape=(size, *self.shape[1:]), rows=rows, outputs=map_tensors(grow, self.outputs))

    @property
    def skipped(self) -> tuple[Tree, ...]:
        """Answers for a first step that only takes x_t in."""
        return self.outputs if self.entry == "step" else ()


class PipelineCalls(nn.Module):
    """Calls of a pipeline up to a step, around its network."""

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        network: str,
        guidance: bool,
        num_inference_steps: int,
        call: dict[str, Any],
    ) -> None:
        super().__init__()
        reason = by_name(REFUSED, type(pipeline))
        if reason is not None:
            raise ValueError(f"{type(pipeline).__name__} is no velocity field: {reason}.")
        networks = [name for name, component in pipeline.components.items() if isinstance(component, nn.Module)]
        if network not in networks:
            raise ValueError(f"`network` must be one of {networks}, got {network!r}.")
        self.pipeline, self.name, self.guidance = pipeline, network, guidance
        self._per_prompt: dict[str, Any] = by_name(PER_PROMPT, type(pipeline), {})
        self.num_inference_steps = num_inference_steps
        self.network = getattr(pipeline, network)
        self.encode_prompt = pipeline.encode_prompt if "encode_prompt" in dir(pipeline) else None
        self._scheduler = one_time_scheduler(pipeline.scheduler)
        self.arguments = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
        self.state = argument_names(self.network)[0]
        # Networks that share the times with this one, such as those of high and of low noise.
        own = type(self.network)
        self.others = [n for n in networks if n != network and type(getattr(pipeline, n)) is own]
        # Networks that are called for it, with times of their own.
        self.sides = [n for n in ("transformer", "controlnet") if n in networks and n not in (network, *self.others)]
        guiders = [name for name in pipeline.components if name.endswith("guider")]
        self._components = {name: getattr(pipeline, name) for name in guiders}
        self._outputs: dict[tuple[int, ...], tuple[Tree, ...]] = {}
        self.times_range: tuple[float, float] | None = None
        self.check_names(call)
        if not guidance:
            embedded = bool(self.network.config.get("guidance_embeds", False))
            call = {**without_guidance(pipeline, set(self.arguments), embedded), **call}
            self._components = {name: guider_off() for name in self._components}
        self.call = call

    @torch.no_grad()
    def finish(self, state: torch.Tensor, components: dict[str, Any], **call: Any) -> None:
        """Run a call to its end, with a state in float32 as the result of every step, without the network."""
        self.check_names(call)
        with self.quiet(state):
            if state.shape not in self._outputs:
                calls = self.calls(record=True)
                self.run(self.probes(call)[1], call, calls)
                self._outputs[state.shape] = _wide(tuple(calls.outputs))
            answers = itertools.cycle(self._outputs[state.shape])

            def answer(arguments: dict[str, Any]) -> Tree:
                return map_tensors(torch.Tensor.contiguous, next(answers))

            scheduler = self._scheduler.offer(self.probes(call)[1], (state,), endless=True)
            encode = self.encode_prompt
            text = {} if encode is None else {"encode_prompt": lambda *a, **k: _wide(encode(*a, **k))}
            arguments = {**self.call, **_wide(call), "num_inference_steps": 4}
            replaced = {**self._replaced(scheduler, answer, torch.float32), **self._beside(self.calls())}
            call_pipeline(self.pipeline, {**replaced, **text, **components}, arguments)

    @torch.no_grad()
    def network_arguments(self, x_t: torch.Tensor, found: Findings, **call: Any) -> dict[str, Any]:
        """Arguments of the network in a call."""
        calls = self.calls(found.skipped + found.outputs)
        with self.quiet(x_t):
            self.run(self.probes(call)[1], call, calls, x_t, found.entry)
        return calls.seen[-1]

    @torch.no_grad()
    def velocity_of_output(self, output: Tree, x_t: torch.Tensor, found: Findings, **call: Any) -> torch.Tensor:
        """Velocity that the pipeline makes of an output of its network."""
        answers = (*found.skipped, output)
        with self.quiet(x_t):
            return self.run(self.probes(call)[1], call, self.calls(answers), x_t, found.entry).velocity

    def prompt_arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Arguments of a call that are a list of prompts, or have an entry for each of them."""
        return {"prompt": list(prompts), **{name: [value] * len(prompts) for name, value in self._per_prompt.items()}}

    def check_names(self, call: dict[str, Any]) -> None:
        wrong = [name for name in call if name not in self.arguments or name in RESERVED]
        if wrong:
            takes = ", ".join(name for name in self.arguments if name not in {*RESERVED, "self"})
            raise ValueError(f"{type(self.pipeline).__name__} takes no {wrong[0]!r} here, only {takes}.")

    def calls(self, answers: tuple[Tree, ...] = (), dtype: torch.dtype | None = None, **options: Any) -> NetworkCalls:
        dtype = dtype or getattr(self.pipeline, self.name).dtype
        return NetworkCalls(self.network, self.state, dtype, answers, **options)

    def run(
        self,
        t: float,
        call: dict[str, Any],
        calls: NetworkCalls,
        x_t: torch.Tensor | None = None,
        entry: str | None = None,
        device: torch.device | None = None,
    ) -> Step:
        """One call of the pipeline, on the device that it finds itself if none is given."""
        arguments = {**self.call, "num_inference_steps": self.num_inference_steps, **call}
        if entry == "latents":
            arguments["latents"] = x_t
        scheduler = self._scheduler.offer(t, (x_t,) if entry == "step" else ())
        replaced = self._replaced(scheduler, calls)
        if device is not None:
            replaced["_execution_device"] = device
        replaced |= self._beside(calls)
        if entry == "prepare_latents":
            # With the stand-ins too: an image is noised by the scheduler there.
            preparing: Any = copy.copy(self.pipeline)
            vars(preparing).update(replaced)
            replaced["prepare_latents"] = lambda *a, **k: _with_first(preparing.prepare_latents(*a, **k), x_t)
        # Texts and images are encoded without gradients, unless something that goes in asks for them.
        inputs = [each for each in (*call.values(), x_t) if isinstance(each, torch.Tensor)]
        try:
            with torch.set_grad_enabled(calls.gradients and any(each.requires_grad for each in inputs)):
                velocity, sample = call_pipeline(self.pipeline, replaced, arguments)
        finally:
            calls.asked = scheduler.asked
        return Step(velocity, sample, scheduler.asked.get("mu"))

    def _beside(self, calls: NetworkCalls) -> dict[str, StandIn]:
        """Stand-ins for the networks that are called for this one, which note their calls."""
        for name in self.sides:
            side = getattr(self.pipeline, name)
            calls.sides[name] = calls.beside(side, argument_names(side)[0], name)
        return {name: StandIn(getattr(self.pipeline, name), side) for name, side in calls.sides.items()}

    def _replaced(
        self, scheduler: OneTimeScheduler, visit: Callable[[dict[str, Any]], Tree], dtype: torch.dtype | None = None
    ) -> dict[str, Any]:
        """Stand-ins for components and methods of the pipeline in one call."""
        network = getattr(self.pipeline, self.name)
        others = {} if dtype is None else {"dtype": dtype}
        vae = self.pipeline.components.get("vae")
        return {
            **({} if vae is None else {"vae": precise_encoder(vae)}),
            # Guiders count their calls.
            **{name: copy.copy(component) for name, component in self._components.items()},
            **{name: StandIn(getattr(self.pipeline, name), stop_at_other) for name in self.others},
            **({} if self.encode_prompt is None else {"encode_prompt": self.encode_prompt}),
            "scheduler": scheduler,
            self.name: StandIn(network, visit, **others),
        }

    def velocity(
        self, x_t: torch.Tensor, t: torch.Tensor | None, offered: float, call: dict[str, Any], found: Findings
    ) -> torch.Tensor:
        """Call as it was verified; with the offered time for all samples where `t` is not given."""
        calls = self.calls(found.skipped, found.dtype, times=found.times, t=t, offered=offered, side_times=found.sides)
        step = self.run(offered, call, calls, x_t, found.entry, found.device)
        if not same_state(step.sample, x_t):
            raise ValueError(f"The loop of {type(self.pipeline).__name__} does not hold the x_t that it is given.")
        if calls.differentiable and not step.velocity.requires_grad:
            raise ValueError(f"{type(self.pipeline).__name__} cuts the gradient between its network and its step.")
        return step.velocity.to(x_t.dtype)

    def probes(self, call: dict[str, Any]) -> tuple[float, float, float]:
        """Three times of the network's range, which is all of [0, 1] unless networks share it."""
        if not self.others:
            return PROBES[0]
        if self.times_range is None:
            grid = [i / 64 for i in range(65)]
            reached = [self._reached(t, call) for t in grid]
            if not any(reached):
                raise ValueError(f"{type(self.pipeline).__name__} calls {self.name} at no time.")
            first, last = reached.index(True), len(grid) - 1 - reached[::-1].index(True)
            self.times_range = self._edge(grid, first, -1, call), self._edge(grid, last, 1, call)
        low, high = self.times_range
        return low, (low + high) / 2, high

    def _reached(self, t: float, call: dict[str, Any]) -> bool:
        try:
            self.run(t, call, self.calls(stop=True))
        except NetworkReached:
            return True
        except OtherNetworkReached:
            return False
        raise ValueError(f"{type(self.pipeline).__name__} calls none of its networks.")

    def _edge(self, grid: list[float], inside: int, side: int, call: dict[str, Any]) -> float:
        """The last time next to a point of the grid at which the network is called."""
        if inside + side not in range(len(grid)):
            return grid[inside]
        good, bad = grid[inside], grid[inside + side]
        for _ in range(16):
            middle = (good + bad) / 2
            good, bad = (middle, bad) if self._reached(middle, call) else (good, middle)
        return good

    @contextlib.contextmanager
    def quiet(self, x_t: torch.Tensor | None) -> Iterator[None]:
        """Eval mode and a random state of its own, both undone."""
        modes = [(module, module.training) for module in self.network.modules()]
        device = torch.device("cpu") if x_t is None else x_t.device
        devices = [] if device.type == "cpu" else [device]
        try:
            self.network.eval()
            with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
                yield
        finally:
            for module, training in modes:
                module.training = training


def same_state(sample: torch.Tensor, x_t: torch.Tensor) -> bool:
    return sample is x_t or (sample.shape == x_t.shape and torch.equal(sample.to(x_t.dtype), x_t))


def _with_first(prepared: Tree, x_t: torch.Tensor | None) -> Tree:
    """Return value of `prepare_latents` with other latents: a tensor, or a tuple that begins with them."""
    return (x_t, *prepared[1:]) if isinstance(prepared, tuple) else x_t


def _wide(tree: T) -> T:
    return map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, tree)


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros of a tensor's shape that take no memory."""
    return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
