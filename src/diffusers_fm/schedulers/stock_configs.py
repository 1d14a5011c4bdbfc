# SPDX-License-Identifier: Apache-2.0
"""Configurations of diffusers' own schedulers, read as configurations of `FlowMatchScheduler` and made from them."""

import inspect
from collections.abc import Mapping
from typing import Any

import diffusers

from ..paths import ConditionalPath, OTPath


FLOW_KEYS = (
    "num_train_timesteps",
    "shift",
    "use_dynamic_shifting",
    "base_shift",
    "max_shift",
    "base_image_seq_len",
    "max_image_seq_len",
    "invert_sigmas",
    "shift_terminal",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "time_shift_type",
    "stochastic_sampling",
)
"""The configuration of `FlowMatchEulerDiscreteScheduler`, all of which `FlowMatchScheduler` shares."""

OWN_KEYS = (
    "path_kwargs",
    "prediction_type",
    "solver",
    "sampling_path",
    "timestep_spacing",
    "final_sigmas_type",
    "steps_offset",
    "clip_sample",
    "clip_sample_range",
    "sigma_data",
    "eta",
    "s_churn",
    "s_tmin",
    "s_tmax",
    "s_noise",
    "diffusion_form",
    "diffusion_scale",
)
"""What `FlowMatchScheduler` adds, apart from `path`."""

BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
"""What a diffusion checkpoint's configuration says of its noise schedule."""

# Options that change the images and have no counterpart here, with the value at which they do nothing.
UNSUPPORTED = {
    "thresholding": False,
    "use_lu_lambdas": False,
    "scale_factors": None,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}


def _pick(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: config[key] for key in keys if key in config}


def translate_stock_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """
    Read the configuration of a stock scheduler as one of `FlowMatchScheduler`.

    Flow configurations (`FlowMatchEulerDiscreteScheduler` and its kin; UniPC and DPM-Solver with `use_flow_sigmas`)
    give the OT path; those of diffusion checkpoints (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC, ...) give
    `vp_discrete` with their betas. A configuration that is ours already comes back as it is.

    Args:
        config (`Mapping[str, Any]`):
            `scheduler.config`, or the contents of a `scheduler_config.json`.

    Returns:
        `dict[str, Any]`: Arguments of `FlowMatchScheduler`.

    Raises:
        ValueError: If the configuration is of an unknown kind, or asks for something that would change the images and
            that `FlowMatchScheduler` does not do.
    """
    class_name = config.get("_class_name")
    if "path" in config or class_name == "FlowMatchScheduler":
        return dict(config)
    if isinstance(class_name, str) and class_name in dir(diffusers):
        # An old JSON file may lack keys that its class has by default.
        parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
        config = {p.name: p.default for p in parameters if p.default is not p.empty} | dict(config)

    for key, neutral in UNSUPPORTED.items():
        if config.get(key, neutral) != neutral:
            raise ValueError(
                f"A {class_name or 'scheduler'} configuration with {key} = {config[key]!r} cannot become a "
                f"FlowMatchScheduler; the accepted value is {neutral!r}."
            )
    if config.get("use_flow_sigmas"):
        shared = _pick(
            config, ("num_train_timesteps", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
        )
        return shared | _pick(config, ("use_dynamic_shifting", "time_shift_type")) | {"shift": config["flow_shift"]}
    if "beta_start" in config:
        return _translate_diffusion(config)
    if "shift" in config:
        # `linspace` is stock's own grid. A configuration that was ours once carries our keys on, save those that were
        # at their defaults.
        flow = {"path": "ot", "timestep_spacing": "linspace"} | _pick(config, FLOW_KEYS + OWN_KEYS)
        if class_name == "FlowMatchHeunDiscreteScheduler":
            flow["solver"] = "heun"
        if class_name == "FlowMatchLCMScheduler":
            flow["stochastic_sampling"] = True
        return flow
    if class_name is None and set(config) <= {"_diffusers_version", *FLOW_KEYS}:
        return dict(config)
    raise ValueError(
        f"A configuration of {class_name or sorted(config)} cannot become a FlowMatchScheduler; accepted are flow "
        "matching configurations (with `shift`) and those of diffusion checkpoints (with `beta_start`)."
    )


def _translate_diffusion(config: Mapping[str, Any]) -> dict[str, Any]:
    shared = ("num_train_timesteps", "prediction_type", "timestep_spacing", "steps_offset", "clip_sample_range")
    grids = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
    translated = _pick(config, shared + grids)
    path_kwargs = _pick(config, BETA_KEYS)
    if path_kwargs.get("trained_betas") is not None:
        path_kwargs["trained_betas"] = [float(beta) for beta in path_kwargs["trained_betas"]]
    # Schedulers with `set_alpha_to_one` or `final_sigmas_type` say where they end; the others end in clean data.
    ends_clean = config.get("final_sigmas_type", "zero") == "zero" and config.get("set_alpha_to_one", True)
    return translated | {
        "path": "vp_discrete",
        "path_kwargs": path_kwargs,
        "timestep_spacing": translated.get("timestep_spacing", "leading"),
        "steps_offset": translated.get("steps_offset", 0),
        "clip_sample": bool(config.get("clip_sample", False)),
        "final_sigmas_type": "zero" if ends_clean else "sigma_min",
    }


# What `FlowMatchEulerDiscreteScheduler` does and cannot be told to do otherwise.
STOCK_BEHAVIOUR = {
    "prediction_type": "flow_prediction",
    "solver": "euler",
    "sampling_path": "ot",
    "timestep_spacing": "linspace",
    "clip_sample": False,
    "eta": 0.0,
    "s_churn": 0.0,
}


def stock_flow_config(config: Mapping[str, Any], path: ConditionalPath) -> dict[str, Any]:
    """
    The configuration of `FlowMatchEulerDiscreteScheduler` that gives the images of a configuration of ours.

    Args:
        config (`Mapping[str, Any]`):
            The configuration of a `FlowMatchScheduler`.
        path (`ConditionalPath`):
            Its path.

    Returns:
        `dict[str, Any]`: Arguments of `FlowMatchEulerDiscreteScheduler`.

    Raises:
        ValueError: If there is none; the message names every setting that stands in the way.
    """
    obstacles = [] if path == OTPath() else [f"the path {path} (not {OTPath()})"]
    obstacles += [
        f"{key} {config[key]!r} (not {value!r})" for key, value in STOCK_BEHAVIOUR.items() if config[key] != value
    ]
    if obstacles:
        raise ValueError(
            f"FlowMatchEulerDiscreteScheduler cannot give the same images: it lacks {', '.join(obstacles)}."
        )
    return _pick(config, FLOW_KEYS)
