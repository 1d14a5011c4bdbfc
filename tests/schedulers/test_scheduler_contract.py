# SPDX-License-Identifier: Apache-2.0
"""What diffusers, its pipelines and its training scripts ask of a flow matching scheduler, member by member."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import BaseOutput
from stock_pipelines import stock_keeps_timesteps

from diffusers_fm import FlowMatchScheduler


STOCK_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters.items()
    if name != "self"
}
OUR_DEFAULTS = {
    "path": "ot",
    "path_kwargs": None,
    "prediction_type": "flow_prediction",
    "solver": "euler",
    "sampling_path": "ot",
    "timestep_spacing": "trailing",
    "final_sigmas_type": "zero",
    "steps_offset": 1,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "sigma_data": None,
    "eta": 0.0,
    "s_churn": 0.0,
    "s_tmin": 0.0,
    "s_tmax": None,
    "s_noise": 1.0,
    "diffusion_form": "sigma",
    "diffusion_scale": 1.0,
    "calibration": None,
    "flow_map": None,
    "default_num_inference_steps": None,
}

# Every key away from its default at least once, every path, prediction type, solver and spacing.
SETTINGS = {
    "default": {},
    "sd3": {"shift": 3.0},
    "flux": {"shift": 3.0, "use_dynamic_shifting": True},
    "qwen": {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02},
    "ltx": {"use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "mochi": {"invert_sigmas": True},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "stochastic": {"stochastic_sampling": True},
    "short": {"num_train_timesteps": 200},
    "linspace": {"timestep_spacing": "linspace"},
    "ot-sigma-min": {"path_kwargs": {"sigma_min": 0.001}},
    "vp": {"path": "vp"},
    "vp-epsilon": {"path": "vp", "path_kwargs": {"beta_min": 0.2, "beta_max": 15.0}, "prediction_type": "epsilon"},
    "ve": {"path": "ve", "path_kwargs": {"sigma_min": 0.02, "sigma_max": 30.0}, "prediction_type": "score"},
    "cosine-v": {"path": "cosine", "prediction_type": "v_prediction"},
    "cosine-sample": {"path": "cosine", "prediction_type": "sample"},
    "native": {"path": "cosine", "sampling_path": "native"},
    "sd-1.5": {
        "path": "vp_discrete",
        "path_kwargs": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "final_sigmas_type": "sigma_min",
    },
    "ddpm": {
        "path": "vp_discrete",
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "clip_sample": True,
        "clip_sample_range": 2.0,
    },
    "zero-snr": {
        "path": "vp_discrete",
        "path_kwargs": {"rescale_betas_zero_snr": True},
        "prediction_type": "v_prediction",
    },
    "midpoint": {"solver": "midpoint"},
    "heun": {"solver": "heun", "shift": 2.0},
    "rk4": {"solver": "rk4"},
    "dopri5": {"solver": "dopri5"},
    "ab2": {"solver": "ab2"},
    "abm3-angle": {
        "solver": "abm3",
        "sampling_path": "angle",
        "timestep_spacing": "graded",
        "sigma_data": 0.5,
        "default_num_inference_steps": 8,
        "path": "vp",
    },
    "dpmpp": {"solver": "dpmpp_2m", "path": "vp_discrete", "prediction_type": "epsilon"},
    "eta": {"eta": 0.7, "path": "cosine"},
    "churn": {"s_churn": 2.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.003, "solver": "heun"},
    "euler-maruyama": {"solver": "euler_maruyama", "diffusion_form": "sigma_squared", "diffusion_scale": 0.5},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())

# The settings that stock has too.
STOCK_SETTINGS = {
    name: {"timestep_spacing": "linspace"} | settings
    for name, settings in SETTINGS.items()
    if set(settings) <= {*STOCK_DEFAULTS, "timestep_spacing"}
}
every_stock_setting = pytest.mark.parametrize("settings", STOCK_SETTINGS.values(), ids=STOCK_SETTINGS.keys())


def stock_of(settings: dict) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**{k: v for k, v in settings.items() if k != "timestep_spacing"})


def mu_of(scheduler: FlowMatchEulerDiscreteScheduler) -> dict[str, float]:
    return {"mu": 0.8} if scheduler.config.use_dynamic_shifting else {}


def noise(seed: int = 0, *shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 4, 4), generator=torch.Generator().manual_seed(seed))


def network(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    return torch.tanh(sample.roll(1, -1)) + 0.1 * torch.cos(0.01 * timestep.to(sample.dtype))


def loop(scheduler: FlowMatchEulerDiscreteScheduler, steps: int = 4, seed: int = 0, **grid) -> torch.Tensor:
    scheduler.set_timesteps(steps, **mu_of(scheduler), **grid)
    generator = torch.Generator().manual_seed(seed)
    sample = noise(seed)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(network(sample, timestep), timestep, sample, generator=generator).prev_sample
    return sample


# Class, configuration and signatures


def test_is_a_stock_flow_scheduler() -> None:
    scheduler = FlowMatchScheduler()
    assert isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    assert isinstance(scheduler, SchedulerMixin)
    assert isinstance(scheduler, ConfigMixin)
    assert scheduler.compatibles == [FlowMatchEulerDiscreteScheduler]
    assert FlowMatchScheduler.config_name == "scheduler_config.json"


def test_configuration_has_stock_keys_and_defaults() -> None:
    config = FlowMatchScheduler().config
    assert isinstance(config, FrozenDict)
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    assert public == STOCK_DEFAULTS | OUR_DEFAULTS
    # In this order: positional arguments mean what they mean in stock.
    parameters = [name for name in inspect.signature(FlowMatchScheduler.__init__).parameters if name != "self"]
    assert parameters[: len(STOCK_DEFAULTS)] == list(STOCK_DEFAULTS)


@pytest.mark.parametrize("method", ["set_timesteps", "step", "scale_noise", "time_shift", "index_for_timestep"])
def test_signatures_begin_as_stock_does(method: str) -> None:
    stock = list(inspect.signature(getattr(FlowMatchEulerDiscreteScheduler, method)).parameters.values())
    ours = list(inspect.signature(getattr(FlowMatchScheduler, method)).parameters.values())
    assert [p.name for p in ours[: len(stock)]] == [p.name for p in stock]
    assert [p.default for p in ours[: len(stock)]] == [p.default for p in stock]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in ours)  # pipelines look names up: **kwargs would hide them
    assert all(p.default is not p.empty for p in ours[len(stock) :])


@every_setting
def test_members_that_pipelines_read(settings: dict) -> None:
    scheduler = FlowMatchScheduler(**settings)
    assert len(scheduler) == scheduler.config.num_train_timesteps
    assert isinstance(scheduler.order, int)
    assert scheduler.order == {"midpoint": 2, "heun": 2, "rk4": 4, "dopri5": 6}.get(settings.get("solver"), 1)
    assert isinstance(scheduler.init_noise_sigma, float)
    if settings.get("path") != "ve":
        assert scheduler.init_noise_sigma == pytest.approx(1.0, abs=1e-12)
    assert scheduler.shift == settings.get("shift", 1.0)
    assert scheduler.step_index is None
    assert scheduler.begin_index is None
    assert 0 <= scheduler.sigma_min < scheduler.sigma_max <= 1
    # Training scripts index these before any `set_timesteps`.
    assert len(scheduler.timesteps) == len(scheduler.sigmas) == scheduler.config.num_train_timesteps
    sample = noise()
    scaled = scheduler.scale_model_input(sample, scheduler.timesteps[-1])
    assert scaled.shape == sample.shape
    assert scaled.dtype == sample.dtype
    if settings.get("path") != "ve":
        assert torch.equal(scheduler.scale_model_input(sample), sample)


def test_noise_of_a_growing_path_is_scaled_up() -> None:
    scheduler = FlowMatchScheduler(path="ve", path_kwargs={"sigma_max": 50.0})
    assert scheduler.init_noise_sigma == pytest.approx(np.hypot(1.0, 50.0))
    at_noise = scheduler.scale_model_input(noise(), torch.tensor(1000.0))
    torch.testing.assert_close(at_noise, noise() / np.hypot(1.0, 50.0).item())


# The grid


@every_setting
@pytest.mark.parametrize("steps", [1, 2, 5, 50])
def test_grid(settings: dict, steps: int) -> None:
    scheduler = FlowMatchScheduler(**settings)
    scheduler.set_timesteps(steps, **mu_of(scheduler))
    timesteps, sigmas = scheduler.timesteps, scheduler.sigmas
    assert scheduler.num_inference_steps == steps
    assert timesteps.dtype == sigmas.dtype == torch.float32
    assert timesteps.ndim == sigmas.ndim == 1
    assert len(sigmas) == len(timesteps) + 1
    assert 0 < len(timesteps) <= steps * scheduler.order
    assert timesteps.isfinite().all()
    assert sigmas.isfinite().all()
    assert 0 <= timesteps.min() <= timesteps.max() <= scheduler.config.num_train_timesteps
    assert 0 <= sigmas.min() <= sigmas.max() <= 1
    end = 1.0 if settings.get("invert_sigmas") else 0.0
    if settings.get("final_sigmas_type") != "sigma_min":
        assert sigmas[-1] == end
    if scheduler.config.s_churn > 0:
        return  # noise is added between steps, so that time goes back up
    direction = 1 if settings.get("invert_sigmas") else -1
    assert (direction * timesteps.diff() >= 0).all()
    assert (direction * sigmas.diff() >= 0).all()


@every_stock_setting
@pytest.mark.parametrize("steps", [2, 5, 50])
def test_linspace_is_the_grid_of_stock(settings: dict, steps: int) -> None:
    ours, stock = FlowMatchScheduler(**settings), stock_of(settings)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(steps, device="cpu", **mu_of(stock))
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-7)
    assert ours.num_inference_steps == stock.num_inference_steps


def test_trailing_spends_no_step_on_the_last_thousandth() -> None:
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]


@pytest.mark.parametrize("shift", [0.5, 2.0])
@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
def test_a_shifted_loop_begins_in_the_noise_of_the_path(path: str, shift: float) -> None:
    scheduler = FlowMatchScheduler(path=path, shift=shift, timestep_spacing="trailing", sampling_path="ot")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[0].item() == pytest.approx(scheduler.path.ratio_max, rel=1e-6)
    equal = torch.linspace(scheduler.path.ratio_max, scheduler.path.ratio_min, 5)[1:4]
    torch.testing.assert_close(scheduler.sigmas[1:4], shift * equal / (1 + (shift - 1) * equal))


def test_trailing_is_shifted_once() -> None:
    scheduler = FlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    expected = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])  # 3 s / (1 + 2 s)
    torch.testing.assert_close(scheduler.sigmas, expected, rtol=0, atol=1e-6)


@every_stock_setting
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_given_sigmas_are_shifted_as_in_stock(settings: dict, kind: type) -> None:
    ours, stock = FlowMatchScheduler(**settings), stock_of(settings)
    sigmas = [1.0, 0.8, 0.3, 0.1]
    ours.set_timesteps(sigmas=kind(sigmas), **mu_of(stock))
    stock.set_timesteps(sigmas=sigmas, **mu_of(stock))
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)


@stock_keeps_timesteps
@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize("sigmas", [None, [0.95, 0.6, 0.2]], ids=["timesteps", "timesteps-and-sigmas"])
def test_given_timesteps_are_treated_as_in_stock(settings: dict, sigmas: list[float] | None) -> None:
    stock = FlowMatchEulerDiscreteScheduler(**settings)
    ours = FlowMatchScheduler.from_config(stock.config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(3, timesteps=[999.0, 500.0, 20.0], sigmas=sigmas, mu=0.7)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)


def test_given_timesteps_of_a_scheduler_made_afresh_agree_with_its_sigmas() -> None:
    scheduler = FlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[900.0, 600.0, 30.0])
    assert scheduler.timesteps.tolist() == [900.0, 600.0, 30.0]
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.9, 0.6, 0.03, 0.0]), rtol=0, atol=1e-6)


def test_networks_trained_on_times_up_to_one_are_told_such_times() -> None:
    # ACE-Step: one train timestep, sigmas from the pipeline.
    stock = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=3.0)
    ours = FlowMatchScheduler.from_config(stock.config)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(sigmas=[1.0, 0.6, 0.3])
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-6)


def test_mu_is_ignored_without_dynamic_shifting_and_needed_with_it() -> None:
    plain, with_mu = FlowMatchScheduler(shift=3.0), FlowMatchScheduler(shift=3.0)
    plain.set_timesteps(5)
    with_mu.set_timesteps(5, mu=2.0)
    assert torch.equal(plain.sigmas, with_mu.sigmas)
    dynamic = FlowMatchScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu"):
        dynamic.set_timesteps(5)
    dynamic.set_timesteps(5, mu=0.0)  # a falsy value is a value
    torch.testing.assert_close(dynamic.sigmas, torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), rtol=0, atol=1e-6)


def test_shift_can_be_set_later_as_in_stock() -> None:
    ours, stock = FlowMatchScheduler(timestep_spacing="linspace"), FlowMatchEulerDiscreteScheduler()
    for scheduler in (ours, stock):
        scheduler.set_shift(4.0)
        scheduler.set_timesteps(6)
    assert ours.shift == stock.shift == 4.0
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_time_shift_is_that_of_stock(kind: str) -> None:
    t = torch.linspace(0.1, 1, 5)
    ours, stock = FlowMatchScheduler(time_shift_type=kind), FlowMatchEulerDiscreteScheduler(time_shift_type=kind)
    assert torch.equal(ours.time_shift(0.8, 1.0, t), stock.time_shift(0.8, 1.0, t))


def test_index_for_timestep_finds_the_grid_points() -> None:
    scheduler = FlowMatchScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    assert [scheduler.index_for_timestep(t) for t in scheduler.timesteps] == list(range(7))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": -3}, "num_inference_steps"),
        ({"num_inference_steps": 3, "sigmas": [1.0, 0.5]}, "length"),
        ({"num_inference_steps": 3, "timesteps": [900, 500]}, "length"),
        ({"timesteps": [900, 500], "sigmas": [0.9]}, "length"),
        ({"sigmas": []}, "sigmas"),
        ({"sigmas": [1.2, 0.5]}, "sigmas"),
        ({"sigmas": [0.5, -0.1]}, "sigmas"),
        ({"sigmas": [0.5, float("nan")]}, "sigmas"),
        ({"sigmas": [0.5, 0.8]}, "sigmas"),
        ({"sigmas": [0.5, 0.5]}, "sigmas"),
        ({"timesteps": [1100, 500]}, "timesteps"),
        ({"timesteps": [500, -1]}, "timesteps"),
        ({"timesteps": [100, 500]}, "timesteps"),
    ],
)
def test_grids_that_make_no_sense_are_refused(call: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowMatchScheduler().set_timesteps(**call)


# The step


@every_setting
def test_step_keeps_shape_and_dtype_and_returns_either_form(settings: dict) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for return_dict in (True, False):
            scheduler = FlowMatchScheduler(**settings)
            scheduler.set_timesteps(5, **mu_of(scheduler))
            sample = noise().to(dtype)
            timestep = scheduler.timesteps[0]
            generator = torch.Generator().manual_seed(0)
            results.append(
                scheduler.step(
                    network(sample, timestep), timestep, sample, generator=generator, return_dict=return_dict
                )
            )
        output, values = results
        assert isinstance(output, BaseOutput)
        assert isinstance(values, tuple)
        assert output[0] is output.prev_sample
        assert torch.equal(output.prev_sample, values[0])
        assert output.prev_sample.shape == sample.shape
        assert output.prev_sample.dtype == dtype
        assert output.prev_sample.isfinite().all()


@every_stock_setting
def test_loop_is_that_of_stock(settings: dict) -> None:
    ours, stock = FlowMatchScheduler(**settings), stock_of(settings)
    for steps in (2, 5, 20):
        torch.testing.assert_close(loop(ours, steps), loop(stock, steps), rtol=0, atol=1e-5)


@every_setting
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_loop_is_finite_and_repeatable(settings: dict, steps: int) -> None:
    scheduler = FlowMatchScheduler(**settings)
    first = loop(scheduler, steps)
    assert first.isfinite().all()
    assert scheduler.step_index == len(scheduler.timesteps)
    # The second run starts from where the first ended: nothing of it may be left.
    assert torch.equal(loop(scheduler, steps), first)
    loop(scheduler, 3)
    assert torch.equal(loop(scheduler, steps), first)


@every_setting
def test_a_run_that_was_cut_short_leaves_nothing_behind(settings: dict) -> None:
    scheduler = FlowMatchScheduler(**settings)
    expected = loop(FlowMatchScheduler(**settings), 5)
    scheduler.set_timesteps(5, **mu_of(scheduler))
    scheduler.step(noise(), scheduler.timesteps[0], noise(), generator=torch.Generator())
    assert torch.equal(loop(scheduler, 5), expected)


def test_step_counts_from_the_begin_index() -> None:
    scheduler = FlowMatchScheduler(shift=2.0)
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(4)
    assert scheduler.begin_index == 4
    sample, output = noise(0), noise(1)
    result = scheduler.step(output, scheduler.timesteps[4], sample).prev_sample
    assert scheduler.step_index == 5
    expected = sample + (scheduler.sigmas[5] - scheduler.sigmas[4]) * output
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    scheduler.set_timesteps(6)
    assert scheduler.begin_index is None
    assert scheduler.step_index is None


@every_setting
def test_step_finds_its_place_without_a_begin_index(settings: dict) -> None:
    # Most pipelines never call `set_begin_index`; image-to-image ones slice the timesteps all the same.
    results = []
    for begin in (None, 3):
        scheduler = FlowMatchScheduler(**settings)
        scheduler.set_timesteps(5, **mu_of(scheduler))
        start = 3 * scheduler.order
        if begin is not None:
            scheduler.set_begin_index(start)
        sample, generator = noise(), torch.Generator().manual_seed(0)
        for timestep in scheduler.timesteps[start:]:
            sample = scheduler.step(network(sample, timestep), timestep, sample, generator=generator)[0]
        results.append(sample)
        assert scheduler.step_index == len(scheduler.timesteps)
    assert torch.equal(*results)


@pytest.mark.parametrize("timestep", [1, torch.tensor(1), torch.tensor(1, dtype=torch.int32)])
def test_integer_timesteps_are_refused_by_step(timestep: int | torch.Tensor) -> None:
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep"):
        scheduler.step(noise(), timestep, noise())


def test_every_form_of_a_float_timestep_is_accepted_by_step() -> None:
    results = []
    for convert in (lambda t: t, float, lambda t: t.double(), lambda t: t.reshape(1)):
        scheduler = FlowMatchScheduler()
        scheduler.set_timesteps(4)
        results.append(scheduler.step(noise(1), convert(scheduler.timesteps[0]), noise(0)).prev_sample)
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_end_written_by_a_pipeline_is_honoured_as_in_stock() -> None:
    # Cosmos registers these keys with the scheduler, and where it finds them again overwrites the last sigma, so that
    # the last step does nothing.
    stock = FlowMatchEulerDiscreteScheduler()
    stock.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    swapped = FlowMatchScheduler.from_config(stock.config)
    assert (swapped.config.sigma_max, swapped.config.final_sigmas_type) == (80.0, "sigma_min")
    registered = FlowMatchScheduler(timestep_spacing="linspace")
    registered.register_to_config(sigma_max=80.0, sigma_min=0.002, sigma_data=1.0, final_sigmas_type="sigma_min")
    samples = []
    for scheduler in (stock, swapped, registered):
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.1, 4))
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
        sample = noise()
        for i, timestep in enumerate(scheduler.timesteps):
            before = sample
            sample = scheduler.step(network(sample, scheduler.sigmas[i]), timestep, sample, return_dict=False)[0]
        assert torch.equal(sample, before)
        samples.append(sample)
    torch.testing.assert_close(samples[1], samples[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(samples[2], samples[0], rtol=0, atol=1e-5)


def test_step_before_set_timesteps_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match="set_timesteps"):
        FlowMatchScheduler().step(noise(), torch.tensor(1000.0), noise())


@pytest.mark.parametrize("settings", [{"shift": 3.0}, {"stochastic_sampling": True, "shift": 3.0}])
def test_per_token_timesteps_are_treated_as_in_stock(settings: dict) -> None:
    per_token = torch.tensor([[1000.0, 500.0, 0.0, 120.0], [700.0, 1000.0, 333.0, 20.0]])
    results = []
    for scheduler in (FlowMatchScheduler(timestep_spacing="linspace", **settings), stock_of(settings)):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(0)
        sample, output = noise(0, 2, 4, 3), noise(1, 2, 4, 3).to(torch.bfloat16)
        result = scheduler.step(
            output, scheduler.timesteps[1], sample, per_token_timesteps=per_token, generator=generator
        )
        assert scheduler.step_index == 2
        results.append(result.prev_sample)
    assert results[0].dtype == results[1].dtype == torch.float32
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_stochastic_sampling_draws_from_the_generator() -> None:
    results = []
    for scheduler in (FlowMatchScheduler(stochastic_sampling=True), FlowMatchScheduler(stochastic_sampling=True)):
        torch.manual_seed(len(results))  # the global generator must not matter
        results.append(loop(scheduler, seed=3))
    assert torch.equal(*results)
    ours, stock = (
        FlowMatchScheduler(stochastic_sampling=True, timestep_spacing="linspace"),
        FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    )
    torch.testing.assert_close(loop(ours, seed=3), loop(stock, seed=3), rtol=0, atol=1e-5)


def test_a_list_of_generators_draws_each_image_alone() -> None:
    def one_step(generators: list[torch.Generator], sample: torch.Tensor) -> torch.Tensor:
        scheduler = FlowMatchScheduler(stochastic_sampling=True)
        scheduler.set_timesteps(4)
        return scheduler.step(sample, scheduler.timesteps[0], sample, generator=generators).prev_sample

    both = one_step([torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)], noise())
    second = one_step([torch.Generator().manual_seed(2)], noise()[1:])
    torch.testing.assert_close(both[1:], second, rtol=0, atol=0)


# Noise for training and image-to-image


@every_stock_setting
def test_scale_noise_is_that_of_stock(settings: dict) -> None:
    if settings.get("invert_sigmas"):
        # Stock mixes by the inverted sigma, and so adds no noise at its noisiest time; no pipeline asks it to.
        scheduler = FlowMatchScheduler(**settings)
        scheduler.set_timesteps(5)
        assert scheduler.timesteps[0] == 0
        torch.testing.assert_close(scheduler.scale_noise(noise(0), scheduler.timesteps[:1], noise(1)), noise(1))
        return
    ours, stock = FlowMatchScheduler(**settings), stock_of(settings)
    for scheduler in (ours, stock):
        scheduler.set_timesteps(5, **mu_of(stock))
    data, eps = noise(0), noise(1)
    chosen = stock.timesteps[[3, 1]]
    torch.testing.assert_close(
        ours.scale_noise(data, chosen, eps), stock.scale_noise(data, chosen, eps), rtol=0, atol=1e-6
    )
    # Image-to-image: the first time of the slice, for the whole batch.
    for scheduler in (ours, stock):
        scheduler.set_begin_index(2)
    latent_timestep = stock.timesteps[2:3].repeat(2)
    expected = stock.scale_noise(data, latent_timestep, eps)
    torch.testing.assert_close(ours.scale_noise(data, latent_timestep, eps), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours.add_noise(data, eps, latent_timestep), expected, rtol=0, atol=1e-6)
    # Inpainting: after a step, the known half at the next time.
    for scheduler in (ours, stock):
        scheduler.step(eps, scheduler.timesteps[2], data, generator=torch.Generator().manual_seed(0))
    following = stock.timesteps[3:4]
    expected = stock.scale_noise(data, following, eps)
    torch.testing.assert_close(ours.scale_noise(data, following, eps), expected, rtol=0, atol=1e-6)


@every_setting
def test_noise_can_be_added_at_any_time(settings: dict) -> None:
    scheduler = FlowMatchScheduler(**settings)
    timesteps = torch.tensor([0.123456, 0.654321]) * scheduler.timestep_scale
    data, eps = noise(0), noise(1)
    noisy = scheduler.add_noise(data, eps, timesteps)
    assert noisy.shape == data.shape
    assert noisy.dtype == data.dtype
    assert torch.equal(noisy, scheduler.scale_noise(data, timesteps, eps))
    each = [scheduler.add_noise(data[i : i + 1], eps[i : i + 1], timesteps[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(each), noisy, rtol=0, atol=0)
    assert scheduler.add_noise(data.bfloat16(), eps.bfloat16(), timesteps).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="noise"):
        scheduler.scale_noise(data, timesteps)


@pytest.mark.parametrize("value", [-1.0, 1000.5, float("nan")])
def test_noise_at_a_time_that_does_not_exist_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="timesteps"):
        FlowMatchScheduler().add_noise(noise(0), noise(1), torch.tensor([value, 3.0]))


def test_training_scripts_find_sigmas_of_integer_timesteps() -> None:
    # The lookup of diffusers' SD3 and Flux training scripts.
    scheduler = FlowMatchScheduler()
    indices = torch.tensor([0, 400, 999])
    timesteps = scheduler.timesteps[indices]
    found = [int((scheduler.timesteps == t).nonzero().item()) for t in timesteps]
    assert found == indices.tolist()
    torch.testing.assert_close(scheduler.sigmas[indices], timesteps / 1000, rtol=0, atol=1e-6)
    copied = copy.deepcopy(scheduler)
    assert torch.equal(copied.sigmas, scheduler.sigmas)


# Copies, configurations, files


@every_setting
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))], ids=["deepcopy", "pickle"])
def test_copies_share_no_state(settings: dict, clone) -> None:
    scheduler = FlowMatchScheduler(**settings)
    scheduler.set_timesteps(4, **mu_of(scheduler))
    sample = noise()
    scheduler.step(network(sample, scheduler.timesteps[0]), scheduler.timesteps[0], sample)
    other = clone(scheduler)
    assert dict(other.config) == dict(scheduler.config)
    sigmas, index = scheduler.sigmas.clone(), scheduler.step_index
    second = scheduler.timesteps[1] if len(scheduler.timesteps) > 1 else scheduler.timesteps[0]
    torch.manual_seed(0)
    expected = other.step(noise(1), second, noise(2)).prev_sample
    other.sigmas[-1] = 0.5
    assert scheduler.step_index == index
    assert torch.equal(scheduler.sigmas, sigmas)
    torch.manual_seed(0)
    assert torch.equal(scheduler.step(noise(1), second, noise(2)).prev_sample, expected)


@every_setting
def test_configuration_survives_files_and_from_config(settings: dict, tmp_path) -> None:
    scheduler = FlowMatchScheduler(**settings)
    expected = loop(scheduler, 6)
    scheduler.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert stored["_class_name"] == "FlowMatchScheduler"
    for key, value in settings.items():
        assert stored[key] == value
    for other in (
        FlowMatchScheduler.from_pretrained(tmp_path),
        FlowMatchScheduler.from_config(FlowMatchScheduler.load_config(tmp_path)),
        FlowMatchScheduler.from_config(scheduler.config),
        FlowMatchScheduler.from_config(dict(scheduler.config)),
        FlowMatchScheduler.from_config(stored),
    ):
        assert type(other) is FlowMatchScheduler
        public = {key: value for key, value in other.config.items() if not key.startswith("_")}
        assert public == {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
        assert torch.equal(loop(other, 6), expected)
    # A second round of files says the same.
    FlowMatchScheduler.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "scheduler_config.json").read_text()) == stored


def test_from_config_and_from_pretrained_take_changes_and_hand_back_the_rest(tmp_path) -> None:
    scheduler = FlowMatchScheduler(shift=2.0)
    changed = FlowMatchScheduler.from_config(scheduler.config, solver="heun", shift=4.0)
    assert (changed.config.solver, changed.config.shift, changed.order) == ("heun", 4.0, 2)
    changed, unused = FlowMatchScheduler.from_config(
        scheduler.config, return_unused_kwargs=True, path="cosine", colour="blue"
    )
    assert changed.config.path == "cosine"
    assert unused["colour"] == "blue"
    scheduler.save_pretrained(tmp_path)
    changed = FlowMatchScheduler.from_pretrained(tmp_path, timestep_spacing="linspace")
    assert (changed.config.timestep_spacing, changed.config.shift) == ("linspace", 2.0)
    changed, unused = FlowMatchScheduler.from_pretrained(tmp_path, return_unused_kwargs=True, colour="blue")
    assert unused["colour"] == "blue"


def test_keys_that_a_file_lacks_take_their_defaults() -> None:
    scheduler = FlowMatchScheduler.from_config({"_class_name": "FlowMatchScheduler", "shift": 2.0})
    assert scheduler.config.shift == 2.0
    assert scheduler.config.path == "ot"
    assert scheduler.config.timestep_spacing == "trailing"


@every_stock_setting
def test_from_a_stock_configuration_and_back(settings: dict, tmp_path) -> None:
    stock = stock_of(settings)
    ours = FlowMatchScheduler.from_config(stock.config)
    assert ours.config.timestep_spacing == "linspace"
    for key in STOCK_DEFAULTS:
        assert ours.config[key] == stock.config[key]
    back = FlowMatchEulerDiscreteScheduler.from_config(ours.config)
    for key in STOCK_DEFAULTS:
        assert back.config[key] == stock.config[key]
    expected = loop(stock, 6)
    torch.testing.assert_close(loop(ours, 6), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(loop(back, 6), expected, rtol=0, atol=0)
    # And from the file that stock wrote.
    stock.save_pretrained(tmp_path)
    loaded = FlowMatchScheduler.from_pretrained(tmp_path)
    assert loaded.config.timestep_spacing == "linspace"
    torch.testing.assert_close(loop(loaded, 6), expected, rtol=0, atol=1e-5)


@every_setting
def test_our_settings_survive_a_visit_to_stock(settings: dict, tmp_path) -> None:
    ours = FlowMatchScheduler(**settings)
    ours.save_pretrained(tmp_path)
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path)
    assert type(stock) is FlowMatchEulerDiscreteScheduler
    stock.save_pretrained(tmp_path / "stock")
    again = FlowMatchScheduler.from_pretrained(tmp_path / "stock")
    for key in STOCK_DEFAULTS | OUR_DEFAULTS:
        assert again.config[key] == ours.config[key]
    # Between configurations in memory diffusers drops what the source left at its default; the rest must stay.
    again = FlowMatchScheduler.from_config(FlowMatchEulerDiscreteScheduler.from_config(ours.config).config)
    for key, value in settings.items():
        assert again.config[key] == value


def test_a_diffusion_configuration_survives_the_way_there_and_back() -> None:
    stock = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1
    )
    ours = FlowMatchScheduler.from_config(stock.config)
    assert ours.config.path == "vp_discrete"
    back = DDIMScheduler.from_config(ours.config)
    for key, value in stock.config.items():
        if not key.startswith("_"):
            assert back.config[key] == value
    again = FlowMatchScheduler.from_config(back.config)
    for key in STOCK_DEFAULTS | OUR_DEFAULTS:
        assert again.config[key] == ours.config[key]


def test_changes_to_a_stock_configuration_are_taken() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = FlowMatchScheduler.from_config(stock.config, timestep_spacing="trailing", solver="midpoint", shift=2.0)
    assert ours.config.timestep_spacing == "trailing"
    assert ours.config.solver == "midpoint"
    assert ours.config.shift == ours.shift == 2.0
    diffusion = DDPMScheduler()
    ours = FlowMatchScheduler.from_config(diffusion.config, timestep_spacing="trailing", clip_sample=False)
    assert (ours.config.timestep_spacing, ours.config.clip_sample) == ("trailing", False)


def test_unipc_flow_configurations_are_read() -> None:
    stock = UniPCMultistepScheduler(use_flow_sigmas=True, flow_shift=5.0, prediction_type="flow_prediction")
    ours = FlowMatchScheduler.from_config(stock.config)
    assert ours.config.path == "ot"
    assert ours.config.shift == 5.0
    assert ours.config.prediction_type == "flow_prediction"
    assert loop(ours).isfinite().all()


def test_heun_flow_configurations_keep_their_solver(tmp_path) -> None:
    stock = FlowMatchHeunDiscreteScheduler(shift=3.0)
    stock.save_pretrained(tmp_path)
    ours = FlowMatchScheduler.from_pretrained(tmp_path)
    assert (ours.config.solver, ours.config.shift, ours.order) == ("heun", 3.0, 2)
    ours.set_timesteps(4)
    stock.set_timesteps(4)
    steps = ours.timesteps[::2]
    torch.testing.assert_close(steps, torch.cat([stock.timesteps[:1], stock.timesteps[1::2]]), rtol=0, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"path": "diagonal"}, "path.*'ot'.*'diagonal'"),
        ({"path_kwargs": {"beta_min": 0.1}}, "path_kwargs.*sigma_min.*beta_min"),
        ({"path_kwargs": {"sigma_min": -1.0}}, "sigma_min.*-1.0"),
        ({"path": "vp", "path_kwargs": {"sigma_min": 0.1}}, "path_kwargs.*beta_min.*sigma_min"),
        ({"prediction_type": "noise"}, "prediction_type.*'epsilon'.*'noise'"),
        ({"solver": "dopri8"}, "solver.*'euler'.*'dopri8'"),
        ({"solver": "EULER"}, "solver.*'euler'.*'EULER'"),
        ({"sampling_path": "straight"}, "sampling_path.*'native'.*'straight'"),
        ({"timestep_spacing": "karras"}, "timestep_spacing.*'trailing'.*'karras'"),
        ({"timestep_spacing": "leading"}, "timestep_spacing.*vp_discrete"),
        ({"final_sigmas_type": "one"}, "final_sigmas_type.*'zero'.*'one'"),
        ({"time_shift_type": "cubic"}, "time_shift_type.*exponential"),
        ({"num_train_timesteps": 0}, "num_train_timesteps.*0"),
        ({"shift": 0.0}, "shift.*0"),
        ({"shift": -1.0}, "shift.*-1"),
        ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "Only one"),
        ({"invert_sigmas": True, "path": "vp"}, "invert_sigmas.*'vp'"),
        ({"stochastic_sampling": True, "solver": "heun"}, "stochastic_sampling.*'heun'"),
        ({"clip_sample": True, "solver": "rk4"}, "clip_sample.*'rk4'"),
        ({"clip_sample": True, "clip_sample_range": -1.0}, "clip_sample_range.*-1"),
        ({"shift_terminal": 1.0}, "shift_terminal.*1"),
        ({"steps_offset": -1}, "steps_offset.*-1"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FlowMatchScheduler(**settings)
    with pytest.raises(ValueError, match=words):
        FlowMatchScheduler.from_config({"_class_name": "FlowMatchScheduler"} | settings)


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "UNet2DModel", "sample_size": 32},
        {"sample_size": 32, "layers_per_block": 2},
        EDMEulerScheduler().config,
    ],
    ids=["model", "nameless", "edm"],
)
def test_configurations_of_another_kind_are_refused(config: dict) -> None:
    with pytest.raises(ValueError, match="cannot become a FlowMatchScheduler"):
        FlowMatchScheduler.from_config(config)


def test_a_path_instead_of_a_configuration_is_refused() -> None:
    with pytest.raises(ValueError, match="config"):
        FlowMatchScheduler.from_config("some/folder")


def test_output_class_is_understood_by_diffusers() -> None:
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(2)
    output = scheduler.step(noise(), scheduler.timesteps[0], noise())
    assert "prev_sample" in output
    assert set(output.keys()) == set(SchedulerOutput(prev_sample=noise()).keys())
