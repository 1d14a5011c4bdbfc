# SPDX-License-Identifier: Apache-2.0
"""Random numbers without state: each draw is a function of the seed and of what it is for.

Nothing has to be saved to resume a run exactly, and the draws for a sample depend neither on the number of processes,
nor on accumulation, nor on the workers that load data.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from ..couplings import minibatch_ot


# A generator is made for each block of samples of about this many values: few seedings for small samples, few numbers
# drawn in vain for large ones.
BLOCK_VALUES = 4096


def derive_seed(*keys: int | str) -> int:
    """
    A seed from any number of keys, the same in every process and on every machine.

    Args:
        keys (`int` or `str`):
            What the random numbers depend on.

    Returns:
        `int`: a number below 2^63.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*keys: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """
    A generator whose numbers depend on the keys alone.

    Args:
        keys (`int` or `str`):
            What the random numbers depend on.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where it draws. The numbers differ from one kind of device to another.

    Returns:
        `torch.Generator`: freshly seeded.
    """
    return torch.Generator(device).manual_seed(derive_seed(*keys))


def epoch_order(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    """
    The order in which an epoch visits the rows of a data set.

    Args:
        seed (`int`):
            Seed of the run.
        epoch (`int`):
            Number of the epoch, from 0.
        num_rows (`int`):
            Rows of the data set.

    Returns:
        `np.ndarray` of shape `(num_rows,)`: a permutation, int64.
    """
    return torch.randperm(num_rows, generator=make_generator(seed, "order", epoch)).numpy()


def row_uniforms(seed: int, purpose: str, keys: np.ndarray) -> np.ndarray:
    """
    One uniform number for each visit of a row, for augmentation. Vectorised: a mix of the keys' bits (splitmix64).

    Args:
        seed (`int`):
            Seed of the run.
        purpose (`str`):
            What the numbers are for; different purposes have independent numbers.
        keys (`np.ndarray` of shape `(batch_size, num_keys)`):
            Epoch and row of each sample, or what else names it.

    Returns:
        `np.ndarray` of shape `(batch_size,)`: float64 in [0, 1).
    """
    bits = np.full(len(keys), derive_seed(seed, purpose), dtype=np.uint64)
    for column in keys.astype(np.uint64).T:
        bits = (bits ^ column) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class BatchSlice:
    """
    The part of a step's global batch that one process handles in one accumulation step.

    Draws are those of the whole global batch, cut to this part: 2 processes with 4 samples each, 1 process with 8, and
    2 accumulation steps of 4 see the same numbers.

    Args:
        seed (`int`):
            Seed of the run.
        step (`int`):
            Number of the optimizer step, from 0.
        offset (`int`):
            Where this part begins in the global batch.
        size (`int`):
            Samples in this part.
        total (`int`):
            Samples in the global batch.
    """

    seed: int
    step: int
    offset: int
    size: int
    total: int

    def generator(self, purpose: str) -> torch.Generator:
        """The generator of the whole global batch for one purpose, on the CPU."""
        return make_generator(self.seed, purpose, self.step)

    def uniform(self, purpose: str) -> torch.Tensor:
        """Uniform numbers, `(size,)` in [0, 1), float32 on the CPU."""
        numbers = torch.rand(self.total, generator=self.generator(purpose))
        return numbers[self.offset : self.offset + self.size]

    def sample_generators(self, purpose: str, device: torch.device | str = "cpu") -> list[torch.Generator]:
        """One generator for each sample of this part, for draws that others make."""
        slots = range(self.offset, self.offset + self.size)
        return [make_generator(self.seed, purpose, self.step, slot, device=device) for slot in slots]

    def normal(self, purpose: str, shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
        """
        Standard normal noise.

        Args:
            purpose (`str`):
                What the noise is for.
            shape (`tuple[int, ...]`):
                The shape of one sample.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
                Where the noise is drawn.

        Returns:
            `torch.Tensor` of shape `(size, *shape)`: float32.
        """
        block = max(1, BLOCK_VALUES // max(1, math.prod(shape)))
        first, last = self.offset // block, (self.offset + self.size - 1) // block
        generator = torch.Generator(device)
        blocks = [
            torch.randn(
                (block, *shape),
                generator=generator.manual_seed(derive_seed(self.seed, purpose, self.step, number)),
                device=device,
            )
            for number in range(first, last + 1)
        ]
        noise = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        start = self.offset - first * block
        return noise[start : start + self.size]


def seed_layers(seed: int, step: int, micro_step: int, process: int, device: torch.device) -> None:
    """
    Seed torch's global generators, which layers such as dropout draw from, for one forward pass.

    Args:
        seed (`int`):
            Seed of the run.
        step (`int`):
            Number of the optimizer step.
        micro_step (`int`):
            Number of the accumulation step within it.
        process (`int`):
            Rank of the process.
        device (`torch.device`):
            Where the model is.
    """
    value = derive_seed(seed, "layers", step, micro_step, process)
    # torch.manual_seed would seed the generators of every kind of device, which takes a hundred times as long.
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        torch.cuda.manual_seed(value)


def draw_noise(
    coupling: str,
    scope: str,
    accelerator: Accelerator,
    part: BatchSlice,
    data: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Noise for a part of a batch, standard normal in float32, paired with its data by the `coupling`, `"independent"` or
    `"minibatch_ot"`, within the `scope`, `"process"` or `"global"`, and within a label, if there are `labels` (dropped
    ones as such). Every process calls it.
    """
    shape = tuple(data.shape[1:])
    # Batches of one step may differ in size, and their noise must not share numbers.
    purpose = f"noise {' x '.join(map(str, shape[1:]))}"
    if coupling == "independent":
        return part.normal(purpose, shape, data.device)
    if scope == "process" or accelerator.num_processes == 1:
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
