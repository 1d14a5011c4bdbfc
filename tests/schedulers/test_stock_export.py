# SPDX-License-Identifier: Apache-2.0
"""Pipelines that leave the package: with diffusers' own scheduler, which then must give the same images."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
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
folder, inputs, images = sys.argv[1:]
absent = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
pipeline = DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))
assert type(pipeline.scheduler).__module__.startswith("diffusers."), type(pipeline.scheduler)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
torch.save(pipeline(**torch.load(inputs), generator=generator, output_type="pt").images, images)
"""


def test_the_folder_needs_nothing_of_this_package(tmp_path: Path) -> None:
    case = flow_cases()["sd3-text"]
    pipeline = StableDiffusion3Pipeline(
        **{**case.pipeline.components, "scheduler": FlowMatchScheduler(shift=3.0, timestep_spacing="linspace")}
    )
    pipeline.set_progress_bar_config(disable=True)
    with_stock_scheduler(pipeline).save_pretrained(tmp_path / "stock")
    # The pipeline that trains on is as it was.
    assert isinstance(pipeline.scheduler, FlowMatchScheduler)
    assert pipeline.config["scheduler"] == ("diffusers_fm", "FlowMatchScheduler")
    index = json.loads((tmp_path / "stock/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    assert index["scheduler"] == ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    assert "diffusers_fm" not in json.dumps(index)

    torch.save(case.inputs, tmp_path / "inputs.pt")
    command = [
        sys.executable,
        "-c",
        WITHOUT_THE_PACKAGE,
        *(str(tmp_path / name) for name in ("stock", "inputs.pt", "images.pt")),
    ]
    subprocess.run(command, check=True)
    ours = pipeline(**case.inputs, generator=torch.Generator().manual_seed(0), output_type="pt").images
    torch.testing.assert_close(torch.load(tmp_path / "images.pt"), ours, rtol=0, atol=1e-4)


def test_a_stock_scheduler_stays() -> None:
    case = flow_cases()["sd3-text"]
    pipeline = StableDiffusion3Pipeline(**case.pipeline.components)
    assert with_stock_scheduler(pipeline).scheduler is pipeline.scheduler


@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_a_pipeline_of_ours_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="cannot load FlowMatchPipeline"):
        with_stock_scheduler(tiny_pipeline(kind, timestep_spacing="linspace"))
