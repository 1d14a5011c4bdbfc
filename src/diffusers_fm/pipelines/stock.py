# SPDX-License-Identifier: Apache-2.0
"""Pipelines of diffusers that train or sample with `FlowMatchScheduler`, for readers who have diffusers alone."""

import copy
from typing import TypeVar

from diffusers import DiffusionPipeline

from ..schedulers.scheduling_flow_match import FlowMatchScheduler


PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)


def with_stock_scheduler(pipeline: PipelineT) -> PipelineT:
    """
    The same pipeline with diffusers' own scheduler in place of ours, see [`FlowMatchScheduler.to_stock`]: what it
    saves and pushes loads where this package is not installed, and gives the same images.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            A pipeline of diffusers, such as `StableDiffusion3Pipeline`.

    Returns:
        [`~diffusers.DiffusionPipeline`]: Of the same class; it shares all other components, and `pipeline` itself is
        left as it is.

    Raises:
        ValueError: If the scheduler has no counterpart in diffusers, or something else of the pipeline is not
            diffusers' own.
    """
    own_package = __name__.partition(".")[0]
    components = {name: part for name, part in pipeline.components.items() if name != "scheduler"}
    own = [
        type(part).__name__
        for part in (pipeline, *components.values())
        if type(part).__module__.partition(".")[0] == own_package
    ]
    if own:
        raise ValueError(
            f"Stock diffusers cannot load {', '.join(own)}: only a pipeline of its own classes can become one."
        )
    stock = copy.copy(pipeline)
    if isinstance(pipeline.scheduler, FlowMatchScheduler):
        stock.scheduler = pipeline.scheduler.to_stock()
    return stock
