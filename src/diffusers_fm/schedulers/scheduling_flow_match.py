# SPDX-License-Identifier: Apache-2.0
"""One scheduler that carries the conditional path: it trains, and it samples inside unchanged diffusers pipelines."""

import difflib
import inspect
import os
from collections.abc import Mapping
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from huggingface_hub import ModelCard

from ..hub.cards import CardContent, model_card
from ..hub.push import PushMixin
from ..paths import ConditionalPath, lift, make_path
from ..registry import full_name, is_own
from .grids import interpolate
from .multistep import read_calibration
from .sampling_loop import SamplingLoop
from .settings import PATH_SETTINGS, check_path_class, check_settings, leaving_settings
from .stock_configs import stock_flow_config, translate_stock_config


class FlowMatchScheduler(PushMixin, SamplingLoop):
    """
    Flow matching on any Gaussian path: the one carrier of the path for training, sampling and likelihood.

    Time `t` is in [0, 1], 0 = data and 1 = noise; networks are given `timestep = timestep_scale * t`, a float. Samples
    between steps are points `x_t = alpha(t) * data + sigma(t) * noise` of the configured path. Sampling integrates the
    straight coordinates, in which each path is the OT path and Euler is DDIM (`sampling_path="ot"`), or the path's own
    ODE (`"native"`, as in arXiv 2210.02747).

    The shared parameters are those of [`~diffusers.FlowMatchEulerDiscreteScheduler`], with its defaults and meaning;
    `sigmas` are times of the straight coordinates, `sigma / (alpha + sigma)`, in [0, 1]. [`from_config`] takes the
    configurations of stock schedulers, flow or diffusion, and then gives their images.

    Args:
        num_train_timesteps (`int`, *optional*, defaults to 1000):
            What `t = 1` is called towards the network.
        shift (`float`, *optional*, defaults to 1.0):
            Static shift of the grid, `s -> shift s / (1 + (shift - 1) s)`.
        use_dynamic_shifting (`bool`, *optional*, defaults to `False`):
            Shift by the `mu` given to `set_timesteps`.
        base_shift (`float`, *optional*, defaults to 0.5):
            `mu` at `base_image_seq_len`; read by pipelines.
        max_shift (`float`, *optional*, defaults to 1.15):
            `mu` at `max_image_seq_len`; read by pipelines.
        base_image_seq_len (`int`, *optional*, defaults to 256):
            Read by pipelines.
        max_image_seq_len (`int`, *optional*, defaults to 4096):
            Read by pipelines.
        invert_sigmas (`bool`, *optional*, defaults to `False`):
            The network's time and velocity run from noise to data (Mochi). OT path with `flow_prediction` only.
        shift_terminal (`float`, *optional*):
            Stretch the shifted grid to end at this value.
        use_karras_sigmas (`bool`, *optional*, defaults to `False`):
            Karras grid (arXiv 2206.00364).
        use_exponential_sigmas (`bool`, *optional*, defaults to `False`):
            Exponential grid.
        use_beta_sigmas (`bool`, *optional*, defaults to `False`):
            Beta grid (arXiv 2407.12173); needs scipy.
        time_shift_type (`str`, *optional*, defaults to `"exponential"`):
            `exponential` or `linear` dynamic shift.
        stochastic_sampling (`bool`, *optional*, defaults to `False`):
            Replace the noise by fresh noise at each step. Solver `euler` only.
        path (`str`, *optional*, defaults to `"ot"`):
            `ot`, `vp`, `ve`, `cosine` or `vp_discrete` (see `paths.PATHS`), or one of [`~paths.register_path`].
        path_kwargs (`dict`, *optional*):
            The parameters of the path, such as `{"sigma_min": 1e-4}`.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network answers: `flow_prediction`, `epsilon`, `sample`, `v_prediction` or `score`.
        solver (`str`, *optional*, defaults to `"euler"`):
            With one call of the network a step: `euler`; `ab2`, `ab3` (Adams-Bashforth of order 2 and 3); `abm2`,
            `abm3` (the same, each call also correcting the steps before, best with `sampling_path="angle"`);
            `dpmpp_2m` (arXiv 2211.01095); `calibrated`, steps fitted to the network (see `calibration`);
            `euler_maruyama` (stochastic); `flow_map`, for a network that is conditioned on the end of its step
            ([`interval_end`]). With several: `midpoint`, `heun` (2), `rk4` (4), `dopri5` (6); these list
            every stage in `timesteps`, and `order` is the number of stages.
        sampling_path (`str`, *optional*, defaults to `"ot"`):
            The coordinates of the integration: `ot`, the straight ones; `native`, the path's own; `angle`, those of
            `atan2(sigma, alpha * sigma_data)`.
        timestep_spacing (`str`, *optional*, defaults to `"trailing"`):
            `trailing`: 1, (N-1)/N, ..., 1/N, then 0. `graded`: finer towards both ends, most towards the data,
            angles `(pi / 2) (1 - (i / N)^1.3)^1.75`. `linspace`: the grid of stock flow schedulers, whose last step
            spans only 1/1000 (before the shift). On `vp_discrete`, the integer timesteps of diffusion schedulers by
            that name, `leading` included.
        final_sigmas_type (`str`, *optional*, defaults to `"zero"`):
            Where a path whose noise does not vanish at t = 0 ends: in the data estimate (`zero`, by one straight step)
            or at t = 0 (`sigma_min`).
        steps_offset (`int`, *optional*, defaults to 1):
            Added to `leading` timesteps.
        clip_sample (`bool`, *optional*, defaults to `False`):
            Clip the data estimate at each step. Solver `euler` only.
        clip_sample_range (`float`, *optional*, defaults to 1.0):
            The largest magnitude that clipping leaves.
        sigma_data (`float`, *optional*):
            Standard deviation of the data, for `angle` and `graded`; 1 where it is not known.
        eta (`float`, *optional*, defaults to 0.0):
            Stochastic sampling between the ODE (0) and the ancestral step of DDPM (1), in [0, 1]. Solver `euler` only.
        s_churn (`float`, *optional*, defaults to 0.0):
            Noise added before each step, as in EDM (arXiv 2206.00364, algorithm 2), with the network called at the
            raised time. Runge-Kutta solvers only.
        s_tmin (`float`, *optional*, defaults to 0.0):
            Least `sigma / alpha` at which to churn.
        s_tmax (`float`, *optional*):
            Greatest `sigma / alpha` at which to churn; no bound by default.
        s_noise (`float`, *optional*, defaults to 1.0):
            Scale of the churned noise; 1 keeps the marginals.
        diffusion_form (`str`, *optional*, defaults to `"sigma"`):
            Diffusion coefficient of `euler_maruyama`, with `sigma` the noise level of the integration's coordinates:
            `sigma`, `sigma_squared` or `constant`.
        diffusion_scale (`float`, *optional*, defaults to 1.0):
            Its factor, at least 0.
        calibration (`dict`, *optional*):
            For `calibrated`: by number of steps, the `sigmas` of its calls, and `keep` and `weights` of its steps, as
            [`~schedulers.calibration.calibrate`] finds them; other numbers of steps are made by `abm3`. The sampling
            path is `angle`, and the grid is neither shifted nor replaced.
        flow_map (`dict`, *optional*):
            Of a network that is conditioned on the end of its step: `first_block`, the first block of a transformer
            that gets it; `num_inference_steps`, the number of calls that it draws best in; `guidance_scale`, the
            guidance that it has learned; `flow_shift`, the shift of its flow, which other solvers and trainings take.
        default_num_inference_steps (`int`, *optional*):
            Number of steps that pipelines of this package make if none is given; 50 if it is `None`. It belongs to
            the solver, as [`~schedulers.recommendation.recommend`] finds both.

    Raises:
        ValueError: If a value is not one of those above, or two of them exclude each other.
    """

    _compatibles: ClassVar = ["FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        path: str = "ot",
        path_kwargs: Mapping[str, Any] | None = None,
        prediction_type: str = "flow_prediction",
        solver: str = "euler",
        sampling_path: str = "ot",
        timestep_spacing: str = "trailing",
        final_sigmas_type: str = "zero",
        steps_offset: int = 1,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        sigma_data: float | None = None,
        eta: float = 0.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        diffusion_form: str = "sigma",
        diffusion_scale: float = 1.0,
        calibration: Mapping[str, Any] | None = None,
        flow_map: Mapping[str, Any] | None = None,
        default_num_inference_steps: int | None = None,
    ):
        check_settings(self.config)
        if "_use_default_values" in self.config:
            # Every value counts as chosen: stock classes drop what the source had by default, which is not theirs.
            self.register_to_config(_use_default_values=[])
        self._calibrated_steps = read_calibration(calibration or {})
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            invert_sigmas=invert_sigmas,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self.path = self._configured_path = self.build_path()
        if is_own(type(self.path)):
            # So that whoever loads the file without the path learns where it comes from.
            self.register_to_config(_path_class=full_name(type(self.path)))
        if path != "ot":
            # Before `set_timesteps`, every time a network is trained at, as in stock schedulers.
            t = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
            self.sigmas, self.timesteps = self.path.ratio(t).float(), (self.timestep_scale * t).float()
        self._forget_loop()

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "FlowMatchScheduler | tuple[FlowMatchScheduler, dict[str, Any]]":
        """
        Build the scheduler from a configuration: its own, or that of a stock scheduler.

        From `FlowMatchEulerDiscreteScheduler` it gives the same images (grid, shift, Euler). From the scheduler of a
        diffusion checkpoint (DDIM, DDPM, PNDM, Euler, DPM-Solver, ...) it takes the betas, the prediction type and the
        timesteps, and Euler gives the images of DDIM with eta = 0; of `DDIMScheduler` itself on the grid `leading`,
        and on `trailing` where the steps divide `num_train_timesteps`: elsewhere it steps beside its grid. `kwargs`
        change what is taken over, and keys of the source that have no meaning here are kept, so that its class can be
        built from ours again.

        Args:
            config (`Mapping[str, Any]`):
                `scheduler.config`, or the contents of a `scheduler_config.json`.
            return_unused_kwargs (`bool`, *optional*, defaults to `False`):
                Whether to return the unused `kwargs` too.
            kwargs: Arguments of `FlowMatchScheduler` that replace those of `config`.

        Returns:
            `FlowMatchScheduler`, with `return_unused_kwargs` a tuple of it and a `dict`.

        Raises:
            ValueError: If the configuration cannot be honoured.
        """
        if not isinstance(config, Mapping):
            raise ValueError(f"`config` must be a configuration dictionary, got {config!r}.")
        known = inspect.signature(cls.__init__).parameters
        misspelt = [] if return_unused_kwargs else [name for name in kwargs if name not in known]
        if misspelt:
            near = difflib.get_close_matches(misspelt[0], [name for name in known if name != "self"], 1, 0.0)[0]
            raise ValueError(f"A {cls.__name__} has no setting {misspelt[0]!r}; the nearest one is {near!r}.")
        saved_by = config.get("_class_name", cls.__name__)
        if "path" in config and saved_by not in (*dir(diffusers), *(base.__name__ for base in cls.__mro__)):
            raise ValueError(
                f"The configuration was saved by a {saved_by}, not a {cls.__name__}: load it with that class."
            )
        # What has no meaning here is kept below; the base class would warn of it each time.
        translated = translate_stock_config(config, kwargs)
        translated = {k: v for k, v in translated.items() if k in known or k.startswith("_")}
        translated.pop("_use_default_values", None)
        path_class = translated.pop("_path_class", None)
        if path_class is not None and "path" not in kwargs:
            check_path_class(translated["path"], path_class)
        defaults = {name: parameter.default for name, parameter in known.items()}
        kwargs = leaving_settings(defaults | translated, kwargs) | kwargs
        if "shift" in kwargs:
            translated.pop("_linspace_shift", None)
        built: Any = super().from_config(translated, return_unused_kwargs=True, **kwargs)
        scheduler, unused = built
        foreign = {k: v for k, v in config.items() if k not in scheduler.config and not k.startswith("_")}
        scheduler.register_to_config(**foreign)
        if "_linspace_shift" in translated:
            scheduler._spread_linspace(translated["_linspace_shift"])
        return (scheduler, unused) if return_unused_kwargs else scheduler

    def with_settings(self, **changes: Any) -> "FlowMatchScheduler":
        """
        The same scheduler with other settings: its class, its path and a shift that was set later stay.

        Settings that belong to the solver leave with it, unless `changes` has them: a calibration, `clip_sample`,
        `eta`, `stochastic_sampling` and `s_churn` where the new solver has no use for them, and coordinates that it
        does not work in. With `default_num_inference_steps` the coordinates and the grid leave that it was found for,
        and the shift of a flow map gives way to that of its flow.

        Args:
            changes: Settings of the scheduler, such as `solver="heun"`.

        Returns:
            `FlowMatchScheduler`: A new scheduler, its loop not laid out.

        Raises:
            ValueError: If there is no setting of that name, or a value is not accepted.
        """
        scheduler: Any = type(self).from_config(self.config, **changes)
        if self.path is not self._configured_path and not PATH_SETTINGS & set(changes):
            scheduler.path = self.path
        return scheduler

    @classmethod
    def from_stock(cls, scheduler: SchedulerMixin) -> "FlowMatchScheduler":
        """
        The scheduler with the images of one of diffusers: [`from_config`], with the shift that was set since.

        Args:
            scheduler (`SchedulerMixin`):
                A scheduler of diffusers.

        Returns:
            `FlowMatchScheduler`: A new scheduler, its loop not laid out.

        Raises:
            ValueError: If it cannot be honoured.
        """
        stock = next(base.__name__ for base in type(scheduler).__mro__ if base.__module__.startswith("diffusers."))
        ours: Any = cls.from_config({**scheduler.config, "_class_name": stock})
        flows = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler)
        if isinstance(scheduler, flows) and scheduler.shift != ours.shift:
            ours.set_shift(scheduler.shift)
        return ours

    def to_stock(self) -> FlowMatchEulerDiscreteScheduler:
        """
        diffusers' own scheduler with the same images, for readers who do not have this package.

        It exists for the plain OT path with `flow_prediction`, Euler steps and stock's grid, `linspace`. A scheduler
        made afresh has the grid `trailing`; `FlowMatchScheduler.from_config(config, timestep_spacing="linspace")` is
        the same with stock's. In pipelines that hand over their own sigmas (Flux, Qwen-Image) the two do not differ.

        Returns:
            `FlowMatchEulerDiscreteScheduler`: A new scheduler, its loop not laid out.

        Raises:
            ValueError: If there is none; the message names every setting that stands in the way.
        """
        config = stock_flow_config(self.config, self.path)
        stock = FlowMatchEulerDiscreteScheduler(**config | {"shift": self.config.get("_linspace_shift", self.shift)})
        stock.set_shift(self.shift)
        # So that its file has the shift too.
        stock.register_to_config(shift=self.shift)
        return stock

    def build_model_card(self, repo_id: str) -> ModelCard:
        """
        The card that `push_to_hub` writes where the repository has none.

        Args:
            repo_id (`str`):
                The repository.

        Returns:
            `ModelCard`: The card.
        """
        snippet = f"""
from diffusers_fm import FlowMatchScheduler

scheduler = FlowMatchScheduler.from_pretrained("{repo_id}")
"""
        summary = "The scheduler of a flow matching model for `diffusers-fm`: its path and how it is sampled."
        return model_card(CardContent(repo_id, summary, snippet, self.config, self.path))

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Write `scheduler_config.json`, see [`~diffusers.ConfigMixin.save_config`].

        Raises:
            ValueError: If `path` was replaced by one that the configuration does not give.
        """
        if self.path is not self._configured_path and self.path != self._configured_path:
            raise ValueError(
                f"The scheduler's path was set to {self.path}, and its configuration gives {self._configured_path}: it"
                " would be loaded as that. Make a scheduler with the settings `path` and `path_kwargs`."
            )
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def build_path(self) -> ConditionalPath:
        """
        Make the path from the configuration. A path of one's own has a name, see [`~paths.register_path`]; a subclass
        may make it here instead, and its files are then loaded by that subclass alone.

        Returns:
            `ConditionalPath`: What training, sampling and likelihood all read.

        Raises:
            ValueError: If the configuration names no path, or gives it wrong parameters.
        """
        path_kwargs = self.config.path_kwargs or {}
        if not isinstance(path_kwargs, Mapping):
            raise ValueError(f"`path_kwargs` must be a dictionary, got {path_kwargs!r}.")
        path_kwargs = dict(path_kwargs)
        if self.config.path == "vp_discrete":
            train_steps = self.config.num_train_timesteps
            if path_kwargs.setdefault("num_train_timesteps", train_steps) != train_steps:
                raise ValueError(
                    f"`path_kwargs` must leave `num_train_timesteps` to the scheduler, where it is {train_steps}, got "
                    f"{path_kwargs['num_train_timesteps']!r}."
                )
        return make_path(self.config.path, **path_kwargs)

    # What pipelines read

    @property
    def init_noise_sigma(self) -> float:
        """The scale of the noise from which sampling starts: 1, save on paths that grow (VE)."""
        return self.path.prior_std

    def time(self, timestep: torch.Tensor | float) -> torch.Tensor:
        """
        The path's time at a timestep of the network.

        Args:
            timestep (`torch.Tensor` or `float`):
                Any shape, in [0, `timestep_scale`].

        Returns:
            `torch.Tensor`: `t` in [0, 1], 0 = data, 1 = noise, at least float32, on the device of `timestep`.
        """
        timestep = torch.as_tensor(timestep)
        timestep = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
        # Times that were given beside sigmas tie the two for the loop that was laid out, not for training.
        if self._given_times is None or (self._begin_index is None and self._step_index is None):
            return self._untied_time(timestep)
        ratios, timesteps = (table.to(timestep) for table in self._given_times)
        return self.path.time_at(interpolate(timestep, timesteps, ratios))

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor | float | None = None) -> torch.Tensor:
        """
        What the network is given in place of `x_t`: the sample itself, on paths that grow (VE) one of unit
        variance.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                `x_t`.
            timestep (`torch.Tensor` of shape `(batch_size,)` or `()`, *optional*):
                Its timestep, needed on VE.

        Returns:
            `torch.Tensor`: The network's input, in the dtype of `sample`.
        """
        if type(self.path).input_scale is ConditionalPath.input_scale:
            return sample
        if timestep is None:
            raise ValueError(f"`timestep` must be given to `scale_model_input` on {self.path}, got None.")
        t = self.time(timestep)
        return (sample * lift(self.path.input_scale(t), sample)).to(sample.dtype)

    def interval_end(self, timestep: torch.Tensor) -> torch.Tensor:
        """
        End of the step in progress, for a network that is conditioned on it (`solver="flow_map"`).

        Args:
            timestep (`torch.Tensor`):
                What the network is given as the time of the step's start: any multiple of the scheduler's timestep,
                of any shape.

        Returns:
            `torch.Tensor`: The time at which the step ends, in the same unit. With another solver, and before and
            after a loop, `timestep` itself: the flow.
        """
        index = self._step_index if self._step_index is not None else self._begin_index or 0
        if self.config.solver != "flow_map" or index >= len(self._stages):
            return timestep
        ratios = self._ratios[index : index + 2].clamp(min=self.path.ratio_min)
        if self._given_times is None:
            start, end = self.timestep(self.path.time_at(ratios)).tolist()
        else:
            start, end = interpolate(ratios, *self._given_times).tolist()
        return timestep * (end / start) if start > 0 else timestep

    # Training

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        `x_t = alpha(t) * data + sigma(t) * noise` at any continuous per-sample timestep (arXiv 2210.02747, eq. 11).

        Args:
            original_samples (`torch.Tensor` of shape `(batch_size, ...)`):
                The data.
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, `(1,)` or `()`):
                In [0, `timestep_scale`], float or int; 0 = data. On a CPU tensor the range is checked; elsewhere that
                would stall the device.

        Returns:
            `torch.Tensor`: `x_t`, in the dtype of `original_samples`.

        Raises:
            ValueError: If noise is missing or a timestep is out of range.
        """
        return self.path.sample(original_samples, noise, self._checked_time(timesteps, original_samples, noise))

    def scale_noise(
        self, sample: torch.Tensor, timestep: torch.Tensor | float, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        [`add_noise`] in the argument order of stock flow schedulers.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                The data.
            timestep (`torch.Tensor` of shape `(batch_size,)`, `(1,)` or `()`):
                In [0, `timestep_scale`].
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.

        Returns:
            `torch.Tensor`: `x_t`, in the dtype of `sample`.

        Raises:
            ValueError: If noise is missing or a timestep is out of range.
        """
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        The conditional velocity `dx_t/dt` (arXiv 2210.02747, theorem 3); on OT `noise - data`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                The data.
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, `(1,)` or `()`):
                In [0, `timestep_scale`].

        Returns:
            `torch.Tensor`: The velocity, in the dtype of `sample`.

        Raises:
            ValueError: If a timestep is out of range, or the velocity has no limit there (VP at 0).
        """
        return self.path.velocity(sample, noise, self._checked_time(timesteps, sample, noise))

    def get_target(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """
        What the network should answer at `x_t` by the configured `prediction_type`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                The data.
            noise (`torch.Tensor` of shape `(batch_size, ...)`):
                Standard normal noise.
            timesteps (`torch.Tensor` of shape `(batch_size,)`, `(1,)` or `()`):
                In [0, `timestep_scale`].

        Returns:
            `torch.Tensor`: The target of the conditional flow matching loss, in the dtype of `sample`.

        Raises:
            ValueError: If a timestep is out of range, or the target has no limit there.
        """
        t = self._checked_time(timesteps, sample, noise)
        target = self.path.target(sample, noise, t, self.config.prediction_type)
        return -target if self.config.invert_sigmas else target

    def _checked_time(
        self, timesteps: torch.Tensor | float, sample: torch.Tensor, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """The path's times of samples, once all of it is known to fit."""
        if noise is None or noise.shape != sample.shape:
            shape = None if noise is None else tuple(noise.shape)
            raise ValueError(
                f"`noise` must be a tensor of the shape of the sample, {tuple(sample.shape)}, got {shape}."
            )
        timesteps = torch.as_tensor(timesteps)
        if timesteps.shape not in ((), (1,), sample.shape[:1]):
            raise ValueError(
                f"`timesteps` must be one number or one for each of {len(sample)} samples, got the shape "
                f"{tuple(timesteps.shape)}."
            )
        if timesteps.device.type == "cpu":
            outside = (timesteps < 0) | (timesteps > self.timestep_scale * (1 + 1e-6)) | timesteps.isnan()
            if bool(outside.any()):
                value = timesteps[outside].flatten()[0].item()
                raise ValueError(f"`timesteps` must lie in [0, {self.timestep_scale:g}], got {value:g}.")
        return self.time(timesteps).clamp(0, 1)
