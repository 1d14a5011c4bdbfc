# SPDX-License-Identifier: Apache-2.0
"""A pipeline for a folder of one's own: its classes, its size and a recipe, and the way to samples in the docs."""

import json
import os
import re
import shlex
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from training_runs import ROOT, run_script, script

from diffusers_fm import init_pipeline
from diffusers_fm.adapt_pipeline import main


CLASSES = ("boat", "cat", "tree")


def photos(folder: Path, count: int = 20) -> Path:
    """Noise of a colour for each class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for row in range(count):
            pixels = rng.integers(0, 100, (40, 48, 3), dtype=np.uint8)
            pixels[..., number] += 150
            PIL.Image.fromarray(pixels).save(folder / name / f"{row}.jpg")
    return folder


@pytest.mark.parametrize(("name", "side"), [("unet-images32", 16), ("dit-digits", 16), ("sd3-digits", 8)])
def test_classes_and_size(name: str, side: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--train_data_dir", str(photos(tmp_path / "photos", 1)), "--output", str(tmp_path / "mine")]
    assert main([str(ROOT / "pipelines" / name), *line, "--resolution", str(side)]) == 0
    pipeline = init_pipeline(tmp_path / "mine", empty=True)
    assert (pipeline.num_classes, pipeline.null_class, pipeline.sample_shape[1:]) == (3, 3, (side, side))
    assert pipeline.get_label_ids(["tree", "boat"]) == [2, 0]
    assert "3 classes (boat, cat, tree)" in capsys.readouterr().out
    recipe = json.loads((tmp_path / "mine" / "training.json").read_text())
    assert recipe["pretrained_model_name_or_path"] == str(tmp_path / "mine")
    assert recipe["train_data_dir"] == str(tmp_path / "photos") and "dataset_name" not in recipe


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--classes", "some"], "--classes must be auto, none or a number of at least 1, got 'some'."),
        ([], "--classes auto needs exactly one of --train_data_dir and --dataset_name."),
        (["--train_data_dir", "{}/photos/cat"], "put those of each class into a subfolder of its name"),
        (
            ["--classes", "none", "--resolution", "30"],
            "must be positive multiples of 4 for this pipeline, got 30 x 30",
        ),
        (["--classes", "none", "--output", "{}/photos"], "exists already: give a new folder."),
    ],
)
def test_refusals(words: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos(tmp_path / "photos", 1)
    words = ["--output", str(tmp_path / "mine"), *(word.format(tmp_path) for word in words)]
    assert main([str(ROOT / "pipelines" / "unet-images32"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


def test_the_commands_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Photos of three classes to samples, with the page's commands word for word; the training is shorter."""
    photos(tmp_path / "photos")
    os.symlink(ROOT / "pipelines", tmp_path / "pipelines")
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO", "diffusers_fm")
    page = (ROOT / "docs" / "your_own_images.md").read_text(encoding="utf-8")
    adapt, train = (
        shlex.split(command.replace("\\\n", " ")) for command in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[:2]
    )
    assert adapt[:3] == ["python", "-m", "diffusers_fm.adapt_pipeline"]
    assert main(adapt[3:]) == 0
    assert train[:3] == ["accelerate", "launch", "training_scripts/train_flow_matching.py"]
    short = ["--max_train_steps", "2", "--num_validation_images", "1", "--num_inference_steps", "2", "--use_cpu"]
    run_script(script, [*train[3:], *short, "--report_to", "none"])
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], {})
    assert "An epoch has 3.38 steps: 54 samples, 16 in a step." in caplog.text
    assert "The warm-up of 200 steps is not over when the run ends after 2" in caplog.text
    assert PIL.Image.open(tmp_path / "sample.png").size == (32, 32)
