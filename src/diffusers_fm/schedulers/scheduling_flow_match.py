# SPDX-License-Identifier: Apache-2.0
"""One scheduler that carries the conditional path: it trains, and it samples inside unchanged diffusers pipelines."""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    SchedulerMixin,
)
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCard

from ..hub.cards import CardContent, model_card
from ..hub.push import PushMixin
from ..paths import ConditionalPath, lift, make_path
from .grids import check_lengths, check_times, integer_timesteps, interpolate, spaced_ratios, to_list
from .multistep import read_calibration
from .sampling_plan import SamplingPlan, Stage, runge_kutta_tableau
from .settings import PATH_SETTINGS, check_number, check_settings, leaving_settings
from .stock_configs import stock_flow_config, translate_stock_config


class FlowMatchScheduler(PushMixin, FlowMatchEulerDiscreteScheduler):
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
            `ot`, `vp`, `ve`, `cosine` or `vp_discrete` (see `paths.PATHS`).
        path_kwargs (`dict`, *optional*):
            The parameters of the path, such as `{"sigma_min": 1e-4}`.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network answers: `flow_prediction`, `epsilon`, `sample`, `v_prediction` or `score`.
        solver (`str`, *optional*, defaults to `"euler"`):
            With one call of the network a step: `euler`; `ab2`, `ab3` (Adams-Bashforth of order 2 and 3); `abm2`,
            `abm3` (the same, each call also correcting the steps before, best with `sampling_path="angle"`);
            `dpmpp_2m` (arXiv 2211.01095); `calibrated`, steps fitted to the network (see `calibration`);
            `euler_maruyama` (stochastic). With several: `midpoint`, `heun` (2), `rk4` (4), `dopri5` (6); these list
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
        sigma_data (`float`, *optional*, defaults to 1.0):
            Standard deviation of the data, for `angle` and `graded`.
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
            [`~schedulers.calibration.calibrate`] finds them. The sampling path is `angle`, and the grid is neither
            shifted nor replaced.

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
        sigma_data: float = 1.0,
        eta: float = 0.0,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float | None = None,
        s_noise: float = 1.0,
        diffusion_form: str = "sigma",
        diffusion_scale: float = 1.0,
        calibration: Mapping[str, Any] | None = None,
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
        self.path = self.build_path()
        if path != "ot":
            # Before `set_timesteps`, every time a network is trained at, as in stock schedulers.
            t = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float64) / num_train_timesteps
            self.sigmas, self.timesteps = self.path.ratio(t).float(), (self.timestep_scale * t).float()
        self.num_inference_steps: int | None = None
        self._ratios = torch.empty(0, dtype=torch.float64)
        self._laid_out = torch.empty(0)
        self._stages: list[Stage] = []
        # Times that the user gave beside sigmas: (sigmas rising, timesteps), which then tie one to the other.
        self._given_times: tuple[torch.Tensor, torch.Tensor] | None = None
        self._step_start: torch.Tensor | None = None
        self._derivatives: list[torch.Tensor] = []

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "FlowMatchScheduler | tuple[FlowMatchScheduler, dict[str, Any]]":
        """
        Build the scheduler from a configuration: its own, or that of a stock scheduler.

        From `FlowMatchEulerDiscreteScheduler` it gives the same images (grid, shift, Euler). From the scheduler of a
        diffusion checkpoint (DDIM, DDPM, PNDM, Euler, DPM-Solver, ...) it takes the betas, the prediction type and the
        timesteps, and Euler gives the images of DDIM with eta = 0. `kwargs` change what is taken over, and keys of the
        source that have no meaning here are kept, so that its class can be built from ours again.

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
        # What has no meaning here is kept below; the base class would warn of it each time.
        translated = translate_stock_config(config, kwargs)
        translated = {k: v for k, v in translated.items() if k in known or k.startswith("_")}
        translated.pop("_use_default_values", None)
        if "shift" in kwargs:
            translated.pop("_linspace_shift", None)
        defaults = {name: parameter.default for name, parameter in known.items()}
        kwargs = leaving_settings(defaults | translated, kwargs) | kwargs
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
        does not work in.

        Args:
            changes: Settings of the scheduler, such as `solver="heun"`.

        Returns:
            `FlowMatchScheduler`: A new scheduler, its loop not laid out.

        Raises:
            ValueError: If there is no setting of that name, or a value is not accepted.
        """
        scheduler: Any = type(self).from_config(self.config, **changes)
        if not PATH_SETTINGS & set(changes):
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

    def build_path(self) -> ConditionalPath:
        """
        Make the path from the configuration; a subclass with a path of its own overrides this one method.

        Returns:
            `ConditionalPath`: What training, sampling and likelihood all read.
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
    def order(self) -> int:
        """Turns of the sampling loop for each step: the stages of the solver."""
        return runge_kutta_tableau(self.config.solver).stages

    @property
    def init_noise_sigma(self) -> float:
        """The scale of the noise from which sampling starts: 1, save on paths that grow (VE)."""
        return self.path.prior_std

    @property
    def timestep_scale(self) -> float:
        """`timestep / t`: `num_train_timesteps`, on `vp_discrete` one less: integer timesteps are its knots."""
        last_knot = self.config.path == "vp_discrete"
        return float(self.config.num_train_timesteps - last_knot)

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

    def _untied_time(self, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep / self.timestep_scale
        return 1 - t if self.config.invert_sigmas else t

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
        if noise is None:
            raise ValueError("`noise` must be a tensor of the shape of the sample, got None.")
        return self.path.sample(original_samples, noise, self._checked_time(timesteps))

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
        return self.path.velocity(sample, noise, self._checked_time(timesteps))

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
        target = self.path.target(sample, noise, self._checked_time(timesteps), self.config.prediction_type)
        return -target if self.config.invert_sigmas else target

    def _checked_time(self, timesteps: torch.Tensor | float) -> torch.Tensor:
        timesteps = torch.as_tensor(timesteps)
        if timesteps.device.type == "cpu":
            outside = (timesteps < 0) | (timesteps > self.timestep_scale * (1 + 1e-6)) | timesteps.isnan()
            if bool(outside.any()):
                value = timesteps[outside].flatten()[0].item()
                raise ValueError(f"`timesteps` must lie in [0, {self.timestep_scale:g}], got {value:g}.")
        return self.time(timesteps).clamp(0, 1)

    # The sampling grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | torch.Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | torch.Tensor | None = None,
    ) -> None:
        """
        Lay out the sampling loop: `timesteps` for the network, `sigmas` (one longer) for those who look.

        Args:
            num_inference_steps (`int`, *optional*):
                Number of steps, each of `order` calls of the network.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` and `sigmas` go.
            sigmas (`list[float]`, `np.ndarray` or `torch.Tensor`, *optional*):
                A grid of straight times, descending in [0, 1], before shifting; the end is appended. Values above the
                path's own start are moved to it.
            mu (`float`, *optional*):
                The dynamic shift; needed with `use_dynamic_shifting`, ignored without.
            timesteps (`list[float]`, `np.ndarray` or `torch.Tensor`, *optional*):
                Times for the network, descending in [0, `timestep_scale`]. Alone they are the grid, unshifted (with
                `timestep_spacing="linspace"` stock shifts the sigmas that belong to them, and so does this); beside
                `sigmas` they are only handed on.

        Raises:
            ValueError: If nothing or contradicting things are given, values are out of range or not descending, or the
                path has no defined derivative at the start of the grid for this `prediction_type`.
        """
        sigmas, timesteps = to_list("sigmas", sigmas), to_list("timesteps", timesteps)
        check_lengths(num_inference_steps, sigmas, timesteps)
        check_times("sigmas", sigmas, 1.0)
        # Where the network's time runs backwards (Mochi), so do the timesteps; the sigmas are given as ever.
        check_times("timesteps", timesteps, self.timestep_scale, rising=self.config.invert_sigmas)
        if self.config.use_dynamic_shifting and (sigmas is not None or timesteps is None):
            linear = self.config.time_shift_type == "linear"
            if mu is None or not math.isfinite(mu) or (linear and mu <= 0):
                accepted = "a number above 0" if linear else "a number"
                raise ValueError(f"`mu` must be {accepted} with `use_dynamic_shifting`, got {mu!r}.")
        # Stock reads timesteps as sigmas, which is not what an inverted network calls them.
        stock_grid = (
            self.config.timestep_spacing == "linspace"
            and self.config.path != "vp_discrete"
            and self.config.sampling_path != "native"
            and not (self.config.invert_sigmas and timesteps is not None)
        )

        # 1. Straight times at which steps begin, and where they end
        if self.config.solver == "calibrated":
            ratios = self._calibrated_ratios(num_inference_steps, sigmas, timesteps)
        elif sigmas is None and timesteps is not None and not stock_grid:
            ratios = self.path.ratio(self._untied_time(torch.tensor(timesteps, dtype=torch.float64)))
        elif sigmas is not None or stock_grid:
            ratios = self._shifted(num_inference_steps, sigmas, mu, timesteps)
        else:
            ratios = self._spaced(num_inference_steps)
            if self._transforms_grid:
                ratios = self._shifted(None, ratios.tolist(), mu, None)
        end = 0.0 if self.config.final_sigmas_type == "zero" else self.path.ratio_min
        ratios = ratios.clamp(self.path.ratio_min, self.path.ratio_max)
        ratios = torch.cat([ratios, ratios.new_tensor([end])])

        # 2. What each turn of the loop does
        self._ratios = ratios
        self._stages = self._plan().stages(ratios)

        # 3. What the network and the pipeline are told
        stage_ratios = torch.tensor([stage.ratio for stage in self._stages] + [end], dtype=torch.float64)
        self._given_times = None
        if timesteps is not None and (sigmas is not None or stock_grid):
            last = self.timestep_scale if self.config.invert_sigmas else 0.0
            self._given_times = (ratios.flip(0), torch.tensor([*timesteps, last], dtype=torch.float64).flip(0))
            network_times = interpolate(stage_ratios[:-1], *self._given_times)
        else:
            t = torch.tensor([stage.t for stage in self._stages], dtype=torch.float64)
            network_times = self.timestep_scale * (1 - t if self.config.invert_sigmas else t)
        sigmas_seen = 1 - stage_ratios if self.config.invert_sigmas else stage_ratios
        self._laid_out = sigmas_seen.to(torch.float32)
        # A copy, since pipelines write into it (Cosmos).
        self.sigmas = self._laid_out.to(device, copy=True)
        self.timesteps = network_times.to(torch.float32).to(device)
        self.num_inference_steps = len(ratios) - 1
        self._step_index = None
        self._begin_index = None
        self._step_start, self._derivatives = None, []

    def _plan(self) -> SamplingPlan:
        config = self.config
        s_tmax = float("inf") if config.s_tmax is None else config.s_tmax
        return SamplingPlan(
            path=self.path,
            prediction_type=config.prediction_type,
            solver=config.solver,
            sampling_path=config.sampling_path,
            sigma_data=config.sigma_data,
            eta=float("inf") if config.stochastic_sampling else config.eta,
            churn=(config.s_churn, config.s_tmin, s_tmax, config.s_noise),
            diffusion=(config.diffusion_form, config.diffusion_scale),
            calibrated_steps=tuple(self._calibrated_steps.values()),
        )

    @property
    def _transforms_grid(self) -> bool:
        config = self.config
        grids = (config.use_karras_sigmas, config.use_exponential_sigmas, config.use_beta_sigmas)
        return self.shift != 1.0 or config.use_dynamic_shifting or bool(config.shift_terminal) or any(grids)

    def _shifted(
        self,
        num_inference_steps: int | None,
        sigmas: list[float] | None,
        mu: float | None,
        timesteps: list[float] | None,
    ) -> torch.Tensor:
        """Straight times after shift, stretch and Karras-like grids, by stock's own code, in its float32."""
        super().set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu, timesteps=timesteps)
        ratios = self.sigmas[:-1].to(torch.float64)
        return 1 - ratios if self.config.invert_sigmas else ratios

    def _spaced(self, num_inference_steps: int) -> torch.Tensor:
        """Straight times of `timestep_spacing` before any shift."""
        config, spacing = self.config, self.config.timestep_spacing
        if config.path == "vp_discrete" and spacing != "graded":
            timesteps = integer_timesteps(
                spacing, num_inference_steps, config.num_train_timesteps, config.steps_offset
            )
            return self.path.ratio(timesteps / self.timestep_scale)
        native = config.sampling_path == "native"
        return spaced_ratios(
            self.path, spacing, num_inference_steps, native, config.sigma_data, config.num_train_timesteps
        )

    def _calibrated_ratios(
        self, num_inference_steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None
    ) -> torch.Tensor:
        """Straight times of the calibration. Equal steps, which pipelines give on their own, ask for no other grid."""
        num_steps = num_inference_steps if sigmas is None else len(sigmas)
        equal = torch.arange(num_steps or 0, 0, -1, dtype=torch.float64) / max(num_steps or 1, 1)
        plain = sigmas is None or torch.allclose(equal.new_tensor(sigmas), equal, rtol=0.0, atol=1e-4)
        if timesteps is not None or not plain:
            raise ValueError(
                "The grid of the solver 'calibrated' is that of its calibration, got other "
                f"{'sigmas' if timesteps is None else 'timesteps'}."
            )
        if num_steps not in self._calibrated_steps:
            raise ValueError(
                f"`num_inference_steps` must be one that was calibrated, {sorted(self._calibrated_steps)}, got "
                f"{num_steps}."
            )
        return torch.tensor(self._calibrated_steps[num_steps].sigmas, dtype=torch.float64)

    def stretch_shift_to_terminal(self, t: Any) -> Any:
        """Stock's stretch to `shift_terminal`; a grid of one step, for which that is 0 / 0, is left alone."""
        return t if len(t) == 1 else super().stretch_shift_to_terminal(t)

    def _convert_to_karras(self, in_sigmas: Any, num_inference_steps: int) -> Any:
        return self._over_levels(super()._convert_to_karras, in_sigmas, num_inference_steps)

    def _convert_to_exponential(self, in_sigmas: Any, num_inference_steps: int) -> Any:
        return self._over_levels(super()._convert_to_exponential, in_sigmas, num_inference_steps)

    def _convert_to_beta(self, in_sigmas: Any, num_inference_steps: int, alpha: float = 0.6, beta: float = 0.6) -> Any:
        convert = super()._convert_to_beta
        return self._over_levels(lambda levels, n: convert(levels, n, alpha, beta), in_sigmas, num_inference_steps)

    def _over_levels(self, convert: Callable[[Any, int], Any], in_sigmas: Any, num_inference_steps: int) -> Any:
        """Stock's flow schedulers lay these grids over straight times, its diffusion schedulers over sigma / alpha."""
        if min(in_sigmas) <= 0:
            raise ValueError(f"Karras, exponential and beta grids need `sigmas` above 0, got {min(in_sigmas):g}.")
        if self.config.path != "vp_discrete":
            return convert(in_sigmas, num_inference_steps)
        if max(in_sigmas) >= 1:
            raise ValueError(
                f"Karras, exponential and beta grids need a finite sigma / alpha where they begin, and {self.path} "
                "begins in pure noise."
            )
        levels = convert(in_sigmas / (1 - in_sigmas), num_inference_steps)
        return levels / (1 + levels)

    def set_shift(self, shift: float) -> None:
        """
        Change the static shift of the grids to come.

        Args:
            shift (`float`):
                Above 0; 1 changes nothing.

        Raises:
            ValueError: If it is not.
        """
        check_number("shift", shift)
        if self.config.solver == "calibrated" and shift != 1.0:
            raise ValueError(
                f"The grid of the solver 'calibrated' is that of its calibration, got the shift {shift!r}."
            )
        # Stock's grid, `linspace`, ends where the shift of the constructor puts it: that is kept in files too.
        self.register_to_config(shift=shift, _linspace_shift=self.config.get("_linspace_shift", self.config.shift))
        super().set_shift(shift)

    def _spread_linspace(self, shift: float) -> None:
        """Give `linspace` the ends that it has in a scheduler constructed with this shift."""
        if not self.config.use_dynamic_shifting:
            ends = torch.tensor([1 / self.config.num_train_timesteps, 1.0])
            self.sigma_min, self.sigma_max = (shift * ends / (1 + (shift - 1) * ends)).tolist()

    # The sampling loop

    def set_begin_index(self, begin_index: int = 0) -> None:
        """
        Say where in `timesteps` the loop begins, as image-to-image pipelines do.

        Args:
            begin_index (`int`, *optional*, defaults to 0):
                The index of the loop's first turn, the first of a step.

        Raises:
            ValueError: If it is below 0.
        """
        if begin_index < 0:
            raise ValueError(f"`begin_index` must be at least 0, got {begin_index!r}.")
        super().set_begin_index(begin_index)

    def index_for_timestep(
        self, timestep: float | torch.Tensor, schedule_timesteps: torch.Tensor | None = None
    ) -> int:
        """
        The turn of the loop that begins a step nearest to a timestep, whether or not that is on the grid.

        Args:
            timestep (`float` or `torch.Tensor` of shape `()`):
                A timestep of the network.
            schedule_timesteps (`torch.Tensor`, *optional*):
                Timesteps to search in place of the grid.

        Returns:
            `int`: The index in `timesteps`.
        """
        grid = self.timesteps if schedule_timesteps is None else schedule_timesteps
        distance = (grid.to("cpu", torch.float64) - float(timestep)).abs()
        if schedule_timesteps is None and self._stages:
            # A step may begin at the time at which the one before had its last stage.
            distance[[not stage.first for stage in self._stages]] = float("inf")
        return int(distance.argmin())

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        per_token_timesteps: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """
        One turn of the sampling loop: from the network's answer to its next input.

        After the last stage of a step the result is the sample at the next grid point, before that the input of the
        next stage. The arithmetic is in float32 (float64 for float64 samples).

        Args:
            model_output (`torch.Tensor` of shape `(batch_size, ...)`):
                The network's answer, of `prediction_type`.
            timestep (`float` or `torch.Tensor` of shape `()`):
                The current element of `timesteps`; only the first call reads it, to find its place if no begin index
                was set.
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                What the network was given, `x_t`.
            s_churn (`float`, *optional*, defaults to 0.0):
                Only 0 is accepted.
            s_tmin (`float`, *optional*, defaults to 0.0):
                Belongs to `s_churn`.
            s_tmax (`float`, *optional*, defaults to infinity):
                Belongs to `s_churn`.
            s_noise (`float`, *optional*, defaults to 1.0):
                Belongs to `s_churn`.
            generator (`torch.Generator` or a list of them, *optional*):
                For `stochastic_sampling`.
            per_token_timesteps (`torch.Tensor` of shape `(batch_size, tokens)`, *optional*):
                A timestep for each token, as stock does it. OT path with `flow_prediction` and Euler only.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return an output class.

        Returns:
            `FlowMatchEulerDiscreteSchedulerOutput` or `tuple`: With `prev_sample`, in the dtype of `model_output`.

        Raises:
            ValueError: If the timestep is an integer index, the loop has not been laid out or is over, it is entered
                in the middle of a step, or an option is not available.
        """
        if isinstance(timestep, int) or (isinstance(timestep, torch.Tensor) and not timestep.is_floating_point()):
            raise ValueError(f"`timestep` must be one of the floats in `scheduler.timesteps`, got {timestep!r}.")
        if s_churn != 0:
            raise ValueError(
                f"Churn is set in the scheduler's configuration; `step` takes `s_churn` 0, got {s_churn!r}."
            )
        if not self._stages:
            raise ValueError("`set_timesteps` must be called before `step`.")
        if per_token_timesteps is not None:
            self._check_per_token()
            return super().step(
                model_output,
                timestep,
                sample,
                generator=generator,
                per_token_timesteps=per_token_timesteps,
                return_dict=return_dict,
            )
        index = self._init_step_index(timestep) if self._step_index is None else self._step_index
        if index >= len(self._stages):
            raise ValueError(f"The sampling loop has {len(self._stages)} turns, got one more; call `set_timesteps`.")

        stage = self._stages[index]
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        answer = -model_output if self.config.invert_sigmas else model_output
        if self.config.clip_sample:
            result = self._clipped(stage, x, answer)
        else:
            result = self._integrate(stage, x, answer)
        if stage.noise != 0.0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            result = torch.add(result, noise, alpha=stage.noise)
        self._step_index = index + 1
        result = result.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _init_step_index(self, timestep: float | torch.Tensor) -> int:
        super()._init_step_index(timestep)
        index = int(self._step_index)
        self._step_start, self._derivatives = None, []
        if self._begin_index is None and self.order == 1 and not torch.equal(self.sigmas.cpu(), self._laid_out):
            # The pipeline has changed the grid. To look at it here stalls a device no more than the look-up above.
            self._laid_out = self.sigmas.cpu().clone()
            ratios = self._laid_out.double()
            self._ratios = 1 - ratios if self.config.invert_sigmas else ratios
            self._stages = self._plan().stages(self._ratios)
        if index > 0 and self._stages[index].first and len(self._stages[index].weights) > 1:
            # A multistep method that begins later has no earlier derivatives: it starts up from there.
            self._stages[index:] = self._plan().stages(self._ratios[index:])
        return index

    def _integrate(self, stage: Stage, x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        if stage.first:
            start = x
        elif self._step_start is not None:
            start = self._step_start
        else:
            raise ValueError(
                f"Sampling with the solver {self.config.solver!r} must begin at a multiple of its {self.order} stages,"
                f" got index {self._step_index}."
            )
        self._step_start = None if stage.last else start
        if start is x and len(stage.weights) == 1 and stage.retain == 0:
            keep = stage.keep + stage.weights[0] * stage.on_sample
            return torch.add(x if keep == 1.0 else x * keep, answer, alpha=stage.weights[0] * stage.on_output)

        answer = answer.to(x.dtype)
        # In place wherever the tensor is a fresh one.
        if stage.on_sample != 0.0:
            derivative = (x * stage.on_sample).add_(answer, alpha=stage.on_output)
        else:
            derivative = answer if stage.on_output == 1.0 else answer * stage.on_output
        derivatives = [*self._derivatives, derivative]
        if stage.keep == 1.0:
            result = torch.add(start, derivative, alpha=stage.weights[-1])
        else:
            result = (start * stage.keep).add_(derivative, alpha=stage.weights[-1])
        for weight, earlier in zip(stage.weights[-2::-1], self._derivatives[::-1]):
            if weight != 0.0:
                result.add_(earlier, alpha=weight)
        self._derivatives = derivatives[len(derivatives) - stage.retain :]
        return result

    def _clipped(self, stage: Stage, x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Euler by way of the estimates of data and noise, the data clipped, the noise as it was before that."""
        t = torch.tensor(stage.t, dtype=torch.float64)
        data = self.path.convert(answer, x, t, self.config.prediction_type, "sample")
        noise = self.path.convert(answer, x, t, self.config.prediction_type, "epsilon")
        data = data.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        alpha, sigma = stage.end
        # Of the noise, the share that is drawn afresh is left out here.
        return alpha * data + max(sigma**2 - stage.noise**2, 0.0) ** 0.5 * noise

    def _check_per_token(self) -> None:
        config = self.config
        if (config.path, config.prediction_type, config.solver) != ("ot", "flow_prediction", "euler"):
            raise ValueError(
                "`per_token_timesteps` needs the path 'ot', 'flow_prediction' and the solver 'euler', got "
                f"{config.path!r}, {config.prediction_type!r} and {config.solver!r}."
            )
