# SPDX-License-Identifier: Apache-2.0
"""Inverse problems with a pipeline: the posterior of Gaussian data in closed form, and what users rely on."""

from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from tiny_pipelines import NUM_CLASSES, generators, images_of, labels_of, tiny_pipeline, tiny_unet

from diffusers_fm import FlowMatchInversePipeline, FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.applications.operators import (
    CompressedOperator,
    DownsampleOperator,
    FunctionOperator,
    LinearOperator,
)


PATHS = {
    "ot": {},
    "vp": {"path": "vp", "prediction_type": "v_prediction"},
    "ve": {"path": "ve", "prediction_type": "v_prediction"},
    "cosine": {"path": "cosine"},
    "vp_discrete": {"path": "vp_discrete", "prediction_type": "epsilon"},
}
every_path = pytest.mark.parametrize("scheduler", PATHS.values(), ids=PATHS.keys())

SIZE = 4
"""Images of 2 x 2 pixels."""


class GaussianPipeline(FlowMatchInversePipeline):
    """A pipeline whose network is exact for data of a given mean and covariance, of `SIZE` values."""

    mean = torch.tensor([0.6, -0.8, 0.4, 1.0])
    covariance = torch.eye(SIZE)

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: None = None) -> torch.Tensor:
        path, t = self.scheduler.path, self.scheduler.time(timestep.double().flatten()[0])
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = sample.flatten(1).double()
        marginal = alpha**2 * self.covariance.double() + sigma**2 * torch.eye(SIZE, dtype=torch.float64)
        whitened = torch.linalg.solve(marginal, (x - alpha * self.mean).T).T
        data = self.mean + alpha * whitened @ self.covariance.double()
        kind = self.scheduler.config.prediction_type
        output = path.target(data, sigma * whitened, t, kind)
        return output.to(sample.dtype).reshape(sample.shape)


def gaussian_pipeline(covariance: torch.Tensor, **scheduler: object) -> GaussianPipeline:
    pipeline = GaussianPipeline(FlowMatchScheduler(**scheduler), unet=tiny_unet(sample_size=2))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.covariance = covariance
    return pipeline


def matrix_operator(matrix: torch.Tensor) -> FunctionOperator:
    return FunctionOperator(lambda x: x.flatten(1) @ matrix.T.to(x), lambda y: (y @ matrix.to(y)).reshape(-1, 1, 2, 2))


def wide_covariance() -> torch.Tensor:
    """Correlated, with standard deviations from about 0.3 to 1.2."""
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))[0]
    return basis @ torch.diag(torch.tensor([1.4, 0.8, 0.3, 0.1])) @ basis.T


MATRIX = torch.tensor([[1.0, 0.5, 0.0, 0.0], [0.0, 0.3, -1.0, 0.2]])


def closed_form(pipeline: GaussianPipeline, y: torch.Tensor, noise_level: float) -> tuple[torch.Tensor, torch.Tensor]:
    covariance, matrix = pipeline.covariance.double(), MATRIX.double()
    total = matrix @ covariance @ matrix.T + noise_level**2 * torch.eye(2, dtype=torch.float64)
    gain = torch.linalg.solve(total, matrix @ covariance).T
    mean = pipeline.mean + gain @ (y.double() - matrix @ pipeline.mean.double())
    return mean, covariance - gain @ matrix @ covariance


