# SPDX-License-Identifier: Apache-2.0
"""Settings on their way: read from stock configurations, changed, rebuilt, written to files, handed to stock."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    RePaintScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.paths import PATHS, ConditionalPath, CosinePath, OTPath, VPPath


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
CALIBRATION = {"2": {"sigmas": [0.9, 0.5], "keep": [1.0, 1.0], "weights": [[-0.5], [0.1, -0.6]]}}
CALIBRATED = {"solver": "calibrated", "sampling_path": "angle", "timestep_spacing": "graded"} | {
    "calibration": CALIBRATION
}


def grid(scheduler: FlowMatchEulerDiscreteScheduler, steps: int = 6, **arguments: float) -> torch.Tensor:
    scheduler.set_timesteps(steps, **arguments)
    return scheduler.sigmas.double()


# Keys of a class that a file does not name


@pytest.mark.parametrize(
    ("config", "key", "right"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "set_alpha_to_one": False}, "final_sigmas_type", "zero"),
        ({"_class_name": "EulerDiscreteScheduler", "clip_sample": True}, "clip_sample", False),
        ({"_class_name": "PNDMScheduler", "final_sigmas_type": "zero"}, "final_sigmas_type", "sigma_min"),
        ({"_class_name": "DDPMScheduler", "use_karras_sigmas": True}, "use_karras_sigmas", False),
        ({"_class_name": "LMSDiscreteScheduler", "thresholding": True}, "path", "vp_discrete"),
        ({"_class_name": "DDIMScheduler", "path": "ot", "solver": "heun"}, "path", "vp_discrete"),
        ({"_class_name": "DDIMScheduler", "path": "ot", "solver": "heun"}, "solver", "euler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon"}, "prediction_type", None),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "clip_sample": True}, "clip_sample", False),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_flow_sigmas": True}, "timestep_spacing", "linspace"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift_terminal": 0.1}, "shift_terminal", None),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting", 0),
    ],
)
def test_left_over_keys_mean_nothing(config: dict, key: str, right: object) -> None:
    right = "flow_prediction" if key == "prediction_type" else right
    assert FlowMatchScheduler.from_config(config).config[key] == right
    # They stay in the configuration for the class that they belong to, if it is not one of ours.
    for name in set(config) - set(FlowMatchScheduler().config) - {"_class_name"}:
        assert FlowMatchScheduler.from_config(config).config[name] == config[name]


@pytest.mark.parametrize(
    ("cls", "settings", "said"),
    [
        (UniPCMultistepScheduler, FLOW | {"use_karras_sigmas": True}, "use_karras_sigmas"),
        (DPMSolverMultistepScheduler, FLOW | {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        (DEISMultistepScheduler, FLOW | {"use_beta_sigmas": True}, "use_beta_sigmas"),
        (UniPCMultistepScheduler, FLOW | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type"),
        (UniPCMultistepScheduler, FLOW | {"prediction_type": "v_prediction"}, "prediction_type"),
        (UniPCMultistepScheduler, {"prediction_type": "flow_prediction"}, "prediction_type"),
        (DPMSolverMultistepScheduler, {"lambda_min_clipped": -5.1}, "lambda_min_clipped"),
        (EulerDiscreteScheduler, {"timestep_type": "continuous"}, "timestep_type"),
        (FlowMatchLCMScheduler, {"scale_factors": [0.5, 1.0]}, "scale_factors"),
        (RePaintScheduler, {}, "RePaintScheduler"),
        (LCMScheduler, {}, "LCMScheduler"),
        (TCDScheduler, {}, "TCDScheduler|LCMScheduler"),
        (DDIMInverseScheduler, {}, "DDIMInverseScheduler"),
        (DPMSolverMultistepInverseScheduler, {}, "DPMSolverMultistepInverseScheduler"),
        (FlowMapEulerDiscreteScheduler, {}, "FlowMapEulerDiscreteScheduler"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(cls: type, settings: dict, said: str, tmp_path) -> None:
    stock = cls(**settings)
    with pytest.raises(ValueError, match=said):
        FlowMatchScheduler.from_config(stock.config)
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        FlowMatchScheduler.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=said):
        FlowMatchScheduler.from_stock(stock)


def test_what_is_replaced_need_not_be_honoured() -> None:
    stock = UniPCMultistepScheduler(**FLOW, use_karras_sigmas=True)
    assert FlowMatchScheduler.from_config(stock.config, use_karras_sigmas=False).shift == 3.0


@pytest.mark.parametrize("cls", [CogVideoXDDIMScheduler, CogVideoXDPMScheduler])
@pytest.mark.parametrize("settings", [{}, {"snr_shift_scale": 1.5}, {"rescale_betas_zero_snr": True}])
def test_the_snr_shift_of_cogvideox_is_in_the_path(cls: type, settings: dict) -> None:
    stock = cls(prediction_type="v_prediction", timestep_spacing="trailing", **settings)
    ours = FlowMatchScheduler.from_config(stock.config)
    knots = torch.arange(1000, dtype=torch.float64) / 999
    # Stock cumulates in float32.
    torch.testing.assert_close(ours.path.alpha(knots).square(), stock.alphas_cumprod.double(), rtol=0, atol=1e-5)
    assert not ours.config.clip_sample  # which CogVideoX has and does not read


@pytest.mark.parametrize("value", [0.0, -1.0, "3", True])
def test_an_snr_shift_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="snr_shift_scale"):
        FlowMatchScheduler(path="vp_discrete", path_kwargs={"snr_shift_scale": value})


def test_the_terminal_and_dynamic_shift_of_unipc_are_kept() -> None:
    stock = UniPCMultistepScheduler(**FLOW, use_dynamic_shifting=True, shift_terminal=0.02)
    ours = FlowMatchScheduler.from_config(stock.config)
    # Stock's grid ends a thousandth of a step above that of ours, before the shift.
    torch.testing.assert_close(grid(ours, mu=0.8), grid(stock, mu=0.8), rtol=0, atol=3e-3)


def test_a_flow_shift_that_is_absent_is_none() -> None:
    config = {"_class_name": "MySolver", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    assert FlowMatchScheduler.from_config(config).shift == 1.0


@pytest.mark.parametrize("cls", [DEISMultistepScheduler, SASolverScheduler])
def test_schedulers_that_end_at_their_first_beta_still_do(cls: type) -> None:
    stock = cls()
    ours = FlowMatchScheduler.from_config(stock.config)
    stock.set_timesteps(6)
    last = stock.sigmas[-1].double()  # sigma / alpha
    torch.testing.assert_close(grid(ours)[-1], last / (1 + last), rtol=1e-4, atol=0)


def test_a_configuration_of_an_object_is_read_as_that_of_its_class() -> None:
    assert FlowMatchScheduler.from_config(FlowMatchLCMScheduler().config).config.stochastic_sampling
    assert FlowMatchScheduler.from_stock(FlowMatchHeunDiscreteScheduler()).config.solver == "heun"
    with pytest.raises(ValueError, match="_class_name"):
        FlowMatchScheduler.from_config(FlowMatchHeunDiscreteScheduler().config)


@pytest.mark.parametrize(("name", "nearest"), [("solvr", "solver"), ("use_karras", "use_karras_sigmas")])
def test_a_misspelt_setting_is_refused_with_the_nearest_name(name: str, nearest: str, tmp_path) -> None:
    scheduler = FlowMatchScheduler()
    scheduler.save_pretrained(tmp_path)
    for build in (
        lambda **changes: FlowMatchScheduler.from_config(scheduler.config, **changes),
        lambda **changes: FlowMatchScheduler.from_config(DDPMScheduler().config, **changes),
        lambda **changes: FlowMatchScheduler.from_pretrained(tmp_path, **changes),
        scheduler.with_settings,
    ):
        with pytest.raises(ValueError, match=f"{name!r}.*{nearest!r}"):
            build(**{name: "heun"})


# Round trips


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (FlowMatchEulerDiscreteScheduler, {}),
        (FlowMatchHeunDiscreteScheduler, {}),
        (FlowMatchLCMScheduler, {}),
        (UniPCMultistepScheduler, {"use_flow_sigmas": True}),
    ],
)
def test_the_default_grid_survives_a_stock_class(cls: type, arguments: dict, tmp_path) -> None:
    ours = FlowMatchScheduler(shift=2.0)
    stock = cls.from_config(ours.config, **arguments)
    stock.save_pretrained(tmp_path)
    for again in (FlowMatchScheduler.from_stock(stock), FlowMatchScheduler.from_pretrained(tmp_path)):
        assert again.config.timestep_spacing == "trailing"
    stock.save_pretrained(tmp_path / "again")
    assert FlowMatchScheduler.from_pretrained(tmp_path / "again").config.path == "ot"


def test_stock_files_that_earlier_versions_wrote_keep_their_solver() -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "solver": "ab2", "sigma_data": 0.5}
    ours = FlowMatchScheduler.from_config(config)
    assert (ours.config.solver, ours.config.sigma_data, ours.config.timestep_spacing) == ("ab2", 0.5, "linspace")


@pytest.mark.parametrize("settings", [{}, {"timestep_spacing": "linspace", "shift": 2.0}, {"path": "vp"}])
def test_a_shift_that_was_set_later_survives_rebuilding_and_files(settings: dict, tmp_path) -> None:
    scheduler = FlowMatchScheduler(**settings)
    scheduler.set_shift(3.0)
    scheduler.set_shift(5.0)
    expected = grid(scheduler)
    scheduler.save_pretrained(tmp_path)
    for other in (
        scheduler.with_settings(),
        scheduler.with_settings(solver="euler"),
        FlowMatchScheduler.from_config(scheduler.config),
        FlowMatchScheduler.from_pretrained(tmp_path),
        copy.deepcopy(scheduler),
    ):
        assert other.shift == other.config.shift == 5.0
        torch.testing.assert_close(grid(other), expected, rtol=0, atol=0)
    fresh = scheduler.with_settings(shift=4.0)
    torch.testing.assert_close(grid(fresh), grid(FlowMatchScheduler(**settings | {"shift": 4.0})), rtol=0, atol=0)


def test_a_shift_that_was_set_on_a_stock_scheduler_comes_along(tmp_path) -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=2.0)
    stock.set_shift(5.0)
    ours = FlowMatchScheduler.from_stock(stock)
    torch.testing.assert_close(grid(ours), grid(stock), rtol=0, atol=1e-7)
    there = ours.to_stock()
    torch.testing.assert_close(grid(there), grid(stock), rtol=0, atol=1e-7)
    there.save_pretrained(tmp_path)
    assert FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path).shift == 5.0


def test_a_calibrated_grid_takes_no_shift_later() -> None:
    scheduler = FlowMatchScheduler(**CALIBRATED)
    scheduler.set_shift(1.0)
    with pytest.raises(ValueError, match=r"calibrated.*3\.0"):
        scheduler.set_shift(3.0)


# Other settings for the same scheduler


class Mine(FlowMatchScheduler):
    def build_path(self) -> ConditionalPath:
        return VPPath()


def test_the_class_stays() -> None:
    scheduler = Mine(path="cosine").with_settings(solver="heun")
    assert (type(scheduler), scheduler.path, scheduler.order) == (Mine, VPPath(), 2)


def test_a_subclass_is_loaded_as_such(tmp_path: Path) -> None:
    Mine(solver="heun").save_pretrained(tmp_path)
    for scheduler in (Mine.from_pretrained(tmp_path), Mine(solver="euler").with_settings(solver="heun")):
        assert scheduler.order == 2 and scheduler.path == VPPath()
    with pytest.raises(ValueError, match="saved by a Mine, not a FlowMatchScheduler: load it with that class"):
        FlowMatchScheduler.from_pretrained(tmp_path)


def test_a_path_that_no_file_names_is_refused(tmp_path: Path) -> None:
    scheduler = FlowMatchScheduler()
    scheduler.path = VPPath()
    for saved in (scheduler, scheduler.with_settings(solver="ab2")):
        with pytest.raises(ValueError, match=r"was set to VPPath.*gives OTPath"):
            saved.save_pretrained(tmp_path)
    scheduler.path = OTPath()
    scheduler.save_pretrained(tmp_path)


class Power(ConditionalPath):
    def __init__(self, power: float = 2.0) -> None:
        self.power = power

    def alpha(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t**self.power

    def sigma(self, t: torch.Tensor) -> torch.Tensor:
        return t


def test_a_path_of_ones_own_is_saved_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PATHS, "power", Power)
    own = {"path": "power", "path_kwargs": {"power": 3.0}}
    FlowMatchScheduler(solver="heun", **own).save_pretrained(tmp_path)
    for scheduler in (FlowMatchScheduler.from_pretrained(tmp_path), FlowMatchScheduler(**own)):
        for same in (scheduler, scheduler.with_settings(solver="ab2"), copy.deepcopy(scheduler)):
            assert isinstance(same.path, Power) and same.path.power == 3.0
    card = FlowMatchScheduler(**own).build_model_card("me/mine").text
    assert f"import {__name__}  # Power; not in this repository\n" in card and "{'power': 3.0}" in card
    assert FlowMatchScheduler.from_pretrained(tmp_path, path="cosine", path_kwargs=None).path == CosinePath()
    assert "_path_class" not in FlowMatchScheduler.from_pretrained(tmp_path, path="ot", path_kwargs=None).config
    monkeypatch.setitem(PATHS, "power", OTPath)
    with pytest.raises(ValueError, match=f"was saved as {__name__}.Power and is registered as .*OTPath"):
        FlowMatchScheduler.from_pretrained(tmp_path)
    monkeypatch.delitem(PATHS, "power")
    with pytest.raises(ValueError, match=f"'power' is not registered: import the module '{__name__}' that calls"):
        FlowMatchScheduler.from_pretrained(tmp_path)


def test_a_path_that_was_put_there_stays_until_another_is_asked_for() -> None:
    scheduler = FlowMatchScheduler()
    scheduler.path = VPPath()
    assert scheduler.with_settings(solver="ab2").path == VPPath()
    assert scheduler.with_settings(path="cosine").path == CosinePath()


@pytest.mark.parametrize(
    ("before", "changes", "left"),
    [
        (CALIBRATED, {"solver": "heun"}, {"calibration": None}),
        (CALIBRATED, {"solver": "euler", "eta": 1.0}, {"calibration": None, "sampling_path": "ot"}),
        ({"clip_sample": True}, {"solver": "heun"}, {"clip_sample": False}),
        ({"eta": 0.5}, {"solver": "ab2"}, {"eta": 0.0}),
        ({"stochastic_sampling": True}, {"sampling_path": "angle"}, {"stochastic_sampling": False}),
        ({"solver": "heun", "s_churn": 2.0}, {"solver": "abm3"}, {"s_churn": 0.0}),
        ({"solver": "heun", "s_churn": 2.0}, {"solver": "euler", "eta": 0.5}, {"s_churn": 0.0}),
        ({"solver": "abm3", "sampling_path": "angle"}, {"solver": "dpmpp_2m"}, {"sampling_path": "ot"}),
    ],
)
def test_settings_of_the_old_solver_leave_with_it(before: dict, changes: dict, left: dict) -> None:
    scheduler = FlowMatchScheduler(**before)
    for other in (scheduler.with_settings(**changes), FlowMatchScheduler.from_config(scheduler.config, **changes)):
        assert {name: other.config[name] for name in left | changes} == left | changes
    # With its own solver nothing leaves.
    same = scheduler.with_settings(solver=scheduler.config.solver)
    assert {name: same.config[name] for name in before} == before


def test_settings_that_are_asked_for_together_are_still_refused() -> None:
    with pytest.raises(ValueError, match="clip_sample"):
        FlowMatchScheduler().with_settings(solver="heun", clip_sample=True)


def test_a_checkpoint_that_clips_takes_another_solver() -> None:
    ours = FlowMatchScheduler.from_config(DDIMScheduler().config, solver="ab2")
    assert (ours.config.solver, ours.config.clip_sample) == ("ab2", False)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"shift": "3.0"}, "shift.*'3.0'"),
        ({"eta": "0.5"}, "eta.*'0.5'"),
        ({"sigma_data": True}, "sigma_data.*True"),
        ({"s_churn": None}, "s_churn.*None"),
        ({"max_shift": "1.15"}, "max_shift.*'1.15'"),
        ({"base_image_seq_len": "256"}, "base_image_seq_len.*'256'"),
        ({"use_karras_sigmas": "False"}, "use_karras_sigmas.*'False'"),
        ({"clip_sample": "no"}, "clip_sample.*'no'"),
        ({"use_dynamic_shifting": 1}, "use_dynamic_shifting.*1"),
        ({"num_train_timesteps": "1000"}, "num_train_timesteps.*'1000'"),
    ],
)
def test_settings_given_as_text_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        FlowMatchScheduler(**settings)


@pytest.mark.parametrize("mu", ["1.0", None, float("nan")])
def test_a_dynamic_shift_that_is_no_number_is_refused(mu: object) -> None:
    with pytest.raises(ValueError, match="`mu` must be a number"):
        FlowMatchScheduler(use_dynamic_shifting=True).set_timesteps(4, mu=mu)
