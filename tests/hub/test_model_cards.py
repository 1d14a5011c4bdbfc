# SPDX-License-Identifier: Apache-2.0
"""What cards say, and that the Hub takes it."""

import json
import os
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import check_card
from huggingface_hub import ModelCard
from tiny_pipelines import KINDS, tiny_pipeline
from tiny_text_to_image import tiny_stable_diffusion_3

from diffusers_fm import PATHS, FlowMatchScheduler, with_stock_scheduler
from diffusers_fm.hub.cards import Evaluation, with_evaluation
from diffusers_fm.hub.portable import portable_files, without_local_paths
from diffusers_fm.text_to_image.cards import lora_card, text_to_image_card
from diffusers_fm.training.cards import model_card


FIGURES = {"validation_loss": 0.25, "validation_loss_by_time": [0.5, None, *[0.125] * 8]}


def arguments(folder: Path, **options: Any) -> Namespace:
    """Arguments of a run that a card speaks of."""
    defaults = {
        "output_dir": str(folder),
        "dataset_name": "someone/digits",
        "train_data_dir": None,
        "pretrained_model_name_or_path": str(folder / "untrained"),
        "max_train_steps": 2000,
        "num_inference_steps": 20,
        "guidance_scale": 2.0,
        "hub_token": "secret-token",
        "hub_license": "apache-2.0",
        "validation_prompts": ["a red square", 'a "blue" one'],
        "resolution": 16,
        "max_sequence_length": 16,
    }
    return Namespace(**{**defaults, **options})


def data_of(card: ModelCard) -> dict[str, Any]:
    """The head, as it is read from the file; the Hub takes it."""
    assert check_card(str(card)) == []
    assert "secret-token" not in str(card)
    return ModelCard(str(card)).data.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_of_a_run(tmp_path: Path, kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    (tmp_path / "grid.png").touch()
    card = model_card(pipeline, arguments(tmp_path), "someone/model", 64, FIGURES)
    data = data_of(card)
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert {"diffusers-fm", "flow-matching"} <= set(data["tags"])
    assert ("class-conditional" in data["tags"]) == (pipeline.num_classes > 0)
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["someone/digits"])
    assert "base_model" not in data
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"name": "someone/digits", "type": "someone/digits"}
    assert result["metrics"] == [{"type": "held-out_loss", "value": 0.25, "name": "held-out loss"}]
    text = card.text
    assert "![Samples](grid.png)" in text
    assert "| steps | 2,000 of 64 samples |" in text
    assert "| 0.0 to 0.1 | 0.5000 |\n| 0.1 to 0.2 |  |\n| 0.2 to 0.3 | 0.1250 |" in text
    assert "| `euler` (as saved) | ot, trailing | 20 | 20 |" in text
    assert "@inproceedings{lipman2023flow" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("path", PATHS)
def test_the_formula_is_that_of_the_path(tmp_path: Path, path: str) -> None:
    card = model_card(tiny_pipeline("unet", path=path), arguments(tmp_path), "someone/model", 64, {})
    assert f'"path": "{path}"' in card.text
    expected = {"ot": "1 - t", "vp": "20", "ve": "50", "cosine": "\\cos(\\pi t / 2)", "vp_discrete": "\\beta_i"}
    (formula,) = (line for line in card.text.splitlines() if line.startswith("$$"))
    assert expected[path] in formula
    if path == "vp":
        # The LaTeX of the exponent, evaluated, is the path's own alpha.
        t = torch.linspace(0, 1, 5, dtype=torch.float64)
        alpha = np.exp(-0.5 * (0.1 * t + 0.5 * (20.0 - 0.1) * t**2))
        torch.testing.assert_close(FlowMatchScheduler(path="vp").path.alpha(t), torch.as_tensor(alpha))


