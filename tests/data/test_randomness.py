# SPDX-License-Identifier: Apache-2.0
"""Draws depend on the seed and on what they are for, and on nothing else."""

import numpy as np
import pytest
import torch

from diffusers_fm.data.randomness import (
    BatchSlice,
    derive_seed,
    epoch_order,
    make_generator,
    row_uniforms,
    seed_layers,
)
from diffusers_fm.timesteps import sample_timesteps


TOTAL = 24
SLICINGS = [[24], [12, 12], [8, 8, 8], [5, 7, 12], [1] * 24]


def parts(sizes: list[int], step: int = 3, seed: int = 7) -> list[BatchSlice]:
    offsets = np.cumsum([0, *sizes[:-1]]).tolist()
    return [BatchSlice(seed, step, offset, size, TOTAL) for offset, size in zip(offsets, sizes)]


# Sample shapes on both sides of the block size: several samples to a generator, one, and one larger than a block.
@pytest.mark.parametrize("shape", [(1,), (1, 8, 8), (3, 20, 20), (3, 48, 48)], ids=str)
@pytest.mark.parametrize("sizes", SLICINGS, ids=str)
def test_noise_does_not_depend_on_how_a_global_batch_is_cut(shape: tuple[int, ...], sizes: list[int]) -> None:
    whole = parts([TOTAL])[0].normal("noise", shape)
    assert whole.shape == (TOTAL, *shape)
    assert torch.equal(torch.cat([part.normal("noise", shape) for part in parts(sizes)]), whole)


@pytest.mark.parametrize("sizes", SLICINGS, ids=str)
def test_other_draws_do_not_depend_on_how_a_global_batch_is_cut(sizes: list[int]) -> None:
    whole = parts([TOTAL])[0]
    assert torch.equal(
        torch.cat([part.uniform("label_dropout") for part in parts(sizes)]), whole.uniform("label_dropout")
    )
    seeds = [g.initial_seed() for part in parts(sizes) for g in part.sample_generators("posterior")]
    assert seeds == [g.initial_seed() for g in whole.sample_generators("posterior")]
    assert len(set(seeds)) == TOTAL
    t = [
        sample_timesteps(
            "logit_normal", part.size, generator=part.generator("times"), offset=part.offset, total=part.total
        )
        for part in parts(sizes)
    ]
    assert torch.equal(torch.cat(t), sample_timesteps("logit_normal", TOTAL, generator=whole.generator("times")))


def test_draws_differ_by_seed_step_and_purpose() -> None:
    draws = [
        BatchSlice(seed, step, 0, 4, 4).normal(purpose, (1, 8, 8))
        for seed in (0, 1)
        for step in (0, 1)
        for purpose in ("noise", "other")
    ]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_noise_is_standard_normal() -> None:
    noise = torch.cat([BatchSlice(0, step, 0, 64, 64).normal("noise", (3, 8, 8)) for step in range(20)]).double()
    # 245,760 values: the standard errors of mean and variance are 0.0020 and 0.0029; five of each.
    assert abs(noise.mean().item()) < 0.010
    assert abs(noise.var().item() - 1) < 0.015
    # Neighbouring samples and steps are not related: 192 values each, standard error 0.072.
    rows = noise.flatten(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    off_diagonal = (rows @ rows.T).fill_diagonal_(0).abs().max().item()
    assert off_diagonal < 0.072 * 6


def test_seeds_are_the_same_everywhere() -> None:
    # A literal, so that no change of platform or version goes unnoticed: it would change every run.
    assert derive_seed(0, "noise", 1) == 2376061928063757211
    assert make_generator(0, "noise", 1).initial_seed() == derive_seed(0, "noise", 1)


def test_epochs_are_different_permutations() -> None:
    orders = [epoch_order(0, epoch, 100) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(100))
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[1], epoch_order(0, 1, 100))
    assert not np.array_equal(orders[0], epoch_order(1, 0, 100))


def test_row_uniforms_are_uniform_and_independent() -> None:
    keys = np.stack(np.meshgrid(np.arange(100), np.arange(200), indexing="ij"), axis=-1).reshape(-1, 2)
    u = row_uniforms(0, "flip", keys)
    # 20,000 numbers: the largest distance from the uniform distribution is below 1.95 / sqrt(n) 999 times in 1,000.
    distance = np.abs(np.sort(u) - (np.arange(len(u)) + 0.5) / len(u)).max()
    assert distance < 1.95 / np.sqrt(len(u))
    table = u.reshape(100, 200)
    for other in (table[1:, :], table[:, 1:]):
        trimmed = table[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(trimmed.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(len(u))
    assert abs(np.corrcoef(u, row_uniforms(0, "down", keys))[0, 1]) < 5 / np.sqrt(len(u))
    # Each number belongs to its key, whatever the batch.
    assert np.array_equal(row_uniforms(0, "flip", keys[17:40]), u[17:40])


def test_seed_layers_seeds_dropout() -> None:
    def draw(*keys: int) -> torch.Tensor:
        seed_layers(*keys, torch.device("cpu"))
        return torch.nn.functional.dropout(torch.ones(100), 0.5)

    assert torch.equal(draw(0, 1, 0, 0), draw(0, 1, 0, 0))
    for other in ((1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)):
        assert not torch.equal(draw(0, 1, 0, 0), draw(*other))
