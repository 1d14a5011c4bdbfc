# SPDX-License-Identifier: Apache-2.0
"""A stock flow matching pipeline as a velocity field: a network of x_t and t, to train, to score and to integrate."""

import contextlib
import inspect
import math
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from .findings import find, tolerance
from .one_step import one_time_scheduler
from .pipeline_calls import Findings, NetworkReached, PipelineCalls
from .prompt_memo import PromptMemo


class VelocityField(PipelineCalls):
    """
    Velocity of a stock pipeline of diffusers, differentiable, with a time for each sample.

    `forward` runs the pipeline's own call up to its first step, so that scaling, packing, position ids, masks,
    guidance and signs are those of sampling. How x_t enters, which arguments of the network depend on the time, and
    whether the network is called more than once are found by asking the pipeline once for each shape, in eval mode
    and without gradients, and verified. The pipeline is never changed. Where weights are sharded over processes, all
    of them have to `ask` for each shape together.

    ```python
    field = VelocityField(pipeline, height=512, width=512)
    velocity = field(x_t, t, prompt=captions)
    loss = (velocity - (noise - data)).square().mean()
    ```

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline with a flow matching scheduler.
        network (`str`, *optional*, defaults to `"transformer"`):
            Name of the component that is trained. It is registered as the attribute `network`, which may be replaced
            by its compiled or distributed form.
        guidance (`bool`, *optional*, defaults to `False`):
            Whether the network may be called several times for a sample, as guided sampling does. Training refuses it.
        num_inference_steps (`int`, *optional*, defaults to 28):
            Steps of sampling, on which the shift depends in some pipelines.
        call:
            Arguments of the pipeline's call that are the same in every `forward`, such as `height` and `width`.
            Without `guidance`, scales that are not given are those at which guidance is off.

    Raises:
        ValueError: If the pipeline is none of a straight flow, or does not have the component or an argument.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        network: str = "transformer",
        *,
        guidance: bool = False,
        num_inference_steps: int = 28,
        **call: Any,
    ) -> None:
        super().__init__(pipeline, network, guidance, num_inference_steps, call)
        self._found: dict[tuple[Any, ...], Findings] = {}

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, **call: Any) -> torch.Tensor:
        """
        Velocity noise - data at x_t and t.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                State of the pipeline's loop, as [`DecodeMap`] encodes it: packed or scaled as the pipeline does.
            t (`torch.Tensor` of shape `(batch_size,)` or `()`):
                Times in [0, 1], 0 = data, 1 = noise.
            call:
                Further arguments of the pipeline's call, such as `prompt`, a list with an entry for each sample.

        Returns:
            `torch.Tensor` of the shape and dtype of `x_t`.

        Raises:
            ValueError: If a time is out of range, or the pipeline's answers cannot be verified.
        """
        t = t.expand(len(x_t)) if t.ndim == 0 else t
        if t.shape != x_t.shape[:1]:
            raise ValueError(f"`t` must have the shape {tuple(x_t.shape[:1])} of the batch, got {tuple(t.shape)}.")
        offered, least, most = torch.stack([t.detach()[0], *t.detach().aminmax()]).tolist()
        found = self.ask(x_t, **call)
        low, high = self.times_range or (0.0, 1.0)
        if not low <= least <= most <= high:
            raise ValueError(f"`t` must lie in [{low:g}, {high:g}] for {self.name}, got {least:g} to {most:g}.")
        velocity = self.velocity(x_t, t, offered, call, found)
        if isinstance(self.encode_prompt, PromptMemo) and self.encode_prompt.unverified is not None:
            self._verify_text(self.encode_prompt, x_t, t, offered, call, found)
        return velocity

    @torch.no_grad()
    def ask(self, x_t: torch.Tensor, **call: Any) -> Findings:
        """
        Find and verify how a kind of call works; kept for each shape of a sample.

        A batch is asked about by its first two samples: the answers hold for every size of it.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                A state.
            call:
                As in `forward`.

        Returns:
            `Findings`: The answers.

        Raises:
            ValueError: If the pipeline cannot be verified to be a velocity field, in one sentence.
        """
        self.check_names(call)
        size = len(x_t)
        few = {name: value[:2] if _is_batch(value, size) else value for name, value in call.items()}
        kinds = ((name, _kind(value)) for name, value in sorted(few.items()))
        weight = next(self.network.parameters())
        key = (min(size, 2), x_t.shape[1:], x_t.dtype, x_t.device, weight.dtype, *kinds)
        if key not in self._found:
            with self.quiet(x_t):
                self._found[key] = find(self, x_t[:2], few)
        return self._found[key].for_batch(size)

    def set_scheduler(self, scheduler: SchedulerMixin) -> None:
        """
        Ask with another scheduler from now on.

        Args:
            scheduler ([`~diffusers.SchedulerMixin`]):
                Flow matching scheduler, whose configuration decides the shift.
        """
        vars(self.pipeline)["scheduler"] = scheduler
        self._scheduler = one_time_scheduler(scheduler)
        self._found.clear()

    @torch.no_grad()
    def state_shape(self, **call: Any) -> tuple[int, ...]:
        """
        Shape of x_t for a call, its batch axis included.

        Args:
            call:
                As in `forward`.
        """
        self.check_names(call)
        with self.quiet(None):
            return tuple(self.run(self.probes(call)[1], call, self.calls()).sample.shape)

    @torch.no_grad()
    def shift(self, **call: Any) -> float:
        """
        Shift of the pipeline's times at the size of a call, for [`~timesteps.shift_time`].

        It is the one that the pipeline itself passes to its scheduler for this size (`mu`) where the shift is dynamic,
        and the scheduler's own otherwise.

        Args:
            call:
                As in `forward`.
        """
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("shift", config.get("flow_shift", 1.0)))
        mu = self.mu(**call)
        if mu is None:
            raise ValueError(f"{type(self.pipeline).__name__} passes no `mu` to its scheduler, which needs one.")
        return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)

    def mu(self, **call: Any) -> float | None:
        """
        Shift that the pipeline passes to its scheduler for a call, if it does.

        Args:
            call:
                As in `forward`.
        """
        return self.timesteps(**call).get("mu")

    @torch.no_grad()
    def timesteps(self, num_inference_steps: int | None = None, **call: Any) -> dict[str, Any]:
        """
        Arguments that the pipeline gives to `set_timesteps` of its scheduler in a call.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of the call; those of the field by default.
            call:
                As in `forward`.

        Returns:
            `dict[str, Any]`: Of `num_inference_steps`, `sigmas`, `timesteps` and `mu` those that it gives.
        """
        self.check_names(call)
        calls, steps = self.calls(stop=True), num_inference_steps or self.num_inference_steps
        with self.quiet(None), contextlib.suppress(NetworkReached):
            self.run(self.probes(call)[1], {**call, "num_inference_steps": steps}, calls)
        return calls.asked

    def without_gradient(self, x_t: torch.Tensor, t: torch.Tensor, **call: Any) -> list[str]:
        """
        Names of trainable parameters of the network that the velocity does not depend on.

        Distributed training stops at them unless they are frozen.

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, ...)`):
                States.
            t (`torch.Tensor` of shape `(batch_size,)`):
                Times.
            call:
                As in `forward`.
        """
        names, parameters = zip(*((n, p) for n, p in self.network.named_parameters() if p.requires_grad))
        gradients = torch.autograd.grad(self(x_t, t, **call).sum(), parameters, allow_unused=True)
        return [name for name, gradient in zip(names, gradients) if gradient is None]

    def keep_text(self, device: str | torch.device = "cpu") -> PromptMemo:
        """
        From now on encode each caption once, alone, and put batches together from those.

        Args:
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where the embeddings are kept.

        Returns:
            [`PromptMemo`]: The embeddings; once they are there, the text encoders can be dropped.
        """
        self.encode_prompt = memo = PromptMemo(self.pipeline, device)
        return memo

    @torch.no_grad()
    def _verify_text(self, memo: PromptMemo, x_t: torch.Tensor, *arguments: Any) -> None:
        """Compare a batch of kept captions of different lengths with the encoders' own."""
        with self.quiet(x_t):
            kept = self.velocity(x_t, *arguments).float()
            self.encode_prompt = memo.encode
            try:
                expected = self.velocity(x_t, *arguments).float()
            finally:
                self.encode_prompt = memo
        if not (kept - expected).abs().max() <= 0.1 * tolerance(self, x_t) * expected.abs().max():
            memo.refuse()
            self.velocity(x_t, *arguments)
        memo.unverified = None

    def describe(self) -> list[dict[str, Any]]:
        """
        What was found, for each kind of call that was asked: plain values, for logs and files.

        Returns:
            `list[dict]`: `shape` of x_t; `x_t`, how it enters; `calls` of the network a step; `time`, the arguments of
            the network that depend on t, and how; `sign` of the network's output against noise - data; `mu`.
        """
        return [
            {
                "pipeline": type(self.pipeline).__name__,
                "network": type(self.pipeline.components[self.name]).__name__,
                "shape": list(found.shape),
                "x_t": found.entry,
                "calls": len(found.rows),
                "rows": list(found.rows),
                "time": {name: str(line) for times in found.times for name, line in times.items()},
                "sign": found.sign,
                "mu": found.mu,
                "call": {name: str(value) for name, value in self.call.items()},
            }
            for found in self._found.values()
        ]


def guidance_call(pipeline: DiffusionPipeline, network: torch.nn.Module, scale: float) -> dict[str, Any]:
    """Arguments of sampling with guidance, whichever name the pipeline has for its scale."""
    names = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    embedded = bool(network.config.get("guidance_embeds", False))  # pyright: ignore[reportCallIssue]
    name = "true_cfg_scale" if "true_cfg_scale" in names and not embedded else "guidance_scale"
    if name not in names:
        return {}
    negative = {"negative_prompt": ""} if "negative_prompt" in names and scale > 1 else {}
    return {name: scale, **negative}


def _is_batch(value: Any, size: int) -> bool:
    """Return whether an argument of a call has an entry for each sample."""
    return size > 2 and isinstance(value, (list, torch.Tensor)) and len(value) == size


def _kind(value: Any) -> Any:
    """Kind of a value: a pipeline runs the same code for all values of a kind."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype
    if isinstance(value, (list, tuple)):
        return len(value), *{_kind(each): None for each in value}
    if isinstance(value, float):
        return value > 0, value > 1
    return value if isinstance(value, (bool, int)) or value is None else type(value).__name__
