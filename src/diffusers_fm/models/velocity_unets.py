# SPDX-License-Identifier: Apache-2.0
"""UNets of diffusion checkpoints that answer with the velocity of the straight path, by the scale-time identity."""

import functools
import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeVar

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..paths import DiscreteVPPath, lift
from ..precision import to_float64, widest_float


F = TypeVar("F", bound=Callable[..., None])


def _after_settings_of(base: type[nn.Module]) -> Callable[[F], F]:
    """Give an `__init__` the signature of its base class, which diffusers reads, and `diffusion` after it."""

    def decorate(init: F) -> F:
        parameters = [*inspect.signature(base.__init__).parameters.values()]
        own = inspect.Parameter("diffusion", inspect.Parameter.KEYWORD_ONLY, default=None)
        init.__signature__ = inspect.Signature([*parameters, own])  # type: ignore[attr-defined]
        return init

    return decorate


def _to_velocity(
    path: DiscreteVPPath, t: torch.Tensor, prediction_type: str, check: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of `x_t` and of the network's answer in `noise - data`; a check costs a device its pace."""
    ones = torch.ones_like(t)
    return path.coefficients(t, prediction_type, (-ones, ones), check=check)


class VelocityMixin:
    """
    Velocity `noise - data` of the straight path from a network that diffusion has trained (Diff2Flow, CVPR 2025).

    A point `x` of the straight path at the time `s` is, at another scale, the point `x / sqrt((1 - s)^2 + s^2)` of the
    diffusion path whose noise is to its data as `s` is to `1 - s`. The network is called there, and its answer gives
    noise and data. Weights and their names stay those of the diffusion network.
    """

    config: Any
    diffusion_class: type[nn.Module]

    @cached_property
    def diffusion_path(self) -> DiscreteVPPath:
        """Path that the network was trained on by diffusion."""
        settings = {name: value for name, value in (self.config.diffusion or {}).items() if name != "prediction_type"}
        path = DiscreteVPPath(**settings)
        _to_velocity(path, torch.ones(()), self.diffusion_prediction, check=True)
        return path

    @property
    def diffusion_prediction(self) -> str:
        """Prediction type of the diffusion model: `epsilon`, `v_prediction` or `sample`."""
        return (self.config.diffusion or {}).get("prediction_type", "epsilon")

    def straight_times(self, timesteps: torch.Tensor) -> torch.Tensor:
        """
        Times of the straight path at timesteps of the diffusion model: `sigmas` that give a diffusion grid.

        Args:
            timesteps (`torch.Tensor`):
                Any shape, in [0, num_train_timesteps - 1].

        Returns:
            `torch.Tensor`: `sigma / (alpha + sigma)` in [0, 1], on the CPU in float64.
        """
        path = self.diffusion_path
        return path.ratio(to_float64(timesteps) / (path.num_train_timesteps - 1))

    def _velocity(
        self, call: Callable[..., Any], sample: torch.Tensor, timestep: torch.Tensor | float, *args: Any, **kwargs: Any
    ) -> Any:
        """The velocity in the place of the network's answer, at `num_train_timesteps * s`."""
        path = self.diffusion_path
        timestep = torch.as_tensor(timestep, device=sample.device)
        s = timestep.to(widest_float(timestep)) / path.num_train_timesteps
        # Beyond the ends of the betas the network is called at the last one.
        t = path.time_at(s)
        x_t = (sample * lift(torch.rsqrt((1 - s).square() + s.square()), sample)).to(sample.dtype)
        output = call(x_t, (t * (path.num_train_timesteps - 1)).float(), *args, **kwargs)
        # Of a learned variance only the prediction is needed.
        prediction = output[0][:, : sample.shape[1]]
        on_sample, on_output = _to_velocity(path, t, self.diffusion_prediction, check=False)
        velocity = (lift(on_output, prediction) * prediction + lift(on_sample, x_t) * x_t).to(prediction.dtype)
        return (velocity, *output[1:]) if isinstance(output, tuple) else type(output)(sample=velocity)

    @classmethod
    def from_diffusion(cls, network: nn.Module, **diffusion: Any) -> Any:
        """
        The velocity of a diffusion network, whose weights it shares.

        Args:
            network ([`~diffusers.UNet2DModel`] or [`~diffusers.UNet2DConditionModel`]):
                Of the class that this one extends.
            diffusion:
                Parameters of [`~paths.DiscreteVPPath`], and `prediction_type`.

        Returns:
            The network, in evaluation mode.

        Raises:
            ValueError: If the betas are wrong, or what is predicted leaves the velocity open.
        """
        own: Any = cls
        with torch.device("meta"):
            velocity = own.from_config(network.config, diffusion=diffusion)
        _ = velocity.diffusion_path
        velocity.load_state_dict(network.state_dict(), assign=True)
        return velocity.eval()

    def to_diffusion(self) -> Any:
        """
        diffusers' own network with the same weights, which predicts what it did before the conversion.

        Returns:
            `UNet2DModel` or `UNet2DConditionModel`: In evaluation mode.
        """
        own: Any = self
        diffusion_class: Any = self.diffusion_class
        settings = {name: value for name, value in self.config.items() if name != "diffusion"}
        with torch.device("meta"):
            network = diffusion_class.from_config(settings)
        network.load_state_dict(own.state_dict(), assign=True)
        return network.eval()


class VelocityUNet2DModel(VelocityMixin, UNet2DModel):
    """
    A [`~diffusers.UNet2DModel`] of a diffusion checkpoint, such as DDPM's, as the velocity of the straight path.

    Its `forward` takes the arguments of its base class, with a `sample` of the straight path and a `timestep` of
    `num_train_timesteps * t`, t = 1 being noise, and returns `noise - data`, the `flow_prediction` of
    [`FlowMatchScheduler`] on the path `ot`. [`convert_diffusion`] makes it.

    Args:
        settings:
            Those of [`~diffusers.UNet2DModel`].
        diffusion (`dict`, *optional*):
            Parameters of [`~paths.DiscreteVPPath`] (`beta_start`, `beta_schedule`, ...), and `prediction_type`,
            `epsilon` by default.

    Raises:
        ValueError: If the betas are wrong, or what is predicted leaves the velocity open.
    """

    diffusion_class = UNet2DModel

    @register_to_config
    @_after_settings_of(UNet2DModel)
    def __init__(self, *args: Any, diffusion: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)

    @functools.wraps(UNet2DModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._velocity(super().forward, *args, **kwargs)


class VelocityUNet2DConditionModel(VelocityMixin, UNet2DConditionModel):
    """
    A [`~diffusers.UNet2DConditionModel`] of a diffusion checkpoint, such as Stable Diffusion 1.5 or XL, as the
    velocity of the straight path: see [`VelocityUNet2DModel`].

    Args:
        settings:
            Those of [`~diffusers.UNet2DConditionModel`].
        diffusion (`dict`, *optional*):
            As for [`VelocityUNet2DModel`].

    Raises:
        ValueError: As for [`VelocityUNet2DModel`].
    """

    diffusion_class = UNet2DConditionModel

    @register_to_config
    @_after_settings_of(UNet2DConditionModel)
    def __init__(self, *args: Any, diffusion: Mapping[str, Any] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)

    @functools.wraps(UNet2DConditionModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._velocity(super().forward, *args, **kwargs)
