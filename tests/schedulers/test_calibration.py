# SPDX-License-Identifier: Apache-2.0
"""Sampling loops fitted to a network: exact mixtures as networks, whose error after calibration is known."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers import draw_mixture, gaussian
from stock_pipelines import Recording, diffusion_cases, flow_cases, record

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.schedulers.calibration import Calibration, calibrate


# Wide modes: between narrow ones a few samples near the border make the error, and differ from seed to seed.
MIXTURE = draw_mixture(41, (2, 4), modes=4, narrowest=0.5, widest=0.9)
Run = Callable[[FlowMatchScheduler, int, int], torch.Tensor]


def runner(settings: dict, mixture: object = MIXTURE, given_sigmas: bool = False) -> Run:
    """A pipeline in short: it starts from unit noise, as stock flow pipelines do."""

    def run(scheduler: FlowMatchScheduler, num_steps: int, seed: int) -> torch.Tensor:
        sigmas = [1 - i / num_steps for i in range(num_steps)] if given_sigmas else None
        scheduler.set_timesteps(None if given_sigmas else num_steps, sigmas=sigmas)
        x = torch.randn(96, *mixture.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = x * scheduler.init_noise_sigma
        kind = scheduler.config.prediction_type
        for timestep in scheduler.timesteps:
            t = (timestep.double() / scheduler.timestep_scale).expand(len(x))
            x = scheduler.step(mixture.predict(scheduler.path, x, t, kind), timestep, x, return_dict=False)[0]
        return x

    return run


def fit(settings: dict, counts: object, **options: object) -> tuple[Calibration, Run]:
    run = runner(settings)
    options = {"max_runs": 8, "reference_steps": 48} | options
    return calibrate(run, FlowMatchScheduler(**settings), counts, **options), run


@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
def test_a_calibrated_loop_is_closer_to_the_solution_than_an_uncalibrated_one(path: str) -> None:
    result, run = fit({"path": path}, [3, 6])
    fine = run(FlowMatchScheduler(path=path, solver="abm3", sampling_path="angle", timestep_spacing="graded"), 200, 2)
    plain = FlowMatchScheduler.from_config(
        result.scheduler.config, solver="abm3", timestep_spacing="graded", calibration=None
    )
    for steps in (3, 6):
        # On noise of a third seed; and what the result says of the second one is true.
        errors = [((run(one, steps, 2) - fine).norm() / fine.norm()).item() for one in (result.scheduler, plain)]
        assert errors[0] < 0.8 * errors[1]
        assert 1 / 3 < errors[0] / result.errors[steps]["calibrated"] < 3
        assert 1 / 3 < errors[1] / result.errors[steps]["abm3"] < 3


@pytest.mark.parametrize("name", ["sd3-text", "flux-text", "qwen-text", "sd-text", "dit"])
def test_stock_pipelines_are_calibrated_as_they_run(name: str, tmp_path: Path) -> None:
    # With guidance in the batch, in the network, by a second call; with equal sigmas and mu; with betas.
    case = (flow_cases() | diffusion_cases())[name]

    def run(scheduler: FlowMatchScheduler, num_steps: int, seed: int) -> Recording:
        return record(case, scheduler, seed, num_inference_steps=num_steps)

    scheduler = FlowMatchScheduler.from_config(case.scheduler.config)
    result = calibrate(run, scheduler, 3, reference_steps=12, max_runs=3)
    # On the noise of another seed, with networks of random weights.
    assert result.errors[3]["calibrated"] < 0.8 * result.errors[3]["abm3"]
    result.scheduler.save_pretrained(tmp_path)
    images = run(result.scheduler, 3, 2).images
    assert torch.equal(run(FlowMatchScheduler.from_pretrained(tmp_path), 3, 2).images, images)
    fine = run(FlowMatchScheduler.from_config(scheduler.config), 60, 2).images
    euler = run(FlowMatchScheduler.from_config(scheduler.config), 3, 2).images
    assert (images - fine).norm() < (euler - fine).norm()


def test_a_pipeline_that_hands_timesteps_over_is_refused() -> None:
    case = flow_cases()["cogview4"]
    with pytest.raises(ValueError, match="cannot be calibrated, got `timesteps`"):
        calibrate(
            lambda scheduler, steps, seed: record(case, scheduler, seed, num_inference_steps=steps),
            FlowMatchScheduler.from_config(case.scheduler.config),
            3,
            reference_steps=8,
        )


def test_a_gaussian_is_solved_by_one_call() -> None:
    # The solution of a Gaussian is linear in the noise, so that one derivative leads to the end at the right weight.
    run = runner({}, gaussian((3,), std=0.4))
    result = calibrate(run, FlowMatchScheduler(), 1, max_runs=1)
    # What is left is the interpolated and integrated reference, and the pull of the least squares.
    assert result.errors[1]["calibrated"] < 1e-3 < 0.1 < result.errors[1]["abm3"]


def test_the_calls_are_counted_and_the_scheduler_is_left_alone() -> None:
    scheduler = FlowMatchScheduler(shift=3.0)
    before = copy.deepcopy(dict(scheduler.config))
    count = 0
    inner = runner({})

    def run(one: FlowMatchScheduler, num_steps: int, seed: int) -> None:
        nonlocal count
        inner(one, num_steps, seed)
        count += num_steps

    result = calibrate(run, scheduler, (2, 5), reference_steps=20, max_runs=4)
    assert result.calls == count == 2 * 20 + 4 * (2 + 5) + 2 * (2 + 5)
    assert dict(scheduler.config) == before and scheduler.num_inference_steps is None
    assert result.scheduler.config.shift == 1.0 and result.scheduler.config.solver == "calibrated"


def test_a_calibration_survives_its_file_and_comes_from_equal_sigmas_too(tmp_path: object) -> None:
    result, run = fit({}, [4])
    result.scheduler.save_pretrained(tmp_path)
    json.loads((tmp_path / "scheduler_config.json").read_text())
    again = FlowMatchScheduler.from_pretrained(tmp_path)
    expected = run(result.scheduler, 4, 5)
    assert torch.equal(run(again, 4, 5), expected)
    # Flux and Qwen-Image hand over equal steps.
    assert torch.equal(runner({}, given_sigmas=True)(again, 4, 5), expected)


def test_a_loop_that_begins_later_takes_abm3_on_the_rest_of_the_grid() -> None:
    result, _ = fit({}, [6])
    scheduler = result.scheduler
    scheduler.set_timesteps(6)
    rest = FlowMatchScheduler(solver="abm3", sampling_path="angle")
    rest.set_timesteps(timesteps=scheduler.timesteps[2:].tolist())
    scheduler.set_begin_index(2)
    x = y = torch.randn(4, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for timestep in rest.timesteps:
        x = scheduler.step(torch.tanh(x), timestep, x).prev_sample
        y = rest.step(torch.tanh(y), timestep, y).prev_sample
    # The times of `rest` have been through float32.
    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "calibrated"}, "no calibration"),
        ({"solver": "abm3", "sampling_path": "angle"}, "a calibration"),
        ({"sampling_path": "ot"}, "'ot'"),
        ({"shift": 3.0}, "shift"),
        ({"calibration": {"2": {"sigmas": [0.9, 0.5]}}}, "lists `sigmas`, `keep`"),
        ({"calibration": {"2": {"sigmas": [0.5, 0.9], "keep": [1, 1], "weights": [[-0.5], [-0.5]]}}}, "falling"),
        ({"calibration": {"2": {"sigmas": [0.9, 0.5], "keep": [1, 1], "weights": [[-0.5]]}}}, "rows"),
    ],
)
def test_calibrations_that_cannot_be_are_refused(settings: dict, message: str) -> None:
    valid = {"2": {"sigmas": [0.9, 0.5], "keep": [1.0, 1.0], "weights": [[-0.5], [0.1, -0.9]]}}
    good: dict = {"solver": "calibrated", "sampling_path": "angle", "calibration": valid}
    FlowMatchScheduler(**good)
    if settings == {"solver": "calibrated"}:
        good.pop("calibration")
    with pytest.raises(ValueError, match=message):
        FlowMatchScheduler(**(good | settings))


def test_grids_that_were_not_calibrated_are_refused() -> None:
    valid = {"2": {"sigmas": [0.9, 0.5], "keep": [1.0, 1.0], "weights": [[-0.5], [0.1, -0.9]]}}
    scheduler = FlowMatchScheduler(solver="calibrated", sampling_path="angle", calibration=valid)
    with pytest.raises(ValueError, match="got other sigmas"):
        scheduler.set_timesteps(sigmas=[1.0, 0.7])
    with pytest.raises(ValueError, match="got other timesteps"):
        scheduler.set_timesteps(timesteps=[900.0, 500.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1, got 0"),
        ({"num_inference_steps": []}, "at least one number"),
        ({"reference_steps": 4}, "`reference_steps` must be at least 5, got 4"),
        ({"max_runs": 0}, "`max_runs` must be at least 1"),
        ({"history": 0}, "`history` must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrate(runner({}), FlowMatchScheduler(), **({"num_inference_steps": 4} | options))


def test_a_run_that_is_no_loop_from_the_same_noise_is_refused() -> None:
    inner = runner({})
    with pytest.raises(ValueError, match="one sampling loop of 8 steps, got 0"):
        calibrate(lambda scheduler, steps, seed: None, FlowMatchScheduler(), 2, reference_steps=8)
    with pytest.raises(ValueError, match="same noise for the same seed"):
        calibrate(
            lambda scheduler, steps, seed: inner(scheduler, steps, seed + steps),
            FlowMatchScheduler(),
            2,
            reference_steps=8,
        )
