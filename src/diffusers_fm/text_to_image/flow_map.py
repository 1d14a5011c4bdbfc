# SPDX-License-Identifier: Apache-2.0
"""Flow map of a text-to-image pipeline in training."""

import contextlib
from collections.abc import Iterator, Sequence
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
        guidance: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Prediction for steps from `timestep` to `end`, both `timestep_scale` times t; without `end` the flow.

        With `guidance`, of shape `(batch_size,)`, the network is given these scales in place of the call's.
        """
        conditioning: Any = IntervalConditioning.of(unwrap_module(self.field.network))
        kept = conditioning.end
        conditioning.end = None
        if end is not None or guidance is not None:
            # The field asks the pipeline about a new shape by other times and fewer samples.
            self.choose_encoder()
            self.field.ask(sample, **self._condition(captions, size))
        if end is not None:
            # The network gets its time in a unit of the pipeline's.
            part = torch.where(timestep > 0, end / timestep, 1.0)
            conditioning.end = lambda start: start * part.to(start.device)
        try:
            with contextlib.nullcontext() if guidance is None else self._given(guidance):
                return super().forward(sample, timestep, captions, size, dropped)
        finally:
            conditioning.end = kept

    @contextlib.contextmanager
    def _given(self, guidance: torch.Tensor) -> Iterator[None]:
        """In this context the network gets these scales, in the unit in which the pipeline gives it the call's."""
        default = self.field.arguments["guidance_scale"].default
        scales = guidance / self.field.call.get("guidance_scale", default)

        def give(network: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            given = kwargs["guidance"]
            return args, {**kwargs, "guidance": given.flatten()[:1] * scales.to(given)}

        handle = self.field.network.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
