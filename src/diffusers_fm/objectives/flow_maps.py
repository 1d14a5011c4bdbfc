# SPDX-License-Identifier: Apache-2.0
"""Training of flow maps: arguments, the network with the end of an interval, and the draw of intervals."""

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from diffusers import UNet2DModel
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..arguments import Arguments, Count, Fraction, Needs, NotNegative, Positive, Range, Size, option
from ..data.randomness import BatchSlice, make_generator
from ..flow_maps import (
    DERIVATIVES,
    OBJECTIVES,
    AverageVelocity,
    flow_map_loss,
    guided_velocity,
    sample_intervals,
)
from ..models.interval import IntervalConditioning, IntervalEmbedding
from ..paths import ConditionalPath, lift
from ..pipelines.base import FlowMatchPipelineBase
from ..pipelines.flow_map import condition_network
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..solvers import odeint
from ..timesteps import shift_time
from ..training.arguments import TrainingArguments
from .flow_matching import TrainableModel, density_settings


logger = logging.getLogger(__name__)

# Velocity of a flow at the points of a batch, computed when it is asked for.
Velocity = Callable[[], torch.Tensor]

# Papers of the losses, for cards.
METHODS: Mapping[str, str] = {
    "trajectories": "distillation of trajectories (arXiv 2406.07507)",
    "semigroup": "progressive self-distillation (arXiv 2505.18825)",
    "lagrangian": "Lagrangian self-distillation (arXiv 2505.18825)",
    "mean_flow": "MeanFlow (arXiv 2505.13447)",
    "improved_mean_flow": "improved MeanFlow (arXiv 2512.02012)",
}


@dataclass(frozen=True, kw_only=True)
class FlowMapArguments(Arguments):
    """Loss of a flow map, its intervals, its teacher, and how the network gets their ends."""

    _argument_group_name = "flow map"

    objective: str = option("semigroup", "Loss of the rows with r < t.", list(OBJECTIVES))
    first_block: Count | None = option(
        None, "First block of a transformer that gets the end of a step; by default two thirds get the start."
    )
    equal_share: Fraction = option(0.5, "Share of rows with r = t, which learn the flow.", source="arXiv 2512.02012")
    noise_share: Fraction = option(0.4, "Share of the other rows that begin in noise.")
    data_share: Fraction = option(0.4, "Share of the other rows that end in data.")
    interval_warmup_steps: Size = option(200, "Steps in which the intervals grow to their full length.")
    middle_fraction: Annotated[bool, Needs("objective", "semigroup")] = option(
        False, "Two steps of equal length in a target.", source="arXiv 2410.12557"
    )
    derivative: str = option("finite_difference", "For all losses but semigroup.", list(DERIVATIVES))
    derivative_step: Annotated[float, Range(0, 0.5, open_low=True), Needs("derivative", "finite_difference")] = option(
        5e-3, "Of the finite difference.", source="arXiv 2605.13724"
    )
    loss_power: NotNegative = option(0.0, "p of the adaptive weight of MeanFlow, 1 there.", source="arXiv 2505.13447")
    flow_teacher: bool = option(False, "Learn the velocity of the pipeline as it was, in place of noise - data.")
    ema_teacher: bool = option(False, "Targets by the averaged weights; needs --use_ema.")
    learned_guidance_scale: Positive = option(1.0, "Guidance to learn; 1 is none.", source="arXiv 2512.02012")
    learned_guidance_max: Annotated[float, Range(1, open_low=True)] | None = option(
        None, "Learn guidance of every scale from 1 to this, which the network is given; it needs an embedding for it."
    )

    def check(self) -> None:
        if not isinstance(self, TrainingArguments):
            return
        if self.weighting_scheme != "none":
            raise ValueError(f"--weighting_scheme must be none for a flow map, got {self.weighting_scheme}.")
        if self.ema_teacher and not self.use_ema:
            raise ValueError("--ema_teacher needs --use_ema.")
        if self.learned_guidance_max is not None and self.learned_guidance_scale != 1.0:
            raise ValueError(
                f"--learned_guidance_scale {self.learned_guidance_scale:g} does not go with --learned_guidance_max"
                f" {self.learned_guidance_max:g}: the map learns one scale, or all of them."
            )


@dataclass(frozen=True, kw_only=True)
class CallArguments(Arguments):
    """Times of the calls in which a flow map samples."""

    _argument_group_name = "calls"

    sampling_shift: Positive = option(
        0.5, "Shift of the times of the calls; with 1 they are equal steps, below it they are finer towards data."
    )


