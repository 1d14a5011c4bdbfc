# SPDX-License-Identifier: Apache-2.0
"""Pipelines that leave the package: with diffusers' own scheduler, which then must give the same images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from processes import run_stock
from stock_pipelines import assert_same, flow_cases, record
from tiny_pipelines import tiny_pipeline

from diffusers_fm import FlowMatchScheduler, with_stock_scheduler


# Stock pipelines, and settings of ours under which stock can do the same.
EXPORTS = {
    "shift": ("sd3-text", {"shift": 3.0}),
    "image to image": ("sd3-image", {"shift": 3.0}),
    "dynamic shift": ("flux-text", {"use_dynamic_shifting": True, "max_shift": 0.9}),
    "terminal": ("sd3-text", {"shift": 2.0, "shift_terminal": 0.1}),
    "karras": ("sd3-text", {"use_karras_sigmas": True}),
    "inverted": ("mochi", {"invert_sigmas": True}),
    "stochastic": ("sd3-text", {"stochastic_sampling": True}),
    "a path said in words": ("sd3-text", {"path": "ot", "path_kwargs": {"sigma_min": 0.0}}),
    "settings that Euler does not read": (
        "sd3-text",
        {"sigma_data": 0.5, "s_noise": 1.1, "final_sigmas_type": "sigma_min"},
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_the_stock_scheduler_gives_the_same_images(name: str) -> None:
    case, settings = EXPORTS[name]
    ours = FlowMatchScheduler(timestep_spacing="linspace", **settings)
    stock = ours.to_stock()
    assert type(stock) is FlowMatchEulerDiscreteScheduler
    recordings = []
    for scheduler in (ours, stock):
        torch.manual_seed(0)
        recordings.append(record(flow_cases()[case], scheduler))
    assert_same(*recordings)


def test_a_shift_that_was_set_later_goes_along() -> None:
    ours = FlowMatchScheduler(timestep_spacing="linspace", shift=2.0)
    ours.set_shift(5.0)
    stock = ours.to_stock()
    for scheduler in (ours, stock):
        scheduler.set_timesteps(6)
    torch.testing.assert_close(ours.sigmas, stock.sigmas)


def test_own_sigmas_give_the_trailing_grid_in_stock() -> None:
    """What the documentation says of a model whose scheduler was `trailing`."""
    trailing = FlowMatchScheduler(shift=3.0)
    stock = FlowMatchScheduler.from_config(trailing.config, timestep_spacing="linspace").to_stock()
    case = flow_cases()["sd3-text"]
    sigmas = np.linspace(1.0, 1 / 5, 5).tolist()
    assert_same(record(case, trailing), record(case, stock, sigmas=sigmas, num_inference_steps=None))


OBSTACLES = {
    "path": ({"path": "vp"}, "VPPath"),
    "path_kwargs": ({"path_kwargs": {"sigma_min": 0.001}}, "sigma_min=0.001"),
    "prediction_type": ({"prediction_type": "sample"}, "prediction_type 'sample'"),
    "solver": ({"solver": "ab2"}, "solver 'ab2'"),
    "sampling_path": ({"sampling_path": "angle"}, "sampling_path 'angle'"),
    "timestep_spacing": ({"timestep_spacing": "trailing"}, "timestep_spacing 'trailing'"),
    "clip_sample": ({"clip_sample": True}, "clip_sample True"),
    "eta": ({"eta": 0.5}, "eta 0.5"),
    "s_churn": ({"s_churn": 1.0}, "s_churn 1.0"),
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_stock_cannot_do_is_named(name: str) -> None:
    settings, said = OBSTACLES[name]
    with pytest.raises(ValueError, match="cannot give the same images") as caught:
        FlowMatchScheduler(**{"timestep_spacing": "linspace", **settings}).to_stock()
    assert said in str(caught.value)
    # Nothing else stands in the way.
    assert str(caught.value).count("(not ") == 1


def test_all_obstacles_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"VEPath.*'epsilon'.*'heun'.*'native'.*'graded'"):
        FlowMatchScheduler(
            path="ve",
            prediction_type="epsilon",
            solver="heun",
            sampling_path="native",
            timestep_spacing="graded",
        ).to_stock()


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["diffusers_fm"] = None  # an import of it is an error
import torch
from diffusers import DiffusionPipeline
absent = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
for folder in sys.argv[1:]:
    given = dict.fromkeys(absent) if folder.endswith("sd3") else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **given)
    assert type(pipeline.scheduler).__module__.startswith("diffusers."), type(pipeline.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(**torch.load(f"{folder}/inputs.pt"), generator=generator, output_type="pt").images
    torch.save(images, f"{folder}/images.pt")
"""


