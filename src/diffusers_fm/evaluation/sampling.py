# SPDX-License-Identifier: Apache-2.0
"""Samples that depend on their number alone, their trajectories, and the solvers to compare."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

import numpy as np
import torch

from ..arguments import Arguments, option
from ..data.randomness import make_generator
from ..pipelines import FlowMatchPipeline
from ..precision import to_float64
from ..training.validation import quiet_copy


@dataclass(frozen=True, kw_only=True)
class ModelArguments(Arguments):
    """Trained pipeline."""

    _argument_group_name = "model"

    pretrained_model_name_or_path: str = option(MISSING, "Folder of a trained pipeline, or a Hub id.")
    revision: str | None = option(None, "Branch, tag or commit of the pipeline on the Hub.")
    variant: str | None = option(None, "Variant of the weights to load.")


@dataclass(frozen=True)
class SolverChoice:
    """Solver, coordinates and grid by the names of a scheduler's configuration; `calls` of the network in a step."""

    solver: str
    sampling_path: str
    timestep_spacing: str
    calls: int = 1

    @property
    def name(self) -> str:
        """The three names in a row."""
        return " ".join(self.settings.values())

    @property
    def settings(self) -> dict[str, str]:
        """The keys of the scheduler's configuration."""
        names = ("solver", "sampling_path", "timestep_spacing")
        return {name: getattr(self, name) for name in names}


SOLVER_CHOICES = (
    SolverChoice("euler", "ot", "trailing"),
    SolverChoice("ab2", "ot", "trailing"),
    SolverChoice("dpmpp_2m", "ot", "trailing"),
    SolverChoice("ab3", "angle", "graded"),
    SolverChoice("abm2", "angle", "graded"),
    SolverChoice("abm3", "angle", "graded"),
    SolverChoice("midpoint", "ot", "trailing", 2),
    SolverChoice("heun", "ot", "trailing", 2),
    SolverChoice("rk4", "ot", "trailing", 4),
    SolverChoice("dopri5", "ot", "trailing", 6),
)


class Sampler:
    """
    Sampler by number: each sample has its own noise and label, whatever batch it is drawn in.

    Args:
        pipeline ([`FlowMatchPipeline`]):
            The model. It is left as it is.
        labels (`np.ndarray` of shape `(num_labels,)`, *optional*):
            Labels by number, used over and over; `None` for a model without classes.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Scale of classifier-free guidance, 1 is off.
    """

    def __init__(
        self, pipeline: FlowMatchPipeline, labels: np.ndarray | None, seed: int = 0, guidance_scale: float = 1.0
    ) -> None:
        self.pipeline, self.seed, self.guidance_scale = pipeline, seed, guidance_scale
        self._labels = labels

    def labels(self, numbers: Sequence[int]) -> list[int] | None:
        """Labels of the samples."""
        return None if self._labels is None else [int(self._labels[n % len(self._labels)]) for n in numbers]

    def noise(self, numbers: Sequence[int]) -> torch.Tensor:
        """Standard normal noise, `(len(numbers), channels, height, width)` on the CPU."""
        shape = self.pipeline.sample_shape
        return torch.stack(
            [torch.randn(shape, generator=make_generator(self.seed, "evaluation", number)) for number in numbers]
        )

    def draw(
        self, numbers: Sequence[int], scheduler: dict[str, Any] | None = None, output_type: str = "pt", **options: Any
    ) -> Any:
        """Draw samples, with changes to the scheduler's configuration and arguments of the pipeline's call."""
        with quiet_copy(self.pipeline) as sampler:
            sampler.scheduler = sampler.scheduler.with_settings(**(scheduler or {}))
            return sampler(
                class_labels=self.labels(numbers),
                batch_size=len(numbers),
                guidance_scale=self.guidance_scale,
                latents=self.noise(numbers).to(sampler._execution_device),
                # Solvers that add noise draw it from here.
                generator=[make_generator(self.seed, "evaluation noise", number) for number in numbers],
                output_type=output_type,
                **options,
            )

    def draw_adaptive(self, numbers: Sequence[int], tolerance: float) -> tuple[torch.Tensor, np.ndarray]:
        """Draw samples by dopri5, each with its own steps: values that the decoder takes, and the calls of each."""
        pipeline, labels = self.pipeline, self.labels(numbers)
        device = pipeline._execution_device
        solution = pipeline.transport(
            self.noise(numbers).to(device) * pipeline.scheduler.init_noise_sigma,
            1.0,
            0.0,
            () if labels is None else (torch.tensor(labels, device=device),),
            guidance_scale=self.guidance_scale,
            method="dopri5",
            num_steps=None,
            rtol=tolerance,
            atol=tolerance,
            step_control="per_sample",
        )
        return solution.x.float(), solution.evaluations.cpu().numpy()


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """Images in [0, 1] as uint8 on the CPU, rounded as diffusers rounds them."""
    return (images.float() * 255).round().clamp(0, 255).to("cpu", torch.uint8).numpy()


def trajectories(
    pipeline: FlowMatchPipeline,
    noise: torch.Tensor,
    labels: list[int] | None,
    num_points: int = 33,
    steps_between: int = 4,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Exact trajectories from noise (t = 1) to data (t = 0), in the path's own coordinates.

    Args:
        pipeline ([`FlowMatchPipeline`]):
            The model.
        noise (`torch.Tensor` of shape `(batch_size, channels, height, width)`), labels (`list[int]`, *optional*):
            Standard normal noise, and labels of the samples.
        num_points (`int`, *optional*, defaults to 33):
            Number of points, evenly spread over t.
        steps_between (`int`, *optional*, defaults to 4):
            RK4 steps from one point to the next.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: times `(num_points,)` from 1 to 0, and points
        `(num_points, batch_size, num_values)`, float64.
    """
    x = noise.to(pipeline._execution_device) * pipeline.scheduler.init_noise_sigma
    args = () if labels is None else (torch.tensor(labels, device=x.device),)
    times = np.linspace(1.0, 0.0, num_points)
    points = [to_float64(x).flatten(1).numpy()]
    for before, after in zip(times, times[1:]):
        x = pipeline.transport(x, before, after, args, method="rk4", num_steps=steps_between, grading=1.0).x.float()
        points.append(to_float64(x).flatten(1).numpy())
    return times, np.stack(points)


def straightness(times: np.ndarray, points: np.ndarray) -> dict[str, np.ndarray]:
    """
    Straightness of trajectories.

    Args:
        times (`np.ndarray` of shape `(num_points,)`):
            Times of the points.
        points (`np.ndarray` of shape `(num_points, batch_size, num_values)`):
            Places of the samples at these times.

    Returns:
        `dict[str, np.ndarray]` of arrays `(batch_size,)`: `path_length_ratio`, the length of the trajectory over the
        distance of its ends, 1 or more; and `curvature`, the mean over time of the squared deviation of the velocity
        from the mean velocity over the squared mean velocity, 0 for a straight line at constant speed (Liu et al.,
        arXiv 2209.03003, equation 6, divided by the squared distance of the ends).
    """
    steps, moves = np.diff(times), np.diff(points, axis=0)
    span = points[-1] - points[0]
    displacement = np.linalg.norm(span, axis=-1)
    length = np.linalg.norm(moves, axis=-1).sum(0)
    mean_velocity = span / (times[-1] - times[0])
    deviation = np.square(moves / steps[:, None, None] - mean_velocity).sum(-1)
    weights = (steps / steps.sum())[:, None]
    return {
        "path_length_ratio": length / displacement,
        "curvature": (weights * deviation).sum(0) / np.square(mean_velocity).sum(-1),
    }