@dataclass(frozen=True, kw_only=True)
class TrajectoryArguments(Arguments):
    """Trajectories of the flow from which its map learns, and the steps that train this flow first."""

    _argument_group_name = "trajectories"

    num_trajectories: Annotated[Size, Needs("flow_teacher", True)] = option(
        0, "Trajectories of the flow to learn from in place of the objective; 0 is none.", source="arXiv 2406.07507"
    )
    trajectory_steps: Count = option(14, "Steps of each.")
    huber_width: NotNegative = option(
        0.03, "Errors above it count by their size, below by their square; 0 is the square of all."
    )
    flow_steps: Annotated[Size, Needs("flow_teacher", True)] = option(
        0, "Steps that train the flow alone, before its average becomes the teacher; then the learning rate restarts."
    )

    def check(self) -> None:
        if not isinstance(self, TrainingArguments) or not self.flow_steps:
            return
        if not self.use_ema:
            raise ValueError(f"--flow_steps {self.flow_steps} needs --use_ema.")
        if self.max_train_steps is not None and self.flow_steps >= self.max_train_steps:
            raise ValueError(
                f"--flow_steps must be below --max_train_steps {self.max_train_steps}, got {self.flow_steps}: the"
                " others train the map."
            )


class IntervalModel(TrainableModel):
    """Trainable models of a few-step pipeline, the second time embedding of a UNet among them."""

    def __init__(self, pipeline: FlowMatchPipelineBase) -> None:
        super().__init__(pipeline)
        self.interval_embedding = pipeline.interval_embedding

    def __deepcopy__(self, memo: dict[int, Any]) -> "IntervalModel":
        pipeline = copy.copy(self._predict[0].__self__)
        trained = (self.denoiser, self.class_embedder, self.interval_embedding)
        for name, component in pipeline.components.items():
            if component is not None and any(component is model for model in trained):
                setattr(pipeline, name, copy.deepcopy(component, memo))
        return IntervalModel(pipeline)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        labels: torch.Tensor | None = None,
        end: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Network output for steps from `timestep` to `end`, both `timestep_scale` times t; without `end` the flow."""
        conditioning = IntervalConditioning.of(unwrap_module(self.denoiser))
        assert conditioning is not None
        kept, conditioning.end = conditioning.end, end
        try:
            return super().forward(sample, timestep, labels)
        finally:
            conditioning.end = kept


def choose_flow_map(pipeline: FlowMatchPipelineBase, args: Any, seed: int, flow_shift: float) -> None:
    """Condition the pipeline's network on the end of a step, and have its scheduler say so, and lay out its calls."""
    network = unwrap_module(pipeline.denoiser)
    if isinstance(network, UNet2DModel) and pipeline.interval_embedding is None:
        if args.first_block is not None:
            raise ValueError(f"--first_block {args.first_block} needs a transformer, and the model is a UNet2DModel.")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            embedding = IntervalEmbedding(network.get_submodule("time_embedding").linear_2.out_features)
        pipeline.register_modules(interval_embedding=embedding.to(network.device))
    scheduler = set_flow_map(args, network, pipeline.scheduler, pipeline.interval_embedding)
    flow_map = {**scheduler.config.flow_map, "flow_shift": flow_shift}
    pipeline.scheduler = scheduler.with_settings(shift=args.sampling_shift, flow_map=flow_map)


def set_flow_map(
    args: Any, network: nn.Module, scheduler: FlowMatchScheduler, embedding: nn.Module | None = None
) -> FlowMatchScheduler:
    """Condition a network on the end of a step: by its last blocks, or by a second time embedding of a UNet."""
    config: Any = network.config
    if args.learned_guidance_max is not None and not config.get("guidance_embeds"):
        raise ValueError(
            f"--learned_guidance_max {args.learned_guidance_max:g} needs a network with `guidance_embeds`, and this"
            f" {type(network).__name__} has none: use --learned_guidance_scale."
        )
    known = scheduler.config.flow_map or {}
    flow_map = {
        **({"first_block": args.first_block} if args.first_block is not None else known),
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.learned_guidance_scale,
    }
    # Equal steps: the last one of diffusers' "linspace" would be a call for a thousandth of the way.
    settings = {"solver": "flow_map", "sampling_path": "ot", "timestep_spacing": "trailing"}
    scheduler = scheduler.with_settings(**settings, flow_map=flow_map)
    first_block = condition_network(network, scheduler, embedding).first_block
    return scheduler.with_settings(
        flow_map=flow_map if first_block is None else {**flow_map, "first_block": first_block}
    )


