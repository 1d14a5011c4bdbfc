# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at any moment and resumed, again and again, end as the uninterrupted ones: bit for bit."""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import datasets
import pytest
from training_runs import (
    SCRIPT,
    assert_same_weights,
    command_line,
    make_dataset,
    read_log,
    run_script_file,
    save_untrained,
    train,
)

from diffusers_fm.training.checkpoints import latest_checkpoint


STEPS = 60

# What a run is hit by, one after the other: a signal that asks or one that does not, at a random moment of the loop,
# while a checkpoint is being written, or while the trained pipeline is.
HITS = [
    ("loop", signal.SIGKILL),
    ("checkpoint", signal.SIGKILL),
    ("loop", signal.SIGTERM),
    ("checkpoint", signal.SIGKILL),
    ("loop", signal.SIGKILL),
    ("checkpoint", signal.SIGTERM),
    ("loop", signal.SIGINT),
    ("checkpoint", signal.SIGKILL),
    ("loop", signal.SIGKILL),
    ("export", signal.SIGKILL),
]

FIGURES = ("loss", "loss_by_time", "learning_rate", "gradient_norm", "epoch")

# Everything that has a state, or might have.
OPTIONS = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 3,
    "checkpoints_total_limit": 2,
    "validation_steps": 10,
    "gradient_accumulation_steps": 2,
    "train_batch_size": 4,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 10,
    "use_ema": True,
    "random_flip": True,
    "report_to": "tensorboard",
}


@pytest.fixture(scope="module")
def processes() -> Iterator[ForkServerContext]:
    """Real processes for the runs, without the seconds that imports take: a server forks them, having imported all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs"])
    former = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    try:
        yield context
    finally:
        os.environ.pop("PYTHONPATH")
        if former is not None:
            os.environ["PYTHONPATH"] = former


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def moment(place: str, output_dir: Path, chance: random.Random) -> Callable[[], bool]:
    """Tells whether the moment has come to hit a run."""
    if place == "checkpoint":
        step = steps_done(output_dir) + chance.randint(1, 9)
        return lambda: steps_done(output_dir) >= step and any(output_dir.glob(".partial-checkpoint-*"))
    if place == "export":
        return lambda: (output_dir / ".partial-export").exists()
    step = min(steps_done(output_dir) + chance.randint(1, 9), STEPS - 1)
    return lambda: steps_done(output_dir) >= step


def steps_done(output_dir: Path) -> int:
    """Lines of losses in the log, from a run that is writing it."""
    file = output_dir / "log.jsonl"
    return file.read_text().count('"loss"') if file.exists() else 0


def hit(
    processes: ForkServerContext, line: list[str], output_dir: Path, place: str, number: int, chance: random.Random
) -> bool:
    """Start or resume a run and hit it; whether it was hit where it should be."""
    has_come = moment(place, output_dir, chance)
    process = processes.Process(target=run_script_file, args=(SCRIPT, [*line, "--resume_from_checkpoint=latest"]))
    process.start()
    assert process.pid is not None
    while not has_come():
        assert process.is_alive(), f"ended with {process.exitcode} before it could be hit: {place}"
        time.sleep(0.0005)
    if place == "loop":
        time.sleep(chance.uniform(0, 0.05))
    os.kill(process.pid, number)
    process.join(timeout=120)
    if number == signal.SIGKILL:
        assert process.exitcode == -number
        return place == "loop" or any(output_dir.glob(f".partial-{place}*"))
    assert process.exitcode == 128 + number
    assert latest_checkpoint(output_dir) is not None
    return True


# Files that wait in the buffer of a stream, and batches that workers have ready, are lost when it is killed.
STREAM = {
    "streaming": True,
    "shuffle_buffer_size": 12,
    "validation_steps": 1000,
    "dataloader_num_workers": 2,
}


def test_killed_streams_end_as_uninterrupted_ones(processes: ForkServerContext, tmp_path: Path) -> None:
    chance = random.Random("stream")
    folder, data = save_untrained(tmp_path / "untrained", "unet-classes"), make_dataset(tmp_path / "data")
    options = {**OPTIONS, **STREAM}
    whole = train(folder, data, tmp_path / "whole", **options)
    output_dir = tmp_path / "killed"
    line = command_line(folder, data, output_dir, **options)
    for place, number in HITS[:5]:
        hit(processes, line, output_dir, place, number, chance)
    process = processes.Process(target=run_script_file, args=(SCRIPT, [*line, "--resume_from_checkpoint=latest"]))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert_same_weights(whole, output_dir)
    assert read_log(output_dir, *FIGURES) == read_log(whole, *FIGURES)


@pytest.mark.parametrize("kind", ["unet-classes", "dit-vae"])
def test_killed_runs_end_as_uninterrupted_ones(kind: str, processes: ForkServerContext, tmp_path: Path) -> None:
    chance = random.Random(kind)
    folder = save_untrained(tmp_path / "untrained", kind)
    data = make_dataset(tmp_path / "data", side=16 if kind.endswith("vae") else 8)
    whole = train(folder, data, tmp_path / "whole", **OPTIONS)
    output_dir = tmp_path / "killed"
    line = command_line(folder, data, output_dir, dataloader_num_workers=1, **OPTIONS)
    inside = {"checkpoint": 0, "export": 0, "loop": 0}
    for place, number in HITS:
        inside[place] += hit(processes, line, output_dir, place, number, chance)
        # What there is of a pipeline is whole or not there.
        assert not (output_dir / "model_index.json").exists()
    assert min(inside.values()) >= 1
    process = processes.Process(target=run_script_file, args=(SCRIPT, [*line, "--resume_from_checkpoint=latest"]))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    assert_same_weights(whole, output_dir)
    assert read_log(output_dir, *FIGURES) == read_log(whole, *FIGURES)
    for name in ("validation_loss", "validation_loss_by_time"):
        assert read_log(output_dir, name) == read_log(whole, name)
    assert [path.name for path in sorted(output_dir.glob("*checkpoint-*"))] == ["checkpoint-57", "checkpoint-60"]
