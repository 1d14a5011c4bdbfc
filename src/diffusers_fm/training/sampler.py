# SPDX-License-Identifier: Apache-2.0
"""Settings of sampling that a run finds out and saves with its pipeline."""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.cache import DryAccelerator
from ..data.loading import TrainingData
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .run import TrainingRun


logger = logging.getLogger(__name__)

# Samples that the standard deviation of the data is measured on.
NUM_MEASURED = 512

SETTINGS = frozenset(inspect.signature(FlowMatchScheduler.__init__).parameters)


def is_stock(scheduler: FlowMatchScheduler) -> bool:
    """Whether a scheduler was made of a configuration of diffusers' own, and stays as it is."""
    foreign = [name for name in scheduler.config if name not in SETTINGS and not name.startswith("_")]
    return bool(foreign) or scheduler.config.timestep_spacing == "linspace"


@torch.no_grad()
def standard_deviation(data: TrainingData, encode: Callable[[dict[str, Any]], torch.Tensor], batch_size: int) -> float:
    """
    Standard deviation of data as the flow sees it, over the values of all pixels and channels.

    Args:
        data ([`ImageData`], [`StreamData`] or [`PairData`]):
            Data set, of which `NUM_MEASURED` samples are read, always the same.
        encode (`Callable`):
            Called as `encode(batch)`: pixels in [-1, 1] or latents, of shape `(batch_size, ...)`.
        batch_size (`int`):
            Samples at once.

    Returns:
        `float`: rounded to four digits.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in data.spread_batches(NUM_MEASURED, batch_size):
        values = to_float64(encode(batch))
        count += values.numel()
        total += values.sum().item()
        squares += values.square().sum().item()
    variance = squares / count - (total / count) ** 2
    return float(f"{max(variance, 0.0) ** 0.5:.4g}")


def measure_sigma_data(
    run: TrainingRun[Any],
    pipeline: Any,
    data: TrainingData,
    encode: Callable[[dict[str, Any]], torch.Tensor],
) -> None:
    """
    Save the standard deviation of the data in a pipeline's scheduler, see [`standard_deviation`].

    A scheduler that has one keeps it, and one that was made of a stock configuration stays as it is. Every process
    calls it.
    """
    scheduler = pipeline.scheduler
    if isinstance(run.accelerator, DryAccelerator) or not isinstance(scheduler, FlowMatchScheduler):
        return
    if scheduler.config.sigma_data is not None or is_stock(scheduler):
        return
    found = [standard_deviation(data, encode, run.args.eval_batch_size) if run.accelerator.is_main_process else 0.0]
    sigma_data = broadcast_object_list(found)[0]
    if sigma_data == 0.0:
        logger.warning("All values of the data are equal: no `sigma_data` is saved.")
        return
    logger.info("Standard deviation of the data: %g, saved as `sigma_data`.", sigma_data)
    pipeline.scheduler = scheduler.with_settings(sigma_data=sigma_data)
