# SPDX-License-Identifier: Apache-2.0
"""Unchanged diffusers pipelines with `FlowMatchScheduler` in place of the stock flow scheduler.

Swapping in `FlowMatchScheduler.from_config(stock.config)` must change nothing: as many denoiser calls, the same inputs
at the same times, and the same images. Times are in [0, 1000] and pixels in [0, 1]; both are held to 1e-4: one or two
float32 roundings of a time, and some hundred of a pixel.
"""

import copy
import dataclasses
import json
import math

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
)
from stock_pipelines import (
    Recording,
    StockCase,
    assert_same,
    diffusion_cases,
    flow_cases,
    record,
    stock_keeps_timesteps,
)

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.solvers import TABLEAUX


ATOL = 1e-4

COGVIEW4 = pytest.param("cogview4", marks=stock_keeps_timesteps)  # it hands timesteps over
TEXT = ("sd3-text", "flux-text", "qwen-text", "lumina2", "sana", "aura-flow", COGVIEW4, "mochi", "ltx", "wan")
IMAGE = ("sd3-image", "flux-image", "qwen-image")
INPAINT = ("sd3-inpaint", "flux-inpaint", "qwen-inpaint")
FLOW = (*TEXT, *IMAGE, *INPAINT)
# In these families guidance is a second call, not a second half of the batch.
CALLS_PER_STEP = {"qwen": 2, "lumina2": 2, "cogview4": 2, "wan": 2}


def calls_per_step(name: str) -> int:
    return CALLS_PER_STEP.get(name.split("-")[0], 1)


def assert_swap_changes_nothing(case: StockCase, stock: FlowMatchEulerDiscreteScheduler, **overrides) -> Recording:
    ours = FlowMatchScheduler.from_config(stock.config)
    actual = record(case, ours, **overrides)
    assert_same(actual, record(case, stock, **overrides))
    return actual


