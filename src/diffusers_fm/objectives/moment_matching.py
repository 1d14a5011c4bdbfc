# SPDX-License-Identifier: Apache-2.0
"""Moment matching: the last steps of a flow map's training, in which what it draws is compared with data as a set."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..arguments import Arguments, Count, Positive, Range, Size, option
from ..data.loading import TrainingData, num_in_memory, read_samples, rows_by_label
from ..data.randomness import BatchSlice, make_generator
from ..flow_maps import AverageVelocity, moment_matching_losses, sample_flow_map
from ..paths import lift
from ..precision import to_float64
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.arguments import TrainingArguments
from .auxiliary import choose_block, hidden_states
from .flow_maps import IntervalModel


# Data that are kept on the CPU, at most.
MAX_SAMPLES = 2**16
# Real samples with which those of a group are compared, at most.
MAX_REAL = 512
# Time of the flow whose hidden states are features: little noise, as clean data have.
FEATURE_TIME = 0.1


class Reached(Exception):
    """End of a call at the block whose output is asked for."""

    def __init__(self, output: Any) -> None:
        self.output = output


def reach(block: nn.Module, args: Any, output: Any) -> None:
    """Hook of a block that ends the call of the network."""
    raise Reached(output)


def call_times(scheduler: FlowMatchScheduler, calls: int) -> list[float]:
    """Straight times of a scheduler's calls, from noise to data, and their end."""
    scheduler = scheduler.with_settings()
    scheduler.set_timesteps(calls)
    return to_float64(scheduler.sigmas).clamp(max=scheduler.path.ratio_max).tolist()


@dataclass(frozen=True, kw_only=True)
class MomentMatchingArguments(Arguments):
    """Last steps, in which what the map draws is compared with data."""

    _argument_group_name = "moment matching"

    matching_steps: Size = option(
        0,
        "Last steps, in which samples that the map draws are compared with data as sets; training begins anew with"
        " them.",
        source="arXiv 2503.07565",
    )
    matching_calls: Count = option(
        1, "Sets in turn are drawn in 1 to this many calls, each of which the last one learns."
    )
    matching_groups: Count = option(16, "Sets in a step of a process, in place of its batch: each of one class.")
    matching_group: Annotated[Count, Range(2)] = option(16, "Samples of a set.")
    matching_known: Annotated[Count, Range(2)] = option(
        1024, "Samples of each label that the map before these steps draws, of 65,536 in all at most."
    )
    matching_rate: Positive = option(0.1, "Share of the learning rate in these steps.")

    def check(self) -> None:
        if not (self.matching_steps and isinstance(self, TrainingArguments)):
            return
        steps, total, flow_steps = self.matching_steps, self.max_train_steps, getattr(self, "flow_steps", 0)
        if total is None or steps + flow_steps > total:
            before = f" and --flow_steps {flow_steps}" if flow_steps else ""
            raise ValueError(f"--matching_steps {steps}{before} need --max_train_steps of as many, got {total}.")
        for name, unset in (("learned_guidance_scale", 1.0), ("learned_guidance_max", None)):
            if getattr(self, name) != unset:
                raise ValueError(f"--{name} does not go with --matching_steps: the data have no guidance.")