def test_what_is_local_is_not_named_as_an_id(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    args = arguments(tmp_path, dataset_name=str(tmp_path / "digits"), hub_license=None)
    card = model_card(tiny_pipeline("unet"), args, "someone/model", 64, {})
    data = data_of(card)
    assert not {"datasets", "base_model", "model-index", "license"} & set(data)
    assert "| data | `digits` |" in card.text
    fine_tuned = arguments(tmp_path, pretrained_model_name_or_path="someone/base")
    assert data_of(model_card(tiny_pipeline("unet"), fine_tuned, "a/b", 64, {}))["base_model"] == "someone/base"


@pytest.mark.parametrize("ours", [True, False])
def test_the_card_of_text_to_image(tmp_path: Path, ours: bool) -> None:
    pipeline = tiny_stable_diffusion_3(scheduler=FlowMatchScheduler(shift=3.0, timestep_spacing="linspace"))
    pipeline = pipeline if ours else with_stock_scheduler(pipeline)
    for i in range(2):
        (tmp_path / f"image_{i}.png").touch()
    card = text_to_image_card(pipeline, arguments(tmp_path), "someone/model", 64, FIGURES)
    data = data_of(card)
    assert data["pipeline_tag"] == "text-to-image"
    assert [entry["text"] for entry in data["widget"]] == ["a red square", 'a "blue" one']
    assert [entry["output"]["url"] for entry in data["widget"]] == ["image_0.png", "image_1.png"]
    assert "<Gallery />" in card.text
    assert ("import diffusers_fm" in card.text) == ours
    assert 'StableDiffusion3Pipeline.from_pretrained("someone/model")' in card.text


def test_the_card_of_lora_weights_is_as_diffusers_writes_it(tmp_path: Path) -> None:
    args = arguments(tmp_path, pretrained_model_name_or_path="stabilityai/sd3", validation_prompts=None)
    (tmp_path / "image_0.png").touch()
    card = lora_card(tiny_stable_diffusion_3(), args, "someone/lora", 4, FIGURES, instance_prompt="a photo of sks dog")
    data = data_of(card)
    assert data["base_model"] == "stabilityai/sd3"
    assert data["instance_prompt"] == "a photo of sks dog"
    assert data["widget"] == [{"text": "a photo of sks dog", "output": {"url": "image_0.png"}}]
    assert {"lora", "template:sd-lora", "diffusers-training"} <= set(data["tags"])
    assert 'from_pretrained("stabilityai/sd3")\npipeline.load_lora_weights("someone/lora")' in card.text


def test_an_evaluation_goes_into_the_card(tmp_path: Path) -> None:
    card = model_card(tiny_pipeline("unet"), arguments(tmp_path), "someone/model", 64, FIGURES)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    found = {
        "model": "unet",
        "dataset_name": "digits",
        "seed": 0,
        "quality": {"fid": 3.25, "features": "inception", "images": 50_000},
        "solvers": {"fixed": [{"solver": "euler", "calls": 20, "relative_error": 0.123456}], "adaptive": []},
    }
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(found))
    (tmp_path / "evaluation" / "nearest.png").touch()
    (tmp_path / "evaluation" / "error_by_calls.png").touch()
    evaluation = Evaluation.read(tmp_path)
    assert evaluation is not None
    assert evaluation.metrics == {"quality/fid": 3.25}
    for _ in range(2):  # a second time the figures are replaced
        card = with_evaluation(card, evaluation)
        (result,) = data_of(card)["model-index"][0]["results"]
        assert result["metrics"] == [{"type": "quality/fid", "value": 3.25, "name": "quality/fid"}]
        assert card.text.count("## Evaluation") == 1
        assert "| quality/fid | 3.25 |" in card.text and "| euler | 20 | 0.1235 |" in card.text
        assert "0.25 |" not in card.text.partition("## Evaluation")[2].partition("##")[0].replace("3.25 |", "")
        assert "@inproceedings{lipman2023flow" in card.text
    assert {"evaluation/metrics.json", "evaluation/error_by_calls.png"} <= set(portable_files(tmp_path))
    assert "evaluation/nearest.png" not in portable_files(tmp_path)
    # Figures of an earlier pipeline are not those of this one.
    os.utime(tmp_path / "evaluation" / "metrics.json", (1, 1))
    assert Evaluation.read(tmp_path) is None
    (tmp_path / "metrics.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object with `dataset_name`"):
        Evaluation.read(tmp_path)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/data/digits", "digits"),
        ("C:\\Users\\me\\digits", "digits"),
        ("~/digits", "digits"),
        ("data/digits", "data/digits"),
        ("/", "/"),
        ("someone/digits", "someone/digits"),
        ("https://example.org/a", "https://example.org/a"),
        ({"_name_or_path": "/home/me/unet", "a": [{"b": "/x/y"}]}, {"a": [{"b": "y"}]}),
        ({"_name_or_path": "someone/unet"}, {"_name_or_path": "someone/unet"}),
        ({"pretrained_model_name_or_path": "/home/me/unet"}, {"pretrained_model_name_or_path": "unet"}),
        (3, 3),
    ],
)
def test_settings_lose_the_paths_of_the_machine(value: Any, expected: Any) -> None:
    assert without_local_paths(value) == expected
