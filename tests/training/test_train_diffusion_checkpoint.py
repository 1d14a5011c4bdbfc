# SPDX-License-Identifier: Apache-2.0
"""A diffusion checkpoint goes into the training script and comes out as a flow, on its own betas."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler
from tiny_pipelines import tiny_unet
from training_runs import make_dataset, train, weights

from diffusers_fm import FlowMatchPipeline


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_ddpm_checkpoint_fine_tunes_as_a_flow(tmp_path: Path, prediction_type: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction_type, clip_sample=False, timestep_spacing="trailing")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "ddpm")
    data = make_dataset(tmp_path / "data")
    # DDPM's own objective is the error of the noise.
    output = train(tmp_path / "ddpm", data, tmp_path / "flow", weighting_scheme="epsilon")

    tuned = FlowMatchPipeline.from_pretrained(output)
    assert tuned.scheduler.config.path == "vp_discrete"
    assert tuned.scheduler.config.prediction_type == prediction_type
    before, after = weights(tmp_path / "ddpm"), weights(output)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    # What comes out samples with Euler as its diffusion scheduler does with DDIM.
    tuned.set_progress_bar_config(disable=True)
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = tuned(latents=noise, num_inference_steps=10, output_type="latent").images
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(10)
    x = noise
    with torch.no_grad():
        for timestep in ddim.timesteps:
            x = ddim.step(tuned.unet(x, timestep).sample, timestep, x).prev_sample
    torch.testing.assert_close(drawn, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
