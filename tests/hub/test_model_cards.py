# SPDX-License-Identifier: Apache-2.0
"""What cards say, and that the Hub takes it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from fake_hub import check_card
from huggingface_hub import ModelCard
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import KINDS, tiny_pipeline
from tiny_text_to_image import tiny_stable_diffusion_3

from diffusers_fm import PATHS, FlowMatchPipeline, FlowMatchScheduler, with_stock_scheduler
from diffusers_fm.hub.cards import Evaluation, with_evaluation
from diffusers_fm.hub.portable import clean_settings, portable_card, portable_files, without_local_paths
from diffusers_fm.pipelines.cards import family_tags
from diffusers_fm.text_to_image.arguments import TextToImageArguments
from diffusers_fm.text_to_image.cards import lora_card, text_to_image_card
from diffusers_fm.training.publishing import model_card


FIGURES = {"validation_loss": 0.25, "validation_loss_by_time": [0.5, None, *[0.125] * 8]}


def arguments(folder: Path, **options: Any) -> TextToImageArguments:
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
        "push_dry_run": True,
        "validation_prompts": ["a red square", 'a "blue" one'],
        "resolution": 16,
        "max_sequence_length": 16,
    }
    return TextToImageArguments(**{**defaults, **options})


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
    # The sentence that says what the columns mean stands right above the table.
    sentence = "NFE is the number of calls of the network, the cost of sampling."
    assert f"{sentence}\n\n| solver | settings | steps | NFE |" in text
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
    assert {"lora", "template:sd-lora", "diffusers-training", "sd3", "sd3-diffusers"} <= set(data["tags"])
    assert 'from_pretrained("stabilityai/sd3")\npipeline.load_lora_weights("someone/lora")' in card.text


@pytest.mark.parametrize(
    ("name", "tag"),
    [("FluxPipeline", "flux"), ("SanaPipeline", "sana"), ("WanPipeline", "wan"), ("ZImagePipeline", "z-image")],
)
def test_a_card_has_the_tags_of_its_own_family(name: str, tag: str) -> None:
    assert family_tags(getattr(diffusers, name)) == (tag, f"{tag}-diffusers")
    assert family_tags(FlowMatchPipeline) == ()


def test_a_card_describes_the_network_that_is_trained(tmp_path: Path) -> None:
    card = lora_card(tiny_stable_diffusion_3(), arguments(tmp_path, network="text_encoder"), "someone/lora", 4, {})
    assert "CLIPTextModelWithProjection" in str(card)


def test_the_example_of_a_text_to_image_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_stable_diffusion_3(scheduler=FlowMatchScheduler(shift=3.0, timestep_spacing="linspace"))
    pipeline.save_pretrained("base")
    args = arguments(tmp_path, pretrained_model_name_or_path="base", num_inference_steps=2)
    pipeline.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q"]))
    layers = get_peft_model_state_dict(pipeline.transformer)
    pipeline.save_lora_weights("lora", transformer_lora_layers=layers)
    images = []
    for card in (text_to_image_card(pipeline, args, "base", 4, {}), lora_card(pipeline, args, "lora", 4, {})):
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        names: dict = {}
        torch.manual_seed(0)
        exec(compile(code, "README.md", "exec"), names)
        images.append(np.asarray(names["image"]))
    assert images[0].shape == (16, 16, 3)
    # The second example loads the adapters, too.
    assert np.abs(images[0].astype(int) - images[1]).max() > 0


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
        ("~someone/digits", "digits"),
        ("file:///home/me/digits", "digits"),
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


@pytest.mark.parametrize(
    ("loaded", "expected"),
    [
        ("/home/me/runs/unet", "me/unet"),
        ("runs/unet", "me/unet"),
        ("/home/me/customer/base", "path/to/base"),
        ("C:\\\\customer\\\\base", "path/to/base"),
        ("~/customer/base", "path/to/base"),
        ("stabilityai/sd3", "stabilityai/sd3"),
    ],
)
@pytest.mark.parametrize("call", ['from_pretrained("{}")', "load_lora_weights('{}')", 'from_pretrained("{}", a="b")'])
def test_an_uploaded_card_loads_the_repository_and_no_folder(call: str, loaded: str, expected: str) -> None:
    text = portable_card(f"before {call.format(loaded)} after", "me/unet", {"/home/me/runs/unet", "runs/unet"})
    assert text == f"before {call.format(expected)} after"


def test_an_uploaded_card_of_lora_weights_names_no_folder_of_the_base_model(tmp_path: Path) -> None:
    args = arguments(tmp_path, pretrained_model_name_or_path=str(tmp_path / "customer" / "base"))
    card = str(lora_card(tiny_stable_diffusion_3(), args, str(tmp_path / "lora"), 4, {}))
    text = portable_card(card, "someone/lora", {str(tmp_path / "lora")})
    assert 'from_pretrained("path/to/base")\npipeline.load_lora_weights("someone/lora")' in text
    assert "LoRA weights for `base`" in text
    assert str(tmp_path) not in text and "customer" not in text


def test_a_folder_in_the_form_of_an_id_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone else may own the id: a reader would load that."""
    monkeypatch.chdir(tmp_path)
    Path("runs/base").mkdir(parents=True)
    args = arguments(tmp_path, pretrained_model_name_or_path="runs/base")
    card = lora_card(tiny_stable_diffusion_3(), args, "someone/lora", 4, {})
    assert "base_model" not in data_of(card)
    assert "huggingface.co/runs" not in card.text
    assert 'from_pretrained("path/to/base")' in portable_card(card.text, "someone/lora", set())


def test_saved_settings_hold_no_paths_of_the_machine(tmp_path: Path) -> None:
    """Those of every component that was loaded from a folder; other files of the folder are not touched."""
    tiny_pipeline("dit-vae").save_pretrained(tmp_path / "first")
    pipeline = FlowMatchPipeline.from_pretrained(tmp_path / "first")
    assert str(tmp_path) in json.dumps(dict(pipeline.vae.config))
    mine = tmp_path / "second" / "my_config.json"
    mine.parent.mkdir()
    mine.write_text(json.dumps({"data": str(tmp_path)}))
    pipeline.save_pretrained(tmp_path / "second")
    # diffusers' own classes do not clean up; training does it after them.
    tiny_stable_diffusion_3().save_pretrained(tmp_path / "stock")
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path / "stock")
    stock.save_pretrained(tmp_path / "second" / "stock")
    assert str(tmp_path) in (tmp_path / "second" / "stock" / "transformer" / "config.json").read_text()
    clean_settings(tmp_path / "second" / "stock")
    for file in set((tmp_path / "second").rglob("*.json")) - {mine}:
        assert str(tmp_path) not in file.read_text(), file
    assert json.loads(mine.read_text()) == {"data": str(tmp_path)}
    assert FlowMatchPipeline.from_pretrained(tmp_path / "second").vae.config.latent_channels == 4


def test_a_data_set_of_an_evaluation_is_named_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"dataset_name": "/home/me/digits", "metrics": {"FID": 1.0}}))
    evaluation = Evaluation.read(tmp_path)
    assert evaluation is not None
    card = with_evaluation(model_card(tiny_pipeline("unet"), arguments(tmp_path), "someone/model", 64, {}), evaluation)
    assert "Measured on digits." in card.text
    assert "/home/me" not in str(card)
