# SPDX-License-Identifier: Apache-2.0
"""The sampling loop of a scheduler: its grid and its steps, as stock pipelines drive them."""

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ..paths import ConditionalPath, LevelPath
from ..precision import read_numbers, to_float64, widest_float
from .grids import check_lengths, check_times, integer_timesteps, interpolate, spaced_ratios
from .multistep import CalibratedSteps
from .sampling_plan import SamplingPlan, Stage, runge_kutta_tableau, stage_table
from .settings import GRIDS, check_number


# Some networks take the logarithm of their time: their timestep stays above 0 by this share of the whole.
LEAST_TIME = 1e-12


class StageTimes(torch.Tensor):
    """Timesteps that list several calls of the network for a step; a cut within a step is refused."""

    order: int
    # Results are plain tensors.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(timesteps: torch.Tensor, order: int) -> "StageTimes":
        times = timesteps.as_subclass(StageTimes)
        times.order = order
        return times

    def __getitem__(self, index: Any) -> torch.Tensor:
        stop = index.stop if isinstance(index, slice) else None
        if isinstance(stop, int) and 1 < stop < len(self) and stop % self.order:
            raise ValueError(
                f"The timesteps list {self.order} calls of the network for each step and cannot be cut after {stop}, "
                "within a step: take a solver of one call a step where a pipeline ends early."
            )
        return super().__getitem__(index)

    def __deepcopy__(self, memo: dict) -> "StageTimes":
        return memo.setdefault(id(self), StageTimes.of(self.clone(), self.order))


