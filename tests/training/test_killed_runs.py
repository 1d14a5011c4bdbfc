# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed at any moment and resumed, again and again, end as the uninterrupted ones: bit for bit."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from processes import run_file, server
from safetensors.torch import load_file
from tiny_pipelines import save_untrained_upscaler
from tiny_text_to_image import save_colours, tiny_stable_diffusion_3
from training_runs import SCRIPT, command_line, make_dataset, read_log, save_untrained

from diffusers_fm.training.checkpoints import latest_checkpoint


pytestmark = pytest.mark.usefixtures("networks_of_one_level")

STEPS = 42

# What a run is hit by, one after the other: a signal that asks or one that does not, at a random moment of the loop,
# while a checkpoint is being written, or while what was trained is.
HITS = [
    ("loop", signal.SIGKILL),
    ("checkpoint", signal.SIGKILL),
    ("loop", signal.SIGINT),
    ("checkpoint", signal.SIGTERM),
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

TEXT_TO_IMAGE = {"resolution": 16, "max_sequence_length": 16, "random_flip": False, "center_crop": True}
TEXT_TO_IMAGE |= {"cache_latents": True, "cache_text_embeddings": True}

# Files that wait in the buffer of a stream, and batches that workers have ready, are lost when it is killed.
STREAM = {"streaming": True, "shuffle_buffer_size": 12, "validation_steps": 1000, "dataloader_num_workers": 2}

# A script, what it is run with besides, and a file of what it leaves.
RUNS = {
    "latents": ("train_flow_matching", {}, "model_index.json"),
    "stream": ("train_flow_matching", STREAM, "model_index.json"),
    "upscaler": ("train_upscale", {"num_measured_images": 4}, "model_index.json"),
    "text": ("train_text_to_image", TEXT_TO_IMAGE, "model_index.json"),
    "adapters": ("train_text_to_image_lora", {**TEXT_TO_IMAGE, "rank": 2}, "pytorch_lora_weights.safetensors"),
}


def untrained(run: str, folder: Path) -> tuple[Path, Path]:
    """A pipeline for a run to train, and data."""
    if run in ("text", "adapters"):
        tiny_stable_diffusion_3(t5=False).save_pretrained(folder / "untrained")
        return folder / "untrained", save_colours(folder / "data")
    if run == "latents":
        return save_untrained(folder / "untrained", "dit-vae"), make_dataset(folder / "data", side=16)
    data = make_dataset(folder / "data")
    if run == "upscaler":
        return save_untrained_upscaler(folder / "untrained"), data
    return save_untrained(folder / "untrained", "unet-classes"), data


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


def start(script: str, line: list[str]) -> ForkServerProcess:
    """A process that runs the script from its newest checkpoint."""
    file = SCRIPT.with_name(f"{script}.py")
    process = server().Process(target=run_file, args=([str(file), *line, "--resume_from_checkpoint=latest"],))
    process.start()
    return process


def hit(process: ForkServerProcess, output_dir: Path, place: str, number: int, chance: random.Random) -> bool:
    """Hit a run that has been started; whether it was hit where it should be."""
    has_come = moment(place, output_dir, chance)
    end = time.monotonic() + 120
    assert process.pid is not None
    while not has_come():
        assert time.monotonic() < end, f"did not come to where it could be hit: {place}"
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


def tensors_by_file(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in a folder; those of a cache by its name alone, for each process that writes has a shard."""
    found: dict[str, torch.Tensor] = {}
    for file in folder.rglob("*.safetensors"):
        place = file.relative_to(folder)
        place = place.parent if place.parts[0] == "precomputed" else place
        tensors = {f"{place}: {name}": tensor for name, tensor in load_file(file).items()}
        assert not tensors.keys() & found.keys()
        found |= tensors
    assert found
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    """All tensors of what was trained, bit for bit; the checkpoints' and the caches' too."""
    first, second = tensors_by_file(one), tensors_by_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("run", RUNS)
def test_killed_runs_end_as_uninterrupted_ones(run: str, tmp_path: Path) -> None:
    script, options, what_is_left = RUNS[run]
    options = {**OPTIONS, **options}
    chance = random.Random(run)
    folder, data = untrained(run, tmp_path)
    whole, output_dir = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(script, command_line(folder, data, whole, **options))
    undisturbed.join(timeout=120)
    assert undisturbed.exitcode == 0
    line = command_line(folder, data, output_dir, **{"dataloader_num_workers": 1, **options})
    inside = {"checkpoint": 0, "export": 0, "loop": 0}
    for place, number in HITS:
        inside[place] += hit(start(script, line), output_dir, place, number, chance)
        # What there is of a pipeline is whole or not there.
        assert not (output_dir / what_is_left).exists()
    assert min(inside.values()) >= 1
    last = start(script, line)
    last.join(timeout=120)
    assert last.exitcode == 0
    assert (output_dir / what_is_left).is_file()
    assert_same_tensors(whole, output_dir)
    assert read_log(output_dir, *FIGURES) == read_log(whole, *FIGURES)
    for name in ("validation_loss", "validation_loss_by_time"):
        assert read_log(output_dir, name) == read_log(whole, name)
    names = [path.name for path in sorted(output_dir.glob("*checkpoint-*"))]
    assert names == [f"checkpoint-{STEPS - 3}", f"checkpoint-{STEPS}"]
