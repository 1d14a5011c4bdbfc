# SPDX-License-Identifier: Apache-2.0
"""Flow map of a text-to-image pipeline in training."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from ..models.interval import IntervalConditioning
from ..pipelines.flow_map import condition_network
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.flow_maps import FlowMapArguments
from .field import Size, TrainedField


class IntervalField(TrainedField):
    """Network of a text-to-image pipeline whose last blocks get the end of an interval."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntervalField":
        copied = super().__deepcopy__(memo)
        copied.__class__ = IntervalField
        return copied  # pyright: ignore[reportReturnType]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        captions: Sequence[str],
        size: Size,
        dropped: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Prediction for steps from `timestep` to `end`, both `timestep_scale` times t; without `end` the flow."""
        conditioning: Any = IntervalConditioning.of(unwrap_module(self.field.network))
        kept = conditioning.end
        conditioning.end = None
        if end is not None:
            # The field asks the pipeline about a new shape by other times and fewer samples.
            self.choose_encoder()
            self.field.ask(sample, **self._condition(captions, size))
            # The network gets its time in a unit of the pipeline's.
            part = torch.where(timestep > 0, end / timestep, 1.0)
            conditioning.end = lambda start: start * part.to(start.device)
        try:
            return super().forward(sample, timestep, captions, size, dropped)
        finally:
            conditioning.end = kept


def set_flow_map(field: TrainedField, scheduler: FlowMatchScheduler, args: FlowMapArguments) -> FlowMatchScheduler:
    """Condition the field's network on the end of a step, and give its pipeline a scheduler that says so."""
    known = scheduler.config.flow_map or {}
    flow_map: dict[str, Any] = {
        **({"first_block": args.first_block} if args.first_block is not None else known),
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.learned_guidance_scale,
    }
    settings = {"solver": "flow_map", "sampling_path": "ot"}
    scheduler = scheduler.with_settings(**settings, flow_map=flow_map)
    flow_map["first_block"] = condition_network(unwrap_module(field.field.network), scheduler).first_block
    scheduler = scheduler.with_settings(flow_map=flow_map)
    field.pipeline.scheduler = scheduler
    field.set_scheduler(scheduler)
    return scheduler
