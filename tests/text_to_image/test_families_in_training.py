# SPDX-License-Identifier: Apache-2.0
"""Training of text-to-image pipelines of several families from their folders, and of adapters on top."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from training_runs import ROOT, load_script, read_log, run_script

from diffusers_fm import init_pipeline
from diffusers_fm.data.loading import with_caption, with_class_images
from diffusers_fm.data.sources import load_splits
from diffusers_fm.families import table
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.text import weigh_prior


PIPELINES = ROOT / "pipelines"
FAMILIES = ("flux-tiny", "aura-flow-tiny", "bria-tiny", "chroma-tiny", "z-image-tiny")
SCRIPTS = ROOT / "training_scripts"


def train(script: str, folder: str | Path, output_dir: Path, **options: Any) -> Path:
    """A few steps on captioned digits."""
    values = {
        "pretrained_model_name_or_path": folder,
        "dataset_name": ROOT / "data" / "digits",
        "output_dir": output_dir,
        "max_train_steps": 2,
        "train_batch_size": 4,
        "max_train_samples": 16,
        "max_validation_samples": 8,
        "resolution": 8,
        "max_sequence_length": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 0,
        "num_inference_steps": 2,
        **options,
    }
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    run_script(load_script(SCRIPTS / f"{script}.py"), line)
    return output_dir


def draw(pipeline: DiffusionPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call: Any = pipeline
    options = {"height": 8, "width": 8, "num_inference_steps": 2, "max_sequence_length": 16}
    return call("a three", generator=generator, output_type="np", **options).images


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_and_adapted_by_scripts_that_do_not_know_it(name: str, tmp_path: Path) -> None:
    prompts = {"validation_prompts": "a three", "num_validation_images": 1}
    trained = train("train_text_to_image", PIPELINES / name, tmp_path / "trained", max_train_steps=6, **prompts)
    assert (trained / "grid.png").is_file()
    assert [line[1] for line in read_log(trained, "validation_loss")][-1] > 0
    index = json.loads((trained / "model_index.json").read_text())
    assert index == {**json.loads((PIPELINES / name / "model_index.json").read_text()), **index}
    stock = getattr(diffusers, index["_class_name"]).from_pretrained(trained)
    base = draw(stock)
    adapters = train("train_text_to_image_lora", trained, tmp_path / "adapters", rank=2, max_train_steps=4)
    if "load_lora_weights" in dir(stock):
        stock.load_lora_weights(adapters)
    else:
        stock.transformer.load_lora_adapter(adapters, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert np.abs(draw(stock) - base).max() > 1e-4
    state = load_file(adapters / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for key, tensor in state.items() if "lora_B" in key or "lora.up" in key)


def test_kept_text_and_latents_change_nothing(tmp_path: Path) -> None:
    options = {"center_crop": True, "caption_dropout": 0.3, "text_encoder_dropout": 0.4, "max_train_steps": 4}
    plain = train("train_text_to_image", PIPELINES / "flux-tiny", tmp_path / "plain", **options)
    options |= {"cache_latents": True, "cache_text_embeddings": True}
    kept = train("train_text_to_image", PIPELINES / "flux-tiny", tmp_path / "kept", **options)
    for one, other in zip(read_log(plain, "loss"), read_log(kept, "loss"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize("streaming", [False, True])
def test_one_caption_for_all_images(streaming: bool, tmp_path: Path) -> None:
    trained = train("train_text_to_image", PIPELINES / "flux-tiny", tmp_path / "trained", max_train_steps=6)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for row, image in enumerate(load_splits(str(ROOT / "data" / "digits"))["train"][:8]["image"]):
        image.save(folder / f"{row}.png")
    options = {"instance_prompt": "a photo of sks digit", "train_data_dir": folder, "dataset_name": None}
    options |= {"rank": 2, "streaming": streaming, "max_train_samples": None}
    run = train("train_text_to_image_lora", trained, tmp_path / "run", **options)
    card = (run / "README.md").read_text()
    assert "instance_prompt: a photo of sks digit" in card and 'pipeline("a photo of sks digit"' in card
    if streaming:
        return

    # Images of the class: one is there, two are drawn, and all of them are as many as those of the instance
    class_folder = tmp_path / "digits"
    class_folder.mkdir()
    (folder / "0.png").replace(class_folder / "own.png")
    options |= {"class_prompt": "a photo of a digit", "class_data_dir": class_folder, "num_class_images": 3}
    options |= {"cache_text_embeddings": True}
    weighed = train("train_text_to_image_lora", trained, tmp_path / "weighed", prior_loss_weight=0.5, **options)
    drawn = {file.name: file.read_bytes() for file in sorted(class_folder.iterdir())}
    assert list(drawn) == ["class-00001.png", "class-00002.png", "own.png"]
    with PIL.Image.open(class_folder / "class-00001.png") as image:
        assert image.size == (8, 8)
    plain = train("train_text_to_image_lora", trained, tmp_path / "plain", prior_loss_weight=1.0, **options)
    assert {file.name: file.read_bytes() for file in class_folder.iterdir()} == drawn
    first = [read_log(folder, "loss")[0][1] for folder in (weighed, plain)]
    assert 0.5 < first[0] / first[1] < 1
    args = SimpleNamespace(class_prompt="a dog", prior_loss_weight=0.5)
    losses = weigh_prior(args, ["a dog", "a sks dog"], torch.tensor([2.0, 2.0]))
    assert losses.tolist() == [1.0, 2.0]
    split = with_class_images(
        with_caption(load_splits(str(folder))["train"], "a sks digit", "image"), str(class_folder), "a digit", "image"
    )
    assert split["instance_prompt"] == ["a sks digit"] * 7 + ["a digit"] * 7


def test_the_shift_of_training_is_that_of_the_pipeline() -> None:
    pipeline = init_pipeline(PIPELINES / "flux-tiny", seed=0)
    # diffusers' line through (256 tokens, 0.5) and (4096, 1.15); a token is 2 x 2 pixels here.
    field = TrainedField(pipeline, "transformer", {"max_sequence_length": 16})
    for side in (8, 32, 128):
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * ((side // 2) ** 2 - 256)
        assert field.shift((side, side)) == pytest.approx(np.exp(mu), rel=1e-6)


def test_no_script_and_no_room_of_training_names_a_family() -> None:
    names = {re.sub(r"(Img2Img|Inpaint|Control|Fill|Edit|Video)*Pipeline$", "", name) for name, *_ in table()}
    names = {name for name in names if len(name) > 2}
    assert {"StableDiffusion3", "Flux", "ZImage"} <= names
    files = [*(ROOT / "src" / "diffusers_fm" / "training").glob("*.py"), *SCRIPTS.glob("train_text_to_image*.py")]
    for file in files:
        text = file.read_text(encoding="utf-8")
        # What users read may have examples.
        code = re.sub(r'r?""".*?"""|#[^\n]*', "", text, flags=re.S)
        found = {name for name in names if re.search(rf"\b{name}\w*(Pipeline|Transformer)", code)}
        assert not found, (file.name, found)
