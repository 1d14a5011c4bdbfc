# SPDX-License-Identifier: Apache-2.0
"""The output folder of a run: one run at a time, the user's files stay, nothing that is not finite is saved."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils.launch import prepare_simple_launcher_cmd_env
from processes import Task, launch_task, server
from training_runs import SCRIPT, command_line, launch_arguments, load, make_dataset, read_log, save_untrained, train

from diffusers_fm.training.checkpoints import latest_checkpoint, read_manifest


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("untrained")
    return save_untrained(folder / "model", "unet-classes"), make_dataset(folder / "data")


# The weights overflow in the first step, or their first output does.
SPOILT = {"weights": {"learning_rate": 1e30, "adam_weight_decay": 1e30}, "losses": {"learning_rate": 1e30}}


@pytest.mark.parametrize("use_ema", [False, True])
@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_not_finite_is_not_exported(
    untrained: tuple[Path, Path], tmp_path: Path, spoilt: str, held_out: bool, use_ema: bool
) -> None:
    model, data = untrained
    if not held_out:
        data = shutil.copytree(data, tmp_path / "data")
        (data / "test-00000-of-00001.parquet").unlink()
    message = {
        "weights": r"Nothing is saved at step 4: \d+ trained parameters are not finite, such as '.*'\. The last good"
        r" checkpoint is none",
        "losses": r"Nothing is saved at step 4: the loss of what was trained is (nan|inf|not finite)\.",
    }
    with pytest.raises(ValueError, match=message[spoilt]):
        train(model, data, tmp_path / "run", use_ema=use_ema, push_dry_run=True, **SPOILT[spoilt])
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert not {"model_index.json", "unet", "README.md"} & set(names), names


def test_weights_that_are_not_finite_are_no_checkpoint(untrained: tuple[Path, Path], tmp_path: Path) -> None:
    run, options = tmp_path / "run", {"checkpointing_steps": 2, "checkpoints_total_limit": 1}
    train(*untrained, run, max_train_steps=2, **options)
    # The gradient of this step was finite still.
    options |= {"resume_from_checkpoint": "latest", "checkpointing_steps": 3, **SPOILT["weights"]}
    with pytest.raises(ValueError, match=r"Nothing is saved at step 3.*The last good checkpoint is .*checkpoint-2"):
        train(*untrained, run, max_train_steps=6, **options)
    assert latest_checkpoint(run) == run / "checkpoint-2"


def test_files_of_the_users_stay(untrained: tuple[Path, Path], tmp_path: Path) -> None:
    mine = ["README.md", "unet/precious.py", "scheduler/mine.txt", "grid.png", "samples/step-2.png", "notes"]
    for name in mine:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("my own work")
    options = {"num_validation_images": 1, "validation_steps": 2, "checkpointing_steps": 4}
    run = train(*untrained, tmp_path / "run", **options)
    former = (run / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    (run / "unet" / "config.json").write_text((run / "unet" / "config.json").read_text() + "\n")
    train(*untrained, run, max_train_steps=6, resume_from_checkpoint="latest", **options)
    assert (run / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() != former
    for name in mine:
        assert (run / name).read_text() == "my own work", name
    # A configuration that the user has changed is in the way of the new one, and kept too.
    assert (run / "unet" / "config.json.kept-1").read_text() == (run / "unet" / "config.json").read_text() + "\n"
    for name in ("README.new.md", "grid.new.png", "samples/step-2.new.png"):
        assert (run / name).is_file(), name
    load(run)
    assert not list(run.rglob(".partial-*"))


def test_fewer_steps_than_were_done_are_refused(untrained: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(*untrained, tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    log = (run / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"--max_train_steps 3 is fewer than the 4 steps that .*checkpoint-4"):
        train(*untrained, run, max_train_steps=3, resume_from_checkpoint="latest")
    # By epochs, of 20 images in steps of 8.
    with pytest.raises(ValueError, match="--num_train_epochs 1, 3 steps, is fewer than the 4 steps"):
        train(*untrained, run, max_train_steps=None, num_train_epochs=1, resume_from_checkpoint="latest")
    # Nor is anything else of a run touched that cannot be resumed so.
    for options in ({"optimizer": "adafactor"}, {"train_batch_size": 64}):
        with pytest.raises(ValueError, match="cannot be adafactor now|is larger than the data set"):
            train(*untrained, run, resume_from_checkpoint="checkpoint-2", **options)
    assert (run / "log.jsonl").read_text() == log
    train(*untrained, run, max_train_steps=3, resume_from_checkpoint="checkpoint-2")


def test_a_resumed_run_uses_the_arguments_of_now(untrained: tuple[Path, Path], tmp_path: Path) -> None:
    run = train(*untrained, tmp_path / "run", max_train_steps=3, checkpointing_steps=3)
    now = {
        "learning_rate": 1e-5,
        "adam_weight_decay": 0.5,
        "adam_beta1": 0.5,
        "adam_beta2": 0.75,
        "adam_epsilon": 1e-4,
    }
    now |= {"lr_scheduler": "linear", "lr_warmup_steps": 0, "checkpointing_steps": 6}
    train(*untrained, run, max_train_steps=6, resume_from_checkpoint="latest", **now)
    # Linear to 0 at step 6, of the rate that is given now.
    rates = [rate for _, rate in read_log(run, "learning_rate")]
    assert rates == pytest.approx([1e-3] * 3 + [0.5e-5, 1e-5 / 3, 1e-5 / 6], rel=1e-6)
    group = torch.load(run / "checkpoint-6" / "optimizer.bin", weights_only=False)["param_groups"][0]
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.5, (0.5, 0.75), 1e-4)


def test_a_tilde_is_the_home_folder(
    untrained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(untrained[0], tmp_path / "model")
    shutil.copytree(untrained[1], tmp_path / "data")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    model, data, run = Path("~/model"), Path("~/data"), Path("~/run")
    train(model, data, run, checkpointing_steps=2, max_train_steps=2)
    assert (tmp_path / "run" / "model_index.json").is_file()
    train(*untrained, Path("~/other"), resume_from_checkpoint="~/run/checkpoint-2")
    assert [step for step, _ in read_log(tmp_path / "other", "loss")] == [3, 4]
    assert not (tmp_path / "~").exists()


def wait_for(condition: object, seconds: float = 240.0) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_second_run_is_refused_and_the_end_of_the_launcher_is_a_signal(
    untrained: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    line = command_line(*untrained, run, max_train_steps=10**6, checkpointing_steps=10**6)
    _, variables = prepare_simple_launcher_cmd_env(launch_arguments(line))
    launcher = server().Process(target=launch_task, args=(Task([str(SCRIPT), *line], variables), tmp_path))
    launcher.start()
    try:
        wait_for(lambda: (run / "log.jsonl").is_file() and (run / "log.jsonl").read_text().count("\n") > 3)
        log = (run / "log.jsonl").read_text()
        monkeypatch.setattr("diffusers_fm.files.LOCK_TIMEOUT", 0.1)
        for options in ({}, {"resume_from_checkpoint": "latest"}):
            with pytest.raises(ValueError, match="Another run is using the output folder"):
                train(*untrained, run, **options)
        assert (run / "log.jsonl").read_text().startswith(log)
        # It is the launcher that is killed, without a chance to pass anything on.
        launcher.kill()
        wait_for(lambda: latest_checkpoint(run) is not None)
    finally:
        launcher.kill()
    # Whoever comes next waits for the first one's end.
    monkeypatch.setattr("diffusers_fm.files.LOCK_TIMEOUT", 60)
    step = read_manifest(latest_checkpoint(run))["step"]
    train(*untrained, run, max_train_steps=step + 2, resume_from_checkpoint="latest")
    assert [done for done, _ in read_log(run, "loss")] == list(range(1, step + 3))
