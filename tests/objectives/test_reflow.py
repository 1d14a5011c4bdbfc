# SPDX-License-Identifier: Apache-2.0
"""Reflow: pairs of noise and sample as a data set, and training on them."""

import re
from pathlib import Path
from types import ModuleType

import datasets
import numpy as np
import pytest
import torch
from processes import check_processes
from tiny_pipelines import tiny_pipeline
from training_runs import (
    ROOT,
    assert_same_weights,
    command_line,
    load,
    load_script,
    read_log,
    run_script,
)
from training_runs import script as training

from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.loading import load_arrays


SCRIPT = ROOT / "training_scripts" / "draw_pairs.py"
FLOW_MAP = ROOT / "training_scripts" / "train_flow_map.py"
script = load_script(SCRIPT)
NAMES = dict(enumerate(["circle", "cross", "square", "star", "line"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained pipeline, as far as pairs are concerned."""
    pipeline = tiny_pipeline("unet-classes")
    pipeline.register_to_config(id2label=NAMES)
    folder = tmp_path_factory.mktemp("pipelines") / "unet"
    pipeline.save_pretrained(folder)
    return folder


def pair_line(folder: Path, output_dir: Path, **options: object) -> list[str]:
    values = {
        "num_pairs": 20,
        "shard_size": 8,
        "num_inference_steps": 2,
        "eval_batch_size": 5,
        "use_cpu": True,
        **options,
    }
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    return [f"--pretrained_model_name_or_path={folder}", f"--output_dir={output_dir}", *words]


def draw(folder: Path, output_dir: Path, **options: object) -> datasets.Dataset:
    run_script(script, pair_line(folder, output_dir, **options))
    return read_pairs(output_dir)


def read_pairs(folder: Path) -> datasets.Dataset:
    """The rows, by `datasets` alone."""
    files = sorted(str(file) for file in folder.glob("train-*.parquet"))
    return datasets.Dataset.from_parquet(files, cache_dir=str(folder.parent / "cache")).with_format("numpy")


@pytest.fixture(scope="module")
def pairs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("pairs") / "pairs"
    draw(folder, output_dir)
    return output_dir


def same_pairs(first: Path, second: Path) -> bool:
    one, other = read_pairs(first), read_pairs(second)
    return all(np.array_equal(one[name][:], other[name][:]) for name in ("noise", "sample", "label"))


def test_a_pair_is_noise_and_what_the_pipeline_makes_of_it(folder: Path, tmp_path: Path) -> None:
    pipeline = load(folder)
    for options in ({}, {"guidance_scale": 2.0, "solver": "midpoint"}):
        rows = draw(folder, tmp_path / str(len(options)), **options)
        assert len(rows) == 20
        assert rows.features["label"].names == list(NAMES.values())
        assert rows["label"][:6].tolist() == [0, 1, 2, 3, 4, 0]
        noise = torch.from_numpy(rows["noise"][:])
        assert noise.dtype == torch.float32
        drawn = pipeline(
            class_labels=rows["label"][:].tolist(),
            latents=noise,
            num_inference_steps=2,
            output_type="latent",
            **options,
        ).images
        assert torch.allclose(torch.from_numpy(rows["sample"][:]), drawn, atol=1e-5)
    # Standard normal, all different.
    assert len(np.unique(noise)) == noise.numel()
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_interrupted_and_shared_work_gives_the_same_pairs(folder: Path, pairs: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    draw(folder, again)
    kept, lost = again / "train-00000-of-00003.parquet", again / "train-00001-of-00003.parquet"
    before = kept.stat().st_mtime_ns
    lost.unlink()
    # What a killed process leaves is no part of the data.
    (again / ".partial-1234-train-00001-of-00003.parquet").write_bytes(b"half")
    run_script(script, pair_line(folder, again))
    assert kept.stat().st_mtime_ns == before
    assert same_pairs(again, pairs)
    two = tmp_path / "two"
    check_processes(SCRIPT, pair_line(folder, two), num_processes=2)
    assert same_pairs(two, pairs)


def test_a_folder_of_other_pairs_is_refused(folder: Path, pairs: Path) -> None:
    with pytest.raises(ValueError, match=re.escape("holds other pairs (seed was 0 and is 1)")):
        run_script(script, pair_line(folder, pairs, seed=1))
    with pytest.raises(ValueError, match="--solver must be one of euler"):
        parse_arguments(script.ScriptArguments, pair_line(folder, pairs, solver="magic"))


def pair_options(**options: object) -> dict[str, object]:
    return {"noise_column": "noise", "image_column": "sample", "timestep_density": "u_shaped", **options}


def test_batches_are_pairs_and_no_noise_is_drawn(folder: Path, pairs: Path, tmp_path: Path) -> None:
    pipeline = load(folder)
    line = command_line(folder, pairs, tmp_path, **pair_options())
    data, held_out = load_arrays(parse_arguments(training.ScriptArguments, line), pipeline)
    assert held_out is None and len(data) == 20
    assert list(pipeline.config.id2label.values()) == list(NAMES.values())
    batch = data[np.array([[0, 3], [1, 0]])]
    rows = read_pairs(pairs)
    for name, column in (("noise", "noise"), ("data", "sample"), ("labels", "label")):
        assert torch.equal(batch[name], torch.from_numpy(rows[[3, 0]][column]))
    # Two runs on the same pairs differ by their seed in times and order alone: a noise of their own would show.
    losses = [zero_loss(training, folder, pairs, tmp_path / str(seed), seed=seed) for seed in range(2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    # A flow map with r = t.
    loss = zero_loss(load_script(FLOW_MAP), folder, pairs, tmp_path / "map", seed=2, equal_share=1.0)
    assert loss == pytest.approx(losses[0], rel=1e-6)


def zero_loss(script: ModuleType, folder: Path, pairs: Path, output_dir: Path, **options: object) -> float:
    """First loss of a batch of all pairs, by a network whose answer is zero: the mean square of noise - data."""
    network = load(folder)
    for parameter in network.unet.parameters():
        parameter.data.zero_()
    network.save_pretrained(output_dir / "zero")
    line = command_line(
        output_dir / "zero",
        pairs,
        output_dir / "run",
        train_batch_size=20,
        max_train_steps=1,
        **pair_options(**options),
    )
    run_script(script, line)
    return read_log(output_dir / "run", "loss")[0][1]


def test_a_resumed_run_on_pairs_is_an_uninterrupted_one(folder: Path, pairs: Path, tmp_path: Path) -> None:
    options = pair_options(checkpointing_steps=2, use_ema=True)
    run_script(training, command_line(folder, pairs, tmp_path / "whole", **options))
    run_script(training, command_line(folder, pairs, tmp_path / "part", **{**options, "max_train_steps": 2}))
    line = command_line(folder, pairs, tmp_path / "part", **options, resume_from_checkpoint="latest")
    run_script(training, line)
    assert_same_weights(tmp_path / "whole", tmp_path / "part")


def test_a_dry_run_counts_pairs(folder: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_script(training, command_line(folder, pairs, tmp_path / "run", dry_run=True, **pair_options()))
    assert "20 arrays of 1 x 8 x 8, each with its noise" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coupling": "minibatch_ot"}, "--coupling minibatch_ot does not go with --noise_column"),
        ({"streaming": True}, "--streaming True does not go with --noise_column"),
        ({"random_flip": True}, "--random_flip True does not go with --noise_column"),
        ({"noise_column": "label"}, "Row 0 of 'label' must have the shape (1, 8, 8), got the shape ()"),
        ({"image_column": "image"}, "'image' is none of the columns ['noise', 'sample', 'label']"),
        ({"label_column": "class"}, "no label column 'class'"),
    ],
)
def test_what_does_not_go_with_pairs_is_refused(
    options: dict, message: str, folder: Path, pairs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_script(training, command_line(folder, pairs, tmp_path / "run", **pair_options(**options)))
