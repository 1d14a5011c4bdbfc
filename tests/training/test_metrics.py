# SPDX-License-Identifier: Apache-2.0
"""What a run reports: losses, pictures, cards, and the upload to the Hub."""

import importlib.util
import json
import math
from contextlib import nullcontext
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tiny_pipelines import NUM_CLASSES, tiny_pipeline

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.training.distributed import check_tracker
from diffusers_fm.training.metrics import LossMeter, RunLog, tracker_options
from diffusers_fm.training.validation import data_and_labels, held_out_loss, make_grid, sample_grid


# Losses


class NoDataIsThere(torch.nn.Module):
    """Answers as if all data were zero: x_t is then all noise."""

    def __init__(self, pipeline: FlowMatchPipeline) -> None:
        super().__init__()
        self.scheduler = pipeline.scheduler

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        path = self.scheduler.path
        t = timestep.double() / self.scheduler.timestep_scale
        data = torch.zeros_like(sample)
        noise = sample / path.sigma(t).float()[:, None, None, None]
        return path.target(data, noise, t, self.scheduler.config.prediction_type)


@pytest.mark.parametrize(
    ("path", "prediction_type"),
    [
        ("ot", "flow_prediction"),
        ("ot", "sample"),
        ("vp", "epsilon"),
        ("ve", "epsilon"),
        ("ve", "v_prediction"),
        ("cosine", "v_prediction"),
    ],
)
def test_the_held_out_loss_means_the_same_on_every_path(
    accelerator: Accelerator, path: str, prediction_type: str
) -> None:
    pipeline = tiny_pipeline("unet", path=path, prediction_type=prediction_type)
    rng = np.random.default_rng(0)
    images = [PIL.Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)) for _ in range(40)]
    dataset = datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))
    data = ImageData(dataset, ImageTransform(8, 1, center_crop=True))
    model = NoDataIsThere(pipeline)
    one, many = (
        held_out_loss(
            accelerator,
            model,
            pipeline.scheduler,
            data,
            batch_size,
            lambda batch: data_and_labels(pipeline, batch, accelerator.device),
        )
        for batch_size in (3, 64)
    )
    # With d taken for 0, the noise is taken for noise + (alpha / sigma) d: the straight velocity is off by d / s.
    energy = torch.tensor([np.square(np.asarray(image) / 127.5 - 1).mean() for image in images])
    spread = (torch.arange(40, dtype=torch.float64) * (math.sqrt(5) - 1) / 2 + 0.5) % 1
    s = (
        pipeline.scheduler.path.ratio_min
        + (pipeline.scheduler.path.ratio_max - pipeline.scheduler.path.ratio_min) * spread
    )
    expected = (energy / s.square()).mean().item()
    # The noise at small sigma is a difference of float32 numbers: 1e-7 / sigma, squared against d / s.
    assert one["validation_loss"] == pytest.approx(expected, rel=1e-3)
    assert many["validation_loss"] == pytest.approx(one["validation_loss"], rel=1e-5)
    by_time = [value for value in one["validation_loss_by_time"] if value is not None]
    assert all(a > b for a, b in zip(by_time[:3], by_time[3:]))


def test_the_meter_sorts_losses_by_time(accelerator: Accelerator) -> None:
    meter = LossMeter()
    meter.add(torch.tensor([0.05, 0.95, 0.5]), torch.tensor([1.0, 3.0, 2.0]))
    meter.add(torch.tensor([0.07]), torch.tensor([5.0]))
    meter.reduce(accelerator)
    # Half of a window goes through a checkpoint.
    again = LossMeter()
    again.load_state_dict(meter.state_dict())
    again.add(torch.tensor([1.0]), torch.tensor([4.0]))
    again.reduce(accelerator)
    report = again.report()
    assert report["loss"] == 3.0
    assert report["loss_by_time"] == [3.0, None, None, None, None, 2.0, None, None, None, 3.5]
    assert again.report()["loss"] is None


def test_the_log_goes_on_where_the_checkpoint_was(accelerator: Accelerator, tmp_path: Path) -> None:
    log = RunLog(accelerator, tmp_path)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    resumed = RunLog(accelerator, tmp_path, first_step=20)
    resumed.write(30, {"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(10, 1.0), (20, 1.0), (30, 2.0)]


# Pictures


def test_trackers_go_on_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    first, again = (tracker_options("digits", "1f2e3d4c", step) for step in (0, 20))
    assert first["wandb"] == again["wandb"] == {"id": "1f2e3d4c", "resume": "allow"}
    assert first["trackio"] == again["trackio"] == {"name": "digits-1f2e3d4c", "resume": "allow"}
    assert "tensorboard" not in first
    assert again["tensorboard"] == {"purge_step": 21}
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert "wandb" not in tracker_options("digits", "1f2e3d4c", 0)


def test_grids_enlarge_small_pictures_pixel_by_pixel() -> None:
    images = [PIL.Image.new("L", (8, 8), shade) for shade in (10, 20, 30)]
    grid = make_grid([images[:2], images[2:]], padding=1)
    assert grid.size == (1 + 2 * 49, 1 + 2 * 49)
    pixels = np.asarray(grid)
    assert (pixels[1:49, 1:49] == 10).all()
    assert (pixels[1:49, 50:98] == 20).all()
    assert (pixels[50:98, 1:49] == 30).all()
    assert (pixels[50:98, 50:98] == 255).all()
    assert (pixels[0] == 255).all()
    large = PIL.Image.new("RGB", (64, 80), "red")
    assert make_grid([[large]], padding=0).tobytes() == large.tobytes()


def test_sampled_grids_have_a_row_for_each_class_and_leave_the_pipeline_alone() -> None:
    pipeline = tiny_pipeline("unet-classes")
    pipeline.scheduler.set_timesteps(7)
    pipeline.unet.train()
    grids = [sample_grid(pipeline, 3, 2, batch_size=batch_size) for batch_size in (64, 4)]
    assert grids[0].size == (2 + 3 * 50, 2 + NUM_CLASSES * 50)
    # Each picture has its own noise, whatever the batch; rounding may move a pixel by one level.
    difference = np.asarray(grids[0]).astype(int) - np.asarray(grids[1]).astype(int)
    assert np.abs(difference).max() <= 1
    assert len(pipeline.scheduler.timesteps) == 7
    assert pipeline.unet.training
    for num_images, columns, rows in ((1, 1, 1), (4, 2, 2), (7, 3, 3), (12, 4, 3)):
        assert sample_grid(tiny_pipeline("unet"), num_images, 1).size == (2 + columns * 50, 2 + rows * 50)


@pytest.mark.parametrize("name", sorted(LOGGER_TYPE_TO_CLASS))
def test_a_tracker_that_is_not_installed_is_refused(name: str) -> None:
    """Accelerate would leave it out without a word."""
    installed = importlib.util.find_spec(name) is not None
    package = name.replace("_", "-")
    refusal = f"--report_to {name} needs a package that is not installed: `pip install {package}`"
    with nullcontext() if installed else pytest.raises(ValueError, match=refusal):
        check_tracker(name)


def test_a_tracker_that_nobody_knows_is_refused() -> None:
    for name in (None, "none", "all", "tensorboard"):
        check_tracker(name)
    with pytest.raises(ValueError, match="--report_to must be one of none, all, aim, .*, got 'tensorbord'"):
        check_tracker("tensorbord")
