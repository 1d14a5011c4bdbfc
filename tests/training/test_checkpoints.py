# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole or not there, and nothing that was good is lost on the way to a new one."""

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import xxhash
from accelerate import Accelerator
from training_runs import make_dataset, read_log, save_untrained, train

from diffusers_fm.files import unlock_folder
from diffusers_fm.training.checkpoints import (
    MANIFEST,
    CheckpointError,
    agree_on_checkpoint,
    damage,
    find_checkpoint,
    handle_model_files,
    latest_checkpoint,
    load_checkpoint,
    read_manifest,
    save_checkpoint,
)


pytestmark = pytest.mark.usefixtures("networks_of_one_level")


def prepare(accelerator: Accelerator, seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    model, optimizer = accelerator.prepare(model, optimizer)
    handle_model_files(accelerator)
    return model, optimizer


def fake(output_dir: Path, step: int, size: int = 5) -> Path:
    checkpoint = output_dir / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "file.bin").write_bytes(b"x" * size)
    entry = {"bytes": 5, "xxh3_128": xxhash.xxh3_128_hexdigest(b"xxxxx")}
    (checkpoint / MANIFEST).write_text(json.dumps({"step": step, "files": {"file.bin": entry}}))
    return checkpoint


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


def test_what_is_saved_is_loaded(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = prepare(accelerator, 0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [state["exp_avg"].clone() for state in optimizer.state_dict()["state"].values()]
    checkpoint = save_checkpoint(accelerator, tmp_path, 7, {"samples_seen": 56, "seed": 3})
    assert checkpoint == tmp_path / "checkpoint-7"
    assert damage(checkpoint) is None
    manifest = read_manifest(checkpoint)
    assert (manifest["step"], manifest["samples_seen"], manifest["seed"]) == (7, 56, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for state in optimizer.state_dict()["state"].values():
        state["exp_avg"].zero_()
    load_checkpoint(accelerator, checkpoint)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    loaded = [state["exp_avg"] for state in optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(loaded, moments))


def test_the_limit_is_kept_after_the_new_one_is_there(accelerator: Accelerator, tmp_path: Path) -> None:
    prepare(accelerator, 0)
    (tmp_path / "checkpoint-notes").mkdir()
    (tmp_path / "checkpoint-5").write_text("a file")
    for step in (1, 2, 10):
        save_checkpoint(accelerator, tmp_path, step, {}, total_limit=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-5", "checkpoint-notes"]
    # A run that was resumed from an early checkpoint writes the same step anew, and removes nothing that is later.
    before = (tmp_path / "checkpoint-2" / MANIFEST).stat().st_mtime_ns
    save_checkpoint(accelerator, tmp_path, 2, {}, total_limit=1)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2", "checkpoint-5", "checkpoint-notes"]
    assert (tmp_path / "checkpoint-2" / MANIFEST).stat().st_mtime_ns != before


def test_a_failed_save_leaves_the_earlier_ones(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(accelerator, 0)
    save_checkpoint(accelerator, tmp_path, 1, {}, total_limit=1)

    def full_disk(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusers_fm.training.checkpoints.save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be written: \[Errno 28\] No space left"):
        save_checkpoint(accelerator, tmp_path, 2, {}, total_limit=1)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    assert names(tmp_path) == ["checkpoint-1"]
    monkeypatch.undo()
    save_checkpoint(accelerator, tmp_path, 3, {}, total_limit=1)
    assert names(tmp_path) == ["checkpoint-3"]


def test_damaged_checkpoints_are_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (1, 2, 3, 4, 20, 21):
        fake(tmp_path, step)
    # The disk gives back other bytes than were written.
    (tmp_path / "checkpoint-21" / "file.bin").write_bytes(b"xxyxx")
    assert damage(tmp_path / "checkpoint-21", thorough=False) is None
    (tmp_path / "checkpoint-20" / "file.bin").write_bytes(b"xx")
    (tmp_path / "checkpoint-4" / "file.bin").unlink()
    (tmp_path / "checkpoint-3" / MANIFEST).unlink()
    (tmp_path / "checkpoint-2" / MANIFEST).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    faults = ["file.bin is not what was written", "file.bin has 2 bytes of 5", "file.bin is missing"]
    faults += ["it holds no checkpoint.json", "cannot be read"]
    for record, step, fault in zip(caplog.records, (21, 20, 4, 3, 2), faults, strict=True):
        assert f"checkpoint-{step} is damaged" in record.getMessage()
        assert fault in record.getMessage()


def flip(file: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_run_without_a_whole_checkpoint_does_not_start_anew(tmp_path: Path) -> None:
    for step in (1, 2):
        flip(fake(tmp_path, step) / "file.bin")
    with pytest.raises(ValueError, match=r"No checkpoint in .* is whole \(checkpoint-2: file.bin is not what was"):
        find_checkpoint(tmp_path, "latest")
    # Another one made of a manifest that lost its step, or of another trainer's files.
    for step, manifest in ((1, '{"files": {}}'), (2, None)):
        (tmp_path / f"checkpoint-{step}" / MANIFEST).unlink()
        if manifest is not None:
            (tmp_path / f"checkpoint-{step}" / MANIFEST).write_text(manifest)
    with pytest.raises(ValueError, match=r"is whole \(checkpoint-2: it holds no checkpoint.json\)"):
        find_checkpoint(tmp_path, "latest")
    assert damage(tmp_path / "checkpoint-1") == "its checkpoint.json cannot be read"


@pytest.mark.parametrize("file", ["model_index.json", "pytorch_lora_weights.safetensors"])
def test_what_was_trained_is_not_trained_anew(tmp_path: Path, file: str) -> None:
    (tmp_path / "log.jsonl").write_text("{}")
    assert find_checkpoint(tmp_path, "latest") is None
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds what a run has trained \({file}\) and no checkpoint to go on from"):
        find_checkpoint(tmp_path, "latest")
    assert find_checkpoint(tmp_path, str(fake(tmp_path, 3))) == tmp_path / "checkpoint-3"
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-3"


def test_files_of_the_users_are_not_rotated_away(accelerator: Accelerator, tmp_path: Path) -> None:
    prepare(accelerator, 0)
    # Of another trainer, by its name; a file where a checkpoint will be; notes in a checkpoint.
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "unet.bin").write_text("mine")
    (tmp_path / "checkpoint-4").write_text("mine")
    save_checkpoint(accelerator, tmp_path, 2, {}, total_limit=1)
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")
    save_checkpoint(accelerator, tmp_path, 3, {}, total_limit=1)
    (tmp_path / "checkpoint-3" / "samples").mkdir()
    (tmp_path / "checkpoint-3" / "samples" / "grid.png").write_text("mine")
    # The same step anew, and another one.
    save_checkpoint(accelerator, tmp_path, 3, {}, total_limit=1)
    save_checkpoint(accelerator, tmp_path, 4, {}, total_limit=1)
    kept = {"checkpoint-1": "unet.bin", "checkpoint-2.kept-1": "notes.txt", "checkpoint-3.kept-1": "samples/grid.png"}
    assert names(tmp_path) == [*kept, "checkpoint-4", "checkpoint-4.kept-1"]
    for folder, file in kept.items():
        assert [path for path in (tmp_path / folder).rglob("*") if path.is_file()] == [tmp_path / folder / file]
    assert (tmp_path / "checkpoint-4.kept-1").read_text() == "mine"
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_a_folder_is_locked_swept_and_refused_as_one(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="Cannot resume from '~/other/checkpoint-3': there is no such folder"):
        agree_on_checkpoint(accelerator, tmp_path / "run", "~/other/checkpoint-3")
    assert names(tmp_path) == []
    first = fake(tmp_path / "run", 3)
    (tmp_path / "run" / ".partial-removed-checkpoint-2").mkdir()
    (tmp_path / "run" / "ema_snapshots").mkdir()
    (tmp_path / "run" / "ema_snapshots" / ".partial-step-3.safetensors").write_text("half")
    assert agree_on_checkpoint(accelerator, tmp_path / "other", "~/run/checkpoint-3")[0] == first
    checkpoint, manifest = agree_on_checkpoint(accelerator, tmp_path / "run", "latest")
    assert (checkpoint, manifest["step"]) == (first, 3)
    assert names(tmp_path / "run") == [".lock", "checkpoint-3", "ema_snapshots"]
    assert names(tmp_path / "run" / "ema_snapshots") == []
    unlock_folder(tmp_path / "run")


def test_where_a_run_starts(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "new", None) is None
    assert find_checkpoint(tmp_path / "new", "latest") is None
    (tmp_path / "notes.txt").write_text("mine")
    assert find_checkpoint(tmp_path, None) is None
    first, second = fake(tmp_path, 9), fake(tmp_path, 10)
    assert find_checkpoint(tmp_path, "latest") == second
    assert find_checkpoint(tmp_path, "checkpoint-9") == first
    assert find_checkpoint(tmp_path / "new", str(first)) == first


@pytest.mark.parametrize("file", ["model_index.json", "training_args.json", "log.jsonl", "checkpoint-3"])
def test_a_folder_with_another_run_is_refused(tmp_path: Path, file: str) -> None:
    if file == "checkpoint-3":
        fake(tmp_path, 3)
    else:
        (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=rf"holds another run \({file}\)"):
        find_checkpoint(tmp_path, None)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Cannot resume from 'checkpoint-9': there is no such folder"):
        find_checkpoint(tmp_path, "checkpoint-9")
    (tmp_path / "some").mkdir()
    with pytest.raises(ValueError, match=r"Cannot resume from 'some': it holds no checkpoint\.json"):
        find_checkpoint(tmp_path, "some")
    fake(tmp_path, 3, size=4)
    with pytest.raises(ValueError, match="file.bin has 4 bytes of 5"):
        find_checkpoint(tmp_path, "checkpoint-3")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        find_checkpoint(tmp_path / "file", None)


def exchanged_labels(rows: datasets.Dataset) -> datasets.Dataset:
    return rows.map(lambda row: {"label": 1 - row["label"] if row["label"] < 2 else 2})


def test_later_checkpoints_make_way_for_a_run_that_goes_on_from_an_earlier_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, data = save_untrained(tmp_path / "untrained", "unet-classes"), make_dataset(tmp_path / "data")
    run, options = tmp_path / "run", {"checkpointing_steps": 1, "lr_scheduler": "constant"}
    train(folder, data, run, max_train_steps=4, **options)
    options |= {"resume_from_checkpoint": "checkpoint-2", "learning_rate": 1e-5}
    train(folder, data, run, max_train_steps=3, **options)
    said = [record.getMessage() for record in caplog.records if record.name == "diffusers_fm.files"]
    assert [message.split(": ")[0].rpartition("/")[2] for message in said] == [
        f"checkpoint-{step} is later than step 2, which this run goes on from, and stood in its way" for step in (3, 4)
    ]
    # The newest is now of the run that was begun last, and nothing is lost.
    assert find_checkpoint(run, "latest") == run / "checkpoint-3"
    assert damage(run / "checkpoint-4.kept-1") is None
    options["resume_from_checkpoint"] = "latest"
    train(folder, data, run, max_train_steps=5, **options)
    assert [rate for _, rate in read_log(run, "learning_rate")][2:] == [1e-5] * 3


# The length of a stream is not always known, and its rows are not read beforehand: shards and first row tell it.
@pytest.mark.parametrize(
    ("streaming", "change", "differs"),
    [
        (False, lambda rows: rows.select(range(19)), "samples (20 then, 19 now)"),
        (False, lambda rows: rows.select([1, 0, *range(2, 20)]), "images ("),
        (False, exchanged_labels, "labels ("),
        (True, lambda rows: rows.select([1, 0, *range(2, 20)]), "first row ("),
        (True, exchanged_labels, "first row ("),
    ],
    ids=["row less", "rows exchanged", "labels exchanged", "stream, rows exchanged", "stream, labels exchanged"],
)
def test_a_run_is_resumed_on_its_own_data(
    streaming: bool, change: Callable[[datasets.Dataset], datasets.Dataset], differs: str, tmp_path: Path
) -> None:
    folder = save_untrained(tmp_path / "untrained", "unet-classes")
    data = make_dataset(tmp_path / "data")
    options = {"streaming": streaming, "max_train_steps": 2, "checkpointing_steps": 1, "validation_split": "test"}
    run = train(folder, data, tmp_path / "run", **options)
    # The same files elsewhere are the same data.
    moved = data.rename(tmp_path / "moved")
    options |= {"resume_from_checkpoint": "checkpoint-1"}
    train(folder, moved, run, **options)
    file = next(moved.glob("train*.parquet"))
    change(datasets.Dataset.from_parquet(str(file))).to_parquet(file)
    with pytest.raises(ValueError, match=rf"not that of .*checkpoint-1: it differs in .*{re.escape(differs)}"):
        train(folder, moved, run, **options)
    train(folder, moved, run, allow_changed_data=True, **options)
