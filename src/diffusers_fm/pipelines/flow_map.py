# SPDX-License-Identifier: Apache-2.0
"""Sampling of flow maps: networks that are conditioned on the end of a step, in any pipeline."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils.torch_utils import unwrap_module

from ..models.interval import IntervalConditioning, IntervalEmbedding
from ..schedulers.scheduling_flow_match import FlowMatchScheduler


def condition_network(
    network: ModelMixin, scheduler: FlowMatchScheduler, embedding: IntervalEmbedding | None = None
) -> IntervalConditioning:
    """Conditioning of a network as the scheduler's `flow_map` says, the one it has or a new one."""
    first_block = (scheduler.config.flow_map or {}).get("first_block")
    conditioning = IntervalConditioning.of(network)
    if conditioning is None:
        return IntervalConditioning(network, first_block, embedding)
    if first_block not in (None, conditioning.first_block):
        raise ValueError(
            f"The network is conditioned from block {conditioning.first_block} on, the scheduler's `flow_map` has the"
            f" `first_block` {first_block}."
        )
    return conditioning


@contextmanager
def interval_of_step(
    network: ModelMixin, scheduler: FlowMatchScheduler, embedding: IntervalEmbedding | None = None
) -> Iterator[None]:
    """In this context a network of `solver="flow_map"` gets the end of the scheduler's step."""
    if scheduler.config.solver != "flow_map":
        yield
        return
    conditioning = condition_network(unwrap_module(network), scheduler, embedding)
    kept, conditioning.end = conditioning.end, scheduler.interval_end
    try:
        yield
    finally:
        conditioning.end = kept


def check_flow(scheduler: FlowMatchScheduler, purpose: str) -> None:
    """Raise a `ValueError` for a purpose that a few-step model does not serve."""
    if scheduler.config.solver == "flow_map":
        raise ValueError(
            f"{purpose} needs a flow, and the scheduler samples a flow map: take the flow that it contains, with"
            " `pipeline.scheduler = pipeline.scheduler.with_settings(solver='euler')`."
        )


def with_flow_map(pipeline: DiffusionPipeline, network: str = "transformer") -> DiffusionPipeline:
    """
    Let a stock pipeline sample the flow map that its scheduler describes.

    The network is conditioned on the end of each step by hooks; class, weights and files stay as they are. The
    scheduler's `flow_map` says from which block on, so this call is all that a loaded pipeline needs:

    ```python
    pipeline = with_flow_map(StableDiffusion3Pipeline.from_pretrained(folder))
    pipeline(prompt, num_inference_steps=4, guidance_scale=1.0)
    ```

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline with a [`FlowMatchScheduler`] of `solver="flow_map"`.
        network (`str`, *optional*, defaults to `"transformer"`):
            The component to condition.

    Returns:
        The pipeline.

    Raises:
        ValueError: If the scheduler is another one, or the network cannot be conditioned.
    """
    scheduler = pipeline.scheduler
    if not isinstance(scheduler, FlowMatchScheduler) or scheduler.config.solver != "flow_map":
        solver = scheduler.config.get("solver")
        raise ValueError(
            "The pipeline's scheduler must be a FlowMatchScheduler with the solver 'flow_map', got a"
            f" {type(scheduler).__name__} with {solver!r}."
        )

    def end(timestep: torch.Tensor) -> torch.Tensor:
        """The end of the step of the scheduler that the pipeline has now."""
        return pipeline.scheduler.interval_end(timestep)

    condition_network(unwrap_module(pipeline.components[network]), scheduler).end = end
    return pipeline
