# SPDX-License-Identifier: Apache-2.0
"""The flow of a pipeline in both directions: encoding, decoding, interpolation, likelihood, adaptive sampling."""

import PIL.Image
import pytest
import torch
from tiny_pipelines import generators, labels_of, tiny_pipeline

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.likelihood import log_likelihood


PATHS = {
    "ot": {},
    "vp": {"path": "vp", "prediction_type": "v_prediction"},
    "ve": {"path": "ve", "prediction_type": "v_prediction"},
    "vp_discrete": {"path": "vp_discrete", "prediction_type": "v_prediction"},
}
every_path = pytest.mark.parametrize("scheduler", PATHS.values(), ids=PATHS.keys())


def gentle_pipeline(kind: str, **scheduler: object) -> FlowMatchPipeline:
    """A tiny pipeline whose velocity is small and smooth, so that the flow does not magnify rounding."""
    pipeline = tiny_pipeline(kind, **scheduler)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.05)
    return pipeline


def images(pipeline: FlowMatchPipeline, batch_size: int = 3, seed: int = 0) -> torch.Tensor:
    shape = (batch_size, *pipeline.sample_shape)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@every_path
@pytest.mark.parametrize("kind", ["unet", "unet-classes"])
def test_encoding_and_decoding_undo_each_other_at_the_order_of_the_solver(kind: str, scheduler: dict) -> None:
    pipeline = gentle_pipeline(kind, **scheduler)
    data, labels = images(pipeline), labels_of(pipeline)
    errors = []
    for steps in (8, 32):
        noise = pipeline.encode(data, labels, num_inference_steps=steps)
        back = pipeline.decode(noise, labels, num_inference_steps=steps, output_type="latent")
        errors.append((back - (2 * data - 1)).abs().max().item())
    # Both ways are of order 3: a quarter of the step leaves at most 1/16 of the error, down to the float32 of the net.
    assert errors[1] < max(errors[0] / 16, 1e-3)


@every_path
def test_encoded_noise_is_what_the_call_takes(scheduler: dict) -> None:
    pipeline = gentle_pipeline("unet-classes", **scheduler)
    data, labels = images(pipeline), labels_of(pipeline)
    noise = pipeline.encode(data, labels, num_inference_steps=None)
    drawn = pipeline(class_labels=labels, latents=noise, solver="dopri5", output_type="pt").images
    torch.testing.assert_close(drawn, data, rtol=0, atol=2e-3)


@pytest.mark.parametrize("solver", ["dopri5", "bosh3"])
def test_an_adaptive_solver_agrees_with_a_fine_grid(solver: str) -> None:
    pipeline = gentle_pipeline("unet-classes")
    call = {"class_labels": labels_of(pipeline), "guidance_scale": 2.0, "output_type": "latent"}
    fine = pipeline(**call, solver="rk4", num_inference_steps=40, generator=generators(1, 2, 3))
    loose, tight = (
        pipeline(**call, solver=solver, rtol=tolerance, atol=tolerance, generator=generators(1, 2, 3))
        for tolerance in (1e-2, 1e-5)
    )
    assert (tight.images - fine.images).abs().max() < 1e-2 * fine.images.std()
    assert loose.nfe < tight.nfe