def with_settings(case: StockCase, **settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler.from_config(case.scheduler.config, **settings)


# The swap, in every family


@pytest.mark.parametrize("name", FLOW)
def test_swap_changes_nothing(name: str) -> None:
    case = flow_cases()[name]
    recording = assert_swap_changes_nothing(case, case.scheduler)
    steps = case.inputs["num_inference_steps"]
    if "strength" in case.inputs:
        steps = math.floor(steps * case.inputs["strength"])
    assert recording.calls == steps * calls_per_step(name)


@pytest.mark.parametrize("name", FLOW)
def test_comparison_would_notice_another_grid(name: str) -> None:
    case = flow_cases()[name]
    stock = record(case, case.scheduler)
    other = record(case, with_settings(case, use_dynamic_shifting=False, shift=1.5 * case.scheduler.shift))
    assert (stock.images - other.images).abs().max() > 5 * ATOL
    if name != "cogview4":  # it chooses the network's times itself
        assert any((a - b).abs().max() > 5 * ATOL for a, b in zip(stock.timesteps, other.timesteps, strict=True))


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_swap_changes_nothing_at_any_number_of_steps(name: str, steps: int) -> None:
    case = flow_cases()[name]
    if steps == 1 and name == "mochi":
        steps = 3  # the pipeline itself divides by `steps // 2`
    if steps == 1 and case.scheduler.config.shift_terminal:
        # Stock divides zero by zero here and answers NaN. There is nothing to stretch: one step spans all of [0, 1].
        recording = record(case, FlowMatchScheduler.from_config(case.scheduler.config), num_inference_steps=1)
        assert recording.calls == calls_per_step(name)
        assert recording.images.isfinite().all()
        assert recording.timesteps[0].max() == (1.0 if name.startswith("qwen") else 1000.0)
        return
    assert_swap_changes_nothing(case, case.scheduler, num_inference_steps=steps)


@pytest.mark.parametrize("strength", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("name", [*IMAGE, *INPAINT])
def test_swap_changes_nothing_at_any_strength(name: str, strength: float) -> None:
    case = flow_cases()[name]
    recording = assert_swap_changes_nothing(case, case.scheduler, strength=strength)
    steps = case.inputs["num_inference_steps"]
    # SD3, Flux and Qwen-Image count `int(steps - steps * strength)` steps as skipped.
    assert recording.calls == (steps - int(steps - steps * strength)) * calls_per_step(name)


@pytest.mark.parametrize("name", ["sd3-text", "sd3-image", "flux-text", "flux-inpaint", "qwen-image", "wan"])
def test_swap_changes_nothing_for_a_batch(name: str) -> None:
    case = flow_cases()[name]
    prompts = {key: torch.cat([value, value.flip(-1)]) for key, value in case.inputs.items() if "embeds" in key}
    recording = assert_swap_changes_nothing(case, case.scheduler, **prompts)
    assert recording.images.shape[0] == 2
    assert (recording.images[0] - recording.images[1]).abs().max() > 10 * ATOL


# Settings of the scheduler

SETTINGS = {
    "shift-1": {"shift": 1.0},
    "shift-0.5": {"shift": 0.5},
    "shift-3": {"shift": 3.0},
    "dynamic-exponential": {"use_dynamic_shifting": True},
    "dynamic-linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"shift": 3.0, "shift_terminal": 0.1},
    "dynamic-terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "dynamic-beta": {"use_dynamic_shifting": True, "use_beta_sigmas": True},
    "500-train-steps": {"num_train_timesteps": 500, "shift": 2.0},
    "stochastic": {"shift": 3.0, "stochastic_sampling": True},
}


@pytest.mark.parametrize("name", ["sd3-text", "sd3-image", "sd3-inpaint", "flux-text", "flux-inpaint"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_swap_changes_nothing_under_any_setting(name: str, settings: dict) -> None:
    case = flow_cases()[name]
    assert_swap_changes_nothing(case, FlowMatchEulerDiscreteScheduler(**settings))


@pytest.mark.parametrize("mu", [0.0, 0.7, 2.0])
@pytest.mark.parametrize("name", ["sd3-text", "sd3-image", "sd3-inpaint"])
def test_swap_changes_nothing_for_a_given_mu(name: str, mu: float) -> None:
    case = flow_cases()[name]
    assert_swap_changes_nothing(case, with_settings(case, use_dynamic_shifting=True), mu=mu)


@pytest.mark.parametrize("name", ["sd3-text", "sd3-image", "flux-text", "flux-image", "qwen-text", "qwen-inpaint"])
@pytest.mark.parametrize("side", [16, 32, 48])
def test_swap_changes_nothing_at_any_resolution(name: str, side: int) -> None:
    case = flow_cases()[name]
    assert_swap_changes_nothing(case, with_settings(case, use_dynamic_shifting=True), height=side, width=side)


# Arguments of the call


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.5, 0.05], [0.8, 0.3], [1.0]], ids=len)
@pytest.mark.parametrize("name", ["sd3-text", "flux-text", "lumina2", "sana", "aura-flow"])
def test_swap_changes_nothing_for_given_sigmas(name: str, sigmas: list[float]) -> None:
    case = flow_cases()[name]
    recording = assert_swap_changes_nothing(case, case.scheduler, sigmas=sigmas, num_inference_steps=len(sigmas))
    assert recording.calls == len(sigmas) * calls_per_step(name)


@pytest.mark.parametrize("name", ["sd3-image", "sd3-inpaint", "flux-image", "flux-inpaint", "qwen-text", "qwen-image"])
def test_swap_changes_nothing_for_given_sigmas_and_a_strength(name: str) -> None:
    case = flow_cases()[name]
    sigmas = [1.0, 0.9, 0.7, 0.3, 0.1]
    assert_swap_changes_nothing(case, case.scheduler, sigmas=sigmas, num_inference_steps=len(sigmas))


@stock_keeps_timesteps
@pytest.mark.parametrize("name", ["cogview4", "sana"])
def test_swap_changes_nothing_for_given_timesteps(name: str) -> None:
    case = flow_cases()[name]
    assert_swap_changes_nothing(case, case.scheduler, timesteps=[999, 700, 444, 30], num_inference_steps=4)


@stock_keeps_timesteps
def test_swap_changes_nothing_for_given_timesteps_and_sigmas() -> None:
    case = flow_cases()["cogview4"]
    assert_swap_changes_nothing(
        case, case.scheduler, timesteps=[999, 700, 444], sigmas=[0.95, 0.6, 0.2], num_inference_steps=3
    )


@pytest.mark.parametrize("name", ["sd3-text", "sd3-image", "flux-text", "flux-inpaint", "qwen-image", COGVIEW4, "wan"])
def test_callbacks_see_and_change_the_same(name: str) -> None:
    case = flow_cases()[name]

    def run(scheduler: FlowMatchEulerDiscreteScheduler) -> tuple[Recording, list, list[torch.Tensor]]:
        seen, latents = [], []

        def callback(pipeline: DiffusionPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
            inner = pipeline.scheduler
            seen.append((step, float(timestep), inner.step_index, float(inner.sigmas[step])))
            latents.append(tensors["latents"].clone())
            return {"latents": 0.9 * tensors["latents"]}

        recording = record(
            case, scheduler, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["latents"]
        )
        return recording, seen, latents

    actual, ours, our_latents = run(FlowMatchScheduler.from_config(case.scheduler.config))
    expected, stock, stock_latents = run(case.scheduler)
    assert_same(actual, expected)
    assert len(ours) == len(stock) == expected.calls // calls_per_step(name)
    for a, b in zip(ours, stock, strict=True):
        assert a == pytest.approx(b, rel=0, abs=ATOL)
    for a, b in zip(our_latents, stock_latents, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ATOL)


# Precision


def in_dtype(case: StockCase, dtype: torch.dtype) -> StockCase:
    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    embeddings = {key: cast(value) if "embeds" in key else value for key, value in case.inputs.items()}
    pipeline = copy.deepcopy(case.pipeline).to(dtype)
    return dataclasses.replace(case, pipeline=pipeline, inputs=embeddings)


@pytest.mark.parametrize("name", ["sd3-text", "sd3-image", "flux-text", "flux-inpaint", "qwen-text", "sana", "wan"])
def test_swap_in_bfloat16(name: str) -> None:
    case = in_dtype(flow_cases()[name], torch.bfloat16)
    expected = record(case, case.scheduler)
    actual = record(case, FlowMatchScheduler.from_config(case.scheduler.config))
    assert actual.calls == expected.calls
    for ours, stock in zip(actual.timesteps, expected.timesteps, strict=True):
        assert torch.equal(ours, stock)
    assert all(sample.dtype == torch.bfloat16 for sample in actual.samples)
    # Latents reach magnitude 4, where bfloat16 is spaced by 2^-6, and stock rounds sigma itself when it adds noise:
    # one such step in each call, through decoders whose pixels move by less than their latents.
    tolerance = expected.calls * 2**-6
    for ours, stock in zip(actual.samples, expected.samples, strict=True):
        torch.testing.assert_close(ours.float(), stock.float(), rtol=0, atol=tolerance)
    torch.testing.assert_close(actual.images.float(), expected.images.float(), rtol=0, atol=tolerance)


# Save and load


def missing_components(case: StockCase) -> dict[str, None]:
    return {name: None for name, component in case.pipeline.components.items() if component is None}


@pytest.mark.parametrize("name", ["sd3-text", "flux-image", "qwen-inpaint", "lumina2", "wan"])
def test_a_saved_pipeline_loads_with_our_scheduler(name: str, tmp_path) -> None:
    case = flow_cases()[name]
    expected = record(case, FlowMatchScheduler.from_config(case.scheduler.config))
    case.pipeline.save_pretrained(tmp_path)

    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(case.pipeline).__name__
    assert index["scheduler"] == ["diffusers_fm", "FlowMatchScheduler"]
    for loader in (type(case.pipeline), DiffusionPipeline):
        loaded = loader.from_pretrained(tmp_path, **missing_components(case))
        assert type(loaded) is type(case.pipeline)
        assert type(loaded.scheduler) is FlowMatchScheduler
        assert loaded.scheduler.config.timestep_spacing == "linspace"
        actual = record(dataclasses.replace(case, pipeline=loaded), loaded.scheduler)
        assert_same(actual, expected)


def test_a_saved_pipeline_loads_with_the_stock_scheduler_instead(tmp_path) -> None:
    case = flow_cases()["sd3-text"]
    expected = record(case, FlowMatchScheduler.from_config(case.scheduler.config))
    case.pipeline.save_pretrained(tmp_path)
    stock = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    loaded = DiffusionPipeline.from_pretrained(tmp_path, scheduler=stock, **missing_components(case))
    assert type(loaded.scheduler) is FlowMatchEulerDiscreteScheduler
    assert_same(record(dataclasses.replace(case, pipeline=loaded), loaded.scheduler), expected)


def test_from_pipe_keeps_our_scheduler() -> None:
    text, image = flow_cases()["sd3-text"], flow_cases()["sd3-image"]
    text.pipeline.scheduler = FlowMatchScheduler.from_config(text.scheduler.config)
    derived = StableDiffusion3Img2ImgPipeline.from_pipe(text.pipeline)
    assert type(derived.scheduler) is FlowMatchScheduler
    actual = record(dataclasses.replace(image, pipeline=derived), derived.scheduler)
    assert_same(actual, record(image, image.scheduler))


# What stock does not offer


@pytest.mark.parametrize(("solver", "stages"), [("midpoint", 2), ("heun", 2), ("rk4", 4)])
@pytest.mark.parametrize("name", ["sd3-text", "flux-text", "qwen-text", "sana", "aura-flow", "mochi", "ltx", "wan"])
def test_runge_kutta_solvers_run_in_text_to_image(name: str, solver: str, stages: int) -> None:
    case = flow_cases()[name]
    scheduler = FlowMatchScheduler.from_config(case.scheduler.config, solver=solver)
    recording = record(case, scheduler, num_inference_steps=3)
    assert recording.calls == 3 * stages * calls_per_step(name)
    assert recording.images.isfinite().all()
    top = 1.0 if name.split("-")[0] in ("flux", "qwen", "aura") else 1000.0
    assert all(0 <= t.min() and t.max() <= top for t in recording.timesteps)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ab2"},
        {"solver": "dpmpp_2m"},
        {"solver": "abm2", "sampling_path": "angle", "timestep_spacing": "graded"},
        {"solver": "euler_maruyama"},
        {"eta": 1.0},
    ],
    ids=["ab2", "dpmpp_2m", "abm2-angle", "euler-maruyama", "ancestral"],
)
@pytest.mark.parametrize("name", [name for name in FLOW if name != "mochi"])  # its time runs the other way: Euler's
def test_solvers_with_one_call_a_step_run_everywhere(name: str, settings: dict) -> None:
    case = flow_cases()[name]
    # From pure noise and to clean data DPM-Solver++(2M) is of order 1: in three or four steps there are no others.
    steps = {"num_inference_steps": 10} if settings.get("solver") == "dpmpp_2m" else {}
    expected = record(case, case.scheduler, **steps)
    recording = record(case, FlowMatchScheduler.from_config(case.scheduler.config, **settings), **steps)
    assert recording.calls == expected.calls
    assert recording.images.isfinite().all()
    # Another solver, not another name for Euler.
    if expected.calls > calls_per_step(name):
        assert (recording.images - expected.images).abs().max() > ATOL