def test_the_folders_need_nothing_of_this_package(tmp_path: Path) -> None:
    case = flow_cases()["sd3-text"]
    sd3 = StableDiffusion3Pipeline(
        **{**case.pipeline.components, "scheduler": FlowMatchScheduler(shift=3.0, timestep_spacing="linspace")}
    )
    stock: dict[str, DiffusionPipeline] = {"sd3": with_stock_scheduler(sd3)}
    # The pipeline that trains on is as it was.
    assert isinstance(sd3.scheduler, FlowMatchScheduler)
    assert sd3.config["scheduler"] == ("diffusers_fm", "FlowMatchScheduler")
    ours = {"sd3": lambda: sd3(**case.inputs, generator=torch.Generator().manual_seed(0), output_type="pt").images}
    inputs: dict[str, dict[str, Any]] = {"sd3": case.inputs}

    pipelines = {
        "unet": tiny_pipeline("unet", timestep_spacing="linspace", shift=2.0),
        "unet-diffusion": tiny_pipeline("unet", path="vp_discrete", prediction_type="v_prediction"),
        "dit": tiny_pipeline("dit-vae", shift=2.0),
        "dit-pixel": tiny_pipeline("dit"),
    }
    for name, pipeline in pipelines.items():
        stock[name], call = pipeline.to_stock(), {"num_inference_steps": 5}
        shape = (2, *pipeline.sample_shape)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if name.startswith("dit"):
            inputs[name] = call | {"class_labels": [0, 3], "guidance_scale": 2.0}
            call = inputs[name]
        else:
            inputs[name] = call | {"batch_size": 2}
        ours[name] = lambda pipeline=pipeline, call=call, x=noise: pipeline(**call, latents=x, output_type="pt").images

    for name, pipeline in stock.items():
        pipeline.save_pretrained(tmp_path / name)
        assert "diffusers_fm" not in (tmp_path / name / "model_index.json").read_text()
        torch.save(inputs[name], tmp_path / name / "inputs.pt")
    index = json.loads((tmp_path / "sd3/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]

    folders = [str(tmp_path / name) for name in stock]
    run_stock(WITHOUT_THE_PACKAGE, *folders)
    for name, draw in ours.items():
        torch.testing.assert_close(torch.load(tmp_path / name / "images.pt"), draw(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "scheduler", "sentence"),
    [
        ("unet", {}, "FlowMatchEulerDiscreteScheduler cannot give the same images: it lacks timestep_spacing 'trail"),
        ("unet", {"path": "vp_discrete", "solver": "ab2"}, "DDIMScheduler cannot give .* it lacks solver 'ab2'"),
        *(
            (
                "unet",
                {"path": "vp_discrete", "timestep_spacing": spacing},
                f"lacks timestep_spacing '{spacing}' .not 'le",
            )
            for spacing in ("linspace", "graded")
        ),
        ("unet-classes", {}, "samples a UNet2DModel with 5 classes in pixels by flow matching: DDPMPipeline reads no"),
        ("dit-vae", {"timestep_spacing": "linspace"}, "it lacks timestep_spacing 'linspace' .not 'trailing'"),
        ("dit-vae", {"shift_terminal": 0.1}, "it lacks shift_terminal 0.1"),
        ("sd3", {}, "samples a SD3Transformer2DModel with 5 classes"),
    ],
)
def test_no_stock_pipeline_is_said_why(kind: str, scheduler: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        tiny_pipeline(kind, **scheduler).to_stock()


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 5), ("leading", 30), ("trailing", 8)])
def test_ddim_gives_the_same_images_on_its_grids(spacing: str, steps: int) -> None:
    pipeline = tiny_pipeline("unet", path="vp_discrete", prediction_type="v_prediction", timestep_spacing=spacing)
    stock = pipeline.to_stock()
    stock.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = pipeline(latents=noise, num_inference_steps=steps, output_type="np").images
    generator = torch.Generator().manual_seed(0)
    theirs = stock(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np").images
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_a_stock_scheduler_stays() -> None:
    case = flow_cases()["sd3-text"]
    pipeline = StableDiffusion3Pipeline(**case.pipeline.components)
    assert with_stock_scheduler(pipeline).scheduler is pipeline.scheduler


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_a_pipeline_of_ours_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="cannot load FlowMatchPipeline"):
        with_stock_scheduler(tiny_pipeline(kind, timestep_spacing="linspace"))
