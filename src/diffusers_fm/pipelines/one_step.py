# SPDX-License-Identifier: Apache-2.0
"""One step of a stock pipeline, cut out of its call, and the maps of tensors that functions of it are.

The call runs on a shallow copy of the pipeline whose scheduler and network are replaced, so the pipeline itself is
never changed: an exception leaves nothing behind, and threads may share a pipeline. Where the pipeline would take a
step, the scheduler ends the call.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

from ..models.networks import argument_names
from ..precision import to_float64, widest_float


Tree = Any  # tensors in lists, tuples, dictionaries and model outputs, and other values
T = TypeVar("T", bound=Tree)

# Place numbers up to its square are written in two digits, each exact in float32.
BASE = 4096


def map_tensors(function: Callable[[torch.Tensor], Any], tree: T) -> T:
    """Apply `function` to every tensor of a tree."""
    if isinstance(tree, torch.Tensor):
        return function(tree)  # type: ignore[return-value]
    if isinstance(tree, dict):
        return type(tree)(**{name: map_tensors(function, value) for name, value in tree.items()})  # type: ignore
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(function, value) for value in tree)  # type: ignore[return-value]
    return tree


def leaves(tree: Tree) -> list[torch.Tensor]:
    """The tensors of a tree."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, tree)
    return found


class StepReached(Exception):
    """End of the call at a step of the scheduler."""

    def __init__(self, velocity: torch.Tensor, sample: torch.Tensor) -> None:
        super().__init__()
        self.velocity, self.sample = velocity, sample


class OneTimeScheduler(FlowMatchEulerDiscreteScheduler):
    """Scheduler with one time for all steps; its first steps return given states, the next one ends the call."""

    init_noise_sigma = 1.0

    def offer(self, t: float, answers: tuple[torch.Tensor, ...] = (), endless: bool = False) -> "OneTimeScheduler":
        """A copy that offers time `t` and answers steps with `answers`, the last of them for ever if `endless`."""
        one = copy.copy(self)
        one.t, one.answers, one.endless, one.asked = t, list(answers), endless, {}
        return one

    def __deepcopy__(self, memo: dict[int, Any]) -> "OneTimeScheduler":
        return self

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take note of what the pipeline asks for and lay out the time, as often as the pipeline wants steps."""
        given = next((values for values in (timesteps, sigmas) if values is not None), None)
        count = max(num_inference_steps or 0 if given is None else len(given), 2)
        sigma = 1 - self.t if self.config["invert_sigmas"] else self.t
        asked = {"sigmas": sigmas, "timesteps": timesteps, "mu": None if mu is None else float(mu)}
        asked["num_inference_steps"] = num_inference_steps if given is None else None
        self.asked = {name: value for name, value in asked.items() if value is not None}
        # Times of a dry run, whose models have no contents, stay numbers.
        place = "cpu" if str(device) == "meta" else device
        self.sigmas = torch.tensor([sigma] * count + [0.0], dtype=torch.float32, device=place)
        self.timesteps = self.sigmas[:-1] * self.config["num_train_timesteps"]
        self.num_inference_steps = count
        self._step_index = self._begin_index = None

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """The sample."""
        return sample

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        """The point of the straight path at the offered time."""
        return (1 - self.t) * sample + self.t * noise

    add_noise = scale_noise

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        model_output: torch.Tensor,
        timestep: Any = None,
        sample: torch.Tensor | None = None,
        *args: Any,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """Return the next answer, or end the call with the velocity noise - data.

        Every flow scheduler steps by (next sigma - sigma) * output, so the output is the derivative by sigma. Where
        sigma runs from noise to data, and where times are given for each token, the sign is the other one.
        """
        if not self.answers:
            negative = bool(self.config["invert_sigmas"]) != (per_token_timesteps is not None)
            raise StepReached(-model_output if negative else model_output, sample)  # type: ignore[arg-type]
        answer = self.answers[0] if self.endless else self.answers.pop(0)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=answer) if return_dict else (answer,)  # type: ignore


def one_time_scheduler(scheduler: SchedulerMixin) -> OneTimeScheduler:
    """A `OneTimeScheduler` with the configuration of a flow matching scheduler."""
    config: Any = scheduler.config  # type: ignore[attr-defined]
    name = type(scheduler).__name__
    flows = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or config.get("use_flow_sigmas", False)
    if not (flows or "FlowMatch" in name or "EulerAncestralRF" in name):
        raise ValueError(f"A velocity field needs a pipeline with a flow matching scheduler, got {name}.")
    if config.get("path", "ot") != "ot" or "flow" not in config.get("prediction_type", "flow_prediction"):
        raise ValueError(
            "A velocity field needs a scheduler of the path 'ot' whose network predicts 'flow_prediction', got"
            f" path {config.get('path', 'ot')!r} and prediction type {config.get('prediction_type')!r}."
        )
    shared = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    one = OneTimeScheduler(**{key: value for key, value in config.items() if key in shared})
    # `from_config` would drop values that the source left at its own defaults.
    one.register_to_config(**{key: value for key, value in config.items() if not key.startswith("_")})
    return one


def straight_scheduler(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """Scheduler of the straight path, on which the network's plain answer is the velocity."""
    shared = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    return FlowMatchEulerDiscreteScheduler(**{name: each for name, each in scheduler.config.items() if name in shared})


