# SPDX-License-Identifier: Apache-2.0
"""Training of video pipelines: numbers of frames, and a run that the stock pipeline samples."""

import io
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline
from tiny_families import FAMILIES
from training_runs import ROOT, load_script, read_log, run_script

from diffusers_fm import init_pipeline
from diffusers_fm.models import can_be_identity, set_identity
from diffusers_fm.text_to_image.field import TrainedField


FOLDER = ROOT / "pipelines" / "wan-tiny"


@pytest.mark.parametrize(("name", "factor"), [("wan_text", 4), ("ltx_text", 8)])
def test_numbers_of_frames(name: str, factor: int) -> None:
    family = FAMILIES[name]()
    parts = family.pipeline.components
    if name == "ltx_text":
        # One level more than the recipe has: the factor of the published autoencoder.
        levels = (True, True, True, False)
        config = {**parts["vae"].config, "spatio_temporal_scaling": levels, "decoder_spatio_temporal_scaling": levels}
        parts = {**parts, "vae": type(parts["vae"]).from_config(config)}
    pipeline = type(family.pipeline)(**parts)
    call = {key: value for key, value in family.call.items() if key not in ("height", "width")}
    field = TrainedField(pipeline, family.network, dict(call))
    size = family.call["height"], family.call["width"]
    for wrong in (2, factor, factor + 2):
        with pytest.raises(ValueError, match=rf"--num_frames must be {factor} k \+ 1 for the .*, got {wrong}\."):
            field.set_frames("num_frames", wrong, size)
    for right in (1, factor + 1, 2 * factor + 1):
        field.set_frames("num_frames", right, size)
        assert field.call["num_frames"] == right
        assert field.decode_map(size).map.y_shape[1] == 1 + (right - 1) // factor


def test_an_autoencoder_of_videos_that_is_the_identity() -> None:
    vae = init_pipeline(FOLDER, seed=0, pipeline_class=WanPipeline).vae
    videos = torch.rand(2, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        posterior = vae.encode(videos).latent_dist
        # c / (2 C**2) for three channels, and the rounding of a constant of 512.
        torch.testing.assert_close(posterior.mode(), videos, rtol=0, atol=4e-5)
        torch.testing.assert_close(vae.decode(videos).sample, videos, rtol=0, atol=4e-5)
    assert posterior.std.max() < 1e-6
    other = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1], temperal_downsample=[])
    assert not can_be_identity(other)
    with pytest.raises(ValueError, match="can be the identity if"):
        set_identity(other)


def test_a_video_run_is_sampled_by_the_stock_pipeline(tmp_path: Path) -> None:
    make = load_script(ROOT / "data" / "moving-digits" / "make_moving_digits.py")
    digit = np.full((8, 8), 255, np.uint8)
    places = {}
    for direction in make.DIRECTIONS:
        pictures = make.frames(digit, direction, 3)
        with PIL.Image.open(io.BytesIO(make.animated_png(pictures))) as image:
            assert image.n_frames == 5
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{direction}.png").write_bytes(make.animated_png(pictures))
        places[direction] = [tuple(np.argwhere(picture).mean(0) - 3.5) for picture in pictures]
    assert places["right"] == [(3, 2 * number) for number in range(5)]
    assert places["up"] == [(8 - 2 * number, 3) for number in range(5)]

    rows = {"image": [], "text": []}
    for direction in make.DIRECTIONS:
        rows["image"].append((tmp_path / "data" / f"{direction}.png").read_bytes())
        rows["text"].append(make.WORDINGS[0].format("one", make.WAYS[direction]))
    folder = tmp_path / "rows"
    datasets.Dataset.from_dict(rows).to_parquet(folder / "train-0.parquet")
    values = {
        "pretrained_model_name_or_path": FOLDER,
        "dataset_name": folder,
        "output_dir": tmp_path / "run",
        "num_frames": 5,
        "resolution": 16,
        "max_sequence_length": 16,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "logging_steps": 1,
        "report_to": "none",
        "validation_prompts": "one up",
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "checkpointing_steps": 2,
    }
    script = load_script(ROOT / "training_scripts" / "train_text_to_image.py")
    flags = ["--cache_latents", "--cache_text_embeddings", "--center_crop"]
    run_script(script, [*(f"--{name}={value}" for name, value in values.items()), *flags])
    assert len(read_log(tmp_path / "run", "loss")) == 4
    with PIL.Image.open(tmp_path / "run" / "grid.png") as grid:
        # The frames of a video stand side by side.
        assert grid.width >= 5 * 16
    card = (tmp_path / "run" / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "num_frames=4" in card and "export_to_video(video" in card
    assert "`timestep` is 1000 t at noise level t, output + (noise - data), x_t of shape (3, 5, 16, 16)" in card
    stock = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(stock) is WanPipeline
    stock.set_progress_bar_config(disable=True)
    call = {"height": 16, "width": 16, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    assert stock("one up", num_frames=4, **call).frames.shape == (1, 5, 16, 16, 3)
    values |= {"pretrained_model_name_or_path": ROOT / "pipelines" / "flux-tiny", "output_dir": tmp_path / "refused"}
    with pytest.raises(ValueError, match="FluxPipeline makes no videos: leave out --num_frames"):
        run_script(script, [f"--{name}={value}" for name, value in values.items()])
