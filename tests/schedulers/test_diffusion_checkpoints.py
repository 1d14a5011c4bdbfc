# SPDX-License-Identifier: Apache-2.0
"""Diffusion checkpoints under `FlowMatchScheduler`: Euler on the straight coordinates is DDIM with eta = 0.

`FlowMatchScheduler.from_config` of a DDIM, DDPM, PNDM or Euler configuration must give DDIM's images at its timesteps.
Two references: diffusers' own `DDIMScheduler`, and equation 12 of the DDIM paper (arXiv 2010.02502) in float64, which
also holds where `DDIMScheduler` steps to a point beside its grid (`linspace`, and `trailing` when the number of steps
does not divide 1000: it always goes back by `1000 // n`). Tolerance 1e-4: float32 rounds the data estimate by about
1e-7 over alpha, which is above 6e-3 for epsilon, and the cumulated betas of stock by as much again.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from helpers import draw_mixture
from stock_pipelines import SD_BETAS, StockCase, diffusion_cases, record

from diffusers_fm import FlowMatchScheduler


ATOL = 1e-4

SD_CHECKPOINT = SD_BETAS | {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
CONFIGS = {
    "sd-1.5": SD_CHECKPOINT,
    "sd-2.1": SD_CHECKPOINT | {"prediction_type": "v_prediction"},
    "sd-to-one": SD_CHECKPOINT | {"set_alpha_to_one": True},
    "sd-no-offset": SD_CHECKPOINT | {"steps_offset": 0},
    "ddpm-linear": {"clip_sample": False},
    "ddpm-clipped": {"clip_sample": True},
    "ddpm-clipped-wider": {"clip_sample": True, "clip_sample_range": 2.0},
    "ddpm-not-to-one": {"clip_sample": False, "set_alpha_to_one": False},
    "ddpm-sample": {"clip_sample": False, "prediction_type": "sample"},
    "cosine-v": {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "prediction_type": "v_prediction"},
    "trained-betas": {"trained_betas": np.linspace(2e-4, 1e-2, 1000).tolist(), "clip_sample": False},
    "500-train-steps": {"num_train_timesteps": 500, "clip_sample": False},
    "zero-snr": SD_CHECKPOINT
    | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def network(stock: SchedulerMixin) -> Network:
    """A field that answers in the prediction type of `stock`, near the sample where that is nearly noise or data."""

    def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        square = stock.alphas_cumprod[int(timestep)].double()
        alpha, sigma = square.sqrt().to(sample.dtype), (1 - square).sqrt().to(sample.dtype)
        v = torch.tanh(0.7 * sample.roll(1, -1) + 0.3) + 0.5 * torch.cos(0.01 * timestep.to(sample.dtype))
        answers = {"v_prediction": v, "epsilon": sigma * sample + alpha * v, "sample": alpha * sample - sigma * v}
        return answers[stock.config.prediction_type]

    return predict


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def sample_with(scheduler: SchedulerMixin, steps: int, model: Network) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    sample = noise()
    for timestep in scheduler.timesteps:
        sample = scheduler.step(model(sample, timestep), timestep, sample, return_dict=False)[0]
    return sample


def ddim(stock: SchedulerMixin, timesteps: list[int], final_alpha_cumprod: float) -> torch.Tensor:
    """Equation 12 of arXiv 2010.02502 at eta = 0 over `timesteps`, in float64."""
    model, sample = network(stock), noise().double()
    squares = [float(stock.alphas_cumprod[timestep]) for timestep in timesteps] + [final_alpha_cumprod]
    for timestep, now, then in zip(timesteps, squares, squares[1:]):
        output = model(sample, torch.tensor(float(timestep), dtype=torch.float64))
        alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
        if stock.config.prediction_type == "epsilon":
            data, epsilon = (sample - sigma * output) / alpha, output
        else:
            data, epsilon = alpha * sample - sigma * output, alpha * output + sigma * sample
        sample = math.sqrt(then) * data + math.sqrt(1 - then) * epsilon
    return sample


# The sampling loop


@pytest.mark.parametrize("steps", [1, 4, 10, 50])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_euler_is_ddim(config: dict, spacing: str, steps: int) -> None:
    stock = DDIMScheduler(**({"timestep_spacing": spacing} | config))
    ours = FlowMatchScheduler.from_config(stock.config)
    model = network(stock)
    expected, actual = sample_with(stock, steps, model), sample_with(ours, steps, model)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("steps", [3, 7, 30, 999])
@pytest.mark.parametrize("config", [SD_CHECKPOINT, {"clip_sample": True}], ids=["sd-1.5", "ddpm"])
def test_euler_is_ddim_when_steps_do_not_divide_the_train_steps(config: dict, steps: int) -> None:
    stock = DDIMScheduler(**config)
    ours = FlowMatchScheduler.from_config(stock.config)
    model = network(stock)
    expected, actual = sample_with(stock, steps, model), sample_with(ours, steps, model)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("steps", [3, 7, 10])
def test_euler_is_equation_12(spacing: str, to_one: bool, prediction_type: str, steps: int) -> None:
    config = SD_CHECKPOINT | {"set_alpha_to_one": to_one, "prediction_type": prediction_type}
    stock = DDIMScheduler(**config, timestep_spacing=spacing)
    ours = FlowMatchScheduler.from_config(stock.config)
    actual = sample_with(ours, steps, network(stock))
    stock.set_timesteps(steps)
    assert ours.timesteps.tolist() == stock.timesteps.tolist()
    final = 1.0 if to_one else float(stock.alphas_cumprod[0])
    expected = ddim(stock, stock.timesteps.tolist(), final)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=ATOL)


def test_euler_is_equation_12_over_given_timesteps() -> None:
    stock = DDIMScheduler(**SD_CHECKPOINT)
    ours = FlowMatchScheduler.from_config(stock.config)
    timesteps = [951, 777, 400, 90, 3]
    ours.set_timesteps(timesteps=timesteps)
    assert ours.timesteps.tolist() == timesteps
    model, sample = network(stock), noise()
    for timestep in ours.timesteps:
        sample = ours.step(model(sample, timestep), timestep, sample).prev_sample
    expected = ddim(stock, timesteps, float(stock.alphas_cumprod[0]))
    torch.testing.assert_close(sample.double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "cls",
    [
        DDPMScheduler,
        PNDMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
    ],
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_scheduler_of_a_checkpoint_becomes_the_same_ddim(cls: type, spacing: str) -> None:
    stock = cls(**SD_BETAS, steps_offset=1, timestep_spacing=spacing)
    ours = FlowMatchScheduler.from_config(stock.config)
    assert ours.config.path == "vp_discrete"
    assert ours.config.prediction_type == "epsilon"
    reference = DDIMScheduler(**SD_BETAS, steps_offset=1, timestep_spacing=spacing)
    reference.set_timesteps(10)
    clips = cls is DDPMScheduler  # DDPM configurations clip by default
    assert ours.config.clip_sample == clips
    ours = FlowMatchScheduler.from_config(stock.config, clip_sample=False)
    # PNDM's own default keeps the first alpha at the end; the others end in clean data.
    final = float(reference.alphas_cumprod[0]) if cls is PNDMScheduler else 1.0
    expected = ddim(reference, reference.timesteps.tolist(), final)
    torch.testing.assert_close(sample_with(ours, 10, network(reference)).double(), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
@pytest.mark.parametrize("levels", [{}, {"sigma_min": 0.05, "sigma_max": 12.0}], ids=["whole-path", "given-range"])
@pytest.mark.parametrize("grid", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_special_grids_are_those_of_the_euler_scheduler(grid: str, levels: dict, spacing: str) -> None:
    # Stock's Euler holds x / alpha, where a DDIM step is an Euler step over sigma / alpha.
    stock = EulerDiscreteScheduler(**SD_BETAS, **{grid: True}, **levels, timestep_spacing=spacing)
    ours = FlowMatchScheduler.from_config(stock.config)
    stock.set_timesteps(8)
    ours.set_timesteps(8)
    torch.testing.assert_close(ours.sigmas, stock.sigmas / (1 + stock.sigmas), rtol=0, atol=1e-5)
    # Between two knots ours interpolates the angle and stock log sigma.
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1.0)


def test_adding_noise_and_velocity_are_those_of_the_checkpoint() -> None:
    stock = DDIMScheduler(**SD_CHECKPOINT)
    ours = FlowMatchScheduler.from_config(stock.config, prediction_type="v_prediction")
    data, eps = noise(1), noise(2)
    for timesteps in (torch.tensor([0, 999]), torch.tensor([500, 3])):
        expected = stock.add_noise(data, eps, timesteps)
        torch.testing.assert_close(ours.add_noise(data, eps, timesteps), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.add_noise(data, eps, timesteps.float()), expected, rtol=0, atol=1e-5)
        target = stock.get_velocity(data, eps, timesteps)
        torch.testing.assert_close(ours.get_target(data, eps, timesteps), target, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("cls", "settings", "words"),
    [
        (DDIMScheduler, {"thresholding": True}, "thresholding"),
        (DPMSolverMultistepScheduler, {"use_lu_lambdas": True}, "use_lu_lambdas"),
        (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "interpolation_type"),
        (
            EulerDiscreteScheduler,
            {"timestep_type": "continuous", "prediction_type": "v_prediction", "sigma_max": 700.0},
            "timestep_type",
        ),
    ],
    ids=["thresholding", "lu-lambdas", "log-linear", "continuous"],
)
def test_what_cannot_be_honoured_is_refused(cls: type, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowMatchScheduler.from_config(cls(**settings).config)


# Whole pipelines


def assert_images_of_ddim(case: StockCase, stock: DDIMScheduler, **overrides) -> None:
    expected = record(case, stock, **overrides)
    actual = record(case, FlowMatchScheduler.from_config(stock.config), **overrides)
    assert actual.calls == expected.calls > 0
    for ours, theirs in zip(actual.timesteps, expected.timesteps, strict=True):
        assert ours.tolist() == theirs.tolist()
    for ours, theirs in zip(actual.samples, expected.samples, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=ATOL)
    torch.testing.assert_close(actual.images, expected.images, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "name", ["sd-text", "sd-image", "sd-inpaint", "sdxl-text", "sdxl-image", "dit", "pixart-alpha", "pixart-sigma"]
)
@pytest.mark.parametrize("steps", [1, 4, 7])
def test_pipelines_of_diffusion_checkpoints_give_the_images_of_ddim(name: str, steps: int) -> None:
    case = diffusion_cases()[name]
    if name == "pixart-alpha":
        steps = max(steps, 2)  # at one step this pipeline wants the data estimate as a second output
    strength = {"strength": 1.0} if "strength" in case.inputs and steps == 1 else {}
    assert_images_of_ddim(case, case.scheduler, num_inference_steps=steps, **strength)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("name", ["sd-text", "sd-image"])
def test_stable_diffusion_gives_the_images_of_ddim(
    name: str, to_one: bool, spacing: str, prediction_type: str
) -> None:
    case = diffusion_cases()[name]
    settings = {"set_alpha_to_one": to_one, "timestep_spacing": spacing, "prediction_type": prediction_type}
    assert_images_of_ddim(case, DDIMScheduler.from_config(case.scheduler.config, **settings))


@pytest.mark.parametrize("name", ["sd-image", "sd-inpaint", "sdxl-image"])
@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
def test_image_to_image_gives_the_images_of_ddim_at_any_strength(name: str, strength: float) -> None:
    case = diffusion_cases()[name]
    assert_images_of_ddim(case, case.scheduler, strength=strength)


@pytest.mark.parametrize(("name", "part"), [("sdxl-text", "denoising_end"), ("sdxl-image", "denoising_start")])
def test_an_ensemble_of_two_checkpoints_divides_the_steps_as_with_ddim(name: str, part: str) -> None:
    case = diffusion_cases()[name]
    assert_images_of_ddim(case, case.scheduler, num_inference_steps=10, **{part: 0.6})


def test_zero_terminal_snr_gives_the_images_of_ddim() -> None:
    case = diffusion_cases()["sd-text"]
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    assert_images_of_ddim(case, DDIMScheduler.from_config(case.scheduler.config, **settings), guidance_rescale=0.7)


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("steps", [1, 4, 10])  # with clipping, an untrained UNet is chaotic over many more
def test_an_unconditional_ddpm_checkpoint_gives_the_images_of_ddim(clip_sample: bool, steps: int) -> None:
    case, ddim_case = diffusion_cases()["ddpm"], diffusion_cases()["ddim"]
    assert isinstance(ddim_case.pipeline, DDIMPipeline)
    checkpoint = DDPMScheduler(clip_sample=clip_sample)
    expected = record(ddim_case, DDIMScheduler.from_config(checkpoint.config), num_inference_steps=steps)
    ours = record(case, FlowMatchScheduler.from_config(checkpoint.config), num_inference_steps=steps)
    assert [float(t) for t in ours.timesteps] == [float(t) for t in expected.timesteps]
    torch.testing.assert_close(ours.images, expected.images, rtol=0, atol=ATOL)


def test_a_saved_checkpoint_pipeline_loads_with_our_scheduler(tmp_path) -> None:
    case = diffusion_cases()["sd-text"]
    expected = record(case, FlowMatchScheduler.from_config(case.scheduler.config))
    case.pipeline.save_pretrained(tmp_path)
    missing = {name: None for name, component in case.pipeline.components.items() if component is None}
    loaded = type(case.pipeline).from_pretrained(tmp_path, requires_safety_checker=False, **missing)
    assert type(loaded.scheduler) is FlowMatchScheduler
    assert loaded.scheduler.config.path_kwargs["beta_schedule"] == "scaled_linear"
    actual = record(StockCase("loaded", loaded, loaded.scheduler, case.inputs), loaded.scheduler)
    torch.testing.assert_close(actual.images, expected.images, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", ["sd-1.5", "sd-2.1", "ddpm-linear", "zero-snr"])
def test_solvers_of_order_two_come_nearer_than_ddim_with_as_many_calls(name: str) -> None:
    checkpoint = DDIMScheduler(**CONFIGS[name])
    mixture = draw_mixture(3, (8,), modes=4, narrowest=0.4, widest=0.8)

    def sample(steps: int, **settings: str) -> torch.Tensor:
        scheduler = FlowMatchScheduler.from_config(checkpoint.config, **settings)
        scheduler.set_timesteps(steps)
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for timestep in scheduler.timesteps:
            t = (timestep.double() / scheduler.timestep_scale).expand(len(x))
            answer = mixture.predict(scheduler.path, x, t, scheduler.config.prediction_type)
            x = scheduler.step(answer, timestep, x, return_dict=False)[0]
        assert len(scheduler.timesteps) == steps
        return x

    fine = sample(500)
    for steps in (10, 25):
        ddim, *second = ((sample(steps, solver=name) - fine).norm() for name in ("euler", "ab2", "dpmpp_2m"))
        assert all(error < 0.7 * ddim for error in second)


def test_another_solver_from_our_own_configuration_is_no_reason_to_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    # It still carries the checkpoint's betas, which nobody asked us to use.
    warnings: list[str] = []
    monkeypatch.setattr("diffusers.configuration_utils.logger.warning", warnings.append)
    ours = FlowMatchScheduler.from_config(DDIMScheduler(**SD_CHECKPOINT).config)
    again = FlowMatchScheduler.from_config(ours.config, solver="ab2")
    assert warnings == [] and again.config.solver == "ab2" and again.config.beta_schedule == "scaled_linear"
