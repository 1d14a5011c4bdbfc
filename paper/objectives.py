# SPDX-License-Identifier: Apache-2.0
"""The objectives that Lipman et al. (arXiv 2210.02747) compare, and the exploding path that they define and leave."""

from dataclasses import dataclass

import torch
from torch import nn

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.paths import lift
from diffusers_fm.timesteps import sample_timesteps


# The paper's own: the variance preserving velocity has no limit at the data, so that times keep this distance from it.
MARGIN = 1e-5


@dataclass(frozen=True)
class Objective:
    """
    One loss, as settings of this package.

    Args:
        label (`str`):
            What the paper calls it.
        path (`str`):
            Of [`FlowMatchScheduler`].
        prediction_type (`str`):
            What the network answers.
        weighting (`str`):
            Of [`flow_matching_loss`].
    """

    label: str
    path: str
    prediction_type: str
    weighting: str


OBJECTIVES = {
    "ddpm": Objective("DDPM", "vp", "epsilon", "epsilon"),
    "score-matching": Objective("Score matching", "vp", "score", "epsilon"),
    "scoreflow": Objective("ScoreFlow", "vp", "score", "likelihood"),
    "fm-diffusion": Objective("FM, diffusion path", "vp", "flow_prediction", "none"),
    "fm-ot": Objective("FM, OT path", "ot", "flow_prediction", "none"),
    "ve": Objective("VE", "ve", "v_prediction", "v_prediction"),
}


class Flow(nn.Module):
    """
    A network with the path on which it is trained.

    Args:
        objective ([`Objective`]):
            Path, prediction and loss.
        network (`nn.Module`):
            `network(x, timesteps)` with times from 0 to 1000.
    """

    def __init__(self, objective: Objective, network: nn.Module) -> None:
        super().__init__()
        self.objective, self.network = objective, network
        self.scheduler = FlowMatchScheduler(path=objective.path, prediction_type=objective.prediction_type)
        self.path = self.scheduler.path
        self.first_time = MARGIN if objective.path == "vp" else 0.0

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The network's answer at points `(batch_size, ...)` and times `(batch_size,)`."""
        scaled = lift(self.path.input_scale(t), x_t) * x_t
        return self.network(scaled.float(), (self.scheduler.timestep_scale * t).float()).to(x_t.dtype)

    def loss(self, data: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The objective on a batch, at uniform times: the same noise and times for every objective."""
        noise = torch.randn(data.shape, generator=generator)
        t = sample_timesteps("uniform", len(data), generator=generator)
        t = self.first_time + (1 - self.first_time) * t
        x_t = self.path.sample(data, noise, t)
        objective = self.objective
        return flow_matching_loss(
            self.path, self(x_t, t), data, noise, t, objective.prediction_type, objective.weighting
        ).mean()