def sampled_moments(pipeline: GaussianPipeline, y: torch.Tensor, **call: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Without Monte Carlo: where everything is Gaussian, the map from noise to sample is affine."""
    latents = torch.cat([torch.zeros(1, SIZE), torch.eye(SIZE)]).reshape(-1, 1, 2, 2)
    call = {"noise_level": 0.3, "eta": 0.0, "solver": "heun", "num_inference_steps": 60, **call}
    output = pipeline(y.expand(SIZE + 1, -1), matrix_operator(MATRIX), latents=latents, output_type="latent", **call)
    points = output.images.flatten(1).double()
    factor = (points[1:] - points[0]).T
    return points[0], factor @ factor.T


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@every_path
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
def test_guidance_by_the_jacobian_draws_from_the_posterior_of_any_gaussian(
    scheduler: dict, noise_level: float
) -> None:
    pipeline = gaussian_pipeline(wide_covariance(), **scheduler)
    y = torch.tensor([1.5, 0.2])
    found = sampled_moments(
        pipeline, y, noise_level=noise_level, method="guided", covariance="jacobian", num_covariance_iterations=SIZE
    )
    for moment, expected in zip(found, closed_form(pipeline, y, noise_level)):
        assert relative_error(moment, expected) < 0.02


@every_path
@pytest.mark.parametrize("method", ["guided", "projection"])
@pytest.mark.parametrize("noise_level", [0.0, 0.3])
def test_both_methods_draw_from_the_posterior_of_independent_pixels(
    scheduler: dict, method: str, noise_level: float
) -> None:
    pipeline = gaussian_pipeline(0.49 * torch.eye(SIZE), sigma_data=0.7, **scheduler)
    y = torch.tensor([1.5, 0.2])
    found = sampled_moments(pipeline, y, noise_level=noise_level, method=method)
    for moment, expected in zip(found, closed_form(pipeline, y, noise_level)):
        assert relative_error(moment, expected) < 0.02


# What users rely on


METHODS = ("guided", "projection")
every_method = pytest.mark.parametrize("method", METHODS)


def inverse_pipeline(kind: str, **scheduler: object) -> FlowMatchInversePipeline:
    pipeline = FlowMatchInversePipeline.from_pipe(tiny_pipeline(kind, **scheduler))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def left_half(images: torch.Tensor) -> torch.Tensor:
    """A mask that has the left half drawn anew."""
    mask = torch.zeros(1, 1, *images.shape[-2:])
    mask[..., : images.shape[-1] // 2] = 1
    return mask


def difference(shape: tuple[int, int, int]) -> FunctionOperator:
    """Differences of neighbours, without closed forms."""

    def adjoint(y: torch.Tensor) -> torch.Tensor:
        x = y.new_zeros(len(y), *shape)
        x[..., 1:] += y
        x[..., :-1] -= y
        return x

    return FunctionOperator(lambda x: x[..., 1:] - x[..., :-1], adjoint)


@every_path
@every_method
def test_inpainting_keeps_what_is_known_bit_for_bit(scheduler: dict, method: str) -> None:
    pipeline = inverse_pipeline("unet-classes", **scheduler)
    levels = (images_of(pipeline) * 255).round().byte().numpy()[:, 0]
    images = [PIL.Image.fromarray(image) for image in levels]
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 255
    output = pipeline(
        image=images,
        mask_image=PIL.Image.fromarray(mask),
        method=method,
        class_labels=labels_of(pipeline),
        guidance_scale=2.0,
        num_inference_steps=4,
        generator=generators(1, 2, 3),
    )
    drawn = np.stack([np.asarray(image) for image in output.images])
    np.testing.assert_array_equal(drawn[:, :, 4:], levels[:, :, 4:])
    assert (drawn[:, :, :4] != levels[:, :, :4]).mean() > 0.5
    assert output.nfe == 4
    assert output.num_backward == 0 if method == "projection" else 3 <= output.num_backward <= 4


@every_method
@pytest.mark.parametrize("kind", ["unet", "dit-vae", "sd3-vae"])
@pytest.mark.parametrize("name", ["downsample", "compressed", "function"])
def test_a_measurement_without_noise_is_met(kind: str, method: str, name: str) -> None:
    pipeline = inverse_pipeline(kind)
    truth = 2 * images_of(pipeline) - 1
    shape = tuple(truth.shape[1:])
    operator: LinearOperator = {
        "downsample": DownsampleOperator(2),
        "compressed": CompressedOperator(shape, truth[0].numel() // 4),
        "function": difference(shape),
    }[name]
    output = pipeline(
        operator.forward(truth),
        operator,
        method=method,
        class_labels=labels_of(pipeline),
        num_inference_steps=3,
        generator=generators(1, 2, 3),
        output_type="pt",
    )
    # The images themselves, clipped to [0, 1]: what is reported is what is so.
    found = (operator.forward(2 * output.images - 1) - operator.forward(truth)).abs().flatten(1).amax(1)
    torch.testing.assert_close(found, output.residuals, rtol=0, atol=1e-5)
    assert output.residuals.max() < 1e-3


@every_method
@pytest.mark.parametrize("kind", ["unet-classes", "dit-vae"])
@pytest.mark.parametrize("covariance", ["isotropic", "jacobian"])
def test_an_image_does_not_depend_on_its_batch(kind: str, method: str, covariance: str) -> None:
    pipeline = inverse_pipeline(kind)
    images = images_of(pipeline)
    call = {"mask_image": left_half(images), "method": method, "covariance": covariance, "num_inference_steps": 3}
    call |= {"output_type": "pt", "noise_level": 0.1}
    labels = labels_of(pipeline)
    together = pipeline(image=images, class_labels=labels, generator=generators(1, 2, 3), **call)
    for i, seed in enumerate((1, 2, 3)):
        alone = pipeline(image=images[i : i + 1], class_labels=labels[i], generator=generators(seed), **call)
        # Convolutions of one and of three images differ in their last float32 digits.
        torch.testing.assert_close(alone.images, together.images[i : i + 1], rtol=0, atol=1e-3)


def test_several_images_of_a_measurement_stand_side_by_side() -> None:
    pipeline = inverse_pipeline("unet-classes")
    images = images_of(pipeline, 2)
    call = {"mask_image": left_half(images), "num_inference_steps": 2, "output_type": "pt"}
    drawn = pipeline(
        image=images, class_labels=[1, 3], num_images_per_measurement=2, generator=generators(1, 2, 3, 4), **call
    ).images
    one_by_one = [
        pipeline(image=images[i // 2 : i // 2 + 1], class_labels=[1, 3][i // 2], generator=generators(i + 1), **call)
        for i in range(4)
    ]
    torch.testing.assert_close(drawn, torch.cat([output.images for output in one_by_one]), rtol=0, atol=1e-3)
    assert (drawn[0] - drawn[1]).abs().max() > 0.1


def test_all_unknown_is_the_plain_pipeline() -> None:
    plain = tiny_pipeline("unet-classes", solver="ab2")
    pipeline = FlowMatchInversePipeline.from_pipe(plain)
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": [1, 3], "num_inference_steps": 4, "output_type": "pt"}
    expected = plain(**call, generator=generators(1, 2))
    images = images_of(pipeline, 2)
    for method in METHODS:
        output = pipeline(
            image=images, mask_image=torch.ones(8, 8), method=method, eta=0.0, generator=generators(1, 2), **call
        )
        torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)
        assert output.nfe == expected.nfe == 4


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_eta_takes_the_place_of_stochastic_sampling(eta: float) -> None:
    pipelines = [inverse_pipeline("unet"), inverse_pipeline("unet", stochastic_sampling=True)]
    images = images_of(pipelines[0], 1)
    plain, stochastic = (
        pipeline(
            image=images,
            mask_image=left_half(images),
            eta=eta,
            num_inference_steps=3,
            generator=generators(1),
            output_type="latent",
        ).images
        for pipeline in pipelines
    )
    assert torch.equal(stochastic, plain)


def test_a_callback_sees_each_step_and_may_stop() -> None:
    pipeline = inverse_pipeline("unet")
    images, seen = images_of(pipeline, 1), []

    def callback(pipeline: FlowMatchInversePipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((step, timestep.item(), tuple(tensors["latents"].shape)))
        pipeline._interrupt = step == 1
        return tensors

    output = pipeline(
        image=images,
        mask_image=left_half(images),
        solver="heun",
        num_inference_steps=4,
        callback_on_step_end=callback,
    )
    assert seen == [(0, 1000.0, (1, 1, 8, 8)), (1, 750.0, (1, 1, 8, 8))]
    assert output.nfe == 4


def test_pipelines_share_weights_and_load_each_others_folders(tmp_path: Path) -> None:
    plain = tiny_pipeline("unet-classes")
    pipeline = FlowMatchInversePipeline.from_pipe(plain)
    assert pipeline.unet is plain.unet
    assert pipeline.num_classes == NUM_CLASSES
    plain.save_pretrained(tmp_path)
    loaded = FlowMatchInversePipeline.from_pretrained(tmp_path)
    assert loaded.num_classes == NUM_CLASSES
    loaded.save_pretrained(tmp_path)
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path)) is FlowMatchInversePipeline
    assert FlowMatchPipeline.from_pretrained(tmp_path).null_class == plain.null_class


@every_method
@pytest.mark.parametrize("kind", ["unet-classes", "dit-vae"])
def test_half_precision_networks_keep_measurements_in_full(kind: str, method: str) -> None:
    pipeline = inverse_pipeline(kind).to(torch.bfloat16)
    images = images_of(pipeline)
    call = {"method": method, "covariance": "jacobian", "num_inference_steps": 3, "output_type": "pt"}
    output = pipeline(image=images, mask_image=left_half(images), class_labels=1, **call)
    assert output.images.dtype == torch.float32
    assert output.images.isfinite().all()
    assert output.residuals.max() < 1e-6
    assert all(parameter.grad is None for parameter in pipeline.denoiser.parameters())


def test_a_measurement_may_be_one_number() -> None:
    pipeline = inverse_pipeline("unet")
    operator = CompressedOperator((1, 8, 8), 1)
    assert pipeline(torch.ones(1, 1), operator, num_inference_steps=2).residuals.max() < 1e-3
    wrong = FunctionOperator(operator.forward, lambda y: 2 * operator.adjoint(y))
    with pytest.raises(ValueError, match="not the adjoint"):
        pipeline(torch.ones(1, 1), wrong, num_inference_steps=2)


IMAGE, MASK = torch.zeros(2, 1, 8, 8), torch.ones(8, 8)
HALF = DownsampleOperator(2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "`measurement` and `operator` must be given"),
        ({"image": IMAGE}, "got no `mask_image`"),
        ({"mask_image": MASK}, "got no `image`"),
        ({"image": IMAGE, "mask_image": MASK, "operator": HALF}, "not both pairs"),
        ({"image": IMAGE, "mask_image": torch.ones(8, 4)}, "must have the size of `image`, 8 x 8, got 8 x 4"),
        ({"image": IMAGE, "mask_image": torch.ones(3, 1, 8, 8)}, "one for each of the 2 images"),
        ({"image": torch.zeros(2, 3, 8, 8), "mask_image": MASK}, "`measurement` must have the shape"),
        ({"image": torch.zeros(2, 1, 7, 8), "mask_image": torch.ones(7, 8)}, "positive multiples of 2"),
        ({"image": IMAGE, "mask_image": MASK, "height": 16}, "must be those of `image`, 8 x 8, got 16 x 8"),
        ({"measurement": torch.zeros(2, 1, 8, 8), "operator": HALF}, "must have the shape"),
        ({"measurement": torch.zeros(1, 1, 2, 2), "operator": DownsampleOperator(3)}, "multiples of the factor 3"),
        ({"image": IMAGE, "mask_image": MASK, "method": "dps"}, "`method` must be one of"),
        ({"image": IMAGE, "mask_image": MASK, "covariance": "full"}, "`covariance` must be one of"),
        ({"image": IMAGE, "mask_image": MASK, "noise_level": -0.1}, "`noise_level` must be a number of at least 0"),
        ({"image": IMAGE, "mask_image": MASK, "sigma_data": 0.0}, "`sigma_data` must be a number above 0"),
        ({"image": IMAGE, "mask_image": MASK, "num_covariance_iterations": 0}, "`num_covariance_iterations` must be"),
        ({"image": IMAGE, "mask_image": MASK, "num_images_per_measurement": 0}, "`num_images_per_measurement` must"),
        ({"image": IMAGE, "mask_image": MASK, "class_labels": 1}, "has no classes"),
        ({"image": IMAGE, "mask_image": MASK, "generator": generators(1)}, "1 generators were given for a batch of 2"),
        ({"image": IMAGE, "mask_image": MASK, "eta": 1.0, "solver": "heun"}, "`eta` needs the solver 'euler'"),
        ({"image": IMAGE, "mask_image": MASK, "eta": 2.0}, "`eta` must be a number in"),
        (
            {"image": IMAGE, "mask_image": MASK, "solver": "dopri5", "output_type": "jpg"},
            "`output_type` must be one of",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(arguments: dict, message: str) -> None:
    pipeline = inverse_pipeline("unet")
    with pytest.raises(ValueError, match=message):
        pipeline(**arguments)