class StandIn:
    """A component as the pipeline sees it: attributes are its own, but for some, and calls go to `call`."""

    def __init__(self, component: torch.nn.Module, call: Callable[[dict[str, Any]], Any], **others: Any) -> None:
        vars(self).update(others, _component=component, _call=call)

    @property
    def __class__(self) -> type:
        return type(self._component)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_component"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._component, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call({**dict(zip(argument_names(self._component), args)), **kwargs} if args else kwargs)


def precise_encoder(vae: torch.nn.Module) -> StandIn:
    """
    An autoencoder whose encoder runs in its own precision, as that of data does, whatever the precision of the texts:
    pipelines hand it images in theirs.
    """

    def encode(images: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        given = images.to(vae.dtype)  # pyright: ignore[reportArgumentType, reportCallIssue]
        if given.is_meta:
            return vae.encode(given, *args, **kwargs)  # pyright: ignore[reportCallIssue]
        with torch.autocast(given.device.type, enabled=False):
            return vae.encode(given, *args, **kwargs)  # pyright: ignore[reportCallIssue]

    return StandIn(vae, lambda arguments: vae(**arguments), encode=encode)


def call_pipeline(
    pipeline: DiffusionPipeline, replaced: dict[str, Any], arguments: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a shallow copy of a pipeline with components replaced, up to a step; the step's velocity and sample."""
    one = copy.copy(pipeline)
    if "_execution_device" in replaced:
        one.__class__ = _on_known_device(type(pipeline))
    # Not by `setattr`, which would write the class of each component into the configuration.
    vars(one).update(replaced)
    one.set_progress_bar_config(disable=True)
    arguments = {name: _own(value) for name, value in arguments.items()}
    call = inspect.unwrap(type(pipeline).__call__)  # without its `no_grad`
    try:
        call(one, **arguments)
    except StepReached as reached:
        return reached.velocity, reached.sample
    raise ValueError(f"{type(pipeline).__name__} took no step.")


def _own(value: Any) -> Any:
    """An argument for one call: pipelines write into lists and draw from generators, and the next call is the same."""
    if isinstance(value, list):
        return [_own(each) if isinstance(each, torch.Generator) else each for each in value]
    if isinstance(value, torch.Generator):
        return torch.Generator(value.device).set_state(value.get_state())
    return value


@functools.cache
def _on_known_device(kind: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """A pipeline class with an attribute for the property that looks at every module of every model, at every call."""
    return type(kind.__name__, (kind,), {"_execution_device": None})


@dataclass(frozen=True)
class Rearrangement:
    """Map of the numbers of each sample: y[i] = offset[i] + scale[i] * x[place[i]]."""

    offset: torch.Tensor
    scale: torch.Tensor
    place: torch.Tensor
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        plain = not self.offset.any() and not (self.scale - self.scale[0]).any()
        in_order = torch.equal(self.place, torch.arange(len(self.place)))
        object.__setattr__(self, "factor", self.scale[0].item() if plain and in_order else None)
        object.__setattr__(self, "_copies", {})

    @classmethod
    def ask(
        cls, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], name: str
    ) -> "Rearrangement":
        """The map that a function of a batch of one is, by zeros, ones and place numbers, and verified by noise."""
        size = torch.Size(shape).numel()
        if size > BASE**2:
            raise ValueError(f"{name} has {size} numbers to move, more than the {BASE**2} that can be told apart.")
        places = torch.arange(size)

        def answer(values: torch.Tensor) -> torch.Tensor:
            return to_float64(function(values.float().reshape(1, *shape)))

        offset = answer(torch.zeros(size))
        y_shape, offset = tuple(offset.shape[1:]), offset.flatten()
        scale = answer(torch.ones(size)).flatten() - offset
        if len(offset) != size or not scale.all():
            raise ValueError(f"{name} makes {len(offset)} numbers of {size}: that has no inverse.")
        digits = [
            (answer(digit).flatten() - offset).div(scale).round().long() for digit in (places % BASE, places // BASE)
        ]
        place = digits[0] + BASE * digits[1]
        if not torch.equal(place.sort().values, places):
            raise ValueError(f"{name} does more than move, scale and offset numbers.")
        found = cls(offset, scale, place, shape, y_shape)
        probe = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        seen = answer(probe)
        error = (seen - to_float64(found(probe))).abs().max().item()
        if not error <= 1e-4 * seen.abs().max().item():
            raise ValueError(f"{name} does more than move, scale and offset numbers: that is off by {error:.1e}.")
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The map of a batch, in its dtype."""
        if self.factor is not None:
            return x.reshape(len(x), *self.y_shape) * self.factor
        offset, scale, place, _ = self._on(x)
        flat = x.flatten(1)[:, place].to(offset.dtype) * scale + offset
        return flat.reshape(len(x), *self.y_shape).to(x.dtype)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse map of a batch, in its dtype."""
        offset, scale, _, order = self._on(y)
        flat = (y.flatten(1).to(offset.dtype) - offset) / scale
        return flat[:, order].reshape(len(y), *self.x_shape).to(y.dtype)

    def _on(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Offset, scale, place and its inverse on the device of a tensor."""
        if x.device not in self._copies:
            dtype = widest_float(x)
            # Normal tensors whatever mode the first call is made in: later ones may need gradients.
            with torch.inference_mode(False):
                numbers = [self.offset.to(dtype), self.scale.to(dtype), self.place, self.place.argsort()]
                self._copies[x.device] = [each.to(x.device) for each in numbers]
        return self._copies[x.device]
