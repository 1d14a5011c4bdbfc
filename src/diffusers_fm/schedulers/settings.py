# SPDX-License-Identifier: Apache-2.0
"""Checks of a scheduler's settings, each alone and together."""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from ..coordinates import SAMPLING_PATHS
from ..paths import PATHS, PREDICTION_TYPES
from ..registry import full_name
from .grids import FINAL_SIGMAS_TYPES, TIMESTEP_SPACINGS
from .sampling_plan import DIFFUSION_FORMS, RUNGE_KUTTA, SOLVERS


CHOICES: dict[str, tuple[str, ...]] = {
    "prediction_type": PREDICTION_TYPES,
    "solver": SOLVERS,
    "sampling_path": SAMPLING_PATHS,
    "timestep_spacing": TIMESTEP_SPACINGS,
    "final_sigmas_type": FINAL_SIGMAS_TYPES,
    "diffusion_form": DIFFUSION_FORMS,
}
NUMBERS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "shift": (lambda value: 0 < value < math.inf, "above 0"),
    "sigma_data": (lambda value: value is None or 0 < value < math.inf, "above 0, or None"),
    "eta": (lambda value: 0 <= value <= 1, "in [0, 1]"),
    "s_churn": (lambda value: 0 <= value < math.inf, "of at least 0"),
    "s_tmin": (lambda value: value >= 0, "of at least 0"),
    "s_tmax": (lambda value: value is None or value >= 0, "of at least 0, or None"),
    "s_noise": (lambda value: 0 <= value < math.inf, "of at least 0"),
    "diffusion_scale": (lambda value: 0 <= value < math.inf, "of at least 0"),
    "clip_sample_range": (lambda value: 0 < value < math.inf, "above 0"),
    "steps_offset": (lambda value: value >= 0, "of at least 0"),
    "shift_terminal": (lambda value: value is None or 0 <= value < 1, "in [0, 1), or None"),
    "base_shift": (lambda value: value is None or math.isfinite(value), "that is finite, or None"),
    "max_shift": (lambda value: value is None or math.isfinite(value), "that is finite, or None"),
    "base_image_seq_len": (lambda value: value > 0, "above 0"),
    "max_image_seq_len": (lambda value: value > 0, "above 0"),
}
# These steps are defined by the estimates of data and noise, not by a derivative in some coordinates.
BY_ESTIMATES = ("stochastic_sampling", "clip_sample", "eta")
# These steps are defined in the straight coordinates alone.
STRAIGHT_ONLY = ("dpmpp_2m", "flow_map")
# What builds the path.
PATH_SETTINGS = frozenset(("path", "path_kwargs", "num_train_timesteps"))
FLOW_MAP = ("first_block", "num_inference_steps", "guidance_scale", "flow_shift")
GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
FLAGS = ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling", "clip_sample", *GRIDS)
GRID_CHANGES = ("use_dynamic_shifting", "shift_terminal", *GRIDS)


def check_number(name: str, value: Any) -> None:
    """Check one of the numbers of a scheduler's configuration."""
    valid, accepted = NUMBERS[name]
    is_number = value is None or (isinstance(value, Real) and not isinstance(value, bool))
    if not is_number or (value is None and "None" not in accepted) or not valid(value):
        raise ValueError(f"`{name}` must be a number {accepted}, got {value!r}.")


