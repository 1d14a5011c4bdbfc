# SPDX-License-Identifier: Apache-2.0
"""Settings of sampling that a run finds out and saves."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from tiny_pipelines import save_untrained_upscaler, tiny_pipeline, tiny_unet
from training_runs import (
    ROOT,
    command_line,
    load,
    load_script,
    make_dataset,
    read_log,
    run_script,
    save_untrained,
    train,
)

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.models import encode_latents
from diffusers_fm.schedulers.recommendation import CALLS, FITTED_CALLS
from diffusers_fm.training.sampler import num_searched


# A search calls the network some hundred times.
pytestmark = pytest.mark.usefixtures("networks_of_one_level")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _few_numbers_of_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches that fail, as those of networks that have learnt nothing do, try all of them."""
    few = (FITTED_CALLS, 20, 40)
    assert set(few) <= set(CALLS)
    monkeypatch.setattr("diffusers_fm.schedulers.recommendation.CALLS", few)


def pixels_of(data: Path, channels: int, side: int) -> torch.Tensor:
    """All images that are trained on, with values in [-1, 1]."""
    rows = datasets.Dataset.from_parquet(str(data / "train-00000-of-00001.parquet"))
    images = [np.array(row["image"].convert("RGB" if channels == 3 else "L").resize((side, side))) for row in rows]
    stacked = torch.from_numpy(np.stack(images)).reshape(len(images), side, side, channels).permute(0, 3, 1, 2)
    return stacked.double() / 127.5 - 1


def saved_sigma_data(folder: Path) -> Any:
    return FlowMatchScheduler.from_pretrained(folder, subfolder="scheduler").config.sigma_data


@pytest.mark.parametrize("streaming", [False, True])
def test_the_deviation_of_pixels_is_saved(data: Path, tmp_path: Path, streaming: bool) -> None:
    output = train(
        save_untrained(tmp_path / "unet", "unet"), data, tmp_path / "run", max_train_steps=1, streaming=streaming
    )
    # Four digits are saved.
    assert saved_sigma_data(output) == pytest.approx(pixels_of(data, 1, 8).std(correction=0).item(), rel=5e-4)


@pytest.mark.parametrize("cached", [False, True])
def test_the_deviation_of_latents_is_saved(tmp_path: Path, cached: bool) -> None:
    data = make_dataset(tmp_path / "data", side=16)
    folder = save_untrained(tmp_path / "dit", "dit-vae")
    output = train(folder, data, tmp_path / "run", max_train_steps=1, cache_latents=cached, center_crop=True)
    latents = encode_latents(tiny_pipeline("dit-vae").vae, pixels_of(data, 3, 16).float(), sample=False)
    assert saved_sigma_data(output) == pytest.approx(latents.std(correction=0).item(), rel=1e-3)


def test_upscalers_save_the_deviation_of_the_large_images(data: Path, tmp_path: Path) -> None:
    module = load_script(ROOT / "training_scripts" / "train_upscale.py")
    line = command_line(save_untrained_upscaler(tmp_path / "up"), data, tmp_path / "run", max_train_steps=1)
    run_script(module, line)
    assert saved_sigma_data(tmp_path / "run") == pytest.approx(
        pixels_of(data, 1, 8).std(correction=0).item(), rel=5e-4
    )


def test_a_deviation_that_the_folder_has_stays(data: Path, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "unet", "unet", sigma_data=0.5)
    assert saved_sigma_data(train(folder, data, tmp_path / "run", max_train_steps=1)) == 0.5


def test_a_stock_configuration_stays_stock(data: Path, tmp_path: Path) -> None:
    DDPMPipeline(tiny_unet(), DDPMScheduler(clip_sample=False)).save_pretrained(tmp_path / "ddpm")
    output = train(tmp_path / "ddpm", data, tmp_path / "run", max_train_steps=1, weighting_scheme="epsilon")
    expected = FlowMatchScheduler.from_pretrained(tmp_path / "ddpm", subfolder="scheduler").config
    found = FlowMatchScheduler.from_pretrained(output, subfolder="scheduler").config
    assert {k: v for k, v in found.items() if k[0] != "_"} == {k: v for k, v in expected.items() if k[0] != "_"}


