# SPDX-License-Identifier: Apache-2.0
"""Guiders of diffusers (`diffusers.guiders`) in a sampling loop: space, interval and first steps."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.guiders import BaseGuidance
from torch import nn

from ..coordinates import Coordinates
from ..paths import ConditionalPath
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler


# What a guider is handed: noise - data, or an estimate of the data or of the noise.
SPACES = ("velocity", "sample", "epsilon")
# What a pipeline's configuration holds beside the guider.
GUIDANCE_SETTINGS = ("guidance_space", "guidance_interval")
# Guiders whose papers mean the estimate of the data; where nothing is said, the others get the velocity.
DATA_GUIDERS = ("AdaptiveProjectedGuidance", "AdaptiveProjectedMixGuidance")

# A guider counts steps. Here it is handed so many, of equal length in sigma, whatever grid the loop has.
NUM_LEVELS = 1000
# Where the network's answer says nothing about the estimate, both ways lead by so much beside that time.
MARGIN = 1e-4

Answer = Callable[[], torch.Tensor]


def choose_space(guider: BaseGuidance, space: str | None) -> str:
    """Space in which a guider works: the one given, or that of its paper."""
    if space is None:
        return "sample" if type(guider).__name__ in DATA_GUIDERS else "velocity"
    return space


def check_guidance_settings(guider: Any, network: object, space: str | None, interval: Sequence[float] | None) -> None:
    """Raise a `ValueError` for a guider, a space or an interval that are none, and for settings without a guider."""
    if guider is not None and not isinstance(guider, BaseGuidance):
        raise ValueError(f"`guider` must be one of `diffusers.guiders`, got {type(guider).__name__}.")
    if space not in (None, *SPACES):
        raise ValueError(f"`guidance_space` must be one of {list(SPACES)}, or None, got {space!r}.")
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] < interval[1] <= 1):
        raise ValueError(f"`guidance_interval` must be two rising sigmas in [0, 1], got {interval!r}.")
    if guider is None and (network, space, interval) != (None, None, None):
        raise ValueError("`guiding_network`, `guidance_space` and `guidance_interval` need a `guider`, got none.")


def without_guidance(components: dict[str, Any]) -> dict[str, Any]:
    """Components given to a pipeline: one that is given no guider, `None`, is not left with another's settings."""
    if "guider" not in components or components["guider"] is not None:
        return components
    return dict.fromkeys(("guiding_network", *GUIDANCE_SETTINGS)) | components


