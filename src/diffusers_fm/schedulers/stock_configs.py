# SPDX-License-Identifier: Apache-2.0
"""Configurations of diffusers' own schedulers, read as configurations of `FlowMatchScheduler` and made from them."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import diffusers

from ..paths import ConditionalPath, DiscreteVPPath, OTPath
from .settings import GRIDS


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

MEANT_KEYS = tuple(key for key in FLOW_KEYS if not key.startswith(("base_", "max_")))
"""Keys of `FLOW_KEYS` that schedulers read; the others are for pipelines."""

BETA_KEYS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr", "snr_shift_scale")
"""Noise schedule of a diffusion checkpoint's configuration."""

# What Cosmos registers with stock flow schedulers and reads again; on the OT path neither changes the samples.
CARRIED = ("sigma_data", "final_sigmas_type")
# Keys that are read here, and those that belong to stock's own solvers and do not change the model or its grid.
READ = {
    *FLOW_KEYS,
    *BETA_KEYS,
    *("prediction_type", "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range", "final_sigmas_type"),
    *("set_alpha_to_one", "use_flow_sigmas", "flow_shift", "sigma_min", "sigma_max"),
    *(
        "solver_order",
        "solver_type",
        "solver_p",
        "algorithm_type",
        "lower_order_final",
        "euler_at_final",
        "predict_x0",
    ),
    *("disable_corrector", "predictor_order", "corrector_order", "tau_func", "skip_prk_steps", "noise_sampler_seed"),
    *("variance_type", "dynamic_thresholding_ratio", "sample_max_value", "upscale_mode"),
}
# Options that change the images and have no counterpart here, with the value at which they do nothing.
UNSUPPORTED = {
    "thresholding": False,
    "use_lu_lambdas": False,
    "lambda_min_clipped": -math.inf,
    "scale_factors": None,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
}

FLOW_CLASSES = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {"solver": "heun"},
    "FlowMatchLCMScheduler": {"stochastic_sampling": True},
}
"""Stock flow schedulers, and what their step is called here."""

