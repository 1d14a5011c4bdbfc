# SPDX-License-Identifier: Apache-2.0
"""The training script: what comes out, what does not matter, what is refused, and what every argument does."""

import functools
import json
import math
import multiprocessing
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import datasets
import engines
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from processes import Task, make_tasks, run_task, server
from safetensors.torch import load_file
from tiny_pipelines import NUM_CLASSES
from training_runs import (
    SCRIPT,
    assert_same_weights,
    command_line,
    launch,
    load,
    make_dataset,
    read_log,
    save_untrained,
    script,
    train,
    unused_arguments,
    weights,
)

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, init_pipeline
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data import loading
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.randomness import BatchSlice
from diffusers_fm.timesteps import DENSITIES
from diffusers_fm.training import checkpoints, validation
from diffusers_fm.training.checkpoints import damage, read_manifest


# Adam divides by the size of the gradient, and so makes noise of gradients that are zero but for rounding. With an
# epsilon above them the weights follow the gradients, and equality can be asked for to a tolerance.
SMOOTH = {"adam_epsilon": 1e-2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("pipelines") / "unet", "unet-classes")


# What comes out


def test_a_run_leaves_a_pipeline_and_its_story(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output_dir = train(
        folder,
        data,
        tmp_path / "run",
        use_ema=True,
        num_validation_images=3,
        validation_steps=2,
        checkpointing_steps=2,
        checkpoints_total_limit=1,
        report_to="tensorboard",
        hub_token="secret-token",
    )
    # The pipeline, by both ways of loading.
    pipeline = load(output_dir)
    assert isinstance(DiffusionPipeline.from_pretrained(output_dir), FlowMatchPipeline)
    assert pipeline.num_classes == NUM_CLASSES
    assert pipeline.config.id2label == {str(i): f"class {i}" for i in range(NUM_CLASSES)}
    assert pipeline(class_labels="class 2", num_inference_steps=2, guidance_scale=2.0).images[0].size == (8, 8)
    config = json.loads((output_dir / "unet" / "config.json").read_text())
    assert not {"decay", "optimization_step", "power", "inv_gamma"} & set(config)

    # Pictures: a row of three for each class, after two steps and at the end.
    for file in ("samples/step-2.png", "grid.png"):
        grid = PIL.Image.open(output_dir / file)
        assert grid.size == (2 + 3 * (48 + 2), 2 + NUM_CLASSES * (48 + 2))
    # The picture is of the saved weights.
    expected = validation.sample_grid(pipeline, 3, 2)
    assert np.array_equal(np.asarray(PIL.Image.open(output_dir / "grid.png")), np.asarray(expected))

    # Arguments and log.
    arguments = json.loads((output_dir / "training_args.json").read_text())
    assert arguments["learning_rate"] == 1e-3
    assert arguments["max_train_steps"] == 4
    everything = [path.read_bytes() for path in output_dir.rglob("*") if path.is_file()]
    assert not any(b"secret-token" in content for content in everything)
    losses = read_log(output_dir, "loss", "learning_rate", "gradient_norm", "images_per_second", "epoch")
    assert [line[0] for line in losses] == [1, 2, 3, 4]
    assert [line[-1] for line in losses] == [step * 8 / 20 for step in (1, 2, 3, 4)]
    assert all(math.isfinite(value) for line in losses for value in line)
    assert [len(by_time) for _, by_time in read_log(output_dir, "loss_by_time")] == [10] * 4
    assert [line[0] for line in read_log(output_dir, "validation_loss", "validation_loss_by_time")] == [2, 4]
    assert list((output_dir / "logs").rglob("events.out.tfevents.*"))
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-4"]

    # The card: valid metadata, and an example that runs.
    card = ModelCard.load(output_dir / "README.md")
    assert card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "flow-matching" in card.data.tags
    example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert example is not None
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    exec(compile(example[1], "README.md", "exec"), names)
    assert len(names["images"]) == 4


def test_the_average_is_what_is_saved(folder: Path, data: Path, tmp_path: Path) -> None:
    ema = {"use_ema": True, "ema_power": 0.5, "ema_inv_gamma": 2.0, "ema_max_decay": 0.45}
    output_dir = train(folder, data, tmp_path / "ema", checkpointing_steps=1, **ema)
    plain = train(folder, data, tmp_path / "plain")
    average = None
    for step in (1, 2, 3, 4):
        raw = load_file(output_dir / f"checkpoint-{step}" / "model.safetensors")
        # diffusers' EMAModel counts from its second step: 0, then 1 - (1 + n / inv_gamma)^-power, at most the maximum.
        decay = 0.0 if step == 1 else min(1 - (1 + (step - 1) / 2.0) ** -0.5, 0.45)
        if average is None:
            average = raw
        average = {name: decay * average[name] + (1 - decay) * value for name, value in raw.items()}
    assert average is not None
    saved = weights(output_dir)
    assert len(saved) == len(average)
    for name, value in saved.items():
        assert torch.allclose(value, average[name.replace("unet.", "denoiser.", 1)], rtol=0, atol=1e-6)
    # The average does not change the training.
    for name, value in weights(plain).items():
        assert torch.equal(value, raw[name.replace("unet.", "denoiser.", 1)])


@pytest.mark.parametrize("kind", ["unet", "dit-vae", "sd3-vae"])
def test_every_kind_of_pipeline_learns(kind: str, tmp_path: Path) -> None:
    latent = kind.endswith("vae")
    folder = save_untrained(tmp_path / "untrained", kind)
    data = make_dataset(tmp_path / "data", side=16 if latent else 8)
    vae = {path.name: path.read_bytes() for path in folder.glob("vae/*")}
    output_dir = train(
        folder, data, tmp_path / "run", max_train_steps=25, learning_rate=5e-3, num_validation_images=1, use_ema=True
    )
    losses = [loss for _, loss in read_log(output_dir, "loss")]
    # Output layers start at zero, so that the first loss is that of no knowledge; 25 steps must tell.
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    pipeline = load(output_dir)
    labels = [0, 1] if pipeline.num_classes else None
    images = pipeline(class_labels=labels, batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == ((2, 16, 16, 3) if latent else (2, 8, 8, 1))
    # The autoencoder goes along, and is not trained.
    assert {path.name: path.read_bytes() for path in output_dir.glob("vae/*.safetensors")} == {
        name: content for name, content in vae.items() if name.endswith(".safetensors")
    }


def test_latents_are_those_of_the_given_autoencoder(tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "untrained", "dit-vae")
    data = make_dataset(tmp_path / "data", side=16)
    other = tmp_path / "other"
    pipeline = FlowMatchPipeline.from_pretrained(save_full(tmp_path / "full", "dit-vae"))
    with torch.no_grad():
        for parameter in pipeline.vae.parameters():
            parameter.mul_(1.5)
    pipeline.vae.save_pretrained(other)
    output_dir = train(folder, data, tmp_path / "run", vae_name_or_path=other)
    assert torch.equal(
        next(iter(load_file(output_dir / "vae" / "diffusion_pytorch_model.safetensors").values())),
        next(iter(load_file(other / "diffusion_pytorch_model.safetensors").values())),
    )


def save_full(folder: Path, kind: str) -> Path:
    from tiny_pipelines import tiny_pipeline

    tiny_pipeline(kind).save_pretrained(folder)
    return folder


def test_training_goes_on_from_a_trained_pipeline(folder: Path, data: Path, tmp_path: Path) -> None:
    first = train(folder, data, tmp_path / "first")
    second = train(first, data, tmp_path / "second", max_train_steps=1, learning_rate=1e-12)
    assert_same_weights(first, second, atol=1e-9)


# What does not matter


def options_with_everything() -> dict[str, object]:
    return {
        "use_ema": True,
        "random_flip": True,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 4,
        "max_train_steps": 7,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "logging_steps": 2,
    }


def test_a_resumed_run_is_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    # Dropout, too: layers that draw random numbers themselves.
    folder = save_untrained(tmp_path / "untrained", "unet-classes")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "dropout": 0.3}))
    options = options_with_everything()
    whole = train(folder, data, tmp_path / "whole", checkpointing_steps=3, **options)
    # The run is killed after step 4: the line of that step is in the log, and half of another.
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-3", resumed / "checkpoint-3")
    lines = (whole / "log.jsonl").read_text().splitlines(keepends=True)
    (resumed / "log.jsonl").write_text("".join(lines[:2]) + lines[2][:20])
    train(folder, data, resumed, resume_from_checkpoint="latest", checkpointing_steps=3, **options)
    assert_same_weights(whole, resumed)
    figures = ("loss", "loss_by_time", "learning_rate", "gradient_norm", "epoch")
    # Step 3 lies between two lines of the log: the sums of step 3 are in the checkpoint.
    assert read_log(resumed, *figures) == read_log(whole, *figures)
    assert [line[0] for line in read_log(resumed, "loss")] == [2, 4, 6, 7]
    assert read_log(resumed, "validation_loss") == read_log(whole, "validation_loss")
    ids = {
        read_manifest(run / f"checkpoint-{n}")["tracker_run_id"] for run, n in ((whole, 3), (whole, 6), (resumed, 6))
    }
    assert len(ids) == 1
    last = [load_file(run / "checkpoint-6" / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_run_without_a_seed_resumes_with_its_own(folder: Path, data: Path, tmp_path: Path) -> None:
    whole = train(folder, data, tmp_path / "whole", seed=None, checkpointing_steps=2)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    train(folder, data, resumed, seed=None, resume_from_checkpoint="latest")
    assert_same_weights(whole, resumed)
    other = train(folder, data, tmp_path / "other", seed=None)
    assert read_log(other, "loss") != read_log(whole, "loss")


def test_changed_arguments_are_told_on_resume(
    folder: Path, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output_dir = train(folder, data, tmp_path / "run", checkpointing_steps=2)
    train(folder, data, output_dir, resume_from_checkpoint="checkpoint-2", max_train_steps=5, logit_mean=0.5)
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [message for message in told if message.startswith("--")] == [
        "--logit_mean was 0.0 in the run that is resumed and is 0.5 now."
    ]
    with pytest.raises(ValueError, match="--use_ema was False in the run that is resumed and cannot be True now"):
        train(folder, data, output_dir, resume_from_checkpoint="checkpoint-2", use_ema=True)


def test_a_finished_run_can_be_resumed(folder: Path, data: Path, tmp_path: Path) -> None:
    output_dir = train(folder, data, tmp_path / "run", checkpointing_steps=2)
    before = weights(output_dir)
    train(folder, data, output_dir, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert all(torch.equal(before[name], value) for name, value in weights(output_dir).items())


def test_accumulation_is_a_larger_batch(folder: Path, data: Path, tmp_path: Path) -> None:
    whole = train(folder, data, tmp_path / "whole", train_batch_size=8, **SMOOTH)
    parts = train(folder, data, tmp_path / "parts", train_batch_size=4, gradient_accumulation_steps=2, **SMOOTH)
    # Sums in another order: float32 gradients of order one differ by 1e-6, steps of 1e-3 / 1e-2 times that by 1e-7.
    assert_same_weights(whole, parts, atol=1e-6)
    for one, other in zip(read_log(whole, "loss", "gradient_norm"), read_log(parts, "loss", "gradient_norm")):
        assert one == pytest.approx(other, rel=1e-5)


def test_workers_and_memory_do_not_matter(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = train(folder, data, tmp_path / "one", random_flip=True)
    decoded = functools.partial(ImageData, memory_budget=0)
    monkeypatch.setattr(loading, "load_images", functools.partial(loading.load_images, make_data=decoded))
    two = train(folder, data, tmp_path / "two", random_flip=True, dataloader_num_workers=2)
    # Workers end with the run, not when the garbage collector finds them.
    assert not multiprocessing.active_children()
    assert_same_weights(one, two)


def wait_for_steps(output_dir: Path, returncode: Callable[[], int | None]) -> None:
    """Wait for three steps of a run that may not end."""
    end = time.monotonic() + 120
    while not (output_dir / "log.jsonl").exists() or len(read_log(output_dir, "loss")) < 3:
        assert returncode() is None
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_signal_stops_the_run_at_a_checkpoint(folder: Path, data: Path, tmp_path: Path, num_processes: int) -> None:
    output_dir, written = tmp_path / "run", tmp_path / "stderr"
    options = {"train_batch_size": 8 // num_processes, "max_train_steps": 100_000, "lr_scheduler": "constant"}
    if num_processes > 1:
        # With the launcher, as a user does it, and in shards.
        data, folder = make_dataset(tmp_path / "data", side=16), save_untrained(tmp_path / "untrained", "dit-vae")
    line = command_line(folder, data, output_dir, **options)
    # One process is started without the launcher, which ends at SIGTERM without telling the script.
    if num_processes == 1:
        process = server().Process(target=run_task, args=(Task([str(SCRIPT), *line]), tmp_path))
        process.start()
        returncode = functools.partial(getattr, process, "exitcode")
        terminate, wait, kill = process.terminate, process.join, process.kill
    else:
        with written.open("w") as stderr:
            command = launch(line, num_processes, config="fsdp2.yaml")
            process = subprocess.Popen(command, env=engines.variables(tmp_path), stderr=stderr)
        returncode, terminate, wait, kill = process.poll, process.terminate, process.wait, process.kill
    try:
        wait_for_steps(output_dir, returncode)
        terminate()
        wait(timeout=120)
    finally:
        kill()
    steps = [int(path.name.split("-")[1]) for path in output_dir.glob("checkpoint-*")]
    assert len(steps) == 1
    assert f"Stopped by signal 15 after step {steps[0]}." in written.read_text()
    assert "--resume_from_checkpoint latest" in written.read_text()
    if num_processes == 1:
        assert returncode() == 128 + signal.SIGTERM
    else:
        engines.check_threads(written.read_text())
        assert len(list((output_dir / f"checkpoint-{steps[0]}").rglob("*.distcp"))) == 4
    assert damage(output_dir / f"checkpoint-{steps[0]}") is None
    assert not (output_dir / "model_index.json").exists()


def test_a_signal_to_one_process_stops_all_after_one_step(folder: Path, data: Path, tmp_path: Path) -> None:
    output_dir = tmp_path / "run"
    options = {"train_batch_size": 4, "max_train_steps": 100_000, "lr_scheduler": "constant"}
    processes = []
    for rank, task in enumerate(make_tasks(SCRIPT, command_line(folder, data, output_dir, **options), 2)):
        place = tmp_path / str(rank)
        place.mkdir()
        processes.append(server().Process(target=run_task, args=(task, place)))
    try:
        for process in processes:
            process.start()
        wait_for_steps(
            output_dir, lambda: max((each.exitcode for each in processes if each.exitcode is not None), default=None)
        )
        processes[1].terminate()
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    finally:
        for process in processes:
            process.kill()
    (checkpoint,) = output_dir.glob("checkpoint-*")
    assert f"after step {checkpoint.name.split('-')[1]}." in (tmp_path / "0" / "stderr").read_text()
    assert damage(checkpoint) is None


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "img"}, r"no image column 'img'; the columns are \['image', 'label'\]"),
        ({"label_column": "class"}, "has 5 classes, but there is no label column 'class'"),
        ({"train_split": "training"}, "no split 'training'"),
        ({"validation_split": "dev"}, "no split 'dev'"),
        ({"train_batch_size": 21}, "An optimizer step of 21 samples .* is larger than the data set of 20"),
        ({"train_batch_size": 0}, "--train_batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "--learning_rate must be above 0"),
        ({"max_grad_norm": 0.0}, "--max_grad_norm must be above 0"),
        ({"label_dropout": 1.5}, r"--label_dropout must be in \[0, 1\], got 1.5"),
        ({"shift": -1.0}, "--shift must be above 0"),
        ({"lr_warmup_steps": 10}, "use --lr_scheduler constant_with_warmup"),
        ({"resolution": 9}, "--resolution must be a multiple of 2"),
        ({"resume_from_checkpoint": "nowhere"}, "Cannot resume from 'nowhere'"),
        ({"train_data_dir": "here"}, "got both"),
        ({"dataset_name": None}, "got neither"),
        ({"config": "nowhere.json", "report_to": "none"}, "no file 'nowhere.json'"),
        ({"optimizer": "schedule_free", "use_ema": True}, "averages the weights itself: leave out --use_ema"),
        ({"optimizer": "schedule_free", "lr_scheduler": "cosine"}, "takes the place of a schedule"),
        ({"logit_std": -1.0}, "--logit_std must be above 0, got -1.0"),
        ({"vae_name_or_path": "some"}, "works on pixels"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(
    folder: Path, data: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(folder, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "model_index.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weighting_scheme=logit_normal"], "use --timestep_density logit_normal"),
        (["--weighting_scheme=nothing"], "'nothing' is not one of none, epsilon"),
        (["--timestep_density=normal"], "--timestep_density must be one of uniform, .*, got 'normal'"),
        (["--lr_scheduler=piecewise_constant"], "--lr_scheduler must be one of .*, got 'piecewise_constant'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_words_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments(script.ScriptArguments, ["--pretrained_model_name_or_path=x", "--dataset_name=x", *words])


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(script.ScriptArguments, ["--pretrained_model_name_or_path=x", "--path=ot"])
    assert "unrecognized arguments: --path=ot" in capsys.readouterr().err


def test_another_run_is_not_overwritten(folder: Path, data: Path, tmp_path: Path) -> None:
    output_dir = train(folder, data, tmp_path / "run")
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="holds another run"):
        train(folder, data, output_dir)
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_what_the_model_cannot_do_is_refused(data: Path, tmp_path: Path) -> None:
    unconditional = save_untrained(tmp_path / "unconditional", "unet")
    with pytest.raises(ValueError, match=r"--label_dropout 0.2 was given, but the model has no classes"):
        train(unconditional, data, tmp_path / "run", label_dropout=0.2)
    transformer = save_untrained(tmp_path / "transformer", "dit-vae")
    with pytest.raises(ValueError, match="--resolution must be 16, for which the transformer is made, got 32"):
        train(transformer, data, tmp_path / "run", resolution=32)
    shifting = save_untrained(tmp_path / "shifting", "unet", use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="give one --shift"):
        train(shifting, data, tmp_path / "run")
    inverted = save_untrained(tmp_path / "inverted", "unet", invert_sigmas=True)
    with pytest.raises(ValueError, match="invert_sigmas"):
        train(inverted, data, tmp_path / "run")


def test_several_processes_that_would_run_as_one_are_refused(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All that a process sees of `accelerate launch --cpu --num_processes 2`.
    launched = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="accelerate launch --multi_gpu --num_processes N"):
        train(folder, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(ValueError, match="accelerate was launched for 4 accumulation steps, the script for 1"):
        train(folder, data, tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP of version 1 is not supported.*use FSDP2"):
        train(folder, data, tmp_path / "run")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DeepSpeed needs GPUs, and on the CPU accelerate runs without it"):
        train(folder, data, tmp_path / "run")


def test_a_gradient_that_is_not_finite_ends_the_run(folder: Path, data: Path, tmp_path: Path) -> None:
    bad = {"learning_rate": 1e30, "max_train_steps": 20, "checkpointing_steps": 1, "checkpoints_total_limit": 1}
    with pytest.raises(ValueError, match=r"The gradient at step \d is not finite\. .* last good checkpoint is .*-1\."):
        train(folder, data, tmp_path / "stop", nan_policy="stop", **bad)
    assert damage(tmp_path / "stop" / "checkpoint-1") is None
    assert not list((tmp_path / "stop").glob("checkpoint-2*"))
    # By default such steps are skipped, ten in a row at most. Checkpoints wait for a finite gradient.
    message = (
        r"not finite at step 1\d, nor was it in the 10 steps before\. Losses by time, .*"
        r" the numbers of those that are not finite \[\d.*\]\. The last good checkpoint is .*-1\."
    )
    with pytest.raises(ValueError, match=message):
        train(folder, data, tmp_path / "skip", **bad)
    assert [path.name for path in (tmp_path / "skip").glob("checkpoint-*")] == ["checkpoint-1"]
    assert max(count for _, count in read_log(tmp_path / "skip", "skipped_steps")) == 10
    with pytest.raises(ValueError, match="not finite at step 5, nor was it in the 3 steps before"):
        train(folder, data, tmp_path / "three", max_skipped_steps=3, **bad)


def test_a_file_stops_the_run_and_the_validation_comes_later(folder: Path, data: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": 6, "validation_steps": 2, "checkpointing_steps": 100}
    whole = train(folder, data, tmp_path / "whole", **options)
    output_dir = tmp_path / "run"
    output_dir.mkdir()
    (output_dir / "STOP").touch()
    with pytest.raises(SystemExit) as left:
        train(folder, data, output_dir, **{**options, "validation_steps": 1})
    assert left.value.code == 0
    assert not (output_dir / "STOP").exists()
    assert read_manifest(output_dir / "checkpoint-1")["validation_is_due"]
    assert read_log(output_dir, "validation_loss") == []
    train(folder, data, output_dir, resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, output_dir)
    assert [step for step, _ in read_log(output_dir, "validation_loss")] == [1, 2, 4, 6]


@pytest.mark.parametrize("what", ["sample_grid", "model_card"])
def test_a_failure_at_the_end_loses_nothing(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    whole = train(folder, data, tmp_path / "whole", num_validation_images=1)

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(validation if what == "sample_grid" else script, what, fail)
        with pytest.raises(RuntimeError, match=r"after step 4: .*No space left.* The last good checkpoint is .*-4;"):
            train(folder, data, tmp_path / "run", num_validation_images=1)
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert not list((tmp_path / "run").glob(".partial-*"))
    train(folder, data, tmp_path / "run", num_validation_images=1, resume_from_checkpoint="latest")
    assert_same_weights(whole, tmp_path / "run")


def test_a_full_disk_does_not_end_a_run_at_once(
    folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train(folder, data, tmp_path / "whole")
    write, calls, broken = checkpoints._write_manifest, [], {2, 3}

    def full(folder: Path, state: dict) -> None:
        calls.append(state["step"])
        if state["step"] in broken:
            raise OSError(28, "No space left on device")
        write(folder, state)

    monkeypatch.setattr(checkpoints, "_write_manifest", full)
    output_dir = train(folder, data, tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=1)
    assert calls == [1, 2, 3, 4]
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 2
    assert all("No space left" in error and "The last good checkpoint is" in error for error in errors)
    assert "checkpoint-1." in errors[1]
    assert [path.name for path in output_dir.glob("checkpoint-*")] == ["checkpoint-4"]
    assert_same_weights(whole, output_dir)
    broken.add(4)
    with pytest.raises(RuntimeError, match=r"3 times in a row, and the run ends\. The last good checkpoint is .*-1\."):
        train(folder, data, tmp_path / "ends", checkpointing_steps=1)


def test_accelerate_reads_the_configurations() -> None:
    files = sorted((SCRIPT.parent / "accelerate").glob("*.yaml"))
    engines = {"deepspeed_zero2.yaml": "DEEPSPEED", "fsdp2.yaml": "FSDP"}
    assert len(files) == 5
    for file in files:
        config = load_config_from_file(str(file))
        assert str(config.distributed_type.value) == engines.get(file.name, "MULTI_GPU")
        assert f"--config_file training_scripts/accelerate/{file.name}" in file.read_text()


# What the arguments do


def test_every_argument_is_used() -> None:
    assert unused_arguments(SCRIPT, script) == []


def test_arguments_of_a_file(folder: Path, data: Path, tmp_path: Path) -> None:
    first = train(folder, data, tmp_path / "first", use_ema=True, lr_scheduler="linear", lr_warmup_steps=1)
    second = tmp_path / "second"
    words = ["--config", str(first / "training_args.json"), "--output_dir", str(second), "--max_train_steps=4"]
    args = parse_arguments(script.ScriptArguments, words)
    saved = json.loads((first / "training_args.json").read_text())
    now = args.saved()
    assert {name for name in now if now[name] != saved[name]} == {"output_dir"}
    (tmp_path / "bad.json").write_text('{"learning_rte": 1}')
    with pytest.raises(ValueError, match=r"arguments that the script does not have: \['learning_rte'\]"):
        parse_arguments(script.ScriptArguments, ["--config", str(tmp_path / "bad.json")])
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        parse_arguments(script.ScriptArguments, ["--config", str(tmp_path / "bad.json")])
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold one JSON object"):
        parse_arguments(script.ScriptArguments, ["--config", str(tmp_path / "bad.json")])


def test_recipes_of_the_pipelines_parse() -> None:
    recipes = sorted((SCRIPT.parents[1] / "pipelines").glob("*/training.json"))
    # The other scripts' recipes are in the tests of those.
    own = [recipe for recipe in recipes if '"FlowMatchPipeline"' in (recipe.parent / "model_index.json").read_text()]
    assert own
    for recipe in own:
        # ImageNet is wherever it is.
        is_complete = "dataset_name" in json.loads(recipe.read_text())
        words = [] if is_complete else ["--train_data_dir=imagenet"]
        parse_arguments(script.ScriptArguments, ["--config", str(recipe), *words])


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode", "cosmap", "beta"])
def test_times_have_the_density_that_was_asked_for(folder: Path, density: str) -> None:
    options = {"timestep_density": density, "logit_mean": 0.5, "logit_std": 0.8, "mode_scale": 0.7}
    options |= {"density_alpha": 2.0, "density_beta": 3.0}
    line = command_line(folder, folder, folder, **options)
    args = parse_arguments(script.ScriptArguments, line)
    path = load_scheduler(folder).path
    part = BatchSlice(0, 0, 0, 4096, 4096)
    t = script.draw_times(args, path, part, 1.0)
    u = torch.linspace(0, 1, 4097, dtype=torch.float64)
    shapes = {"logit_normal": {"mean": 0.5, "std": 0.8}, "mode": {"scale": 0.7}, "beta": {"alpha": 2.0, "beta": 3.0}}
    quantiles = DENSITIES[density](u, **shapes.get(density, {}))
    # One draw from each of 4,096 strata of equal probability.
    in_order = t.sort().values
    assert (quantiles[:-1] <= in_order + 1e-12).all()
    assert (in_order <= quantiles[1:] + 1e-12).all()
    # A shift of the times of the straight coordinates.
    shifted = script.draw_times(args, path, part, 3.0)
    assert torch.allclose(torch.logit(shifted), torch.logit(t) + math.log(3), atol=1e-6)


def load_scheduler(folder: Path) -> FlowMatchScheduler:
    return FlowMatchScheduler.from_pretrained(folder, subfolder="scheduler")


@pytest.mark.parametrize("path", ["vp", "ve", "cosine"])
def test_the_shift_of_other_paths_is_that_of_their_sampling(path: str, tmp_path: Path) -> None:
    scheduler = FlowMatchScheduler(path=path, shift=3.0)
    words = ["--pretrained_model_name_or_path=x", "--dataset_name=x", "--timestep_density=uniform"]
    args = parse_arguments(script.ScriptArguments, words)
    part = BatchSlice(0, 0, 0, 64, 64)
    t, shifted = (script.draw_times(args, scheduler.path, part, shift) for shift in (1.0, 3.0))
    r = scheduler.path.ratio(t)
    expected = (3 * r / (1 + 2 * r)).clamp(max=scheduler.path.ratio_max)
    assert torch.allclose(scheduler.path.ratio(shifted), expected, atol=1e-9)


def test_the_shift_is_saved(folder: Path, data: Path, tmp_path: Path) -> None:
    output_dir = train(folder, data, tmp_path / "run", shift=3.0, max_train_steps=1)
    assert load(output_dir).scheduler.config.shift == 3.0
    # Without the argument the folder's own shift holds, and it is the same training.
    again = train(output_dir, data, tmp_path / "again", max_train_steps=1)
    other = train(output_dir, data, tmp_path / "other", max_train_steps=1, shift=3.0)
    assert read_log(again, "loss") == read_log(other, "loss")
    plain = train(output_dir, data, tmp_path / "plain", max_train_steps=1, shift=1.0)
    assert read_log(plain, "loss") != read_log(other, "loss")


def first_loss(folder: Path, data: Path, output_dir: Path, **options: object) -> float:
    return read_log(train(folder, data, output_dir, max_train_steps=1, **options), "loss")[0][1]


def test_weights_of_the_loss(folder: Path, data: Path, tmp_path: Path) -> None:
    # With an output layer of zeros, the first loss is the mean of weight(t) |target|^2, whatever the network.
    losses = {
        name: first_loss(folder, data, tmp_path / name, weighting_scheme=name)
        for name in ("none", "epsilon", "sample", "cosmap", "min_snr")
    }
    losses["min_snr-1"] = first_loss(folder, data, tmp_path / "gamma", weighting_scheme="min_snr", snr_gamma=1.0)
    assert len(set(losses.values())) == 6
    assert losses["epsilon"] < losses["none"]
    assert losses["sample"] < losses["none"]
    assert losses["min_snr-1"] < losses["min_snr"]


def test_labels_are_dropped_as_often_as_asked(folder: Path, data: Path, tmp_path: Path) -> None:
    # The table's gradient shows which labels the network was given.
    def trained_rows(label_dropout: float) -> torch.Tensor:
        name = "unet.class_embedding.weight"
        output_dir = tmp_path / str(label_dropout)
        train(folder, data, output_dir, max_train_steps=6, label_dropout=label_dropout, adam_weight_decay=0.0)
        start = init_pipeline(folder, seed=0).unet.class_embedding.weight
        return (weights(output_dir)[name] != start).any(1)

    assert trained_rows(0.0).tolist() == [True] * NUM_CLASSES + [False]
    assert trained_rows(1.0).tolist() == [False] * NUM_CLASSES + [True]
    assert trained_rows(0.4).tolist() == [True] * (NUM_CLASSES + 1)


def test_schedules_count_optimizer_steps(folder: Path, data: Path, tmp_path: Path) -> None:
    def rates(**options: object) -> list[float]:
        output_dir = tmp_path / str(len(list(tmp_path.iterdir())))
        train(folder, data, output_dir, max_train_steps=6, train_batch_size=4, **options)
        return [rate for _, rate in read_log(output_dir, "learning_rate")]

    assert rates() == [1e-3] * 6
    warm = rates(lr_scheduler="constant_with_warmup", lr_warmup_steps=4, gradient_accumulation_steps=2)
    assert warm == pytest.approx([0, 2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    cosine = rates(lr_scheduler="cosine", lr_warmup_steps=2)
    assert cosine == pytest.approx([0, 5e-4, *(5e-4 * (1 + math.cos(math.pi * i / 4)) for i in range(4))])
    linear = rates(lr_scheduler="polynomial", lr_warmup_steps=0, lr_power=1.0)
    square = rates(lr_scheduler="polynomial", lr_warmup_steps=0, lr_power=2.0)
    assert square[3] < linear[3]
    restarts = rates(lr_scheduler="cosine_with_restarts", lr_warmup_steps=0, lr_num_cycles=2)
    assert restarts[3] == pytest.approx(1e-3)
    assert rates(scale_lr=True, gradient_accumulation_steps=2) == pytest.approx([8e-3] * 6)
    # Five hundred steps of warm-up, if nothing is said.
    assert rates(lr_scheduler="linear") == pytest.approx([1e-3 * i / 500 for i in range(6)])


def test_length_in_epochs(folder: Path, data: Path, tmp_path: Path) -> None:
    options = {"max_train_steps": None, "num_train_epochs": 3, "train_batch_size": 8}
    output_dir = train(folder, data, tmp_path / "run", **options)
    # 60 samples in steps of 8.
    assert [line[0] for line in read_log(output_dir, "loss")][-1] == 8
    assert json.loads((output_dir / "training_args.json").read_text())["max_train_steps"] == 8
    # Of 60 samples 32 are seen in two steps; the others take seven steps of four.
    options |= {"train_batch_size": 16, "max_train_steps": 2, "checkpointing_steps": 2}
    first = train(folder, data, tmp_path / "first", **options)
    options |= {"train_batch_size": 4, "max_train_steps": None}
    resumed = train(folder, data, tmp_path / "resumed", resume_from_checkpoint=first / "checkpoint-2", **options)
    assert [line[0] for line in read_log(resumed, "loss")][-1] == 2 + 7


@pytest.mark.parametrize(
    "options",
    [
        {"adam_beta1": 0.5},
        {"adam_beta2": 0.9},
        {"adam_weight_decay": 0.5},
        {"adam_epsilon": 1e-2},
        {"max_grad_norm": 1e-3, "adam_epsilon": 1e-2},
        {"mixed_precision": "bf16"},
        {"max_train_samples": 12},
        {"random_flip": True},
        {"seed": 1},
        {"label_dropout": 0.9},
        {"logit_mean": 1.0},
        {"logit_std": 0.5},
        {"resolution": 12},
    ],
    ids=lambda options: next(iter(options)),
)
def test_arguments_that_change_the_weights(
    folder: Path, data: Path, tmp_path: Path, options: dict[str, object], plain_run: Path
) -> None:
    output_dir = train(folder, data, tmp_path / "run", max_train_steps=3, **options)
    plain, changed = weights(plain_run), weights(output_dir)
    assert any(not torch.equal(plain[name], changed[name]) for name in plain)
    assert all(torch.isfinite(tensor).all() and tensor.dtype == torch.float32 for tensor in changed.values())
    if "resolution" in options:
        assert load(output_dir)(class_labels=[0], num_inference_steps=1).images[0].size == (12, 12)


@pytest.fixture(scope="module")
def plain_run(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(folder, data, tmp_path_factory.mktemp("plain") / "run", max_train_steps=3)


def test_arguments_that_do_not_change_the_weights(folder: Path, data: Path, tmp_path: Path, plain_run: Path) -> None:
    options = {
        "allow_tf32": True,
        "logging_steps": 2,
        "validation_steps": 1,
        "num_validation_images": 1,
        "guidance_scale": 2.0,
        "eval_batch_size": 3,
        "max_validation_samples": 4,
        "nan_policy": "skip",
        "logging_dir": "board",
        "tracker_project_name": "named",
        "report_to": "tensorboard",
        "cache_dir": tmp_path / "cache",
    }
    output_dir = train(folder, data, tmp_path / "run", max_train_steps=3, **options)
    assert_same_weights(plain_run, output_dir)
    assert list((output_dir / "board" / "named").rglob("events.out.tfevents.*"))
    assert (tmp_path / "cache").is_dir()


def test_gradient_checkpointing_changes_nothing_but_memory(data: Path, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "untrained", "unet-classes")
    plain = train(folder, data, tmp_path / "plain", **SMOOTH)
    saved = train(folder, data, tmp_path / "saved", gradient_checkpointing=True, **SMOOTH)
    assert_same_weights(plain, saved, atol=1e-6)


def test_cropping(folder: Path, tmp_path: Path) -> None:
    # Wide pictures: the middle is black, the ends are white.
    images = []
    for _ in range(20):
        pixels = np.full((8, 24), 255, dtype=np.uint8)
        pixels[:, 8:16] = 0
        images.append(PIL.Image.fromarray(pixels))
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.Value("int64")})
    columns = {"picture": images, "kind": [0] * 20}
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    names = {"image_column": "picture", "label_column": "kind"}
    # The mean square of the target is 1 plus that of the data, which is 1 at black and at white.
    anywhere = first_loss(folder, tmp_path / "data", tmp_path / "anywhere", **names)
    centre = first_loss(folder, tmp_path / "data", tmp_path / "centre", center_crop=True, **names)
    assert anywhere != centre


def test_folders_of_images_and_other_splits(folder: Path, tmp_path: Path) -> None:
    for split, count in (("practice", 12), ("exam", 4)):
        for i in range(count):
            file = tmp_path / "images" / split / "abcde"[i % 5] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (9, 8), (10 * i, 0, 0)).save(file)
    output_dir = train(
        folder,
        tmp_path,
        tmp_path / "run",
        dataset_name=None,
        train_data_dir=tmp_path / "images" / "practice",
        max_train_steps=1,
    )
    assert load(output_dir).config.id2label == {str(i): "abcde"[i] for i in range(5)}
    assert read_log(output_dir, "validation_loss") == []
