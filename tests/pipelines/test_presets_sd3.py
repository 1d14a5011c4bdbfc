# SPDX-License-Identifier: Apache-2.0
"""Untrained Stable Diffusion 3 and FLUX pipelines of the repository, and how `init_pipeline` builds such folders."""

import importlib
import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from torch import nn
from training_runs import load_script

from diffusers_fm import FlowMatchPipeline, init_pipeline


ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"
PRESETS = {
    "sd3-tiny": "StableDiffusion3Pipeline",
    "sd3-emoji": "StableDiffusion3Pipeline",
    "sd3-medium": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
}
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


def model_index(name: str) -> dict:
    return json.loads((PIPELINES / name / "model_index.json").read_text(encoding="utf-8"))


def build_on_meta(name: str) -> dict[str, nn.Module]:
    """The models of a preset without memory for their weights; fails on a key that a class does not know."""
    models = {}
    for component, value in model_index(name).items():
        folder = PIPELINES / name / component
        if not (folder / "config.json").is_file():
            continue
        model_class = getattr(importlib.import_module(value[0]), value[1])
        with torch.device("meta"):
            if value[0] == "transformers":
                models[component] = model_class(model_class.config_class.from_pretrained(folder))
            else:
                models[component], unknown = model_class.from_config(
                    model_class.load_config(folder), return_unused_kwargs=True
                )
                assert [key for key in unknown if not key.startswith("_")] == []
    return models


@pytest.fixture(scope="module")
def tiny() -> StableDiffusion3Pipeline:
    """The tiny pipeline, untrained."""
    pipeline = init_pipeline(PIPELINES / "sd3-tiny", seed=0, pipeline_class=StableDiffusion3Pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def copy_of_tiny(folder: Path, without: str | None = None) -> Path:
    """A copy of the folder of the tiny pipeline, one part left out."""
    shutil.copytree(PIPELINES / "sd3-tiny", folder)
    if without is not None:
        shutil.rmtree(folder / without)
    return folder


def configure(folder: Path, component: str, **config: object) -> None:
    """Changes values of a component's config."""
    file = folder / component / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


# The folders


@pytest.mark.parametrize("name", PRESETS)
def test_stock_class_names_only(name: str) -> None:
    index = model_index(name)
    assert index["_class_name"] == PRESETS[name]
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers", "transformers", None}
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    _, unknown = FlowMatchEulerDiscreteScheduler.from_pretrained(
        PIPELINES / name / "scheduler", return_unused_kwargs=True
    )
    assert [key for key in unknown if not key.startswith("_")] == []


@pytest.mark.parametrize("name", PRESETS)
def test_folders_hold_json_alone(name: str) -> None:
    folder = PIPELINES / name
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"README.md"}
    assert all(file.endswith(".json") for file in files)
    components = {file.partition("/")[0] for file in files if "/" in file}
    named = {key for key, value in model_index(name).items() if isinstance(value, list) and value[0] is not None}
    assert components == (named if name == "sd3-tiny" else named - set(TOKENIZERS))


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_are_those_of_the_readme(name: str) -> None:
    readme = (PIPELINES / name / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {name}\n")
    stated = {
        component: (class_name, int(count.replace(",", "")))
        for component, class_name, count in re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d,]+) \|$", readme, re.MULTILINE)
    }
    assert stated == {
        component: (type(model).__name__, sum(weight.numel() for weight in model.parameters()))
        for component, model in build_on_meta(name).items()
    }


def test_tokenizers_are_those_of_their_script(tmp_path: Path) -> None:
    load_script(ROOT / "data" / "digits" / "make_tokenizers.py").main(tmp_path)
    for name in TOKENIZERS:
        written, shipped = (
            json.loads((folder / name / "tokenizer.json").read_text(encoding="utf-8"))
            for folder in (tmp_path, PIPELINES / "sd3-tiny")
        )
        assert written == shipped


def test_every_caption_is_read_whole(tiny: StableDiffusion3Pipeline) -> None:
    for split in ("train", "test"):
        captions = {
            caption for row in load_dataset(str(ROOT / "data" / "digits"), split=split)["text"] for caption in row
        }
        for tokenizer in (tiny.tokenizer, tiny.tokenizer_2, tiny.tokenizer_3):
            tokens = tokenizer(sorted(captions)).input_ids
            assert max(map(len, tokens)) <= tokenizer.model_max_length == 16
            assert not any(tokenizer.unk_token_id in words[1:-1] for words in tokens)
            # All captions differ to every tokenizer.
            assert len(set(map(tuple, tokens))) == len(captions)


# Building


