# SPDX-License-Identifier: Apache-2.0
"""Diffusion pipelines as flows: the same images before training, training by the scripts, and the way back.

Tolerance 1e-4 of the images: both ways round differently, by about 1e-7 over an alpha of at least 6e-3.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from stock_pipelines import dit
from tiny_pipelines import tiny_unet
from tiny_stable_diffusion import tiny_stable_diffusion, tiny_stable_diffusion_xl
from tiny_text_to_image import save_colours, train_text_to_image
from training_runs import ROOT, load_script, make_dataset, train, weights

from diffusers_fm import VelocityUNet2DConditionModel, VelocityUNet2DModel, with_velocity, without_velocity
from diffusers_fm.convert_diffusion import main


ATOL = 1e-4


def ddpm(**scheduler: Any) -> DDPMPipeline:
    """A tiny DDPM."""
    unet = tiny_unet(out_channels=2 if "variance_type" in scheduler else 1)
    return DDPMPipeline(unet, DDPMScheduler(**{"clip_sample": False, **scheduler}))


def ddim_images(pipeline: Any, noise: torch.Tensor, steps: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of a DDPM by stock DDIM with eta = 0, and its timesteps."""
    scheduler, x = DDIMScheduler.from_config(pipeline.scheduler.config), noise
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, timestep).sample[:, :1], timestep, x).prev_sample
    return x.clamp(-1, 1) / 2 + 0.5, scheduler.timesteps


def start(noise: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
    """Noise of the diffusion grid's first step on the straight path."""
    return noise * torch.hypot(1 - sigmas[0], sigmas[0]).float()


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"clip_sample": True},
        {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"prediction_type": "sample", "num_train_timesteps": 500},
        {"variance_type": "learned_range"},
    ],
    ids=["epsilon", "clipped", "v", "zero-snr", "sample-500", "learned-variance"],
)
def test_a_ddpm_gives_the_same_images(tmp_path: Path, scheduler: dict, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = ddpm(**scheduler)
    pipeline.save_pretrained(tmp_path / "ddpm")
    clips = ["--clip_sample"] if "clip_sample" in scheduler else []
    assert main([str(tmp_path / "ddpm"), "--output", str(tmp_path / "flow"), *clips]) == 0
    assert "FlowMatchPipeline with a VelocityUNet2DModel that predicted" in capsys.readouterr().out
    flow: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow")
    assert flow.scheduler.config.path == "ot" and flow.scheduler.config.prediction_type == "flow_prediction"
    assert weights(tmp_path / "flow").keys() == weights(tmp_path / "ddpm").keys()

    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected, timesteps = ddim_images(pipeline, noise)
    sigmas = flow.unet.straight_times(timesteps)
    drawn = flow(latents=start(noise, sigmas), sigmas=sigmas.tolist(), output_type="pt").images
    torch.testing.assert_close(drawn, expected, rtol=0, atol=ATOL)
    assert expected.std() > 0.1

    again = flow.unet.to_diffusion()
    assert type(again) is UNet2DModel and "diffusion" not in again.config
    assert torch.equal(again(noise, 7).sample, pipeline.unet(noise, 7).sample)


@pytest.mark.parametrize("make", [tiny_stable_diffusion, tiny_stable_diffusion_xl])
def test_stable_diffusion_gives_the_same_images(tmp_path: Path, make: Any) -> None:
    pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path / "sd")
    assert main([str(tmp_path / "sd"), "--output", str(tmp_path / "flow")]) == 0
    flow: Any = DiffusionPipeline.from_pretrained(tmp_path / "flow")
    assert type(flow) is type(pipeline)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": ["a cat", "a dog"], "guidance_scale": 3.0, "height": 16, "width": 16, "output_type": "pt"}
    expected = pipeline(**call, latents=noise, num_inference_steps=6).images
    sigmas = flow.unet.straight_times(pipeline.scheduler.timesteps)
    drawn = flow(**call, latents=start(noise, sigmas), sigmas=sigmas.tolist()).images
    torch.testing.assert_close(drawn, expected, rtol=0, atol=ATOL)


def test_a_converted_stable_diffusion_is_trained(tmp_path: Path) -> None:
    with_velocity(tiny_stable_diffusion()).save_pretrained(tmp_path / "flow")
    script = load_script(ROOT / "training_scripts" / "train_text_to_image.py")
    options = {"network": "unet", "max_sequence_length": None, "max_train_steps": 2, "num_validation_images": 0}
    data = save_colours(tmp_path / "data", 4, 3)
    tuned: Any = DiffusionPipeline.from_pretrained(
        train_text_to_image(script, tmp_path / "flow", data, tmp_path / "out", **options)
    )
    # What was trained is the velocity of the straight path, and a diffusion model for readers without this package.
    assert isinstance(tuned.unet, VelocityUNet2DConditionModel) and tuned.unet.config.diffusion
    stock: Any = without_velocity(tuned)
    for pipeline in (tuned, stock):
        pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    call = {"prompt": "a red square", "height": 16, "width": 16, "output_type": "pt"}
    expected = stock(**call, latents=noise, num_inference_steps=5).images
    sigmas = tuned.unet.straight_times(stock.scheduler.timesteps)
    drawn = tuned(**call, latents=start(noise, sigmas), sigmas=sigmas.tolist()).images
    torch.testing.assert_close(drawn, expected, rtol=0, atol=ATOL)
    assert type(stock.unet) is UNet2DConditionModel


def test_a_converted_ddpm_is_trained(tmp_path: Path) -> None:
    ddpm().save_pretrained(tmp_path / "ddpm")
    assert main([str(tmp_path / "ddpm"), "--output", str(tmp_path / "flow")]) == 0
    output = train(tmp_path / "flow", make_dataset(tmp_path / "data"), tmp_path / "out")
    tuned: Any = DiffusionPipeline.from_pretrained(output)
    assert type(tuned.unet) is VelocityUNet2DModel
    assert not np.array_equal(*(weights(tmp_path / name)["unet.conv_out.weight"] for name in ("out", "flow")))
    index = json.loads((output / "model_index.json").read_text())
    assert index["unet"] == ["diffusers_fm", "VelocityUNet2DModel"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: ddpm(rescale_betas_zero_snr=True), "has no limit at t = 1"),
        (lambda: with_velocity(ddpm()), "Only a pipeline of a UNet2DModel and a scheduler, or with"),
        (lambda: dit().pipeline, "DiTPipeline has transformer DiTTransformer2DModel"),
    ],
    ids=["epsilon-zero-snr", "converted", "dit"],
)
def test_refusals(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        with_velocity(make())


def test_refusals_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none"), "--output", str(tmp_path / "flow")]) == 2
    assert "neither a valid local path nor a valid repo id" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), "--output", str(tmp_path)]) == 2
    assert "exists already: give a new folder." in capsys.readouterr().err
