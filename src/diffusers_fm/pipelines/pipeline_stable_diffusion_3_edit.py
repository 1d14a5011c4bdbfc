# SPDX-License-Identifier: Apache-2.0
"""Editing an image by prompts with Stable Diffusion 3, without inversion."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from .base import FlowMatchPipelineOutput
from .checks import Generators, Images, check_guidance
from .components import KeepDtypeMixin
from .edits import FlowMatchInversionOutput
from .stock_flow import StockFlow


class StableDiffusion3EditPipeline(KeepDtypeMixin, StableDiffusion3Pipeline):
    r"""
    Edits images by two prompts, one for what they show and one for what they shall show, with Stable Diffusion 3.

    It has the components of a [`~diffusers.StableDiffusion3Pipeline`] and loads every folder and repository of one;
    `StableDiffusion3EditPipeline.from_pipe(pipeline)` shares the weights of one that is loaded. The path and the grid
    are those of its scheduler: a [`FlowMatchScheduler`], or a stock one, which is read as that.

    For images after one prompt, and for inpainting, use diffusers' own `StableDiffusion3Img2ImgPipeline` and
    `StableDiffusion3InpaintPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        source_prompt: str | list[str],
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        method: str = "flowedit",
        strength: float = 0.66,
        num_inference_steps: int = 50,
        source_guidance_scale: float = 3.5,
        guidance_scale: float = 13.5,
        num_averages: int = 1,
        num_free_steps: int = 0,
        solver: str = "ab2",
        mu: float | None = None,
        max_sequence_length: int = 256,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> FlowMatchPipelineOutput | tuple[Any, int]:
        """
        Edits images. The defaults are those that the paper of FlowEdit has for Stable Diffusion 3.

        Args:
            image (PIL images, `np.ndarray` or `torch.Tensor`):
                The images; arrays and tensors with values in [0, 1].
            source_prompt (`str` or `list[str]`):
                What they show: one prompt, or one for each.
            prompt (`str` or `list[str]`):
                What they shall show, likewise. An image for which this is the same is returned bit for bit.
            negative_prompt (`str` or `list[str]`, *optional*):
                What guidance leads away from, on both sides.
            source_guidance_scale (`float`, *optional*, defaults to 3.5):
                Scale of classifier-free guidance under the source prompt; 1 is off.
            guidance_scale (`float`, *optional*, defaults to 13.5):
                The same under the wanted prompt.
            mu (`float`, *optional*):
                Dynamic shift, where the scheduler uses it; defaults to what follows from the size.
            max_sequence_length (`int`, *optional*, defaults to 256):
                Tokens of the third text encoder.
            method, strength, num_inference_steps, num_averages, num_free_steps, solver, generator, output_type,
            return_dict (*optional*):
                As in [`FlowMatchEditPipeline`].

        Returns:
            [`FlowMatchPipelineOutput`] or `tuple`: The images and the number of calls of the network, two for each
            step; a call with guidance evaluates twice the batch and counts once.

        Raises:
            ValueError: For arguments that do not fit the pipeline or each other, before any work.
        """
        check_guidance(source_guidance_scale=source_guidance_scale, guidance_scale=guidance_scale)
        output = self._flow(max_sequence_length).edit(
            image,
            source_prompt,
            prompt,
            "" if negative_prompt is None else negative_prompt,
            method,
            strength,
            num_inference_steps,
            source_guidance_scale,
            guidance_scale,
            num_averages,
            num_free_steps,
            solver,
            mu,
            generator,
            output_type,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def invert(
        self,
        image: Images,
        prompt: str | list[str] = "",
        num_inference_steps: int = 25,
        solver: str = "heun",
        max_sequence_length: int = 256,
    ) -> FlowMatchInversionOutput:
        """
        Find the noise that images come from, without guidance, and the error of the way there and back.

        Args:
            image (PIL images, `np.ndarray` or `torch.Tensor`):
                The images; arrays and tensors with values in [0, 1].
            prompt (`str` or `list[str]`, *optional*, defaults to `""`):
                What they show: one prompt, or one for each.
            max_sequence_length (`int`, *optional*, defaults to 256):
                Tokens of the third text encoder.
            num_inference_steps, solver (*optional*):
                As in [`FlowMatchEditPipeline.invert`].

        Returns:
            [`FlowMatchInversionOutput`]: The noise, and the errors in units of latents.

        Raises:
            ValueError: If the images or prompts do not fit.
        """
        return self._flow(max_sequence_length).invert(image, prompt, num_inference_steps, solver)

    def _flow(self, max_sequence_length: int) -> StockFlow:
        """The flow of the stock pipeline that has these components."""
        stock = StableDiffusion3Pipeline(**self.components)
        stock.set_progress_bar_config(**vars(self).get("_progress_bar_config", {}))
        return StockFlow(stock, max_sequence_length=max_sequence_length)
