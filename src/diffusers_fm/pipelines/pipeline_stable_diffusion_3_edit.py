# SPDX-License-Identifier: Apache-2.0
"""Editing an image by prompts with Stable Diffusion 3, without inversion."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.image_processor import VaeImageProcessor

from ..applications.editing import Predict
from ..models.autoencoding import encode_latents
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .base import FlowMatchPipelineOutput
from .checks import Generators, Images, check_output, read_images
from .components import KeepDtypeMixin
from .edits import EditOptions, FlowMatchInversionOutput, edit_images, invert
from .sampling import default_mu


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
        # 1. A check of everything
        options = EditOptions(
            method,
            num_inference_steps,
            strength,
            num_averages,
            num_free_steps,
            solver,
            generator,
            output_type,
            source_guidance_scale,
            guidance_scale,
        )
        pixels = self._to_pixels(image)
        batch_size = len(pixels)
        check_output(batch_size, output_type, generator)
        source_prompts = _for_each(batch_size, "source_prompt", source_prompt)
        prompts = _for_each(batch_size, "prompt", prompt)
        negative = _for_each(batch_size, "negative_prompt", "" if negative_prompt is None else negative_prompt)

        # 2. The edit; images that are to stay as they are take no part in what is returned
        scheduler = self._flow_scheduler()
        data = encode_latents(self.vae, pixels, sample=False)
        if mu is None and scheduler.config.use_dynamic_shifting:
            mu = default_mu(scheduler, tuple(data.shape[1:]), self.patch_size)
        unchanged = torch.tensor([a == b for a, b in zip(source_prompts, prompts)], device=data.device)
        under = (
            lambda: self._under(scheduler, source_prompts, negative, source_guidance_scale, max_sequence_length),
            lambda: self._under(scheduler, prompts, negative, guidance_scale, max_sequence_length),
        )
        images, nfe = edit_images(self, self.transformer, scheduler, image, data, unchanged, under, options, mu)
        return FlowMatchPipelineOutput(images=images, nfe=nfe) if return_dict else (images, nfe)

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
        pixels = self._to_pixels(image)
        prompts = _for_each(len(pixels), "prompt", prompt)
        scheduler = self._flow_scheduler()
        data = encode_latents(self.vae, pixels, sample=False)
        predict = self._under(scheduler, prompts, [""] * len(prompts), 1.0, max_sequence_length)
        output = invert(self.transformer, scheduler, predict, data, num_inference_steps, solver)
        self.maybe_free_model_hooks()
        return output

    def _flow_scheduler(self) -> FlowMatchScheduler:
        if isinstance(self.scheduler, FlowMatchScheduler):
            return self.scheduler
        return FlowMatchScheduler.from_stock(self.scheduler)

    def _to_pixels(self, image: Images) -> torch.Tensor:
        """Images in [-1, 1] at their own size, which has to be one that the transformer takes."""
        processor = VaeImageProcessor(do_resize=False, vae_latent_channels=0)
        pixels = read_images("image", image, processor).to(self._execution_device, torch.float32)
        multiple = self.vae_scale_factor * self.patch_size
        height, width = pixels.shape[-2:]
        largest = self.transformer.config.pos_embed_max_size * multiple
        if pixels.shape[1] != self.vae.config.in_channels:
            raise ValueError(f"`image` must have {self.vae.config.in_channels} channels, got {pixels.shape[1]}.")
        if height % multiple or width % multiple or max(height, width) > largest:
            raise ValueError(
                f"`image` must have a height and width that are multiples of {multiple} up to {largest}, got"
                f" {height} x {width}."
            )
        return pixels

    def _under(
        self,
        scheduler: FlowMatchScheduler,
        prompts: list[str],
        negative_prompts: list[str],
        guidance_scale: float,
        max_sequence_length: int,
    ) -> Predict:
        """The transformer under prompts, a function of x_t and t."""
        guided = guidance_scale != 1.0
        embeds, negative_embeds, pooled, negative_pooled = self.encode_prompt(
            prompts,
            None,
            None,
            device=self._execution_device,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompts,
            max_sequence_length=max_sequence_length,
        )
        if guided:
            embeds, pooled = torch.cat([negative_embeds, embeds]), torch.cat([negative_pooled, pooled])

        def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            inverted = scheduler.config.invert_sigmas
            timestep = scheduler.timestep_scale * (1 - t if inverted else t)
            model_input = scheduler.scale_model_input(x_t, timestep)
            timestep = timestep.to(x_t).expand(len(x_t))
            if guided:
                model_input, timestep = torch.cat([model_input, model_input]), torch.cat([timestep, timestep])
            output = self.transformer(
                hidden_states=model_input.to(self.transformer.dtype),
                timestep=timestep,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0].to(x_t.dtype)
            if guided:
                negative, positive = output.chunk(2)
                output = negative + guidance_scale * (positive - negative)
            return -output if inverted else output

        return predict


def _for_each(batch_size: int, name: str, prompt: str | list[str]) -> list[str]:
    prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
    if len(prompts) != batch_size or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`{name}` must be a string, or one for each of the {batch_size} images, got {prompt!r}.")
    return prompts