@pytest.mark.parametrize("name", ["sd3-image", "sd3-inpaint", "sd-image", "sd-inpaint"])
def test_heun_runs_where_image_to_image_asks_the_scheduler_for_its_grid(name: str) -> None:
    # Flux and Qwen-Image hand over sigmas, and then count the stages as steps: there, only one stage a step fits.
    case = (flow_cases() | diffusion_cases())[name]
    recording = record(case, FlowMatchScheduler(solver="heun"), num_inference_steps=5, strength=0.6)
    times = [float(t.flatten()[0]) for t in recording.timesteps]
    assert times == pytest.approx([600.0, 400.0, 400.0, 200.0, 200.0, 0.0], rel=0, abs=ATOL)
    assert recording.images.isfinite().all()


@pytest.mark.parametrize("name", ["sd-text", "sdxl-text", "dit", "pixart-alpha", "pixart-sigma", "ddpm"])
def test_flow_models_run_in_diffusion_pipelines(name: str) -> None:
    case = diffusion_cases()[name]
    recording = record(case, FlowMatchScheduler(), num_inference_steps=5)
    times = [float(t.flatten()[0]) for t in recording.timesteps]
    assert times == pytest.approx([1000.0, 800.0, 600.0, 400.0, 200.0], rel=0, abs=ATOL)
    assert recording.images.isfinite().all()


