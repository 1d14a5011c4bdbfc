# SPDX-License-Identifier: Apache-2.0
"""Settings that a search finds for exact mixtures in the place of a network."""

from typing import Any

import pytest
import torch
from helpers import draw_mixture

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.schedulers import recommendation
from diffusers_fm.schedulers.recommendation import recommend


MIXTURE = draw_mixture(41, (2, 4), modes=4, narrowest=0.5, widest=0.9)


def run(scheduler: FlowMatchScheduler, num_steps: int, seed: int) -> torch.Tensor:
    """A sampling loop of an exact network."""
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(96, *MIXTURE.shape, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = (timestep.double() / scheduler.timestep_scale).expand(len(x))
        output = MIXTURE.predict(scheduler.path, x, t, scheduler.config.prediction_type)
        x = scheduler.step(output, timestep, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize(
    "settings", [{"path": "ot", "shift": 2.0}, {"path": "vp"}, {"path": "ve"}], ids=lambda s: s["path"]
)
def test_few_calls_err_less_than_fifty_euler_calls(settings: dict[str, Any]) -> None:
    scheduler = FlowMatchScheduler(**settings, sigma_data=0.8)
    found = recommend(run, scheduler)
    config = found.scheduler.config
    assert config.default_num_inference_steps * found.scheduler.order <= 10
    assert (config.sampling_path, config.timestep_spacing, config.sigma_data) == ("angle", "graded", 0.8)
    assert (config.path, config.shift) == (settings["path"], settings.get("shift", 1.0))
    # On noise of a third seed, against a solver that is not among those of the search; and what it says is true.
    fine = run(scheduler.with_settings(solver="rk4"), 200, 2)
    few = run(found.scheduler, config.default_num_inference_steps, 2)
    euler = run(scheduler, 50, 2)
    errors = [((end - fine).norm() / fine.norm()).item() for end in (few, euler)]
    assert errors[0] < errors[1]
    assert errors == pytest.approx([found.error, found.baseline], rel=0.5)


def test_the_only_solver_to_try() -> None:
    found = recommend(run, FlowMatchScheduler(), solver="midpoint")
    config = found.scheduler.config
    assert (config.solver, config.sampling_path, config.timestep_spacing) == ("midpoint", "ot", "trailing")
    assert found.error < found.baseline
    assert f"`midpoint`, {2 * config.default_num_inference_steps} calls" in str(found)
    # Euler does not fall below itself.
    config = recommend(run, FlowMatchScheduler(), solver="euler").scheduler.config
    assert (config.solver, config.default_num_inference_steps) == ("euler", 50)


def test_steps_are_fitted_where_no_solver_does_in_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommendation, "CANDIDATES", ("euler",))
    scheduler = FlowMatchScheduler(sigma_data=0.8)
    found = recommend(run, scheduler)
    config = found.scheduler.config
    assert (config.solver, list(config.calibration), config.default_num_inference_steps) == ("calibrated", ["10"], 10)
    # On noise that they were neither fitted to nor judged on.
    abm3 = scheduler.with_settings(**recommendation.REFERENCE)
    fine, few, euler = run(abm3, 200, 2), run(found.scheduler, 10, 2), run(scheduler, 50, 2)
    assert (few - fine).norm() < (euler - fine).norm()
    # Other numbers of steps are made, too.
    assert torch.equal(run(found.scheduler, 7, 2), run(abm3, 7, 2))
    # What is no better on the other noise is not taken.
    monkeypatch.setattr(recommendation, "MARGIN", 0.0)
    config = recommend(run, scheduler).scheduler.config
    assert (config.solver, config.calibration, config.default_num_inference_steps) == ("euler", None, 50)


def test_fitted_steps_are_saved_with_the_fewest_that_suffice() -> None:
    found = recommend(run, FlowMatchScheduler(), calibrate_steps=[8, 2])
    config = found.scheduler.config
    assert (config.solver, sorted(config.calibration), config.default_num_inference_steps) == (
        "calibrated",
        ["2", "8"],
        8,
    )
    assert found.error < found.baseline
    with pytest.raises(ValueError, match=r"one that was calibrated, \[2, 8\], got 5"):
        found.scheduler.with_settings(default_num_inference_steps=5)


def test_settings_that_were_found_together_leave_together() -> None:
    found = {
        "solver": "abm3",
        "sampling_path": "angle",
        "timestep_spacing": "graded",
        "default_num_inference_steps": 8,
    }
    scheduler = FlowMatchScheduler(**found)
    assert FlowMatchScheduler.from_config(scheduler.config).config.default_num_inference_steps == 8
    assert scheduler.with_settings(eta=0.0).config.default_num_inference_steps == 8

    def kept(**changes: Any) -> tuple[Any, ...]:
        config = scheduler.with_settings(**changes).config
        return config.sampling_path, config.timestep_spacing, config.default_num_inference_steps

    assert kept(solver="euler") == ("ot", "trailing", None)
    assert kept(solver="ab3", sampling_path="angle") == ("angle", "trailing", None)
    assert kept(solver="ab3", default_num_inference_steps=9) == ("ot", "trailing", 9)
    assert kept(sampling_path="ot") == ("ot", "graded", None)


@pytest.mark.parametrize("value", [0, True, 2.0, "8"])
def test_numbers_of_steps_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=f"at least 1, or None, got {value!r}"):
        FlowMatchScheduler(default_num_inference_steps=value)