class MomentMatching:
    """
    Comparison of what a flow map draws in a few calls, the last of which learns, with the data of a label.

    Both are compared as they are and by the features that the map's own flow has of them: hidden states in the middle
    of the network, a UNet's middle block, their mean over the image. What the map before these steps draws from the
    same noise takes most of the noise of few samples out of the comparison.

    Args:
        args ([`MomentMatchingArguments`]):
            Of the run.
        before ([`IntervalModel`]):
            The map as it was, frozen.
        average_velocity (`Callable`):
            Makes the average velocity of a model.
        scheduler ([`FlowMatchScheduler`]):
            Scheduler of the pipeline: the path, and the times of its calls.
        data (`torch.Tensor` of shape `(num_samples, ...)`):
            Data as the flow sees them, on the CPU.
        labels (`torch.Tensor` of shape `(num_samples,)`, *optional*):
            Their labels.
        null_class (`int`, *optional*):
            Label of dropped labels, which all data have.
        label_dropout (`float`):
            Share of the groups with this label.
        device (`torch.device`):
            Where the models are.

    Raises:
        ValueError: if the network has no list of blocks.
    """

    def __init__(
        self,
        args: Any,
        before: IntervalModel,
        average_velocity: Callable[[IntervalModel], AverageVelocity],
        scheduler: FlowMatchScheduler,
        data: torch.Tensor,
        labels: torch.Tensor | None,
        null_class: int | None,
        label_dropout: float,
        device: torch.device,
    ) -> None:
        self._args, self._path, self._before, self._device = args, scheduler.path, average_velocity(before), device
        self._grids = [call_times(scheduler, calls) for calls in range(1, args.matching_calls + 1)]
        network = unwrap_module(before.denoiser)
        middle = getattr(network, "mid_block", None)
        self._block = choose_block(network, None, 0.5, "matching_steps")[1] if middle is None else middle
        self._in_order = [None] * len(data) if labels is None else sorted(labels.tolist())
        self._null_class = null_class if labels is not None and label_dropout else None
        self._data, self._dropout = data, label_dropout
        self._rows = rows_by_label(data, labels, self._null_class)
        self._known: dict[tuple[int | None, int], tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.no_grad():
            self._features_of_data = {
                label: torch.cat(
                    [self._features(data[some].to(device), label) for some in rows.split(args.eval_batch_size)]
                )
                for label, rows in self._rows.items()
            }

    def losses(
        self, part: BatchSlice, u: AverageVelocity, local: AverageVelocity
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Loss of each sample in the groups of a part of a step, all groups in one call of the map.

        `local` is the map without the wrapper of an engine, in which all processes make the same calls: it makes the
        calls before the last, which are as many as the groups of a process need.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: the path's times at which the samples start, and losses, both of shape
            `(matching_groups * matching_group,)`.
        """
        args, path, device = self._args, self._path, self._device
        size, count = args.matching_group, args.matching_groups
        number, parts = part.offset // part.size, part.total // part.size
        groups = BatchSlice(part.seed, part.step, number * count, count, parts * count)
        labels = self._draw_labels(groups)
        noise = groups.normal("moment matching", (size, *self._data.shape[1:]), device)
        numbers = range(groups.offset, groups.offset + count)
        grids = [self._grids[(number + part.step) % len(self._grids)] for number in numbers]
        t = torch.tensor([grid[-2] for grid in grids], dtype=torch.float64).repeat_interleave(size)
        noise = path.ratio_max * noise
        conditions = [torch.cat(each) for each in zip(*(self._conditions(label, size) for label in labels))]
        with torch.no_grad():
            before = self._end(self._before, self._start(self._before, noise, grids, labels), t, conditions)
        drawn = self._end(u, self._start(local, noise, grids, labels), t, conditions)
        losses = []
        for samples, own, label, grid, generator in zip(
            drawn.split(size), before.split(size), labels, grids, groups.sample_generators("moment matching")
        ):
            rows = self._rows[label]
            chosen = torch.randperm(len(rows), generator=generator)[:MAX_REAL]
            known, features_of_known = self._known_samples(label, grid)
            with torch.no_grad():
                features_of_own = self._features(own, label)
            features = self._features_of_data[label][chosen.to(device)]
            losses.append(
                moment_matching_losses(samples, self._data[rows[chosen]].to(device), own, known.to(device))
                + moment_matching_losses(self._features(samples, label), features, features_of_own, features_of_known)
            )
        return path.time_at(t), torch.cat(losses)

    @torch.no_grad()
    def _start(
        self, u: AverageVelocity, noise: torch.Tensor, grids: list[list[float]], labels: list[int | None]
    ) -> torch.Tensor:
        """Where the last calls of groups start, from their noise of shape `(matching_groups, matching_group, ...)`."""
        return torch.cat(
            [
                sample_flow_map(u, x, grid[:-1], args=self._conditions(label, len(x))) if len(grid) > 2 else x
                for x, grid, label in zip(noise, grids, labels)
            ]
        )

    def _end(
        self, u: AverageVelocity, x: torch.Tensor, t: torch.Tensor, conditions: list[torch.Tensor]
    ) -> torch.Tensor:
        """
        What the scheduler makes of straight points by its last call: the path's own points, to compare with data.

        On VE the path ends before straight time 0. The network knows of no later end, and the step goes on to where
        the scheduler's grid ends.
        """
        path, end = self._path, self._grids[0][-1]
        r = torch.full_like(t, path.ratio_min)
        x = (x - lift(t - end, x) * u(x, r, t, *conditions)).to(x.dtype)
        return path.from_straight(x, r)[0] if end > 0 else x

    @torch.no_grad()
    def _known_samples(self, label: int | None, grid: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples that the map before draws of a label, on the CPU, and their features; made once."""
        key = label, len(grid)
        if key not in self._known:
            count = min(self._args.matching_known, max(2, MAX_SAMPLES // len(self._rows)))
            generator = make_generator(self._args.seed, "known samples", label or 0, len(grid))
            noise = self._path.ratio_max * torch.randn((count, *self._data.shape[1:]), generator=generator)
            samples, features = [], []
            for x in noise.to(self._device).split(self._args.eval_batch_size):
                start = self._start(self._before, x[None], [grid], [label])
                t = torch.full((len(x),), grid[-2], dtype=torch.float64)
                drawn = self._end(self._before, start, t, self._conditions(label, len(x)))
                samples.append(drawn.cpu())
                features.append(self._features(drawn, label))
            self._known[key] = torch.cat(samples), torch.cat(features)
        return self._known[key]

    def _draw_labels(self, groups: BatchSlice) -> list[int | None]:
        """Labels of groups, spread evenly over the data, of which some are dropped."""
        strata = torch.arange(groups.offset, groups.offset + groups.size) + to_float64(groups.uniform("group"))
        labels = [self._in_order[int(share * len(self._in_order))] for share in strata / groups.total]
        if self._null_class is None:
            return labels
        dropped = groups.uniform("label_dropout") < self._dropout
        return [self._null_class if drop else label for label, drop in zip(labels, dropped)]

    def _conditions(self, label: int | None, size: int) -> list[torch.Tensor]:
        """Label of each sample as the condition of the model, or no condition."""
        return [] if label is None else [torch.full((size,), label, device=self._device)]

    def _features(self, samples: torch.Tensor, label: int | None) -> torch.Tensor:
        """Features of samples, `(num_samples, channels)`; no block after theirs is called."""
        time = torch.full((len(samples),), FEATURE_TIME, dtype=torch.float64)
        hook = self._block.register_forward_hook(reach)
        try:
            self._before(samples, time, time, *self._conditions(label, len(samples)))
        except Reached as reached:
            hidden = hidden_states(reached.output)
            # Of tokens, or of a map.
            return hidden.mean(1) if hidden.ndim == 3 else hidden.flatten(2).mean(2)
        finally:
            hook.remove()
        raise AssertionError("The network has a block that it does not call.")


def restarts(args: Any) -> dict[int, float]:
    """Steps at which the training of a flow map begins anew, with their shares of the learning rate."""
    restarts = {args.flow_steps: 1.0} if args.flow_steps else {}
    return restarts | ({args.max_train_steps - args.matching_steps: args.matching_rate} if args.matching_steps else {})


def begin_moment_matching(
    args: Any,
    before: IntervalModel,
    average_velocity: Callable[[IntervalModel], AverageVelocity],
    scheduler: FlowMatchScheduler,
    data: TrainingData,
    encode: Callable[[dict[str, Any]], torch.Tensor],
    null_class: int | None,
    label_dropout: float,
    device: torch.device,
) -> MomentMatching:
    """[`MomentMatching`] with the data of a run, or as many of them as are kept; `encode(batch)` are a batch's."""
    count = min(MAX_SAMPLES, num_in_memory(data, encode))
    samples = read_samples(data, lambda batch: encode(batch).cpu(), count, args.eval_batch_size)
    return MomentMatching(args, before, average_velocity, scheduler, *samples, null_class, label_dropout, device)