@pytest.mark.parametrize("name", ["sd-image", "sd-inpaint", "sdxl-image"])
@pytest.mark.parametrize(("strength", "steps"), [(0.2, 1), (0.6, 3), (1.0, 5)])
def test_flow_models_run_in_image_to_image_diffusion_pipelines(name: str, strength: float, steps: int) -> None:
    case = diffusion_cases()[name]
    recording = record(case, FlowMatchScheduler(), num_inference_steps=5, strength=strength)
    times = [float(t.flatten()[0]) for t in recording.timesteps]
    assert times == pytest.approx([1000.0, 800.0, 600.0, 400.0, 200.0][5 - steps :], rel=0, abs=ATOL)
    assert recording.images.isfinite().all()


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("name", ["sd-text", "sd-image", "sdxl-text", "sdxl-image", "ddpm"])
def test_flow_models_take_the_solvers_steps_in_diffusion_pipelines(name: str, solver: str) -> None:
    # Without guidance the denoiser's own inputs and outputs show the whole solution, stage by stage.
    case = diffusion_cases()[name]
    overrides = {} if name == "ddpm" else {"guidance_scale": 1.0}
    recording = record(case, FlowMatchScheduler(solver=solver), num_inference_steps=5, **overrides)
    tableau = TABLEAUX[solver]
    stages = tableau.stages
    assert recording.calls % stages == 0
    for first in range(0, recording.calls, stages):
        start = recording.samples[first]
        velocities = recording.outputs[first : first + stages]
        inputs = recording.samples[first : first + stages + 1]
        for weights, point in zip((*tableau.a, tableau.b), inputs):
            expected = start - sum((w * v for w, v in zip(weights, velocities)), torch.zeros_like(start)) / 5
            torch.testing.assert_close(point, expected, rtol=0, atol=1e-5)
