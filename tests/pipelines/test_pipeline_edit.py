# SPDX-License-Identifier: Apache-2.0
"""Editing by classes and by prompts: what stays bit for bit, what agrees with plain sampling, and what is refused."""

from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tiny_pipelines import generators, images_of, labels_of, tiny_pipeline

from diffusers_fm import FlowMatchEditPipeline, FlowMatchScheduler, StableDiffusion3EditPipeline, init_pipeline


PIPELINES = Path(__file__).parents[2] / "pipelines"
PATHS = {
    "ot": {},
    "vp": {"path": "vp", "prediction_type": "v_prediction"},
    "ve": {"path": "ve", "prediction_type": "v_prediction"},
    "cosine": {"path": "cosine"},
    "vp_discrete": {"path": "vp_discrete", "prediction_type": "v_prediction"},
}
every_path = pytest.mark.parametrize("scheduler", PATHS.values(), ids=PATHS.keys())
every_method = pytest.mark.parametrize("method", ["flowedit", "inversion"])


def edit_pipeline(kind: str, **scheduler: object) -> FlowMatchEditPipeline:
    pipeline = FlowMatchEditPipeline.from_pipe(tiny_pipeline(kind, **scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@every_path
@every_method
@pytest.mark.parametrize("kind", ["unet-classes", "dit-vae"])
def test_an_image_of_the_wanted_class_stays_bit_for_bit(kind: str, method: str, scheduler: dict) -> None:
    pipeline = edit_pipeline(kind, **scheduler)
    images = images_of(pipeline)
    call = {"method": method, "num_inference_steps": 4, "guidance_scale": 2.0, "generator": generators(1, 2, 3)}
    output = pipeline(images, [1, 2, 3], [1, 0, 3], output_type="pt", **call)
    assert torch.equal(output.images[[0, 2]], images[[0, 2]])
    assert (output.images[1] - images[1]).abs().max() > 0.05
    assert output.images.isfinite().all()
    assert output.nfe == 6


@pytest.mark.parametrize("kind", ["unet-classes", "sd3-vae"])
def test_bits_stay_in_every_kind_of_image(kind: str) -> None:
    pipeline = edit_pipeline(kind)
    images = images_of(pipeline)
    array = images.permute(0, 2, 3, 1).numpy()
    levels = (array * 255).round().astype(np.uint8)
    pictures = [PIL.Image.fromarray(level[..., 0] if level.shape[-1] == 1 else level) for level in levels]
    labels = labels_of(pipeline)
    assert pipeline(images, labels, labels).nfe == 0
    np.testing.assert_array_equal(pipeline(array, labels, labels, output_type="np").images, array)
    for found, given in zip(pipeline(pictures, labels, labels).images, pictures):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(given))


def test_an_edit_does_not_depend_on_its_batch() -> None:
    pipeline = edit_pipeline("unet-classes")
    images = images_of(pipeline)
    call = {"num_inference_steps": 4, "output_type": "pt", "num_averages": 2}
    together = pipeline(images, [1, 2, 3], [4, 0, 2], generator=generators(1, 2, 3), **call).images
    for i, seed in enumerate((1, 2, 3)):
        alone = pipeline(images[i : i + 1], [1, 2, 3][i], [4, 0, 2][i], generator=generators(seed), **call).images
        # Convolutions of one and of three images differ in their last float32 digits.
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("path", ["ot", "cosine"])  # at t = 1 of the others, noised data is not pure noise
def test_free_steps_alone_draw_what_the_pipeline_draws(path: str) -> None:
    plain = tiny_pipeline("unet-classes", path=path)
    pipeline = edit_pipeline("unet-classes", path=path)
    call = {"guidance_scale": 2.0, "num_inference_steps": 4, "generator": generators(1, 2), "output_type": "latent"}
    expected = plain([1, 3], **call).images
    call["generator"] = generators(1, 2)
    found = pipeline(images_of(pipeline, 2), [0, 0], [1, 3], strength=1.0, num_free_steps=4, **call).images
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@every_path
def test_inversion_reports_the_error_of_the_round_trip(scheduler: dict) -> None:
    pipeline = edit_pipeline("unet-classes", **scheduler)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.05)  # a flow that does not magnify rounding
    images, labels = images_of(pipeline), labels_of(pipeline)
    coarse, fine = (pipeline.invert(images, labels, steps) for steps in (6, 24))
    assert (coarse.nfe, fine.nfe) == (12, 48)
    back = pipeline.decode(fine.latents, labels, 24, "latent", solver="heun")
    errors = (back - (2 * images - 1)).flatten(1)
    torch.testing.assert_close(fine.round_trip_error, errors.square().mean(1).sqrt(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(fine.round_trip_max, errors.abs().amax(1), rtol=1e-3, atol=1e-5)
    # Order 2: a quarter of the step leaves at most 1/8 of the error, with a margin of 2, down to float32.
    assert bool((fine.round_trip_error < (coarse.round_trip_error / 8).clamp(min=2e-4)).all())
    assert bool((fine.round_trip_error < 1e-3).all())


def test_edit_pipelines_share_weights_and_load_folders(tmp_path: Path) -> None:
    plain = tiny_pipeline("unet-classes")
    assert FlowMatchEditPipeline.from_pipe(plain).unet is plain.unet
    plain.save_pretrained(tmp_path)
    FlowMatchEditPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is FlowMatchEditPipeline


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "sdedit"}, "`method` must be one of"),
        ({"strength": 0.0}, "`strength` must be a number in"),
        ({"strength": 1.5}, "`strength` must be a number in"),
        ({"strength": 0.1, "num_inference_steps": 5}, "leaves no step"),
        ({"num_averages": 0}, "`num_averages` must be at least 1"),
        ({"num_inference_steps": 4, "num_free_steps": 5}, "`num_free_steps` must be from 0 to the 3 steps"),
        ({"method": "inversion", "num_averages": 2}, "belong to the method 'flowedit'"),
        ({"method": "inversion", "solver": "newton"}, "`method` must be one of"),
        ({"class_labels": [1, 2]}, "2 class labels were given for a batch of 3"),
        ({"source_class_labels": 9}, "Class label 9 is out of range"),
        ({"class_labels": None}, "`class_labels` must be given"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ({"generator": generators(1)}, "1 generators were given for a batch of 3"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
        ({"image": torch.zeros(3, 3, 8, 8)}, "`images` must have the shape"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict, message: str) -> None:
    pipeline = edit_pipeline("unet-classes")
    call = {"image": images_of(pipeline), "source_class_labels": 1, "class_labels": [1, 2, 3], **arguments}
    with pytest.raises(ValueError, match=message):
        pipeline(**call)


def test_a_pipeline_without_classes_has_nothing_to_edit() -> None:
    pipeline = edit_pipeline("unet")
    with pytest.raises(ValueError, match="needs a pipeline with classes"):
        pipeline(images_of(pipeline), None, None)


# Stable Diffusion 3


@pytest.fixture(scope="module")
def stock() -> StableDiffusion3Pipeline:
    pipeline = init_pipeline(PIPELINES / "sd3-tiny", seed=0, pipeline_class=StableDiffusion3Pipeline)
    # The last layer starts at zero, and so would every velocity.
    with torch.no_grad():
        for parameter in pipeline.transformer.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def prompted(stock: StableDiffusion3Pipeline) -> StableDiffusion3EditPipeline:
    pipeline = StableDiffusion3EditPipeline.from_pipe(stock)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_prompt_pipelines_load_stock_folders(stock: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    stock.save_pretrained(tmp_path)
    StableDiffusion3EditPipeline.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is StableDiffusion3EditPipeline
    assert type(StableDiffusion3Pipeline.from_pretrained(tmp_path)) is StableDiffusion3Pipeline


def photos(pipeline: StableDiffusion3Pipeline, batch_size: int = 2) -> torch.Tensor:
    side = pipeline.default_sample_size * pipeline.vae_scale_factor
    shape = (batch_size, pipeline.vae.config.in_channels, side, side)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@every_method
def test_an_image_of_the_wanted_prompt_stays_bit_for_bit(prompted: StableDiffusion3EditPipeline, method: str) -> None:
    images = photos(prompted)
    output = prompted(images, ["a three", "a five"], "a three", method=method, num_inference_steps=3, output_type="pt")
    assert torch.equal(output.images[0], images[0])
    # Random text encoders tell prompts apart only a little.
    assert (output.images[1] - images[1]).abs().max() > 1e-3
    assert output.images.isfinite().all()
    assert output.nfe == 2
    assert prompted(images, "a three", "a three").nfe == 0


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_free_steps_alone_draw_what_stock_draws(
    stock: StableDiffusion3Pipeline, prompted: StableDiffusion3EditPipeline, ours: bool, guidance_scale: float
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    stock.scheduler = scheduler
    prompted.scheduler = FlowMatchScheduler.from_config(scheduler.config) if ours else scheduler
    images = photos(prompted)
    shape = prompted.invert(images, num_inference_steps=1).latents.shape
    noise = torch.cat([torch.randn((1, *shape[1:]), generator=generator) for generator in generators(1, 2)])
    call = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "output_type": "latent"}
    expected = stock(["a three", "a five"], negative_prompt=["", ""], latents=noise, **call).images
    found = prompted(
        images,
        "a one",
        ["a three", "a five"],
        strength=1.0,
        num_free_steps=4,
        generator=generators(1, 2),
        **call,
    ).images
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_inversion_by_prompt_reports_its_error(prompted: StableDiffusion3EditPipeline) -> None:
    images = photos(prompted)
    coarse, fine = (prompted.invert(images, ["a three", "a five"], steps) for steps in (8, 32))
    assert coarse.latents.shape == fine.latents.shape
    assert bool((fine.round_trip_error < coarse.round_trip_error).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a", "b", "c"]}, "`prompt` must be a string, or one for each of the 2 images"),
        ({"source_prompt": [1, 2]}, "`source_prompt` must be a string"),
        ({"strength": 2.0}, "`strength` must be a number in"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be a finite number"),
        ({"image": torch.zeros(2, 5, 8, 8)}, "`image` must have . channels, got 5"),
        ({"output_type": "jpg"}, "`output_type` must be one of"),
    ],
)
def test_prompts_and_images_that_do_not_fit_are_refused(
    prompted: StableDiffusion3EditPipeline, arguments: dict, message: str
) -> None:
    call = {"image": photos(prompted), "source_prompt": "a three", "prompt": "a five", **arguments}
    with pytest.raises(ValueError, match=message):
        prompted(**call)


def test_an_image_too_large_for_the_transformer_is_refused(prompted: StableDiffusion3EditPipeline) -> None:
    image = torch.zeros(1, prompted.vae.config.in_channels, 4096, 8)
    with pytest.raises(ValueError, match="takes no images of 4096 x 8 pixels: .* cannot be greater than"):
        prompted(image, "a three", "a five")