def check_flow_map(flow_map: Any) -> None:
    """Check what a scheduler's configuration says of a flow map."""
    if not isinstance(flow_map, Mapping) or not set(flow_map) <= set(FLOW_MAP):
        raise ValueError(f"`flow_map` must be a dictionary with keys among {list(FLOW_MAP)}, got {flow_map!r}.")
    for name in ("first_block", "num_inference_steps"):
        value = flow_map.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` of `flow_map` must be an integer of at least 1, got {value!r}.")
    for name in ("guidance_scale", "flow_shift"):
        value = flow_map.get(name, 1.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"`{name}` of `flow_map` must be a number above 0, got {value!r}.")


def check_default_steps(steps: Any, calibration: Mapping[str, Any]) -> None:
    """Check the number of steps that a scheduler's configuration has."""
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"`default_num_inference_steps` must be an integer of at least 1, or None, got {steps!r}.")
    if steps is not None and calibration and str(steps) not in map(str, calibration):
        raise ValueError(
            f"`default_num_inference_steps` must be one that was calibrated, {sorted(map(int, calibration))}, got"
            f" {steps}."
        )


def leaving_settings(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the present solver that a change of solver or coordinates takes away, at values that do nothing."""
    leaving: dict[str, Any] = {}
    if config["default_num_inference_steps"] is not None:
        if changes.get("sampling_path", config["sampling_path"]) != config["sampling_path"]:
            leaving = {"default_num_inference_steps": None}
        if changes.get("solver", config["solver"]) != config["solver"]:
            leaving = {
                "default_num_inference_steps": None,
                "sampling_path": "angle" if changes["solver"] == "calibrated" else "ot",
                "timestep_spacing": "trailing",
            }
    now = {**config, **leaving, **changes}
    by_estimates = any(changes.get(name) for name in BY_ESTIMATES)
    if now["sampling_path"] != "ot" and (now["solver"] in STRAIGHT_ONLY or by_estimates):
        leaving["sampling_path"] = now["sampling_path"] = changes.get("sampling_path", "ot")
    if (now["solver"], now["sampling_path"]) == (config["solver"], config["sampling_path"]):
        return {}
    if now["solver"] != "calibrated":
        leaving["calibration"] = None
    if config["solver"] == "flow_map":
        leaving["shift"] = (config["flow_map"] or {}).get("flow_shift", config["shift"])
    if (now["solver"], now["sampling_path"]) != ("euler", "ot"):
        leaving |= {"stochastic_sampling": False, "clip_sample": False, "eta": 0.0}
    if now["solver"] not in RUNGE_KUTTA or by_estimates:
        leaving["s_churn"] = 0.0
    return {name: value for name, value in leaving.items() if name not in changes}


def check_path_class(name: str, path_class: str) -> None:
    """Check that a path of the user's is registered, and is of the class that a configuration was saved with."""
    module, _, class_name = path_class.rpartition(".")
    found = PATHS.get(name)
    if found is None:
        first = "run the script" if module == "__main__" else f"import the module {module!r}"
        raise ValueError(
            f"The path {name!r} is not registered: {first} that calls `diffusers_fm.register_path({name!r},"
            f" {class_name})` before loading, in a training script with --import_modules."
        )
    if found.__name__ != class_name:
        raise ValueError(f"The path {name!r} was saved as {path_class} and is registered as {full_name(found)}.")


def check_settings(config: Any) -> None:
    """
    Check the configuration of a `FlowMatchScheduler`; its path and its calibration are checked where they are read.
    """
    for name, accepted in CHOICES.items():
        if config[name] not in accepted:
            raise ValueError(f"`{name}` must be one of {list(accepted)}, got {config[name]!r}.")
    for name in FLAGS:
        if not isinstance(config[name], bool):
            raise ValueError(f"`{name}` must be True or False, got {config[name]!r}.")
    count = config.num_train_timesteps
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"`num_train_timesteps` must be an integer of at least 1, got {count!r}.")
    for name in NUMBERS:
        check_number(name, config[name])

    path, kind, solver, coordinates = config.path, config.prediction_type, config.solver, config.sampling_path
    if config.timestep_spacing == "leading" and path != "vp_discrete":
        raise ValueError(f"`timestep_spacing` 'leading' needs the path 'vp_discrete', got {path!r}.")
    if config.invert_sigmas and (path, kind, coordinates) != ("ot", "flow_prediction", "ot"):
        raise ValueError(
            f"`invert_sigmas` needs the path 'ot', `sampling_path` 'ot' and 'flow_prediction', got path {path!r}, "
            f"`sampling_path` {coordinates!r} and {kind!r}."
        )
    by_estimates = [name for name in BY_ESTIMATES if config[name]]
    if by_estimates and (solver, coordinates) != ("euler", "ot"):
        raise ValueError(
            f"`{by_estimates[0]}` needs the solver 'euler' and `sampling_path` 'ot', got {solver!r} and "
            f"{coordinates!r}."
        )
    if solver in STRAIGHT_ONLY and coordinates != "ot":
        raise ValueError(f"The solver {solver!r} needs `sampling_path` 'ot', got {coordinates!r}.")
    if config.s_churn > 0 and (solver not in RUNGE_KUTTA or by_estimates):
        raise ValueError(
            f"`s_churn` needs one of the solvers {list(RUNGE_KUTTA)} and none of `stochastic_sampling`, `eta` and "
            f"`clip_sample`, got {[solver, *by_estimates]}."
        )
    if solver == "flow_map" and config.invert_sigmas:
        raise ValueError("The solver 'flow_map' needs a time that falls from noise to data, got `invert_sigmas` True.")
    check_flow_map(config.flow_map or {})
    calibration = config.calibration
    if (solver == "calibrated") != bool(calibration) or (calibration and coordinates != "angle"):
        raise ValueError(
            "The solver 'calibrated', a `calibration` and `sampling_path` 'angle' go together, got the solver "
            f"{solver!r}, {'a' if calibration else 'no'} calibration and {coordinates!r}."
        )
    check_default_steps(config.default_num_inference_steps, calibration or {})
    changes = [name for name in GRID_CHANGES if config[name]] + ["shift"] * (config.shift != 1.0)
    if solver == "calibrated" and changes:
        raise ValueError(
            "The grid of the solver 'calibrated' is that of its calibration, so there must be none of "
            f"{['shift', *GRID_CHANGES]}, got {changes}."
        )
