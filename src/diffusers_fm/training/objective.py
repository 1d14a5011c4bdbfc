# SPDX-License-Identifier: Apache-2.0
"""The training times that a script's arguments ask for."""

import argparse

import torch

from ..paths import ConditionalPath
from ..timesteps import sample_timesteps, shift_time
from .randomness import BatchSlice


def draw_times(args: argparse.Namespace, path: ConditionalPath, part: BatchSlice, shift: float) -> torch.Tensor:
    """
    Times of a part of a batch, stratified over the global batch.

    Args:
        args (`argparse.Namespace`):
            With the arguments of `add_objective_arguments`.
        path ([`ConditionalPath`]):
            The path, on which the shift acts in the straight coordinates.
        part ([`BatchSlice`]):
            Which samples of which step.
        shift (`float`):
            Shift towards the noise, 1 is none (arXiv 2403.03206, equation 23).

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: in (0, 1), 0 = data, 1 = noise, float64 on the CPU.
    """
    t = sample_timesteps(
        args.timestep_density,
        part.size,
        generator=part.generator("times"),
        offset=part.offset,
        total=part.total,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
        alpha=args.density_alpha,
        beta=args.density_beta,
    )
    # The sampler shifts the times of the straight coordinates; on the OT path these are t itself.
    return t if shift == 1 else path.time_at(shift_time(path.ratio(t), shift))
