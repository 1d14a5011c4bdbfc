# SPDX-License-Identifier: Apache-2.0
"""Calls of the sampling pipelines: the arguments that they share, and the state that each has for itself."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .checks import Callback, Generators, check_guidance, check_noise


ADAPTIVE_SOLVERS = ("dopri5", "bosh3")


@dataclass(frozen=True)
class SamplingOptions:
    """Arguments of a call, as [`FlowMatchPipeline.__call__`] describes them; raises a `ValueError` for wrong ones."""

    guidance_scale: float = 1.0
    num_inference_steps: int | None = None
    sigmas: list[float] | None = None
    timesteps: list[float] | None = None
    mu: float | None = None
    solver: str | None = None
    rtol: float | None = None
    atol: float | None = None
    generator: Generators = None
    latents: torch.Tensor | None = None
    output_type: str = "pil"
    callback_on_step_end: Callback | None = None
    callback_on_step_end_tensor_inputs: list[str] | None = None

    def __post_init__(self) -> None:
        if self.sigmas is not None and self.timesteps is not None:
            raise ValueError("Only one of `sigmas` and `timesteps` can be given.")
        check_guidance(guidance_scale=self.guidance_scale)
        if self.latents is not None:
            check_noise("latents", self.latents)
        # An adaptive solver has no timesteps to lay out and no steps to call back after.
        names = ("sigmas", "timesteps", "mu", "callback_on_step_end") if self.is_adaptive else ("rtol", "atol")
        given = [name for name in names if getattr(self, name) is not None]
        if given:
            kind = "an adaptive one" if self.is_adaptive else "one with fixed steps"
            raise ValueError(f"`{given[0]}` has no meaning for the solver {self.solver!r}, which is {kind}.")

    @property
    def is_adaptive(self) -> bool:
        """True if the solver chooses its own steps."""
        return self.solver in ADAPTIVE_SOLVERS

    @property
    def tensor_inputs(self) -> list[str]:
        """Names of the tensors that the callback is handed."""
        if isinstance(self.callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            return self.callback_on_step_end.tensor_inputs
        names = self.callback_on_step_end_tensor_inputs
        return ["latents"] if names is None else names

    def set_timesteps(self, scheduler: FlowMatchScheduler, latents: torch.Tensor, patch_size: int) -> None:
        """Lay out the loop of a scheduler."""
        mu, given = self.mu, self.sigmas is not None or self.timesteps is not None
        if mu is None and scheduler.config.use_dynamic_shifting:
            mu = default_mu(scheduler, tuple(latents.shape[1:]), patch_size)
        steps = default_steps(scheduler) if self.num_inference_steps is None else self.num_inference_steps
        steps = None if given else steps
        scheduler.set_timesteps(steps, device=latents.device, sigmas=self.sigmas, timesteps=self.timesteps, mu=mu)
        scheduler.set_begin_index(0)


def default_steps(scheduler: SchedulerMixin) -> int:
    """Number of steps of a scheduler where none is given: what its configuration says, or 50."""
    config: Any = scheduler.config  # pyright: ignore[reportAttributeAccessIssue]
    few = (config.get("flow_map") or {}) if config.get("solver") == "flow_map" else {}
    return config.get("default_num_inference_steps") or few.get("num_inference_steps", 50)


def default_mu(scheduler: FlowMatchScheduler, shape: tuple[int, ...], patch_size: int) -> float:
    """Dynamic shift by the number of tokens of x_t, of shape `(channels, height, width)`, as in Stable Diffusion 3."""
    config = scheduler.config
    return calculate_shift(
        (shape[1] // patch_size) * (shape[2] // patch_size),
        config.base_image_seq_len,
        config.max_image_seq_len,
        config.base_shift,
        config.max_shift,
    )


@dataclass
class SamplingCall:
    """State of one call of a pipeline, which callbacks read and change."""

    scheduler: FlowMatchScheduler
    guidance_scale: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False
    # Takes the place of the pipeline's network.
    network: ModelMixin | None = None


# Innermost call in progress by the id of the pipeline. Each thread, and each asynchronous task, sees its own alone.
CALLS: ContextVar[Mapping[int, SamplingCall]] = ContextVar("calls", default=MappingProxyType({}))


@contextmanager
def begin_call(pipeline: DiffusionPipeline, call: SamplingCall) -> Iterator[SamplingCall]:
    """Make a call the pipeline's call in progress."""
    token = CALLS.set({**CALLS.get(), id(pipeline): call})
    try:
        yield call
    finally:
        CALLS.reset(token)
