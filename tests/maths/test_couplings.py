# SPDX-License-Identifier: Apache-2.0
"""Optimal transport: in a batch the best permutation, within a class alone; to all data cells of equal mass."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from training_runs import assert_same_weights, make_dataset, read_log, save_untrained, train

from diffusers_fm.arguments import parse_arguments
from diffusers_fm.couplings import cell_masses, fit_semidiscrete, minibatch_ot, semidiscrete_assignment
from diffusers_fm.text_to_image.arguments import TextToImageArguments


def cost(data: torch.Tensor, noise: torch.Tensor) -> float:
    return (data - noise).square().flatten(1).sum(1).mean().item()


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 1, 2, 2)])
def test_no_permutation_is_better(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        data, noise = torch.randn(2, *shape, generator=generator)
        permutation = minibatch_ot(data, noise)
        assert sorted(permutation.tolist()) == list(range(7))
        rows = [x.reshape(7, -1) for x in (data, noise)]
        best = min(cost(rows[0], rows[1][list(order)]) for order in itertools.permutations(range(7)))
        assert cost(rows[0], rows[1][permutation]) == pytest.approx(best, rel=1e-6)
        # On any path the cost is that of `a data` and `b noise`, and the pairing the same.
        assert torch.equal(minibatch_ot(0.3 * data, 7 * noise), permutation)


def test_noise_is_exchanged_within_a_label_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, 30, 2, generator=generator)
    labels = torch.arange(30) % 4
    permutation = minibatch_ot(data, noise, labels)
    assert sorted(permutation.tolist()) == list(range(30))
    assert torch.equal(labels[permutation], labels)
    for label in range(4):
        members = labels == label
        alone = minibatch_ot(data[members], noise[members])
        assert torch.equal(noise[permutation][members], noise[members][alone])


def test_noise_is_independent_of_the_label_only_if_labels_are_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    sums, num_batches = torch.zeros(2, 2), 200
    for _ in range(num_batches):
        labels = torch.arange(64) % 2
        data = torch.randn(64, 1, generator=generator) + 4.0 * labels[:, None] - 2
        noise = torch.randn(64, 1, generator=generator)
        for row, seen in enumerate((None, labels)):
            paired = noise[minibatch_ot(data, noise, seen)][:, 0]
            sums[row] += torch.stack([paired[labels == label].mean() for label in (0, 1)])
    blind, seeing = sums / num_batches
    # Each class takes the nearer half of the noise, whose mean is sqrt(2/pi); two classes 4 apart hardly mix.
    torch.testing.assert_close(blind, torch.tensor([-1.0, 1.0]) * math.sqrt(2 / math.pi), rtol=0, atol=0.05)
    # Standard error of a mean of 200 x 32 normal numbers: 0.0125.
    assert seeing.abs().max() < 4 * 0.0125


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(3, 2\) and \(2, 2\)"):
        minibatch_ot(torch.zeros(3, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"one label for each of 3 samples, got the shape \(2,\)"):
        minibatch_ot(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(2))


def test_a_script_with_captions_refuses_it() -> None:
    words = ["--pretrained_model_name_or_path=x", "--dataset_name=x", "--coupling"]
    assert parse_arguments(TextToImageArguments, [*words, "independent"]).coupling == "independent"
    with pytest.raises(ValueError, match="'minibatch_ot' is not 'independent', the only coupling here"):
        parse_arguments(TextToImageArguments, [*words, "minibatch_ot"])


def test_training_with_it(tmp_path: Path) -> None:
    data, pipeline = make_dataset(tmp_path / "data"), save_untrained(tmp_path / "untrained", "unet")
    runs = {
        name: train(pipeline, data, tmp_path / name, **options, checkpointing_steps=2)
        for name, options in {
            "independent": {},
            "minibatch_ot": {"coupling": "minibatch_ot"},
            "resumed": {"coupling": "minibatch_ot", "max_train_steps": 2, "lr_scheduler": "constant"},
        }.items()
    }
    train(
        pipeline,
        data,
        runs["resumed"],
        coupling="minibatch_ot",
        lr_scheduler="constant",
        resume_from_checkpoint="latest",
        checkpointing_steps=2,
    )
    assert_same_weights(runs["minibatch_ot"], runs["resumed"])
    with pytest.raises(AssertionError):
        assert_same_weights(runs["minibatch_ot"], runs["independent"])
    assert len(read_log(runs["minibatch_ot"], "time_share/coupling")) == 4
    assert read_log(runs["independent"], "time_share/coupling") == []


def test_cells_on_a_line_are_the_quantiles_of_the_noise() -> None:
    data = torch.tensor([2.0, -3.0, 0.1, 0.4, -0.2], dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(0)
    potentials = fit_semidiscrete(data, generator, 600)
    order = data[:, 0].argsort()
    # Between neighbours the wall is where both cost the same.
    a, b = data[order[:-1], 0], data[order[1:], 0]
    walls = (b.square() - a.square() - (potentials[order[1:]] - potentials[order[:-1]])) / (2 * (b - a))
    quantiles = torch.special.ndtri(torch.arange(1, 5, dtype=torch.float64) / 5)
    torch.testing.assert_close(walls, quantiles, rtol=0, atol=0.02)
    noise = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
    found = semidiscrete_assignment(data, noise, potentials)
    assert torch.equal(data[found, 0], data[found, 0].sort().values)


def test_fitted_cells_keep_the_marginal_of_the_data_and_the_watch_sees_where_not() -> None:
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(40, 1, 3, 3, generator=generator)
    fitted, plain = fit_semidiscrete(data, generator, 300), torch.zeros(40)
    (shares, variance), (_, unfitted) = (cell_masses(data, each, 40_000, generator) for each in (fitted, plain))
    assert shares.mean() == pytest.approx(1.0)
    # The counts of 1,000 samples of noise for each have a variance of 0.001, and its own deviation is a fifth of that.
    assert abs(variance) < 2e-3
    assert unfitted > 0.3
    # And the pairs cost less than independent ones.
    noise = torch.randn(2000, 1, 3, 3, generator=generator)
    paired = data[semidiscrete_assignment(data, noise, fitted)]
    anyhow = data[torch.randint(40, (2000,), generator=generator)]
    assert cost(paired, noise) < 0.8 * cost(anyhow, noise)


def test_few_samples_of_many_values_share_noise_of_all_values() -> None:
    """The fit sees noise in the span of the data alone, of 6 dimensions; the cells are those of noise in all 300."""
    generator = torch.Generator().manual_seed(0)
    data = (
        torch.randn(6, 3, 10, 10, generator=generator, dtype=torch.float64)
        * torch.linspace(0.02, 0.3, 6).reshape(6, 1, 1, 1).double()
    )
    potentials = fit_semidiscrete(data, generator, 400)
    noise = torch.randn(60_000, 3, 10, 10, generator=generator, dtype=torch.float64)
    counts = semidiscrete_assignment(data, noise, potentials).bincount(minlength=6)
    assert (counts / 10_000 - 1).abs().max() < 0.05
    unfitted = semidiscrete_assignment(data, noise, torch.zeros(6, dtype=torch.float64)).bincount(minlength=6)
    assert (unfitted / 10_000 - 1).abs().max() > 0.5
    shares, _ = cell_masses(data, potentials, 60_000, generator)
    assert (shares - counts / 10_000).abs().max() < 0.05