class SamplingLoop(FlowMatchEulerDiscreteScheduler):
    """Grid and steps of a `FlowMatchScheduler`, which adds the path, the settings and what training needs."""

    path: ConditionalPath
    _calibrated_steps: dict[int, CalibratedSteps]

    def _forget_loop(self) -> None:
        """The state before any `set_timesteps`."""
        self.num_inference_steps: int | None = None
        self._ratios = torch.empty(0, dtype=torch.float64)
        self._stages: list[Stage] = []
        self._table = torch.empty(0)
        self._has_noise = False
        # `sigmas` and `timesteps` as laid out, and copies: pipelines replace them or write into them.
        self._seen = (self.sigmas, 0, self.timesteps, 0)
        self._laid_out = (self.sigmas, self.timesteps)
        # Times that the user gave beside sigmas: (sigmas rising, timesteps), which then tie one to the other.
        self._given_times: tuple[torch.Tensor, torch.Tensor] | None = None
        self._step_start: torch.Tensor | None = None
        self._derivatives: list[torch.Tensor] = []
        self._spare: list[torch.Tensor] = []

    @property
    def order(self) -> int:
        """Turns of the sampling loop for each step: the stages of the solver."""
        return runge_kutta_tableau(self.config.solver).stages

    @property
    def sigma_data(self) -> float:
        """Standard deviation of the data: that of the configuration, or 1."""
        return 1.0 if self.config.sigma_data is None else self.config.sigma_data

    @property
    def timestep_scale(self) -> float:
        """`timestep / t`: `num_train_timesteps`, on `vp_discrete` one less: integer timesteps are its knots."""
        return float(self.config.num_train_timesteps - (self.config.path == "vp_discrete"))

    def timestep(self, t: torch.Tensor) -> torch.Tensor:
        """
        Timestep of the network at a time of the path.

        Where times are continuous it stays above 0, if only just: some networks take its logarithm.

        Args:
            t (`torch.Tensor`):
                Any shape, in [0, 1], 0 = data, 1 = noise.

        Returns:
            `torch.Tensor`: Timesteps, of that shape, in [0, `timestep_scale`].
        """
        if self.config.invert_sigmas:
            return self.timestep_scale * (1 - t)
        return self.timestep_scale * (t if self.config.path == "vp_discrete" else t.clamp(min=LEAST_TIME))

    def _untied_time(self, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep / self.timestep_scale
        return 1 - t if self.config.invert_sigmas else t

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
        sigmas = None if sigmas is None else read_numbers("sigmas", sigmas).tolist()
        timesteps = None if timesteps is None else read_numbers("timesteps", timesteps).tolist()
        check_lengths(num_inference_steps, sigmas, timesteps)
        if not self._levels:
            check_times("sigmas", sigmas, 1.0)
        # Where the network's time runs backwards (Mochi), so do the timesteps; the sigmas are given as ever.
        check_times("timesteps", timesteps, self.timestep_scale, rising=self.config.invert_sigmas)
        if self.config.use_dynamic_shifting and (sigmas is not None or timesteps is None):
            linear = self.config.time_shift_type == "linear"
            if not isinstance(mu, Real) or not math.isfinite(mu) or (linear and mu <= 0):
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
                equal, ratios = ratios, self._shifted(None, ratios.tolist(), mu, None)
                if not any(self.config[name] for name in GRIDS):
                    ratios[0] = torch.maximum(ratios[0], equal[0])  # noise before t = 1, with a shift below 1
        plan = self._plan()
        end = 0.0 if self.config.final_sigmas_type == "zero" else plan.path.ratio_min
        ratios = ratios.clamp(plan.path.ratio_min, plan.path.ratio_max)
        self._ratios = torch.cat([ratios, ratios.new_tensor([end])])

        # 2. What each turn of the loop does
        self._lay_out(plan.stages(self._ratios))

        # 3. Timesteps of the network and sigmas of the pipeline
        t, stage_ratios = torch.tensor([stage[:2] for stage in self._stages], dtype=torch.float64).unbind(1)
        self._given_times = None
        if timesteps is not None and (sigmas is not None or stock_grid):
            last = self.timestep_scale if self.config.invert_sigmas else 0.0
            self._given_times = (self._ratios.flip(0), t.new_tensor([*timesteps, last]).flip(0))
            network_times = interpolate(stage_ratios, *self._given_times)
        else:
            # A start of a step that the user put at 0 stays there.
            network_times = (
                torch.where(t == 0, self.timestep_scale * t, self.timestep(t)) if timesteps else self.timestep(t)
            )
        seen = torch.cat([t if self._levels else stage_ratios, t.new_tensor([end])])
        with torch.inference_mode(False):
            # Copies, since pipelines write into them (Cosmos); inference tensors would not tell.
            self.sigmas = (1 - seen if self.config.invert_sigmas else seen).to(torch.float32)
            self.timesteps = network_times.to(torch.float32)
            self._laid_out = (self.sigmas, self.timesteps)
            self.sigmas, self.timesteps = (x.to(device, copy=True) for x in self._laid_out)
            if self.order > 1 and self.config.path == "vp_discrete":
                # Pipelines of diffusion checkpoints (SDXL and its refiner) cut timesteps where a time lies.
                self.timesteps = StageTimes.of(self.timesteps, self.order)
            self._table = self._table.to(self.sigmas.device, widest_float(self.sigmas))
        self._seen = (self.sigmas, self.sigmas._version, self.timesteps, self.timesteps._version)
        self.num_inference_steps = len(ratios)
        self._step_index = None
        self._begin_index = None
        self._step_start, self._derivatives, self._spare = None, [], []

    @property
    def _levels(self) -> bool:
        """True if a stock pipeline (Cosmos) has set a Karras-like grid to levels `sigma / alpha` above 1."""
        config = self.config
        return config.path == "ot" and any(config[name] for name in GRIDS) and (config.get("sigma_max") or 0.0) > 1.0

    def _lay_out(self, stages: list[Stage]) -> None:
        self._stages = stages
        self._has_noise = any(stage.noise for stage in stages)
        self._table = stage_table(stages)

    def _plan(self) -> SamplingPlan:
        config = self.config
        s_tmax = float("inf") if config.s_tmax is None else config.s_tmax
        return SamplingPlan(
            path=LevelPath() if self._levels else self.path,
            prediction_type=config.prediction_type,
            solver=config.solver,
            sampling_path="native" if self._levels else config.sampling_path,
            sigma_data=self.sigma_data,
            eta=float("inf") if config.stochastic_sampling else config.eta,
            churn=(config.s_churn, config.s_tmin, s_tmax, config.s_noise),
            diffusion=(config.diffusion_form, config.diffusion_scale),
            calibrated_steps=tuple(self._calibrated_steps.values()),
            clips=config.clip_sample,
        )

    @property
    def _transforms_grid(self) -> bool:
        config = self.config
        shifts = self.shift != 1.0 or config.use_dynamic_shifting or bool(config.shift_terminal)
        return shifts or any(config[name] for name in GRIDS)

    def _shifted(
        self,
        num_inference_steps: int | None,
        sigmas: list[float] | None,
        mu: float | None,
        timesteps: list[float] | None,
    ) -> torch.Tensor:
        """Straight times after shift, stretch and Karras-like grids, by stock's own code, in its float32."""
        super().set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu, timesteps=timesteps)
        return self._ratios_of(self.sigmas[:-1])

    def _ratios_of(self, sigmas: torch.Tensor) -> torch.Tensor:
        """Straight times of the `sigmas` that pipelines see."""
        sigmas = to_float64(sigmas)
        if self._levels:
            return sigmas / (1 + sigmas)
        return 1 - sigmas if self.config.invert_sigmas else sigmas

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
            self.path, spacing, num_inference_steps, native, self.sigma_data, config.num_train_timesteps
        )

    def _calibrated_ratios(
        self, num_inference_steps: int | None, sigmas: list[float] | None, timesteps: list[float] | None
    ) -> torch.Tensor:
        """
        Straight times of the calibration, or of `timestep_spacing` for numbers of steps that it does not have. Equal
        steps, which pipelines give on their own, ask for no other grid.
        """
        num_steps = num_inference_steps or 0 if sigmas is None else len(sigmas)
        equal = torch.arange(num_steps, 0, -1, dtype=torch.float64) / max(num_steps, 1)
        plain = sigmas is None or torch.allclose(equal.new_tensor(sigmas), equal, rtol=0.0, atol=1e-4)
        if timesteps is not None or not plain:
            raise ValueError(
                "The grid of the solver 'calibrated' is that of its calibration, got other "
                f"{'sigmas' if timesteps is None else 'timesteps'}."
            )
        if num_steps not in self._calibrated_steps:
            return self._spaced(num_steps)
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
        if self._levels:
            return convert(in_sigmas, num_inference_steps)
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
        if schedule_timesteps is None:
            # The copy on the CPU: to look at the grid itself would stall a device.
            grid = self.timesteps if self._was_changed(2) else self._laid_out[1]
        else:
            grid = schedule_timesteps
        distance = (to_float64(grid) - to_float64(torch.as_tensor(timestep))).abs()
        if schedule_timesteps is None and self._stages:
            # A step may begin at the time at which the one before had its last stage.
            distance[[not stage.first for stage in self._stages]] = float("inf")
        return int(distance.argmin())

    def _was_changed(self, which: int) -> bool:
        """Return whether `sigmas` (0) or `timesteps` (2) may be other than laid out."""
        tensor = (self.sigmas, self.sigmas, self.timesteps)[which]
        return tensor is not self._seen[which] or tensor._version != self._seen[which + 1]

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
        if model_output.shape != sample.shape:
            raise ValueError(
                f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, got "
                f"{tuple(model_output.shape)}."
            )
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

        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        answer = -model_output if self.config.invert_sigmas else model_output
        if torch.compiler.is_compiling():
            result, noise = self._compiled_turn(index, x, answer)
        else:
            stage = self._stages[index]
            result, noise = self._integrate(stage, x, answer), stage.noise
            if index + 1 == len(self._stages):
                self._spare = []
        if self._has_noise if torch.compiler.is_compiling() else noise != 0.0:
            fresh = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            result = result + noise * fresh
        self._step_index = index + 1
        result = result.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def _init_step_index(self, timestep: float | torch.Tensor) -> int:
        super()._init_step_index(timestep)
        index = int(self._step_index)
        self._step_start, self._derivatives, self._spare = None, [], []
        if torch.compiler.is_compiling():
            return index
        if self._was_changed(0):
            self._follow_sigmas()
        if index > 0 and self._stages[index].first and len(self._stages[index].weights) > 1:
            # A multistep method that begins later has no earlier derivatives: it starts up from there.
            self._lay_out(self._stages[:index] + self._plan().stages(self._ratios[index:]))
            self._table = self._table.to(self.sigmas.device, widest_float(self.sigmas))
        return index

    def _follow_sigmas(self) -> None:
        """Lay the loop out again after a pipeline has changed `sigmas`, at the places that it changed."""
        sigmas = self.sigmas.cpu().float()
        changed = self._ratios_of(sigmas).clamp(0, 1)
        places = [i for i, stage in enumerate(self._stages) if stage.first] + [len(self._stages)]
        moved = (sigmas != self._laid_out[0])[places]
        if bool(moved.any()):
            self._ratios = torch.where(moved, changed[places], self._ratios)
            self._lay_out(self._plan().stages(self._ratios))
            self._table = self._table.to(self.sigmas.device, widest_float(self.sigmas))

    def _integrate(self, stage: Stage, x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        if stage.estimates is not None:
            return self._clipped(stage.estimates, x, answer)
        if stage.first:
            start = x
        elif self._step_start is not None:
            start = self._step_start
        else:
            raise ValueError(
                f"Sampling with the solver {self.config.solver!r} must begin at a multiple of its {self.order} stages,"
                f" got index {self._step_index}."
            )
        if start is x and len(stage.weights) == 1 and stage.retain == 0 and stage.last:
            keep = stage.keep + stage.weights[0] * stage.on_sample
            return torch.add(x if keep == 1.0 else x * keep, answer, alpha=stage.weights[0] * stage.on_output)

        # What is the caller's own is not kept, but a copy of it: it may be a buffer that the next call fills again.
        borrowed = answer.dtype == x.dtype and not self.config.invert_sigmas
        answer = answer.to(x.dtype)
        # In place wherever the tensor is a fresh one.
        if stage.on_sample != 0.0:
            derivative, borrowed = (x * stage.on_sample).add_(answer, alpha=stage.on_output), False
        elif stage.on_output != 1.0:
            derivative, borrowed = answer * stage.on_output, False
        else:
            derivative = answer
        if stage.keep == 1.0:
            result = torch.add(start, derivative, alpha=stage.weights[-1])
        else:
            result = (start * stage.keep).add_(derivative, alpha=stage.weights[-1])
        for weight, earlier in zip(stage.weights[-2::-1], self._derivatives[::-1]):
            if weight != 0.0:
                result.add_(earlier, alpha=weight)

        dropped = len(self._derivatives) + 1 - stage.retain
        if borrowed:
            self._spare += self._derivatives[:dropped]
        self._derivatives = self._derivatives[dropped:]
        if stage.retain > 0:
            self._derivatives.append(self._copy(derivative) if borrowed else derivative)
        if stage.first and not stage.last:
            self._step_start = self._copy(start)
        elif stage.last and self._step_start is not None:
            self._spare.append(self._step_start)
            self._step_start = None
        return result

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, in memory that the loop needs no more: new memory costs more than the copy itself."""
        spare = self._spare.pop() if self._spare else None
        if tensor.requires_grad or spare is None or spare.shape != tensor.shape or spare.requires_grad:
            return tensor.clone()
        return spare.copy_(tensor)

    def _clipped(self, weights: Sequence[Any], x: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """Euler by way of the estimates of data and noise, the data clipped, the noise as it was before that."""
        data = weights[0] * x + weights[1] * answer
        noise = weights[2] * x + weights[3] * answer
        limit = self.config.clip_sample_range
        return weights[4] * data.clamp(-limit, limit) + weights[5] * noise

    def _compiled_turn(self, index: int, x: torch.Tensor, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A turn as one formula over a row of the table, and its noise: one graph serves all turns."""
        on_sample, on_output, keep, noise, first, *weights = self._table[index].to(x).unbind()
        if self.config.clip_sample:
            return self._clipped(weights, x, answer), noise
        start = x
        if self.order > 1:
            # On the first turn of the loop, a first stage, any tensor will do.
            start = self._step_start = torch.where(first > 0, x, x if self._step_start is None else self._step_start)
        missing = [torch.zeros_like(x)] * max(len(weights) - 1 - len(self._derivatives), 0)
        derivatives = [*missing, *self._derivatives, on_sample * x + on_output * answer][-len(weights) :]
        self._derivatives = derivatives[1:]
        result = keep * start
        for weight, derivative in zip(weights, derivatives):
            result = result + weight * derivative
        return result, noise

    def _check_per_token(self) -> None:
        config = self.config
        if (config.path, config.prediction_type, config.solver) != ("ot", "flow_prediction", "euler"):
            raise ValueError(
                "`per_token_timesteps` needs the path 'ot', 'flow_prediction' and the solver 'euler', got "
                f"{config.path!r}, {config.prediction_type!r} and {config.solver!r}."
            )