def draw_intervals(
    args: Any, path: ConditionalPath, part: BatchSlice, shift: float, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Intervals of a part of a batch: the path's time at which they start, and their straight ends `r` and starts `t`.

    Float64 on the CPU, of shape `(batch_size,)`, 0 = data and 1 = noise, stratified over the global batch. `step` is
    counted from where the map begins to learn; below 0 all rows have r = t.
    """
    r, t = sample_intervals(
        **density_settings(args, part),
        equal_share=args.equal_share if step >= 0 else 1.0,
        noise_share=args.noise_share,
        data_share=args.data_share,
        max_length=min(1.0, max(step + 1, 1) / max(args.interval_warmup_steps, 1)),
    )
    r, t = (path.ratio(time) if shift == 1 else shift_time(path.ratio(time), shift) for time in (r, t))
    return path.time_at(t), r, t


@torch.no_grad()
def learned_velocity(
    args: FlowMapArguments,
    velocity: torch.Tensor,
    conditional: Velocity,
    unconditional: Velocity | None = None,
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Velocity that a flow map learns where r = t: noise - data or the teacher's, with the guidance to be learned.

    Args:
        args ([`FlowMapArguments`]):
            With `flow_teacher` and `learned_guidance_scale`.
        velocity (`torch.Tensor` of shape `(batch_size, ...)`):
            noise - data.
        conditional (`Callable`):
            Gives the flow's velocity, of the teacher if there is one, else of the network that learns.
        unconditional (`Callable`, *optional*):
            Gives the same without the condition; without it there is no guidance.
        guidance (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Scales of [`draw_guidance`], in place of `learned_guidance_scale`.

    Returns:
        `torch.Tensor` of the shape of `velocity`.
    """
    scale = args.learned_guidance_scale
    if args.flow_teacher:
        velocity = conditional()
    if unconditional is None or (guidance is None and scale == 1.0):
        return velocity
    null = unconditional()
    scales = torch.full(velocity.shape[:1], scale) if guidance is None else guidance
    if args.flow_teacher:
        return null + lift(scales.to(velocity), velocity) * (velocity - null)
    return guided_velocity(velocity, conditional(), null, scales)


def draw_guidance(args: FlowMapArguments, part: BatchSlice) -> torch.Tensor | None:
    """
    Scales of guidance for a part of a batch, uniform in their logarithm from 1 to `learned_guidance_max` (arXiv
    2512.02012): `(batch_size,)` on the CPU, or `None` for a map that is not given its guidance.
    """
    if args.learned_guidance_max is None:
        return None
    return args.learned_guidance_max ** part.uniform("guidance")


def interval_losses(
    args: FlowMapArguments,
    path: ConditionalPath,
    part: BatchSlice,
    u: AverageVelocity,
    x: torch.Tensor,
    r: torch.Tensor,
    t: torch.Tensor,
    velocity: torch.Tensor,
    teacher: AverageVelocity,
    conditions: Sequence[torch.Tensor],
) -> torch.Tensor:
    """[`~flow_maps.flow_map_loss`] as the arguments say; `teacher` is the map by the averaged weights."""
    return flow_map_loss(
        u,
        x,
        r,
        t,
        velocity,
        args.objective,
        teacher=teacher if args.ema_teacher else None,
        fraction=0.5 if args.middle_fraction else to_float64(part.uniform("fraction")),
        derivative=args.derivative,
        step=args.derivative_step,
        span=(path.ratio_min, path.ratio_max),
        power=args.loss_power,
        args=conditions,
    )


def huber_losses(error: torch.Tensor, width: float) -> torch.Tensor:
    """
    Mean of each row's squares, or with a `width` of the pseudo-Huber loss `sqrt(error^2 + width^2) - width` of each
    value. For targets without noise both have the same minimum.
    """
    error = error.square() if width == 0 else (error.square() + width**2).sqrt() - width
    return error.flatten(1).mean(1)


class Trajectories:
    """
    Trajectories of a flow from noise to data: any two points of one are an interval of its map (arXiv 2406.07507).

    They are computed once, by `abm2`, in batches whose times differ and are finer towards the data, and kept on the
    CPU. Their average velocities, `(x_t - x_r) / (t - r)`, are exact up to the solver and need no call of a network.

    Args:
        field (`Callable`):
            `field(t, x, *conditions)`, the velocity in the straight coordinates, with times of `(batch_size,)`.
        path ([`ConditionalPath`]):
            The path, for the ends of its time.
        noise (`torch.Tensor` of shape `(num_trajectories, ...)`):
            Where they begin; noise of the path.
        conditions (`Sequence[torch.Tensor]`):
            Tensors with one row for each, which the field and the map are given.
        num_steps (`int`):
            Steps of each.
        seed (`int`):
            Of their times.
        batch_size (`int`):
            Trajectories at once.
        device (`torch.device`):
            Where the field is called.
    """

    def __init__(
        self,
        field: Callable[..., torch.Tensor],
        path: ConditionalPath,
        noise: torch.Tensor,
        conditions: Sequence[torch.Tensor],
        num_steps: int,
        seed: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self.field, self.conditions = field, conditions
        points, times = [], []
        last, first = path.ratio_min, path.ratio_max
        for number in range(0, len(noise), batch_size):
            # Straight points without data.
            x = first * noise[number : number + batch_size]
            jitter = torch.rand(
                num_steps - 1, generator=make_generator(seed, "trajectory", number), dtype=torch.float64
            )
            # Of a third order, unequal steps would err three times more.
            shares = (torch.arange(1, num_steps) + jitter - 0.5) / num_steps
            inner = (first**0.5 + (last**0.5 - first**0.5) * shares).square()
            grid = [first, *inner.tolist(), last]
            rows = [condition[number : number + batch_size].to(device) for condition in conditions]
            with torch.no_grad():
                solution = odeint(
                    field, x.to(device), first, last, method="abm2", grid=grid, args=rows, return_trajectory=True
                )
            assert solution.trajectory is not None
            assert solution.times is not None
            points.append(solution.trajectory.transpose(0, 1).cpu())
            times.append(solution.times.expand(len(x), -1))
        self.points, self.times = torch.cat(points), torch.cat(times)

    def losses(
        self,
        part: BatchSlice,
        u: AverageVelocity,
        x: torch.Tensor,
        r: torch.Tensor,
        t: torch.Tensor,
        conditions: Sequence[torch.Tensor],
        width: float = 0.0,
    ) -> torch.Tensor:
        """
        Error of each row: with r = t that of the field's velocity at `x`, elsewhere that of the average velocity
        between the points of a trajectory, drawn anew, whose times are nearest to `t` and `r`.
        """
        equal = (r == t).nonzero()[:, 0]
        here = equal.to(x.device)
        chosen = (to_float64(part.uniform("trajectory")) * len(self.points)).long()
        times, rows = self.times[chosen], torch.arange(part.size)
        first = (times[:, :-1] - t[:, None]).abs().argmin(1)
        last = torch.maximum((times - r[:, None]).abs().argmin(1), first + 1)
        start, end = self.points[chosen, first], self.points[chosen, last]
        target = ((start - end) / lift(times[rows, first] - times[rows, last], start)).to(x)
        x = start.to(x).index_copy(0, here, x[here])
        r, t = (
            drawn.index_copy(0, equal, own[equal]) for drawn, own in ((times[rows, last], r), (times[rows, first], t))
        )
        conditions = [
            drawn[chosen].to(own).index_copy(0, here, own[here]) for drawn, own in zip(self.conditions, conditions)
        ]
        if len(equal):
            with torch.no_grad():
                velocity = self.field(t[equal], x[here], *(condition[here] for condition in conditions))
            target = target.index_copy(0, here, velocity.to(target))
        return huber_losses(u(x, r, t, *conditions).float() - target.float(), width)


def draw_trajectories(
    args: Any,
    pipeline: FlowMatchPipelineBase,
    path: ConditionalPath,
    field: Callable[..., torch.Tensor],
    label_dropout: float,
    device: torch.device,
) -> Trajectories:
    """Trajectories of all classes in turn, of which `label_dropout` are unconditional; the same in every process."""
    count = args.num_trajectories
    generator = make_generator(args.seed, "trajectories")
    noise = torch.randn((count, *pipeline.sample_shape), generator=generator)
    conditions = []
    if pipeline.num_classes:
        dropped = torch.rand(count, generator=generator) < label_dropout
        conditions = [torch.where(dropped, pipeline.null_class or 0, torch.arange(count) % pipeline.num_classes)]
    logger.info("%d trajectories of %d steps are drawn.", count, args.trajectory_steps)
    return Trajectories(field, path, noise, conditions, args.trajectory_steps, args.seed, args.eval_batch_size, device)


def flow_map_facts(args: Any, method: str) -> dict[str, str]:
    """Rows of a card: the method, a key of `METHODS`, and the calls of the network."""
    facts = {"method": METHODS[method], "calls of the network": f"{args.num_inference_steps} by default"}
    if getattr(args, "matching_steps", 0):
        facts["method"] += ", then moment matching (arXiv 2503.07565)"
    if args.learned_guidance_max is not None:
        facts["learned guidance"] = f"1 to {args.learned_guidance_max:g}, which `guidance_scale` chooses"
    if args.learned_guidance_scale != 1.0:
        facts["learned guidance"] = f"{args.learned_guidance_scale:g}; sample with `guidance_scale` 1"
    return facts
