# SPDX-License-Identifier: Apache-2.0
"""Guiders of diffusers in stock pipelines, through their velocity field."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers.guiders import BaseGuidance

from ..precision import to_float64
from .checks import check_finite, check_noise, check_output
from .conditioned import Prompts, rows_of
from .guidance import Guidance
from .stock_flow import StockFlow


@torch.no_grad()
def draw_guided(
    flow: StockFlow,
    guider: BaseGuidance,
    noise: torch.Tensor,
    prompt: Prompts = "",
    negative_prompt: Prompts = "",
    size: dict[str, int] | None = None,
    num_inference_steps: int = 28,
    guidance_space: str | None = None,
    guidance_interval: Sequence[float] | None = None,
    output_type: str = "pil",
    **call: Any,
) -> Any:
    """
    Draw images with a stock pipeline by a guider of `diffusers.guiders` in place of the pipeline's own guidance.

    The guider is handed the velocity under the prompts and that under the negative prompts, in its space, as in
    [`FlowMatchPipeline`]. Guidance that is embedded in a network stays what `call` says.

    ```python
    flow = StockFlow(StableDiffusion3Pipeline.from_pretrained(folder))
    noise = torch.randn(1, 16, 128, 128)
    images = draw_guided(flow, ClassifierFreeZeroStarGuidance(4.0), noise, "a lighthouse at night")
    ```

    Args:
        flow ([`StockFlow`]):
            Flow of the pipeline; its scheduler decides solver and grid.
        guider ([`~diffusers.guiders.BaseGuidance`]):
            Guider; guiders that skip layers change the network for their own call.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Standard normal noise in the shape of the pipeline's loop.
        prompt, negative_prompt (`str` or `list[str]`, *optional*, defaults to `""`):
            What to draw, and what to lead away from: one prompt, or one for each.
        size, num_inference_steps, output_type, call (*optional*):
            As in [`StockFlow.decode`]; steps are those of the scheduler's grid.
        guidance_space, guidance_interval (*optional*):
            As in [`FlowMatchPipeline`].

    Returns:
        The images, as `output_type` says.

    Raises:
        ValueError: If noise or arguments do not fit the pipeline.
    """
    # 1. Checks, and the velocity under both prompts
    check_noise("noise", noise)
    check_output(len(noise), output_type, None)
    size, noise = size or {}, noise.to(flow.device, torch.float32)
    predict, null = (flow.velocity(size, noise.shape, each, call) for each in (prompt, negative_prompt))

    # 2. The pipeline's grid
    scheduler, one = flow.scheduler.with_settings(), rows_of(predict.call, [0], len(noise))
    scheduler.set_timesteps(**predict.field.timesteps(num_inference_steps, **one), device=flow.device)
    guidance = Guidance(guider, scheduler, flow.network, guidance_space, guidance_interval)

    # 3. Integration from noise to data
    x_t = guidance.skip_zero_steps(noise * scheduler.init_noise_sigma)
    for timestep in scheduler.timesteps[scheduler.begin_index or 0 :]:
        t = scheduler.time(to_float64(timestep))
        answer = guidance(x_t, timestep, partial(predict, x_t, t), partial(null, x_t, t))
        x_t = scheduler.step(answer, timestep, x_t, return_dict=False)[0]
    check_finite(flow.network, x_t)
    return flow.to_images(x_t, size, output_type, **one)