def test_a_run_saves_the_settings_that_it_finds(data: Path, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "unet", "unet-classes", path="vp")
    options: dict[str, Any] = {"num_inference_steps": None, "eval_batch_size": 2, "validation_split": "test"}
    output = train(folder, data, tmp_path / "run", num_validation_images=1, checkpointing_steps=2, **options)
    pipeline = load(output)
    config = pipeline.scheduler.config
    steps = config.default_num_inference_steps
    assert pipeline(class_labels=[0, 1]).nfe == steps * pipeline.scheduler.order < 50
    assert pipeline(class_labels=[0, 1], num_inference_steps=5).nfe == 5
    assert pipeline(class_labels=[0, 1], solver="euler").nfe == 50
    ((_, error, baseline),) = read_log(output, "sampling_error", "euler_error")
    assert error < baseline
    card = (output / "README.md").read_text()
    assert f"| sampling | `{config.solver}`, {steps} steps by default; relative error {error:.2g}, of 50 Euler" in card
    assert "num_inference_steps=" not in card.partition("```python")[2].partition("```")[0]

    # Resumed half-way, it finds the same.
    (output / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    again = train(
        folder, data, tmp_path / "again", resume_from_checkpoint=tmp_path / "checkpoint-2", num_validation_images=1,
        checkpointing_steps=2, **options,
    )  # fmt: skip
    assert load(again).scheduler.config == config


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"solver": "heun", "num_inference_steps": 7}, ("heun", "ot", "trailing", 7)),
        ({"solver": "ab2", "num_inference_steps": 7}, ("ab2", "angle", "graded", 7)),
        ({"num_inference_steps": 7}, ("euler", "ot", "trailing", 7)),
        (
            {"calibrate_steps": 4, "num_inference_steps": None, "eval_batch_size": 4},
            ("calibrated", "angle", "graded", 4),
        ),
    ],
)
def test_settings_of_the_command_line_are_saved(
    data: Path, tmp_path: Path, options: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    output = train(save_untrained(tmp_path / "unet", "unet"), data, tmp_path / "run", max_train_steps=1, **options)
    pipeline = load(output)
    names = ("solver", "sampling_path", "timestep_spacing", "default_num_inference_steps")
    assert tuple(pipeline.scheduler.config[name] for name in names) == expected
    assert pipeline().nfe == expected[-1] * pipeline.scheduler.order


def test_fitted_steps_do_not_outlive_their_network(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_train_steps": 1, "num_inference_steps": None, "eval_batch_size": 2}
    fitted = train(save_untrained(tmp_path / "unet", "unet"), data, tmp_path / "run", calibrate_steps=4, **options)
    assert list(load(fitted).scheduler.config.calibration) == ["4"]
    searched = train(fitted, data, tmp_path / "searched", **options)
    assert len(read_log(searched, "sampling_error")) == 1
    assert list(load(searched).scheduler.config.calibration or {}) in ([], ["10"])
    options |= {"num_inference_steps": 7, "shift": 2.0}
    config = load(train(fitted, data, tmp_path / "seven", **options)).scheduler.config
    assert (config.solver, config.default_num_inference_steps, config.shift) == ("euler", 7, 2.0)
    assert config.calibration is None


def test_a_folder_that_says_how_to_sample_is_not_searched(data: Path, tmp_path: Path) -> None:
    folder = save_untrained(tmp_path / "unet", "unet", solver="heun")
    output = train(folder, data, tmp_path / "run", max_train_steps=1, num_inference_steps=None)
    config = load(output).scheduler.config
    assert (config.solver, config.default_num_inference_steps) == ("heun", None)


def test_large_samples_are_searched_by_few() -> None:
    assert [num_searched(shape, 64) for shape in ((1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 256, 256))] == [
        64,
        21,
        8,
        8,
    ]
    assert num_searched((3, 256, 256), 4) == 4
