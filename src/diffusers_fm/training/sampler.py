# SPDX-License-Identifier: Apache-2.0
"""Settings of sampling that a run finds out and saves with its pipeline."""

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from ..data.cache import DryAccelerator
from ..data.loading import TrainingData
from ..data.randomness import make_generator
from ..pipelines.base import FlowMatchPipelineBase
from ..precision import to_float64
from ..schedulers.recommendation import recommend, solver_settings
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..schedulers.settings import BY_ESTIMATES, GRIDS
from ..schedulers.watchers import Run
from .arguments import SamplingArguments
from .metrics import rounded
from .run import TrainingRun
from .validation import EVALUATION_SEED, quiet_copy


logger = logging.getLogger(__name__)

# Samples that the standard deviation of the data is measured on.
NUM_MEASURED = 512
# Values of all samples by which solvers are tried, and the fewest samples: a search takes up to 1,700 calls.
SEARCHED_VALUES, MIN_SEARCHED = 2**14, 8

DEFAULTS = {name: each.default for name, each in inspect.signature(FlowMatchScheduler.__init__).parameters.items()}
# A scheduler in which these are as made afresh says nothing on how to sample.
CHOSEN = ("solver", "sampling_path", "timestep_spacing", "s_churn", "invert_sigmas", *BY_ESTIMATES, *GRIDS)


def is_stock(scheduler: FlowMatchScheduler) -> bool:
    """Return whether a scheduler was made of a configuration of diffusers' own, and so stays as it is."""
    foreign = [name for name in scheduler.config if name not in DEFAULTS and not name.startswith("_")]
    return bool(foreign) or scheduler.config.timestep_spacing == "linspace"


@torch.no_grad()
def standard_deviation(data: TrainingData, encode: Callable[[dict[str, Any]], torch.Tensor], batch_size: int) -> float:
    """Standard deviation of all values of `NUM_MEASURED` samples, always the same, to four digits."""
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
    Save the standard deviation of the data, over the values of all pixels and channels, in a pipeline's scheduler.

    A scheduler that has one keeps it, and one that was made of a stock configuration stays as it is. Every process
    calls it.

    Args:
        run ([`TrainingRun`]), pipeline ([`~diffusers.DiffusionPipeline`]):
            Run, and pipeline whose scheduler is replaced.
        data ([`ImageData`], [`StreamData`] or [`ArrayData`]):
            Data set.
        encode (`Callable`):
            Called as `encode(batch)`: pixels in [-1, 1] or latents, of shape `(batch_size, ...)`.
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


def num_searched(shape: Sequence[int], most: int) -> int:
    """Samples of a shape by which solvers are tried: the fewer, the larger they are."""
    return min(most, max(MIN_SEARCHED, math.ceil(SEARCHED_VALUES / math.prod(shape))))


def choose_sampler(
    run: TrainingRun[Any], pipeline: FlowMatchPipelineBase, num_samples: int, **call: Any
) -> dict[str, float]:
    """
    Settings by which the trained pipeline samples from now on: those of the arguments, or the recommended ones.

    `--num_inference_steps` is saved as it is, with `--solver` or the scheduler's own. Without it, a scheduler of ours
    that is as made afresh gets what [`~schedulers.recommendation.recommend`] finds, as do `--solver` and
    `--calibrate_steps`. Others stay as they are. The main process calls it.

    Args:
        run ([`TrainingRun`]):
            With the arguments.
        pipeline ([`~pipelines.base.FlowMatchPipelineBase`]):
            Pipeline, whose scheduler is replaced.
        num_samples (`int`):
            Samples of a trial.
        call:
            Arguments of the pipeline's call, for so many samples.

    Returns:
        `dict[str, float]`: `sampling_error` and `euler_error`, if there was a search.
    """
    args, scheduler, steps = run.args, pipeline.scheduler, run.args.num_inference_steps
    asked = args.solver is not None or bool(args.calibrate_steps)
    says_nothing = scheduler.config.default_num_inference_steps is None and all(
        scheduler.config[name] == DEFAULTS[name] for name in CHOSEN
    )
    if not asked and (is_stock(scheduler) or not (says_nothing or steps)):
        return {}
    if steps is not None and not args.calibrate_steps:
        settings = solver_settings(args.solver) if args.solver is not None else {}
        pipeline.scheduler = scheduler.with_settings(**settings, default_num_inference_steps=steps)
        return {}
    with quiet_copy(pipeline) as sampler:

        def sample(candidate: FlowMatchScheduler, num_inference_steps: int, seed: int) -> None:
            sampler.scheduler = candidate
            sampler(  # pyright: ignore[reportCallIssue]
                **call,
                num_inference_steps=num_inference_steps,
                guidance_scale=args.guidance_scale,
                generator=[make_generator(EVALUATION_SEED, "sampler", seed, i) for i in range(num_samples)],
                output_type="latent",
            )

        pipeline.scheduler, figures = find_sampler(args, scheduler, sample)
    return figures


def find_sampler(
    args: SamplingArguments, scheduler: FlowMatchScheduler, sample: Run
) -> tuple[FlowMatchScheduler, dict[str, float]]:
    """Scheduler that [`recommend`] finds with the solver and steps of the arguments, and the figures of its errors."""
    logger.info("Solvers and steps of sampling are tried out; --num_inference_steps N of a later run skips this.")
    found = recommend(sample, scheduler, solver=args.solver, calibrate_steps=args.calibrate_steps)
    logger.info("Sampling by default: %s.", found)
    return found.scheduler, {"sampling_error": rounded(found.error), "euler_error": rounded(found.baseline)}