DIFFUSION_CLASSES = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("LMSDiscreteScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "SASolverScheduler"),
    *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DPMSolverSDEScheduler"),
    *("UniPCMultistepScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
)
# These end at t = 0 of their betas and have no key for it.
END_AT_FIRST_BETA = ("DEISMultistepScheduler", "SASolverScheduler")

REFUSED_CLASSES = {
    "RePaintScheduler": "it goes back to more noise on the way",
    "LCMScheduler": "it draws new noise at each step, at timesteps of its own",
    "TCDScheduler": "it draws new noise at each step, at timesteps of its own",
    "LTXEulerAncestralRFScheduler": "it draws new noise at each step",
    "DDIMInverseScheduler": "it runs from data to noise",
    "DPMSolverMultistepInverseScheduler": "it runs from data to noise",
    "FlowMapEulerDiscreteScheduler": "its networks take two times",
}


def _pick(config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {key: config[key] for key in keys if key in config}


def _refuse(class_name: str | None, key: str, value: Any, accepted: Any) -> NoReturn:
    raise ValueError(
        f"A {class_name or 'scheduler'} configuration with {key} = {value!r} cannot become a FlowMatchScheduler; the "
        f"accepted value is {accepted!r}."
    )


def _class_of(config: Mapping[str, Any]) -> str | None:
    """The class that a configuration names, or whose keys it has: the configurations of objects name none."""
    if "_class_name" in config:
        return config["_class_name"]
    keys = {key for key in config if not key.startswith("_")}
    same = [name for name in (*FLOW_CLASSES, *DIFFUSION_CLASSES, *REFUSED_CLASSES) if keys == set(_defaults(name))]
    if len(same) > 1 and len({name in REFUSED_CLASSES for name in same}) > 1:
        raise ValueError(f"A configuration of {sorted(keys)} may be one of {same}: give its `_class_name`.")
    return same[0] if same else None


def _defaults(class_name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(diffusers, class_name).__init__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def translate_stock_config(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """
    Read the configuration of a stock scheduler as one of `FlowMatchScheduler`.

    Flow configurations (`FlowMatchEulerDiscreteScheduler` and its kin; UniPC and DPM-Solver with `use_flow_sigmas`)
    give the OT path; those of diffusion checkpoints (DDPM, DDIM, PNDM, Euler, DPM-Solver, UniPC, ...) give
    `vp_discrete` with their betas. A configuration that is ours already comes back as it is. Keys that the class named
    in the configuration does not have are left over from another class, and mean nothing.
    """
    class_name = _class_of(config)
    is_stock = isinstance(class_name, str) and class_name in dir(diffusers)
    if class_name == "FlowMatchScheduler" or ("path" in config and not is_stock):
        return dict(config)
    if is_stock:
        if class_name in REFUSED_CLASSES:
            raise ValueError(f"A {class_name} cannot become a FlowMatchScheduler: {REFUSED_CLASSES[class_name]}.")
        # Settings of ours that a stock flow scheduler carries on, perhaps without those that were at their defaults.
        ours = config if {"path", "solver", "sampling_path", "path_kwargs"} & set(config) else {}
        if ours and class_name == "FlowMatchEulerDiscreteScheduler":
            return {"path": "ot", "timestep_spacing": "linspace"} | dict(config)
        # An old JSON file may lack keys that its class has by default.
        defaults = _defaults(class_name)
        given, config = config, defaults | _pick(config, defaults)
        if class_name in FLOW_CLASSES:
            config |= _pick(given, CARRIED) | {"timestep_spacing": ours.get("timestep_spacing", "linspace")}
        elif class_name not in DIFFUSION_CLASSES:
            config = {"sample_size": None}
        unread = {key: value for key, value in defaults.items() if key not in READ} | UNSUPPORTED
    else:
        unread = UNSUPPORTED

    config = {**config, **_pick(changes, (*GRIDS, "final_sigmas_type", "prediction_type"))}
    for key, neutral in unread.items():
        if config.get(key, neutral) != neutral:
            _refuse(class_name, key, config[key], neutral)
    if config.get("use_flow_sigmas"):
        return _translate_flow(class_name, config)
    if "beta_start" in config:
        return _translate_diffusion(class_name, config)
    if "shift" in config:
        flow = {"path": "ot", "timestep_spacing": config.get("timestep_spacing", "linspace")}
        return flow | _pick(config, (*FLOW_KEYS, *CARRIED)) | FLOW_CLASSES.get(str(class_name), {})
    if class_name is None and set(config) <= {"_diffusers_version", *FLOW_KEYS}:
        return dict(config)
    raise ValueError(
        f"A configuration of {class_name or sorted(config)} cannot become a FlowMatchScheduler; accepted are flow "
        "matching configurations (with `shift`) and those of diffusion checkpoints (with `beta_start`)."
    )


def _translate_flow(class_name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    """UniPC, DPM-Solver, DEIS and SASolver on flows: their special grids lie between levels that betas give."""
    for key in GRIDS:
        if config.get(key):
            _refuse(class_name, key, config[key], False)
    if config.get("final_sigmas_type", "zero") != "zero":
        _refuse(class_name, "final_sigmas_type", config["final_sigmas_type"], "zero")
    prediction_type = config.get("prediction_type", "flow_prediction")
    if prediction_type not in ("flow_prediction", "epsilon", "sample"):
        # Stock's velocity of diffusion models is not scaled to the flow's alpha and sigma.
        _refuse(class_name, "prediction_type", prediction_type, "flow_prediction")
    keys = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    return _pick(config, keys) | {"shift": config.get("flow_shift", 1.0), "prediction_type": prediction_type}


def _translate_diffusion(class_name: str | None, config: Mapping[str, Any]) -> dict[str, Any]:
    # Schedulers of old that lack the key, such as RePaint's kin, predict the noise.
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in ("epsilon", "sample", "v_prediction"):
        _refuse(class_name, "prediction_type", prediction_type, "epsilon")
    path_kwargs = _pick(config, BETA_KEYS)
    if path_kwargs.get("trained_betas") is not None:
        path_kwargs["trained_betas"] = [float(beta) for beta in path_kwargs["trained_betas"]]
    # Schedulers with `set_alpha_to_one` or `final_sigmas_type` say where they end; most others end in clean data.
    ends_clean = config.get("final_sigmas_type", "zero") == "zero" and config.get("set_alpha_to_one", True)
    return _pick(config, ("num_train_timesteps", "clip_sample_range", *GRIDS)) | {
        "path": "vp_discrete",
        "path_kwargs": path_kwargs,
        "prediction_type": prediction_type,
        "timestep_spacing": config.get("timestep_spacing", "leading"),
        "steps_offset": config.get("steps_offset", 0),
        "clip_sample": bool(config.get("clip_sample", False)) and not str(class_name).startswith("CogVideoX"),
        "final_sigmas_type": "zero" if ends_clean and class_name not in END_AT_FIRST_BETA else "sigma_min",
    }


# Fixed behaviour of `FlowMatchEulerDiscreteScheduler`.
STOCK_BEHAVIOUR = {
    "prediction_type": "flow_prediction",
    "solver": "euler",
    "sampling_path": "ot",
    "timestep_spacing": "linspace",
    "clip_sample": False,
    "eta": 0.0,
    "s_churn": 0.0,
}


def stock_flow_config(
    config: Mapping[str, Any],
    path: ConditionalPath,
    class_name: str = "FlowMatchEulerDiscreteScheduler",
    spacing: str = "linspace",
) -> dict[str, Any]:
    """The configuration of a stock flow scheduler of Euler steps on a grid that gives the images of one of ours."""
    shared = _defaults(class_name)
    behaviour = STOCK_BEHAVIOUR | {"timestep_spacing": spacing}
    behaviour |= {key: _defaults("FlowMatchEulerDiscreteScheduler")[key] for key in MEANT_KEYS if key not in shared}
    obstacles = [] if path == OTPath() else [f"the path {path} (not {OTPath()})"]
    obstacles += [f"{key} {config[key]!r} (not {value!r})" for key, value in behaviour.items() if config[key] != value]
    if obstacles:
        raise ValueError(f"{class_name} cannot give the same images: it lacks {', '.join(obstacles)}.")
    return _pick(config, set(FLOW_KEYS) & set(shared))


def stock_diffusion_config(config: Mapping[str, Any], path: ConditionalPath) -> dict[str, Any]:
    """
    The configuration of `DDIMScheduler` that gives the images of a configuration of ours; on the grid `trailing` where
    the number of steps divides `num_train_timesteps`.
    """
    obstacles = [] if isinstance(path, DiscreteVPPath) else [f"the path {path} (not vp_discrete)"]
    behaviour = {"solver": "euler", "sampling_path": "ot", "eta": 0.0, "s_churn": 0.0} | dict.fromkeys(GRIDS, False)
    obstacles += [f"{key} {config[key]!r} (not {value!r})" for key, value in behaviour.items() if config[key] != value]
    # DDIMScheduler goes down by the same number of timesteps in each step, wherever the next one of its grid lies.
    if config["timestep_spacing"] in ("graded", "linspace"):
        obstacles += [f"timestep_spacing {config['timestep_spacing']!r} (not 'leading' or 'trailing')"]
    if getattr(path, "snr_shift_scale", 1.0) != 1.0:
        obstacles += ["snr_shift_scale (not 1.0)"]
    if obstacles:
        raise ValueError(f"DDIMScheduler cannot give the same images: it lacks {', '.join(obstacles)}.")
    keys = ("num_train_timesteps", "prediction_type", "timestep_spacing", "steps_offset", "clip_sample")
    betas = _pick(config["path_kwargs"] or {}, BETA_KEYS[:-1])
    ends = {"set_alpha_to_one": config["final_sigmas_type"] == "zero"}
    return _pick(config, (*keys, "clip_sample_range")) | betas | ends
