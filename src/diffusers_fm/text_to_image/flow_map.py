# SPDX-License-Identifier: Apache-2.0
"""Flow map of a text-to-image pipeline in training."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from ..models.interval import IntervalConditioning
from .field import Size, TrainedField


class IntervalField(TrainedField):
    """Network of a text-to-image pipeline whose last blocks get the end of an interval."""

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
