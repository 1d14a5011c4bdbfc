# SPDX-License-Identifier: Apache-2.0
"""Schedulers that watch the sampling loop of a pipeline."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ..coordinates import Coordinates, angle_of_ratio
from ..precision import to_float64
from .scheduling_flow_match import FlowMatchScheduler


# `run(scheduler, num_inference_steps, seed)` draws noise by the seed and runs one sampling loop with that scheduler.
Run = Callable[[FlowMatchScheduler, int, int], Any]


class Watcher(FlowMatchScheduler):
    """Scheduler that keeps to its own grid, whatever a pipeline gives, and notes where its loop ends."""

    turns: int = 0
    end: torch.Tensor
    called_at: list[float] | None = None

    def watch(self, run: Run, num_inference_steps: int, seed: int) -> int:
        """Have a pipeline make one loop of so many steps; returns the calls of the network."""
        run(self, num_inference_steps, seed)
        if (self.num_inference_steps, self.turns) != (num_inference_steps, len(self._stages)):
            raise ValueError(
                f"`run` must make one sampling loop of {num_inference_steps} steps, got {self.turns} turns."
            )
        return self.turns

    def error(self, exact: torch.Tensor) -> float:
        """Relative error of the loop's end; infinite if it is not finite."""
        error = float((to_float64(self.end) - to_float64(exact)).norm() / to_float64(exact).norm())
        return error if math.isfinite(error) else math.inf

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().step(model_output, timestep, sample, *args, **kwargs)
        self.end = result[0].clone()
        self.turns += 1
        return result

    def __copy__(self) -> "Watcher":
        """Itself: pipelines sample with copies of their scheduler, and notes are to be found here."""
        return self

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        if timesteps is not None:
            raise ValueError(
                "A pipeline whose timesteps are not those of its grid cannot be calibrated, got `timesteps`."
            )
        given = num_inference_steps if sigmas is None else len(sigmas)
        super().set_timesteps(given if self.called_at is None else None, device, self.called_at, mu)

    def normalised(self, sample: torch.Tensor) -> torch.Tensor:
        """The sample of this turn in the angle's coordinates; the first one is noise as it is at t = 1."""
        t = torch.tensor(self._stages[self.turns].t if self.turns else 1.0, dtype=torch.float64)
        return to_float64(sample) / self.scale(self.path.alpha(t), self.path.sigma(t))

    def scale(self, alpha: Any, sigma: Any) -> float:
        coordinates = Coordinates(self.path, "angle", self.sigma_data)
        return float(coordinates.scale(*(torch.as_tensor(value, dtype=torch.float64) for value in (alpha, sigma))))


class Recorder(Watcher):
    """Keeps the trajectory of a loop."""

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if self.turns == 0:
            self.points: list[torch.Tensor] = []
        self.points.append(self.normalised(sample).to(torch.promote_types(sample.dtype, torch.float32)))
        return super().step(model_output, timestep, sample, *args, **kwargs)

    def at(self, angle: float) -> torch.Tensor:
        """The trajectory at an angle, by the polynomial through the four nearest points."""
        if angle == 0.0:
            return to_float64(self.end) / self.scale(1.0, 0.0)
        ratios = torch.tensor([stage.ratio for stage in self._stages], dtype=torch.float64)
        angles = angle_of_ratio(ratios, self.sigma_data)
        first = min(max(int((angles > angle).sum()) - 2, 0), len(angles) - 4)
        nodes = angles[first : first + 4].tolist()
        result = torch.zeros_like(self.points[0], dtype=torch.float64)
        for i, node in enumerate(nodes):
            weight = math.prod((angle - other) / (node - other) for other in nodes if other != node)
            result += weight * self.points[first + i]
        return result