class Guidance:
    """
    A guider in one sampling loop.

    The guider is handed predictions of one space on every path: `velocity`, noise - data of the straight coordinates,
    in which each path is the OT path; `sample`, the estimate of the data; `epsilon`, that of the noise. Where it asks
    for the conditional prediction alone, that is returned as it is. Its own shares of the steps (`start`, `stop`) are
    shares of sigma from the start of the path to 0, and so do not move with the grid.

    Args:
        guider ([`~diffusers.guiders.BaseGuidance`]):
            Guider; a copy of it keeps the state of the loop.
        scheduler ([`FlowMatchScheduler`]):
            Scheduler of the loop, laid out.
        network (`nn.Module`):
            Network, in which some guiders skip layers.
        space (`str`, *optional*):
            `velocity`, `sample` or `epsilon`; by default that of the guider's paper.
        interval (`Sequence[float]`, *optional*):
            Least and greatest sigma, `scheduler.sigmas`, at which to guide; outside, predictions are conditional.
    """

    def __init__(
        self,
        guider: BaseGuidance,
        scheduler: FlowMatchScheduler,
        network: nn.Module,
        space: str | None = None,
        interval: Sequence[float] | None = None,
    ) -> None:
        check_guidance_settings(guider, None, space, interval)
        self.guider, self.scheduler, self.network = copy.copy(guider), scheduler, network
        self.space, self.interval = choose_space(guider, space), (0.0, 1.0) if interval is None else interval
        self._has_begun = False

    @property
    def num_zero_steps(self) -> int:
        """First steps in which the velocity is zero (CFG-Zero*, arXiv 2503.18886)."""
        enabled = getattr(self.guider, "_enabled", True)
        return int(self.guider.config.get("zero_init_steps", 0)) if enabled else 0

    def skip_zero_steps(self, x_t: torch.Tensor) -> torch.Tensor:
        """
        Begin the scheduler's loop after the steps of velocity zero, so that no solver takes them into its history.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                Point of the path where the loop begins.

        Returns:
            `torch.Tensor`: point of the path where it begins now, of the same place in the straight coordinates.

        Raises:
            ValueError: if no step is left.
        """
        scheduler, count = self.scheduler, self.num_zero_steps
        if count == 0:
            return x_t
        if count >= (scheduler.num_inference_steps or 0):
            raise ValueError(
                f"The guider's `zero_init_steps` zeroes {count} of {scheduler.num_inference_steps} steps: one at least"
                " must be left."
            )
        index = count * scheduler.order
        scheduler.set_begin_index(index)
        t = scheduler.time(to_float64(scheduler.timesteps[[0, index]].cpu()))
        before, after = Coordinates(scheduler.path, "ot").scale_at(t).tolist()
        return x_t * (after / before)

    def __call__(self, x_t: torch.Tensor, timestep: torch.Tensor, conditional: Answer, unconditional: Answer) -> Any:
        """
        Guided prediction.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                Point of the path.
            timestep (`torch.Tensor` of shape `()`):
                Timestep of the network.
            conditional, unconditional (`Callable`):
                Called without arguments, where the prediction is needed: that of the network with its condition, and
                the one to be guided away from.

        Returns:
            `torch.Tensor` of the shape of `x_t`: of the scheduler's `prediction_type`.
        """
        t = self.scheduler.time(to_float64(timestep.cpu()))
        sigma = self.scheduler.path.ratio(t).item()
        answers = {"answer": (conditional, unconditional)}
        if not self._has_begun:
            # A guider makes the state of a loop at step 0, and there alone.
            self.guider.set_state(0, NUM_LEVELS, timestep)
            self.guider.prepare_inputs(answers)  # pyright: ignore[reportArgumentType]
        level = math.floor(NUM_LEVELS * (1 - sigma / self.scheduler.path.ratio_max))
        self.guider.set_state(max(level, self.num_zero_steps, int(self._has_begun)), NUM_LEVELS, timestep)
        self._has_begun = True
        batches = self.guider.prepare_inputs(answers)  # pyright: ignore[reportArgumentType]
        if len(batches) == 1 or not self.interval[0] <= sigma <= self.interval[1]:
            return conditional()
        sign = -1.0 if self.scheduler.config.invert_sigmas else 1.0
        on_sample, on_output = conversion(self.scheduler.path, t, self.scheduler.config.prediction_type, self.space)
        for batch in batches:
            self.guider.prepare_models(self.network)
            try:
                batch.noise_pred = on_sample * x_t + sign * on_output * batch.answer()
            finally:
                self.guider.cleanup_models(self.network)
        return sign * (self.guider(batches).pred - on_sample * x_t) / on_output


def conversion(path: ConditionalPath, t: torch.Tensor, prediction_type: str, space: str) -> tuple[float, float]:
    """Weights of `x_t` and of the prediction in what the guider is handed, the second not zero; `t` of shape `()`."""
    target = (-torch.ones_like(t), torch.ones_like(t)) if space == "velocity" else space
    beside = t.clamp(MARGIN, 1 - MARGIN)
    if bool(path.determines(t, prediction_type, target)):
        on_sample, on_output = path.coefficients(t, prediction_type, target)
        if on_output != 0:
            return on_sample.item(), on_output.item()
    on_sample, on_output = path.coefficients(beside, prediction_type, target)
    return on_sample.item(), on_output.item()
