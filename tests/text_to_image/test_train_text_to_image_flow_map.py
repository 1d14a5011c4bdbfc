# SPDX-License-Identifier: Apache-2.0
"""Flow maps of text-to-image pipelines: what comes out, what does not matter, and what is refused."""

import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from tiny_text_to_image import save_colours, tiny_stable_diffusion_3, train_text_to_image
from training_runs import ROOT, assert_same_weights, environment, launch, load_script, weights

from diffusers_fm import with_flow_map
from diffusers_fm.flow_maps import OBJECTIVES


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
        height=16,
        width=16,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        **{"guidance_scale": 1.0, **options},
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
    subprocess.run(launch(line, 2, SCRIPT), check=True, capture_output=True, env=environment())
    assert_same_weights(one, tmp_path / "two", atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_stock": True}, "--save_stock does not go with a flow map"),
        ({"ema_teacher": True}, "--ema_teacher needs --use_ema"),
        ({"weighting_scheme": "min_snr"}, "--weighting_scheme must be none"),
        ({"first_block": 2}, "`first_block` must be an integer from 1 to 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(
    options: dict, message: str, model: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(model, data, tmp_path / "run", **options)
