# SPDX-License-Identifier: Apache-2.0
"""Velocity fields of tiny stock pipelines, and single steps of those pipelines by diffusers' own scheduler."""

import inspect
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.guiders import ClassifierFreeGuidance
from stock_pipelines import StockCase, flow_cases

from diffusers_fm.pipelines import VelocityField


# The network's time argument of each family, from its paper or model card.
TIME_ARGUMENTS = {
    "sd3": lambda t: 1000 * t,
    "flux": lambda t: t,
    "qwen": lambda t: t,
    "lumina2": lambda t: 1 - t,
    "sana": lambda t: 1000 * t,
    "aura-flow": lambda t: t,
    "cogview4": lambda t: 1000 * t,
    "mochi": lambda t: 1000 * (1 - t),
    "ltx": lambda t: 1000 * t,
    "wan": lambda t: 1000 * t,
}
# The stock calls of these two begin from the image, whatever latents they are given.
CASES = [name for name in flow_cases() if name not in ("flux-inpaint", "qwen-inpaint")]
TEXT = [name for name in CASES if not name.endswith(("-image", "-inpaint"))]


def split(case: StockCase) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments that all samples share, and two samples' own, without guidance."""
    dropped = ("num_inference_steps", "true_cfg_scale", "guidance_scale")
    inputs = {key: value for key, value in case.inputs.items() if key not in dropped and "negative" not in key}
    own = {key: torch.cat([value, value.flip(0)]) for key, value in inputs.items() if isinstance(value, torch.Tensor)}
    for value in own.values():
        if value.is_floating_point():
            value[1] = value[1].roll(1, -1)
    return {key: value for key, value in inputs.items() if key not in own}, own


def sample(own: dict[str, Any], i: int) -> dict[str, Any]:
    return {key: value[i : i + 1] for key, value in own.items()}


def make(name: str, **options: Any) -> tuple[VelocityField, torch.Tensor, dict[str, Any]]:
    """A field, two states, and the conditions of two samples."""
    case = flow_cases()[name]
    case.pipeline.scheduler = case.scheduler
    fixed, own = split(case)
    field = VelocityField(case.pipeline, **{**fixed, **options})
    return field, torch.randn(field.state_shape(**own), generator=torch.Generator().manual_seed(3)), own


class Decoded(Exception):
    """The decoder was reached."""


def stop_at_decoder(monkeypatch: pytest.MonkeyPatch, vae: Any) -> list[torch.Tensor]:
    """Latents that calls hand to an autoencoder's decoder from now on, which then raises `Decoded`."""
    given: list[torch.Tensor] = []

    def decode(latents: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        given.append(latents)
        raise Decoded

    monkeypatch.setattr(vae, "decode", decode)
    return given


class StepFrom(FlowMatchEulerDiscreteScheduler):
    """diffusers' own scheduler with one step, from a given time to the data."""

    init_noise_sigma = 1.0

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        ends = (1 - self.t, 1.0) if self.config.invert_sigmas else (self.t, 0.0)
        self.sigmas = torch.tensor(ends, dtype=torch.float32)
        self.timesteps = self.sigmas[:1] * self.config.num_train_timesteps
        self.num_inference_steps, self._step_index, self._begin_index = 1, None, None

    def scale_noise(self, sample: torch.Tensor, timestep: Any, noise: torch.Tensor) -> torch.Tensor:
        return sample if self.state is None else self.state

    def scale_model_input(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return sample

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = super().step(model_output, timestep, sample, *args, **kwargs)
        self.taken = (model_output, sample.clone(), out[0])  # some pipelines write the result into the state
        if self.result is None:
            return out
        return (self.result,) if kwargs.get("return_dict") is False else type(out)(prev_sample=self.result)


def stock_step(
    pipeline: DiffusionPipeline,
    x_t: torch.Tensor | None,
    t: float,
    *,
    network: str = "transformer",
    result: torch.Tensor | None = None,
    **call: Any,
) -> tuple[torch.Tensor, ...]:
    """Network output, state and result of one Euler step from t to 0 of the stock pipeline.

    Without x_t, the pipeline begins from its own noise, or its image. With `result`, it goes on with that.
    """
    old, guiders = pipeline.scheduler, {}
    names = inspect.signature(FlowMatchEulerDiscreteScheduler.__init__).parameters
    scheduler = StepFrom(**{key: value for key, value in old.config.items() if key in names})
    scheduler.t, scheduler.state, scheduler.result = t, x_t, result
    for name, component in pipeline.components.items():
        if name.endswith("guider") and component is not None:
            guiders[name] = component
            setattr(pipeline, name, ClassifierFreeGuidance(guidance_scale=1.0))
    pipeline.scheduler = scheduler
    pipeline.set_progress_bar_config(disable=True)
    taken = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    fixed = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 2, "output_type": "latent"}
    try:
        with torch.no_grad():
            pipeline(**{name: value for name, value in ({"latents": x_t} | fixed | call).items() if name in taken})
    finally:
        pipeline.scheduler = old
        for name, component in guiders.items():
            setattr(pipeline, name, component)
    return scheduler.taken
