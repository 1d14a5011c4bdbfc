# SPDX-License-Identifier: Apache-2.0
"""The training times and the pairing of noise with data that a script's arguments ask for."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ..couplings import minibatch_ot
from ..data.randomness import BatchSlice
from ..paths import ConditionalPath
from ..timesteps import sample_timesteps, shift_time
from .arguments import ObjectiveArguments


def draw_times(args: ObjectiveArguments, path: ConditionalPath, part: BatchSlice, shift: float) -> torch.Tensor:
    """
    Times of a part of a batch, stratified over the global batch.

    Args:
        args ([`ObjectiveArguments`]):
            Of the script.
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


def draw_noise(
    args: ObjectiveArguments,
    accelerator: Accelerator,
    part: BatchSlice,
    data: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Noise for a part of a batch, paired with its data as `--coupling` says. Every process calls it.

    Args:
        args ([`ObjectiveArguments`]):
            Of the script.
        accelerator (`Accelerator`):
            Of the run.
        part ([`BatchSlice`]):
            Which samples of which step.
        data (`torch.Tensor` of shape `(batch_size, ...)`):
            The clean samples.
        labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            What the network is told of them, dropped labels as such: noise is exchanged within a label.

    Returns:
        `torch.Tensor` of the shape of `data`: standard normal, float32.
    """
    shape = tuple(data.shape[1:])
    # Batches of one step may differ in size, and their noise must not share numbers.
    purpose = f"noise {' x '.join(map(str, shape[1:]))}"
    if args.coupling == "independent":
        return part.normal(purpose, shape, data.device)
    if args.coupling_scope == "process" or accelerator.num_processes == 1:
        noise = part.normal(purpose, shape, data.device)
        return noise[minibatch_ot(data, noise, labels).to(data.device)]
    # The parts of all processes lie side by side; noise is drawn, not sent.
    first = accelerator.process_index * part.size
    whole = replace(part, offset=part.offset - first, size=accelerator.num_processes * part.size)
    noise = whole.normal(purpose, shape, data.device)
    everything: Any = accelerator.gather((data.contiguous(), labels) if labels is not None else (data.contiguous(),))
    permutation = torch.arange(whole.size)
    if accelerator.is_main_process:
        permutation = minibatch_ot(everything[0], noise, *everything[1:])
    # One process decides: on unequal devices, roundings might make the pairings differ.
    permutation = broadcast(permutation.to(noise.device))
    return noise[permutation[first : first + part.size]]