def test_tiny_is_built_saved_and_read_by_stock_diffusers(tiny: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    assert type(tiny) is StableDiffusion3Pipeline
    images = 2 * torch.rand(2, 3, 8, 8) - 1
    with torch.no_grad():
        assert (tiny.vae.encode(images).latent_dist.mode() - images).abs().max() < 4e-5
    models = [model for model in tiny.components.values() if isinstance(model, nn.Module)]
    assert {model.dtype for model in models} == {torch.float32}
    assert not any(model.training for model in models)
    tiny.save_pretrained(tmp_path)
    stock = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    prompts = ["a handwritten seven", "the digit 3"]
    # The transformer starts at a velocity of 0: the image is the noise it began with.
    for pipeline in (tiny, stock):
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline(prompts, num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt")
        noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(output.images, (noise / 2 + 0.5).clamp(0, 1), rtol=0, atol=4e-5)
    assert stock(prompts[0], num_inference_steps=1).images[0].size == (8, 8)
    for one, other in zip(stock.encode_prompt(prompts, None, None), tiny.encode_prompt(prompts, None, None)):
        assert torch.equal(one, other)


def test_seed_fixes_the_weights_of_every_part() -> None:
    first, second, other = (init_pipeline(PIPELINES / "sd3-tiny", seed=seed) for seed in (3, 3, 4))
    for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"):
        weights = [list(getattr(pipeline, name).parameters()) for pipeline in (first, second, other)]
        assert all(map(torch.equal, weights[0], weights[1]))
        assert not all(map(torch.equal, weights[0], weights[2]))


def test_parts_that_have_weights_are_loaded(tiny: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "pipeline")
    tiny.text_encoder_2.save_pretrained(folder / "text_encoder_2")
    pipeline = init_pipeline(folder, seed=1)
    assert all(map(torch.equal, pipeline.text_encoder_2.parameters(), tiny.text_encoder_2.parameters()))
    assert not all(map(torch.equal, pipeline.text_encoder.parameters(), tiny.text_encoder.parameters()))


def test_text_encoders_of_another_pipeline(tiny: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "trained")
    folder = copy_of_tiny(tmp_path / "untrained", without="tokenizer_3")
    with pytest.raises(ValueError, match="holds no tokenizer: give `text_encoders`"):
        init_pipeline(folder)
    pipeline = init_pipeline(folder, seed=5, text_encoders=tmp_path / "trained")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert all(map(torch.equal, getattr(pipeline, name).parameters(), getattr(tiny, name).parameters()))
    assert pipeline.tokenizer_3.get_vocab() == tiny.tokenizer_3.get_vocab()
    assert not all(map(torch.equal, pipeline.transformer.parameters(), tiny.transformer.parameters()))


def test_autoencoder_with_random_weights_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy_of_tiny(tmp_path / "pipeline")
    with caplog.at_level(logging.WARNING, logger="diffusers_fm"):
        init_pipeline(folder)
        assert caplog.text == ""
        configure(folder, "vae", norm_num_groups=2)
        init_pipeline(folder)
    assert "has random weights" in caplog.text


# Bad input


@pytest.mark.parametrize(
    ("component", "config", "match"),
    [
        ("transformer", {"in_channels": 4, "out_channels": 4}, "has 3 latent channels, the transformer 4"),
        ("transformer", {"pooled_projection_dim": 64}, r"project to 256 dimensions .* `pooled_projection_dim` is 64"),
        ("text_encoder", {"hidden_size": 112}, "are 272 wide together, .* `joint_attention_dim` is 256"),
        ("text_encoder_3", {"d_model": 64}, "`text_encoder_3` is 64 wide, .* `joint_attention_dim` is 256"),
    ],
)
def test_parts_that_do_not_fit(component: str, config: dict, match: str, tmp_path: Path) -> None:
    folder = copy_of_tiny(tmp_path / "pipeline")
    configure(folder, component, **config)
    with pytest.raises(ValueError, match=match):
        init_pipeline(folder)


def test_pipeline_of_another_family() -> None:
    with pytest.raises(ValueError, match="holds a StableDiffusion3Pipeline, where a FlowMatchPipeline is needed"):
        init_pipeline(PIPELINES / "sd3-tiny", pipeline_class=FlowMatchPipeline)
    with pytest.raises(ValueError, match="holds a FlowMatchPipeline, where a StableDiffusion3Pipeline is needed"):
        init_pipeline(PIPELINES / "unet-digits", pipeline_class=StableDiffusion3Pipeline)


def test_text_encoders_for_a_pipeline_without_text() -> None:
    with pytest.raises(ValueError, match="`text_encoders` was given, but the pipeline .* reads no text"):
        init_pipeline(PIPELINES / "unet-digits", text_encoders=PIPELINES / "sd3-tiny")
