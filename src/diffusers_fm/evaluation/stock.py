# SPDX-License-Identifier: Apache-2.0
"""Stock pipelines of diffusers as evaluation sees a pipeline of this package: its classes are numbered prompts."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..data.images import ImageData
from ..data.randomness import make_generator
from ..pipelines import FlowMatchPipelineOutput, StockFlow
from ..pipelines.base import flow_end
from ..pipelines.conditioned import Conditioned
from ..precision import to_float64
from ..transport import Solution, transport
from .measures import batch_of
from .sampling import Sampler
from .store import ResultStore


class StockModel:
    """
    Flow of a stock pipeline in the terms of a class-conditional [`FlowMatchPipeline`].

    Args:
        flow ([`StockFlow`]):
            The pipeline.
        prompts (`Sequence[str]`):
            What is drawn; the classes are their numbers.
        size (`dict[str, int]`):
            Arguments of the call for the size of the images, `height` and `width`.
    """

    def __init__(self, flow: StockFlow, prompts: Sequence[str], size: dict[str, int]) -> None:
        self.flow, self.prompts, self.size = flow, prompts, size
        self.scheduler, self._execution_device = flow.scheduler, flow.device
        self.sample_shape = flow.field(**size).state_shape(prompt=[prompts[0]])[1:]
        self._asked: dict[Any, Conditioned] = {}

    def predict(self, labels: Sequence[int], guidance_scale: float = 1.0) -> Conditioned:
        """Velocity under some of the prompts, by their numbers; what is asked of the pipeline for them is kept."""
        key = (*labels, guidance_scale)
        if key not in self._asked:
            prompts, scale = [self.prompts[label] for label in labels], None if guidance_scale == 1 else guidance_scale
            shape = (len(prompts), *self.sample_shape)
            self._asked[key] = self.flow.velocity(self.size, shape, prompts, {}, scale, single=scale is None)
        return self._asked[key]

    def transport(
        self,
        x: torch.Tensor,
        start: float,
        end: float,
        args: tuple[torch.Tensor, ...],
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Solution:
        """Carry states along the flow, as [`FlowMatchPipeline.transport`] does."""
        predict, numbers = self.predict(args[0].tolist(), guidance_scale), torch.arange(len(x))
        ends = {"start": flow_end(self.scheduler, start), "end": flow_end(self.scheduler, end)}
        kind = self.scheduler.config.prediction_type
        return transport(predict, x, self.scheduler.path, prediction_type=kind, args=(numbers,), **ends, **options)


class StockSampler(Sampler):
    """
    Sampler by number of a [`StockModel`]: each sample has its own noise and prompt.

    Args:
        model ([`StockModel`]):
            The model.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Scale of guidance as the pipeline's call takes it, 1 is off.
    """

    def __init__(self, model: Any, seed: int = 0, guidance_scale: float = 1.0) -> None:
        super().__init__(model, np.arange(len(model.prompts)), seed, guidance_scale)

    def draw(
        self,
        numbers: Sequence[int],
        scheduler: dict[str, Any] | None = None,
        output_type: str = "latent",
        num_inference_steps: int = 50,
    ) -> FlowMatchPipelineOutput:
        """Draw states at t = 0 on the scheduler's own grid, shifted as the pipeline shifts it at this size."""
        model: Any = self.pipeline
        labels = self.labels(numbers) or []
        predict = model.predict(labels, self.guidance_scale)
        sampler = model.scheduler.with_settings(**(scheduler or {}))
        mu = predict.field.mu(**model.size, prompt=[model.prompts[labels[0]]])
        shift = {"mu": mu} if sampler.config.use_dynamic_shifting else {}
        sampler.set_timesteps(num_inference_steps, device=model._execution_device, **shift)
        x = self.noise(numbers).to(model._execution_device) * sampler.init_noise_sigma
        generators = [make_generator(self.seed, "evaluation noise", number) for number in numbers]
        with torch.no_grad():
            for timestep, t in zip(sampler.timesteps, sampler.time(to_float64(sampler.timesteps))):
                x = sampler.step(predict(x, t), timestep, x, generator=generators, return_dict=False)[0]
        return FlowMatchPipelineOutput(images=x, nfe=len(sampler.timesteps))


def latent_likelihood(
    store: ResultStore, flow: StockFlow, data: ImageData, batch_size: int, seed: int = 0, **options: Any
) -> dict[str, Any]:
    """
    Log-density, in nats, of the latents of held-out images under their captions and the plain flow.

    Args:
        store ([`ResultStore`]):
            Results.
        flow ([`StockFlow`]):
            The pipeline.
        data ([`ImageData`]):
            Held-out images with captions.
        batch_size (`int`), seed (`int`, *optional*, defaults to 0):
            Images at once, and the seed of the probes.
        options:
            Arguments of [`StockFlow.log_likelihood`].

    Returns:
        `dict[str, Any]`: `nats_per_dim`, the mean of the density of a number of the latents, its standard error over
        the images, and `nfe`, the mean number of calls.
    """

    def work(numbers: range) -> dict[str, np.ndarray]:
        batch = batch_of(data, numbers)
        generator = make_generator(seed, "likelihood", numbers.start)
        result = flow.log_likelihood(batch["images"].float() / 255, batch["captions"], generator=generator, **options)
        log_prob = to_float64(result.log_prob) / result.noise[0].numel()
        return {"nats_per_dim": log_prob.cpu().numpy(), "nfe": result.nfe.cpu().numpy()}

    store.compute("latent_likelihood", len(data), batch_size, work)
    nats = store.read("latent_likelihood", "nats_per_dim")
    error = float(nats.std(ddof=1)) / math.sqrt(len(nats)) if len(nats) > 1 else None
    nfe = float(store.read("latent_likelihood", "nfe").mean())
    return {"nats_per_dim": float(nats.mean()), "standard_error": error, "images": len(nats), "nfe": nfe}