def test_an_adaptive_draw_does_not_depend_on_its_batch() -> None:
    pipeline = gentle_pipeline("unet-classes")
    labels = labels_of(pipeline)
    together = pipeline(class_labels=labels, solver="dopri5", generator=generators(1, 2, 3), output_type="latent")
    alone = [
        pipeline(class_labels=[label], solver="dopri5", generator=generators(seed), output_type="latent")
        for label, seed in zip(labels, (1, 2, 3))
    ]
    assert together.nfe == max(draw.nfe for draw in alone)
    # Convolutions of one and of three images differ in their last float32 digits.
    torch.testing.assert_close(together.images, torch.cat([draw.images for draw in alone]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("arguments", [{"sigmas": [1.0, 0.5]}, {"timesteps": [900.0, 100.0]}, {"mu": 1.0}])
def test_an_adaptive_solver_refuses_what_belongs_to_a_grid(arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` has no meaning for the solver 'dopri5'"):
        tiny_pipeline("unet")(solver="dopri5", **arguments)


def test_a_grid_refuses_tolerances() -> None:
    with pytest.raises(ValueError, match="`rtol` has no meaning for the solver 'heun'"):
        tiny_pipeline("unet")(solver="heun", rtol=1e-3)


def test_interpolation_ends_at_both_images() -> None:
    pipeline = gentle_pipeline("unet-classes")
    first, second = images(pipeline, 2).split(1)
    drawn = pipeline.interpolate(
        first, second, num_images=5, class_labels=[1, 3], num_inference_steps=128, output_type="pt"
    )
    assert len(drawn) == 5
    torch.testing.assert_close(drawn[[0, -1]], torch.cat([first, second]), rtol=0, atol=5e-3)


@every_path
def test_log_likelihood_is_that_of_the_flow(scheduler: dict) -> None:
    pipeline = gentle_pipeline("unet-classes", **scheduler)
    data, labels = images(pipeline, 2), torch.tensor([1, 3])
    options = {"num_steps": 4, "divergence": "exact"}
    result = pipeline.log_likelihood(data, labels, **options)

    def predict(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return pipeline.predict(x, pipeline.scheduler.timestep_scale * t, labels)

    expected = log_likelihood(
        predict,
        2 * data - 1,
        pipeline.scheduler.path,
        prediction_type=pipeline.scheduler.config.prediction_type,
        args=(labels,),
        **options,
    )
    torch.testing.assert_close(result.log_prob, expected.log_prob)
    standard_normal = result.noise / pipeline.scheduler.init_noise_sigma
    torch.testing.assert_close(standard_normal.float(), pipeline.encode(data, labels, 4), rtol=1e-4, atol=1e-4)


def test_bits_per_dim_of_whole_levels() -> None:
    pipeline = tiny_pipeline("unet")
    levels = torch.randint(17, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    result = pipeline.bits_per_dim(
        levels, num_samples=2, levels=17, num_steps=8, generator=torch.Generator().manual_seed(0)
    )
    assert result.bits_per_dim.shape == (2,)
    assert bool(result.bits_per_dim.isfinite().all())


def test_bits_per_dim_of_the_same_images_in_other_forms() -> None:
    pipeline = tiny_pipeline("unet")
    levels = torch.randint(256, (2, 1, 8, 8), generator=torch.Generator().manual_seed(0))
    pictures = [PIL.Image.fromarray(image[0].to(torch.uint8).numpy()) for image in levels]
    found = [
        pipeline.bits_per_dim(each, num_steps=2, generator=torch.Generator().manual_seed(0)).bits_per_dim
        for each in (levels, levels.float() / 255, pictures, levels.permute(0, 2, 3, 1).numpy() / 255)
    ]
    assert all(torch.equal(found[0], other) for other in found[1:])
    with pytest.raises(ValueError, match="must hold multiples of 1 / 255, whole levels of 256"):
        pipeline.bits_per_dim(levels / 257)


def test_latents_have_a_likelihood_of_their_own() -> None:
    pipeline = tiny_pipeline("dit-vae")
    data = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="density of latents, got `latent_space` False"):
        pipeline.log_likelihood(data, [1])
    result = pipeline.log_likelihood(data, [1], latent_space=True, num_steps=4)
    assert result.noise.shape == (1, *pipeline.sample_shape)
    with pytest.raises(ValueError, match="density of pixels, got `latent_space` True"):
        tiny_pipeline("unet").log_likelihood(torch.rand(1, 1, 8, 8), latent_space=True)


def test_images_that_do_not_fit_are_named() -> None:
    pipeline = tiny_pipeline("unet")
    with pytest.raises(ValueError, match=r"`images` must have the shape \(2, 1, 8, 8\).*got \(2, 3, 8, 8\)"):
        pipeline.encode(torch.rand(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"`noise` must have the shape"):
        pipeline.decode(torch.randn(1, 2, 8, 8))
    with pytest.raises(ValueError, match="`num_images` must be at least 2, got 1"):
        pipeline.interpolate(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 8), num_images=1)
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        tiny_pipeline("unet-classes").encode(torch.rand(1, 1, 8, 8))


@pytest.mark.parametrize(("kind", "mode"), [("unet", "L"), ("dit-vae", "RGB")])
def test_pictures_with_a_palette_or_of_bits_are_read_as_they_look(kind: str, mode: str) -> None:
    pipeline = tiny_pipeline(kind)
    side = pipeline.sample_shape[1] * pipeline.vae_scale_factor
    grey = PIL.Image.linear_gradient("L").resize((side, side))
    for picture in (grey.convert("RGB").quantize(16), grey.point(lambda level: 255 * (level > 90))):
        assert torch.equal(pipeline.to_data(picture.convert("P")), pipeline.to_data(picture.convert(mode)))
    if mode == "L":
        bits = grey.convert("1")
        assert torch.equal(pipeline.to_data(bits), pipeline.to_data(bits.convert("L")))
        assert pipeline.to_data(bits).unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("mode", ["I;16", "I", "F", "CMYK"])
def test_pictures_of_other_numbers_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"`images` must be PIL images of the modes 1, P, L, .*, got {mode}: convert"):
        tiny_pipeline("unet").to_data(PIL.Image.new(mode, (8, 8)))
