# SPDX-License-Identifier: Apache-2.0
"""The upscaling pipeline: resampling, tiles, the condition, and what a call gives and refuses."""

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from tiny_pipelines import NUM_CLASSES, generators, tiny_dit, tiny_unet, tiny_vae
from torch import nn

from diffusers_fm import FlowMatchScheduler, FlowMatchUpscalePipeline, init_pipeline
from diffusers_fm.pipelines.resampling import downscale, resize_bicubic
from diffusers_fm.pipelines.tiling import TileGrid


def upscale_pipeline(in_channels: int = 2, scale_factor: int = 2, **components: object) -> FlowMatchUpscalePipeline:
    if "transformer" not in components:
        components = {"unet": tiny_unet(in_channels=in_channels), **components}
    scheduler = components.pop("scheduler", FlowMatchScheduler())
    pipeline = FlowMatchUpscalePipeline(scheduler=scheduler, scale_factor=scale_factor, **components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(height: int = 4, width: int = 4, seed: int = 0, channels: int = 1) -> PIL.Image.Image:
    rng = np.random.default_rng(seed)
    shape = (height, width) if channels == 1 else (height, width, channels)
    return PIL.Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


# Resampling


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_downscaling_is_pillows(factor: int) -> None:
    large = picture(12, 24)
    small = np.asarray(large.resize((24 // factor, 12 // factor), PIL.Image.Resampling.BICUBIC)).astype(int)
    ours = downscale(torch.from_numpy(np.asarray(large))[None, None], factor)[0, 0].numpy().astype(int)
    # Pillow rounds after each direction.
    assert np.abs(ours - small).max() <= 1


def test_enlarging_keeps_what_is_linear() -> None:
    # The cubic kernel reproduces straight lines, where it does not reach over the edge.
    ramp = torch.arange(12.0)[None, None, None].expand(1, 1, 12, 12)
    large = resize_bicubic(ramp, (24, 24))[0, 0, 8:-8, 8:-8]
    expected = (torch.arange(24.0) + 0.5) / 2 - 0.5
    assert torch.allclose(large, expected[8:-8].expand(8, 8), atol=1e-5)


# Tiles


@pytest.mark.parametrize(
    ("size", "tile", "overlap"), [((20, 26), (8, 8), 4), ((8, 30), (8, 12), 2), ((9, 9), (4, 5), 0)]
)
def test_tiles_of_a_pointwise_answer_are_the_whole(size: tuple[int, int], tile: tuple[int, int], overlap: int) -> None:
    canvas = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    grid = TileGrid(size, tile, overlap)
    assert torch.allclose(grid.blend(lambda window: canvas[window] ** 2), canvas**2, atol=1e-5)
    covered = torch.zeros(size)
    for window in grid:
        assert canvas[window].shape[2:] == tile
        covered[window[2:]] += 1
    assert covered.min() >= 1


def test_a_network_that_looks_no_further_than_the_overlap_leaves_no_step() -> None:
    # A tile of a local mean sees zeros beyond its edge. The weights fall there, and the answer has no jump that the
    # whole has not: where each tile alone is off by up to 1, the blend of a constant is off by less at the seam.
    convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    nn.init.constant_(convolution.weight, 1 / 9)
    canvas = torch.ones(1, 1, 24, 24)
    with torch.no_grad():
        whole = convolution(canvas)
        hard, soft = (TileGrid((24, 24), (12, 12), overlap) for overlap in (0, 6))
        errors = [(grid.blend(lambda w: convolution(canvas[w])) - whole).abs().max() for grid in (hard, soft)]
    # At a hard edge a third is missing; blended, 1/8 of it.
    assert errors[0] == pytest.approx(5 / 9, abs=1e-5)
    assert errors[1] < 0.15


class Local(UNet2DModel):
    """A network that answers from each pixel alone, so that tiles change nothing."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        x, condition = sample[:, :1], sample[:, 1:2]
        answer = x - condition * timestep[:, None, None, None] / 1000
        return (answer,)


def test_tiles_change_nothing_for_a_pointwise_network() -> None:
    network = Local(
        **{key: value for key, value in tiny_unet(in_channels=2).config.items() if not key.startswith("_")}
    )
    pipeline = upscale_pipeline(unet=network)
    image = picture(10, 14)
    options = {"num_inference_steps": 4, "output_type": "pt", "generator": None}
    latents = torch.randn(1, 1, 20, 28, generator=torch.Generator().manual_seed(0))
    whole = pipeline(image, latents=latents, **options)
    tiled = pipeline(image, latents=latents, tile_size=8, tile_overlap=4, **options)
    assert torch.allclose(whole.images, tiled.images, atol=1e-5)
    assert whole.nfe == tiled.nfe == 4


# The condition


def test_the_network_sees_the_enlarged_image_and_the_noise_level() -> None:
    pipeline = upscale_pipeline(in_channels=3)
    assert pipeline.takes_noise_level
    pixels = pipeline.preprocess([picture(seed=1), picture(seed=2)])
    condition = pipeline.encode_condition(pixels, (8, 8))
    assert torch.allclose(condition, resize_bicubic(pixels, (8, 8)))
    noise = torch.randn(condition.shape, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([0.0, 0.25])
    augmented = pipeline.augment_condition(condition, level, noise)
    assert torch.allclose(augmented[0, :1], condition[0])
    assert torch.allclose(augmented[1, :1], 0.75 * condition[1] + 0.25 * noise[1])
    assert torch.equal(augmented[:, 1], level[:, None, None].expand(2, 8, 8))
    assert pipeline.predict(torch.randn(2, 1, 8, 8), 500.0, augmented).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", ["unet", "unet-vae", "dit"])
def test_every_kind_draws_images_of_the_right_size(kind: str) -> None:
    if kind == "unet":
        pipeline, channels = upscale_pipeline(), 1
    elif kind == "unet-vae":
        pipeline, channels = upscale_pipeline(unet=tiny_unet(in_channels=8, out_channels=4), vae=tiny_vae()), 3
    else:
        pipeline, channels = upscale_pipeline(transformer=tiny_dit(in_channels=2, out_channels=1), scale_factor=2), 1
    labels = 0 if pipeline.num_classes else None
    output = pipeline(picture(channels=channels), class_labels=labels, num_images_per_prompt=2, num_inference_steps=2)
    assert output.nfe == 2
    assert [(image.size, image.mode) for image in output.images] == [((8, 8), "L" if channels == 1 else "RGB")] * 2


def test_odd_sizes_and_other_factors() -> None:
    pipeline = upscale_pipeline()
    assert pipeline(picture(5, 7), num_inference_steps=1).images[0].size == (14, 10)
    assert pipeline(picture(5, 7), height=11, width=9, num_inference_steps=1).images[0].size == (9, 11)
    assert pipeline(picture(5, 7), height=25, width=35, num_inference_steps=1).images[0].size == (35, 25)


def test_samples_do_not_depend_on_the_batch() -> None:
    pipeline = upscale_pipeline(in_channels=3)
    images = [picture(seed=1), picture(seed=2)]
    options = {"noise_level": 0.3, "num_inference_steps": 3, "output_type": "pt"}
    together = pipeline(images, num_images_per_prompt=2, generator=generators(0, 1, 2, 3), **options).images
    for i, image in enumerate(images):
        apart = pipeline(image, num_images_per_prompt=2, generator=generators(2 * i, 2 * i + 1), **options).images
        assert torch.allclose(together[2 * i : 2 * i + 2], apart, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_the_image_matters() -> None:
    pipeline = upscale_pipeline()
    one, other = (
        pipeline(picture(seed=seed), num_inference_steps=3, generator=generators(0), output_type="pt").images
        for seed in (1, 2)
    )
    assert not torch.allclose(one, other, atol=1e-3)


# Folders


def test_it_is_saved_and_loaded_by_either_class(tmp_path: Path) -> None:
    pipeline = upscale_pipeline(scale_factor=3)
    pipeline.save_pretrained(tmp_path / "trained")
    expected = pipeline(picture(), num_inference_steps=2, generator=generators(0), output_type="pt").images
    for pipeline_class in (FlowMatchUpscalePipeline, DiffusionPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path / "trained")
        assert type(loaded) is FlowMatchUpscalePipeline
        assert loaded.config.scale_factor == 3
        loaded.set_progress_bar_config(disable=True)
        images = loaded(picture(), num_inference_steps=2, generator=generators(0), output_type="pt").images
        # Where loaded weights lie in memory decides the order of sums.
        assert torch.allclose(images, expected, atol=1e-5)
    (tmp_path / "trained" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    untrained = init_pipeline(tmp_path / "trained", seed=0)
    assert type(untrained) is FlowMatchUpscalePipeline


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": picture(channels=3)}, r"of the mode L or 1 for this pipeline, got RGB: use `image.convert\('L'\)`"),
        ({"image": []}, "`image` is an empty list"),
        ({"image": [picture(4, 4), picture(4, 6)]}, r"must be of one size, got \[\(4, 4\), \(6, 4\)\]"),
        ({"image": torch.zeros(1, 3, 4, 4)}, r"must have 1 channels for this pipeline, got the shape \(1, 3, 4, 4\)"),
        ({"height": 3}, "must not be below those of the image, 4 x 4, got 3 x 8"),
        ({"num_images_per_prompt": 0}, "`num_images_per_prompt` must be 1 or more, got 0"),
        ({"noise_level": 1.5}, r"`noise_level` must be in \[0, 1\], got 1.5"),
        ({"tile_overlap": 4}, "`tile_overlap` 4 has no meaning without a `tile_size`"),
        ({"tile_size": 5}, "`tile_size` must be a positive multiple of 2, got 5"),
        ({"tile_size": 6, "tile_overlap": 6}, "`tile_overlap` must be a multiple of 2 from 0 to 4, got 6"),
        ({"class_labels": 1}, "this pipeline has no classes"),
        ({"guidance_scale": 2.0}, "needs classes"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"latents": torch.zeros(1, 1, 4, 4)}, r"`latents` must have the shape \(1, 1, 8, 8\), got \(1, 1, 4, 4\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_calls_are_refused(options: dict, message: str) -> None:
    pipeline = upscale_pipeline()
    pipeline.unet.forward = None
    with pytest.raises(ValueError, match=message):
        pipeline(**{"image": picture(), "num_inference_steps": 1, **options})


def test_networks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="its `in_channels` must be 2 or 3, got 1"):
        upscale_pipeline(in_channels=1)
    with pytest.raises(ValueError, match="`scale_factor` must be a whole number of 2 or more, got 1"):
        upscale_pipeline(scale_factor=1)
    with pytest.raises(ValueError, match="has 4 latent channels, the network 1"):
        upscale_pipeline(vae=tiny_vae())


# Truth


class GaussianPosterior(UNet2DModel):
    """The exact velocity on the OT path if each pixel is Gaussian around the enlarged image: it looks at one pixel."""

    std = 0.3

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        x_t, mean = sample.chunk(2, dim=1)
        t = (timestep / 1000)[:, None, None, None]
        variance = (1 - t) ** 2 * self.std**2 + t**2
        rest = (x_t - (1 - t) * mean) / variance
        velocity = t * rest - mean - (1 - t) * self.std**2 * rest
        return (velocity,) if not return_dict else UNet2DOutput(sample=velocity)


def gaussian_upscaler() -> FlowMatchUpscalePipeline:
    """An upscaler with this network, twice to each side."""
    config = {"sample_size": 8, "in_channels": 2, "out_channels": 1, "block_out_channels": (8, 8)}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "norm_num_groups": 4}
    network = GaussianPosterior(**config, **blocks, layers_per_block=1).eval()
    pipeline = FlowMatchUpscalePipeline(FlowMatchScheduler(), network, scale_factor=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("solver", ["heun", "dopri5"])
def test_samples_are_of_the_posterior(solver: str) -> None:
    pipeline, small = gaussian_upscaler(), torch.full((1, 1, 4, 4), 0.5)
    small[..., 2:] = 0.7
    options = {} if solver == "heun" else {"rtol": 1e-3, "atol": 1e-3}
    generator = torch.Generator().manual_seed(0)
    output = pipeline(
        small,
        num_images_per_prompt=400,
        num_inference_steps=20,
        solver=solver,
        generator=generator,
        output_type="latent",
        **options,
    )
    expected = resize_bicubic(2 * small - 1, (8, 8))
    # Four standard errors of the mean of 400 samples; of the variance of 64 x 400 pixels a few percent.
    assert (output.images.mean(0) - expected[0]).abs().max() < 4.5 * 0.3 / 20
    assert (output.images - expected).std().item() == pytest.approx(0.3, rel=0.03)


def test_tiles_of_an_exact_network_are_the_whole() -> None:
    pipeline, small = gaussian_upscaler(), picture(9, 14)
    whole, tiled = (
        pipeline(small, num_inference_steps=4, generator=generators(1), output_type="latent", **options).images
        for options in ({}, {"tile_size": 8, "tile_overlap": 4})
    )
    assert torch.allclose(whole, tiled, atol=1e-5)
    adaptive = pipeline(small, solver="bosh3", rtol=1e-2, atol=1e-2, tile_size=8, output_type="latent").images
    assert adaptive.shape == whole.shape
    # Tiles are those of a call alone.
    again = pipeline(small, num_inference_steps=4, generator=generators(1), output_type="latent").images
    assert torch.equal(again, whole)


def test_classes_may_be_unknown() -> None:
    pipeline = FlowMatchUpscalePipeline(
        FlowMatchScheduler(),
        tiny_unet(in_channels=2, num_class_embeds=NUM_CLASSES + 1),
        num_classes=NUM_CLASSES,
        scale_factor=2,
    )
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    unknown, known, guided = (
        pipeline(picture(), generator=generators(0), **options, **more).images
        for more in ({}, {"class_labels": 3}, {"class_labels": 3, "guidance_scale": 0.0})
    )
    assert torch.allclose(unknown, guided, atol=1e-5)
    assert not torch.allclose(unknown, known, atol=1e-4)
    with pytest.raises(ValueError, match="needs `class_labels`"):
        pipeline(picture(), guidance_scale=2.0)
