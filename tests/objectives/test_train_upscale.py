# SPDX-License-Identifier: Apache-2.0
"""The training of upscalers: what comes out, pairs of images, noise on the condition, what is refused, the recipes."""

import json
import re
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import UNet2DModel
from huggingface_hub import ModelCard
from tiny_pipelines import save_untrained_upscaler
from training_runs import (
    ROOT,
    assert_same_weights,
    load_script,
    make_dataset,
    png,
    read_log,
    run_script,
    save_untrained,
    unused_arguments,
)

from diffusers_fm import FlowMatchScheduler, FlowMatchUpscalePipeline
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.objectives.upscaling import PairedImageData
from diffusers_fm.pipelines.resampling import downscale


PIPELINES = ROOT / "pipelines"
PRESETS = {
    "upscale-digits": (2, (1, 8, 8)),
    "upscale-emoji": (2, (3, 64, 64)),
    "upscale-64-256": (4, (3, 256, 256)),
}

script = load_script(ROOT / "training_scripts" / "train_upscale.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_untrained_upscaler(tmp_path_factory.mktemp("pipelines") / "upscaler")


def train(pipeline: Path, data: Path, output_dir: Path, **options: object) -> Path:
    values = {
        "pretrained_model_name_or_path": pipeline,
        "dataset_name": data,
        "output_dir": output_dir,
        "seed": 0,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_inference_steps": 2,
        "num_validation_images": 2,
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()]
    run_script(script, line)
    return output_dir


def test_a_run_leaves_a_pipeline_figures_a_grid_and_a_card(folder: Path, data: Path, tmp_path: Path) -> None:
    output_dir = train(folder, data, tmp_path / "run", max_train_steps=25, learning_rate=5e-3, validation_steps=20)
    losses = [loss for _, loss in read_log(output_dir, "loss")]
    # Output layers start at zero: the first loss is that of no knowledge.
    assert np.mean(losses[-5:]) < 0.9 * losses[0]
    figures = read_log(output_dir, "validation_loss", "psnr", "ssim", "bicubic_psnr", "bicubic_ssim")
    assert [line[0] for line in figures] == [20, 25]
    # Bicubic enlargement is the same at every step.
    assert figures[0][4:] == figures[1][4:]

    pipeline = FlowMatchUpscalePipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    small = PIL.Image.fromarray(np.full((4, 4), 100, dtype=np.uint8))
    assert pipeline(small, num_inference_steps=2).images[0].size == (8, 8)
    # Low resolution, bicubic, two samples, original.
    assert PIL.Image.open(output_dir / "grid.png").size == (2 + 5 * (48 + 2), 2 + 2 * (48 + 2))
    card = ModelCard.load(output_dir / "README.md")
    assert card.data.pipeline_tag == "image-to-image"
    assert "PSNR of a sample, of bicubic" in card.text
    example = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert example is not None
    assert "PIL.Image.open" in example[1]
    compile(example[1], "README.md", "exec")


def test_a_resumed_run_is_the_uninterrupted_one(data: Path, tmp_path: Path) -> None:
    folder = save_untrained_upscaler(tmp_path / "untrained", in_channels=3)
    options = {"max_noise_level": 0.5, "random_flip": True, "use_ema": True, "num_validation_images": 0}
    whole = train(folder, data, tmp_path / "whole", max_train_steps=5, checkpointing_steps=3, **options)
    resumed = train(folder, data, tmp_path / "resumed", max_train_steps=3, checkpointing_steps=3, **options)
    options |= {"resume_from_checkpoint": "latest"}
    train(folder, data, resumed, max_train_steps=5, checkpointing_steps=3, **options)
    assert_same_weights(whole, resumed)
    # The channel of the noise level is used: without noise the same seed learns something else.
    plain = train(folder, data, tmp_path / "plain", max_train_steps=1, num_validation_images=0)
    assert read_log(plain, "loss")[0] != read_log(whole, "loss")[0]


def paired_columns(side: int = 8, factor: int = 2, count: int = 12) -> dict[str, list[PIL.Image.Image]]:
    rng = np.random.default_rng(0)
    large = [PIL.Image.fromarray(rng.integers(0, 256, (side, side + 4), dtype=np.uint8)) for _ in range(count)]
    small = [
        PIL.Image.fromarray(downscale(torch.from_numpy(np.asarray(image))[None, None], factor)[0, 0].numpy())
        for image in large
    ]
    return {"sharp": large, "blurred": small}


def paired_dataset(columns: dict[str, list[PIL.Image.Image]]) -> datasets.Dataset:
    features = datasets.Features({name: datasets.Image() for name in columns})
    return datasets.Dataset.from_dict(columns, features=features)


@pytest.mark.parametrize("memory_budget", [None, 0])
def test_pairs_are_cropped_and_mirrored_alike(memory_budget: int | None) -> None:
    columns = paired_columns()
    # Where a pixel of the small image is, the large one has four of its value: crops that fit can be told.
    columns["sharp"] = [image.resize((12, 8), PIL.Image.Resampling.NEAREST) for image in columns["blurred"]]
    transform = ImageTransform(8, 1, random_flip=True, multiple=2)
    options = {} if memory_budget is None else {"memory_budget": memory_budget}
    data = PairedImageData(paired_dataset(columns), transform, "blurred", 2, seed=3, image_column="sharp", **options)
    seen = set()
    for epoch in range(6):
        batch = data[np.array([[epoch, row] for row in range(len(data))])]
        assert torch.equal(batch["images"][:, :, ::2, ::2], batch["conditioning_images"])
        seen |= {bytes(image.numpy().tobytes()) for image in batch["conditioning_images"]}
    # Three places and two sides of each.
    assert len(seen) > 2 * len(data)


def test_training_on_pairs(folder: Path, tmp_path: Path) -> None:
    paired_dataset(paired_columns()).save_to_disk(str(tmp_path / "pairs"))
    columns = {"image_column": "sharp", "conditioning_image_column": "blurred"}
    output_dir = train(folder, tmp_path / "pairs", tmp_path / "run", **columns)
    assert len(read_log(output_dir, "loss")) == 4
    wrong = paired_columns()
    wrong["blurred"][5] = wrong["blurred"][5].resize((5, 4))
    paired_dataset(wrong).save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(ValueError, match="row 5 of the data set are no pair: 8 x 12 is not 2 times 4 x 5"):
        train(folder, tmp_path / "wrong", tmp_path / "other", **columns)


@pytest.mark.parametrize("memory_budget", [2**20, 0], ids=["in memory", "on the way"])
def test_pairs_that_cannot_be_read_are_replaced_by_pairs(memory_budget: int) -> None:
    columns: dict[str, list] = paired_columns()
    columns["sharp"] = [image.resize((12, 8), PIL.Image.Resampling.NEAREST) for image in columns["blurred"]]
    for name, images in columns.items():
        columns[name] = [{"bytes": png(image), "path": None} for image in images]
    columns["sharp"][2]["bytes"] = b"no image"
    columns["blurred"][5]["bytes"] = columns["blurred"][5]["bytes"][:50]
    columns["blurred"][7] = None
    dataset, transform = paired_dataset(columns), ImageTransform(8, 1, center_crop=True, multiple=2)
    options = {"image_column": "sharp", "memory_budget": memory_budget}
    data = PairedImageData(dataset, transform, "blurred", 2, max_unreadable=3, **options)
    keys = np.array([[epoch, row] for epoch in range(3) for row in range(12)])
    batch = data[keys]
    assert sorted(batch["unreadable"]) == [2, 5, 7]
    # Each is still the partner of the other.
    assert torch.equal(batch["images"][:, :, ::2, ::2], batch["conditioning_images"])
    assert "unreadable" not in data[keys]
    with pytest.raises(ValueError, match="The image in row . of the data set cannot be read"):
        PairedImageData(dataset, transform, "blurred", 2, max_unreadable=2, **options)[keys]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_noise_level": 1.5}, r"--max_noise_level must be in \[0, 1\], got 1.5"),
        ({"num_measured_images": -1}, "--num_measured_images must be at least 0, got -1"),
        ({"conditioning_image_column": "small"}, "no image column 'small'"),
        ({"resolution": 9}, "--resolution must be a multiple of 2"),
        ({"max_train_steps": 0}, "--max_train_steps must be at least 1, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(folder: Path, data: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(folder, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_other_pipelines_are_refused(data: Path, tmp_path: Path) -> None:
    generator = save_untrained(tmp_path / "generator", "unet")
    with pytest.raises(ValueError, match="holds a FlowMatchPipeline, where a FlowMatchUpscalePipeline is needed"):
        train(generator, data, tmp_path / "run")


@pytest.mark.parametrize("name", PRESETS)
def test_recipes_and_folders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    scale_factor, shape = PRESETS[name]
    folder = PIPELINES / name
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FlowMatchUpscalePipeline"
    config = json.loads((folder / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DModel.from_config(config)
    scheduler = FlowMatchScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = FlowMatchUpscalePipeline(scheduler, unet=unet, scale_factor=index["scale_factor"])
    assert (pipeline.config.scale_factor, pipeline.sample_shape) == (scale_factor, shape)
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert f"{sum(parameter.numel() for parameter in unet.parameters()):,}" in readme
    assert f"--config pipelines/{name}/training.json" in readme
    assert "## Expected figures" in readme
    argv = ["--config", f"pipelines/{name}/training.json"]
    recipe = json.loads((folder / "training.json").read_text())
    argv += [] if "dataset_name" in recipe else ["--train_data_dir=/data"]
    args = parse_arguments(script.ScriptArguments, argv)
    assert {key: getattr(args, key) for key in recipe} == recipe


def test_every_argument_is_used() -> None:
    assert unused_arguments(ROOT / "training_scripts" / "train_upscale.py", script) == []
