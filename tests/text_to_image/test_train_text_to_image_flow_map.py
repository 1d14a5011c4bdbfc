# SPDX-License-Identifier: Apache-2.0
"""Flow maps of text-to-image pipelines: what comes out, what does not matter, and what is refused."""

import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from processes import check_processes
from tiny_text_to_image import save_colours, tiny_stable_diffusion_3, train_text_to_image
from training_runs import ROOT, assert_same_weights, load_script, weights

from diffusers_fm import init_pipeline, with_flow_map
from diffusers_fm.flow_maps import OBJECTIVES
from diffusers_fm.models.interval import IntervalConditioning
from diffusers_fm.pipelines.velocity_field import VelocityField
from diffusers_fm.text_to_image.flow_map import IntervalField


SCRIPT = ROOT / "training_scripts" / "train_text_to_image_flow_map.py"
train = partial(train_text_to_image, load_script(SCRIPT))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion_3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("data"))


def draw(pipeline: Any, **options: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        "a red square",
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **{"height": 16, "width": 16, "guidance_scale": 1.0, **options},
    ).images


def test_a_stock_pipeline_comes_out(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["--validation_prompts", "red"]
    output_dir = train(model, data, tmp_path / "run", *words, num_validation_images=2, learned_guidance_scale=2.0)
    card = ModelCard.load(output_dir / "README.md").text
    assert "diffusers_fm.with_flow_map(pipeline)" in card
    assert "2 by default" in card
    assert "sample with `guidance_scale` 1" in card
    assert (output_dir / "grid.png").is_file()
    flow = StableDiffusion3Pipeline.from_pretrained(output_dir)
    assert flow.scheduler.config.flow_map == {"first_block": 1, "num_inference_steps": 2, "guidance_scale": 2.0}
    without = draw(flow)
    # Two equal steps, shifted by 3: none is a thousandth of the way, as the last one of "linspace" was.
    assert flow.scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0])
    # The end of a step enters a pipeline of stock class by one call.
    assert not torch.equal(draw(with_flow_map(flow)), without)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_loss_trains(objective: str, model: Path, data: Path, tmp_path: Path) -> None:
    options = {"objective": objective, "flow_teacher": True, "interval_warmup_steps": 0}
    output_dir = train(model, data, tmp_path / "run", num_validation_images=0, **options)
    before, after = weights(model), weights(output_dir)
    assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith("transformer"))


def test_a_resumed_run_is_the_uninterrupted_one(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"use_ema": True, "ema_teacher": True, "checkpointing_steps": 2, "num_validation_images": 0}
    options |= {"text_encoder_dropout": 0.3, "learned_guidance_scale": 2.0, "flow_teacher": True}
    whole = train(model, data, tmp_path / "whole", **options)
    resumed = train(model, data, tmp_path / "resumed", **{**options, "max_train_steps": 2})
    train(model, data, resumed, resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, resumed)


def test_two_processes_are_one(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"adam_epsilon": 1e-2, "interval_warmup_steps": 0, "num_validation_images": 0, "caption_dropout": 0.5}
    one = train(model, data, tmp_path / "one", **options)
    values = {"pretrained_model_name_or_path": model, "dataset_name": data, "output_dir": tmp_path / "two"}
    values |= {"resolution": 16, "max_sequence_length": 16, "seed": 0, "train_batch_size": 2, "max_train_steps": 4}
    values |= {"learning_rate": 1e-3, "num_inference_steps": 2, "report_to": "none", **options}
    line = ["--use_cpu", *(f"--{name}={value}" for name, value in values.items())]
    check_processes(SCRIPT, line, num_processes=2)
    assert_same_weights(one, tmp_path / "two", atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_stock": True}, "--save_stock does not go with a flow map"),
        ({"ema_teacher": True}, "--ema_teacher needs --use_ema"),
        ({"weighting_scheme": "min_snr"}, "--weighting_scheme must be none"),
        (
            {"class_prompt": "a dog", "instance_prompt": "a sks dog", "class_data_dir": "/nowhere"},
            "--class_prompt needs --num_class_images 100 images in --class_data_dir '/nowhere', got 0",
        ),
        ({"first_block": 2}, "`first_block` must be an integer from 1 to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: dict, message: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(model, data, tmp_path / "run", **options)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configurations of a FLUX that is given its guidance."""
    folder = tmp_path_factory.mktemp("told") / "flux"
    shutil.copytree(ROOT / "pipelines" / "flux-tiny", folder)
    file = folder / "transformer" / "config.json"
    file.write_text(file.read_text().replace('"guidance_embeds": false', '"guidance_embeds": true'))
    return folder


def test_guidance_is_an_input(told: Path, data: Path, tmp_path: Path) -> None:
    """A stock FLUX pipeline chooses the scale of its map by `guidance_scale`, in one call of the network a step."""
    options = {"learned_guidance_max": 4.0, "interval_warmup_steps": 0, "num_validation_images": 0, "resolution": 8}
    output_dir = train(told, data, tmp_path / "run", learning_rate=1e-2, **options)
    assert "1 to 4, which `guidance_scale` chooses" in ModelCard.load(output_dir / "README.md").text
    pipeline = with_flow_map(FluxPipeline.from_pretrained(output_dir))
    one, same, other = (draw(pipeline, height=8, width=8, guidance_scale=scale) for scale in (1.5, 1.5, 4.0))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 1e-4


def test_each_sample_gets_its_own_guidance(told: Path) -> None:
    """The network answers as in the pipeline's own call at that scale."""
    pipeline = init_pipeline(told, seed=0)
    torch.manual_seed(1)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    call = {"max_sequence_length": 16}
    field = IntervalField(pipeline, "transformer", call)
    IntervalConditioning(pipeline.transformer)
    x, t = torch.randn(2, *field.decode_map((8, 8)).map.x_shape), torch.tensor([300.0, 700.0])
    scales = torch.tensor([1.5, 4.0])
    captions = ["a three", "a five"]
    together = field(x, t, captions, (8, 8), None, None, scales)
    for row, scale in enumerate(scales.tolist()):
        stock = VelocityField(pipeline, "transformer", guidance_scale=scale, **call)
        alone = stock(x[row : row + 1], t[row : row + 1] / 1000, prompt=captions[row], height=8, width=8)
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)
    assert (together - field(x, t, captions, (8, 8))).abs().max() > 1e-3


def test_guidance_as_an_input_is_refused(model: Path, told: Path, data: Path, tmp_path: Path) -> None:
    for folder, options, message in (
        (model, {}, "--learned_guidance_max 4 needs a network with `guidance_embeds`, and this SD3Transformer2DModel"),
        (
            told,
            {"learned_guidance_scale": 2.0},
            "--learned_guidance_scale 2 does not go with --learned_guidance_max 4",
        ),
        (told, {"call": "guidance_scale=2"}, "--call guidance_scale does not go with --learned_guidance_max"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            train(folder, data, tmp_path / "run", learned_guidance_max=4.0, **options)
