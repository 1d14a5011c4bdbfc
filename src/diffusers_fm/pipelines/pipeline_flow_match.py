# SPDX-License-Identifier: Apache-2.0
"""Unconditional and class-conditional image generation with a flow matching model, in pixels or in latents."""

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from ..models.class_embedder import ClassEmbedder
from .base import Callback, FlowMatchPipelineBase, FlowMatchPipelineOutput
from .components import check_channels
from .transport import FlowTransportMixin


class FlowMatchPipeline(FlowTransportMixin, FlowMatchPipelineBase):
    r"""
    Generates images from noise by integrating the velocity that a network has learned, from t = 1 (noise) to t = 0
    (data), with the path, the grid and the solver of its [`FlowMatchScheduler`].

    The network is a [`~diffusers.UNet2DModel`] or [`~diffusers.DiTTransformer2DModel`], with or without classes, or an
    [`~diffusers.SD3Transformer2DModel`] conditioned through a [`ClassEmbedder`]. The components carry diffusers' own
    names, so folders of DDPM (`unet`, `scheduler`) and DiT (`transformer`, `vae`, `scheduler`, `id2label`) checkpoints
    load as well: a scheduler of another class is converted with [`FlowMatchScheduler.from_config`].

    Args:
        scheduler ([`FlowMatchScheduler`] or another diffusers scheduler):
            The path, what the network predicts, and how to sample.
        unet ([`~diffusers.UNet2DModel`], *optional*):
            The network. Exactly one of `unet` and `transformer` is given.
        transformer ([`~diffusers.DiTTransformer2DModel`] or [`~diffusers.SD3Transformer2DModel`], *optional*):
            The network.
        vae ([`~diffusers.AutoencoderKL`], [`~diffusers.AutoencoderTiny`] or [`~diffusers.AutoencoderDC`], *optional*):
            The autoencoder of a latent model.
        class_embedder ([`ClassEmbedder`], *optional*):
            The class conditioning of an `SD3Transformer2DModel`, and of no other network.
        num_classes (`int`, *optional*):
            Number of classes. Only a `UNet2DModel` needs it, and only if one row of its class table is the null class:
            `num_class_embeds == num_classes + 1`. Without it every row is a class.
        id2label (`dict`, *optional*):
            Names of the classes by label; a name may list synonyms separated by commas.

    Raises:
        ValueError: if the components do not fit together.
    """

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | SD3Transformer2DModel | None = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        class_embedder: ClassEmbedder | None = None,
        num_classes: int | None = None,
        id2label: dict | None = None,
    ) -> None:
        super().__init__(scheduler, unet, transformer, vae, class_embedder, num_classes, id2label)
        check_channels(self.denoiser, vae)

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        One call of the network at x_t, as in sampling: what comes out is of the scheduler's `prediction_type`.

        The network sees `scheduler.scale_model_input(sample, timestep)` in its own dtype. Labels are never dropped in
        here, in training mode neither: `DiTTransformer2DModel` would replace a tenth of them by the null class, in
        each block anew, on top of what a training script drops.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t, pixels or latents.
            timestep (`torch.Tensor` of shape `()` or `(batch_size,)`, or `float`):
                `num_train_timesteps * t`, continuous. It stays in float32: in bfloat16 it would be off by up to 2.
            class_labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
                Integer labels, [`null_class`] among them. Needed exactly if the model has classes.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`, without channels of a learned variance.
        """
        return self._call_network(self.scheduler.scale_model_input(sample, timestep), timestep, class_labels)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int] | list[str] | torch.Tensor | None = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
        solver: str | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> FlowMatchPipelineOutput | tuple[Any, int]:
        """
        Generates images.

        Args:
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                What to draw: labels, or names of the config's `id2label`. A single one serves the whole batch. Needed
                exactly if the model has classes.
            batch_size (`int`, *optional*):
                Number of images; defaults to the number of labels, of generators or of latents, else 1.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale w of classifier-free guidance (arXiv 2207.12598), `v = v_null + w * (v_class - v_null)`: 1 is
                off, 0 draws from the null class, that is, without a class. Values other than 1 double the batch of a
                call.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Number of solver steps. Each takes `scheduler.order` calls of the network, the last one fewer where a
                path ends in a single straight step.
            sigmas (`list[float]`, *optional*):
                Grid of the steps instead of `num_inference_steps`, see [`FlowMatchScheduler.set_timesteps`].
            timesteps (`list[float]`, *optional*):
                The same in the network's timesteps.
            mu (`float`, *optional*):
                Dynamic shift. If the scheduler's `use_dynamic_shifting` is on, it defaults to the value that follows
                from the number of tokens, as in Stable Diffusion 3.
            solver (`str`, *optional*):
                Solver of this call instead of the scheduler's. `"dopri5"` and `"bosh3"` choose their own steps, each
                image its own: `num_inference_steps` is not read then, and `nfe` is the largest number of any image.
            rtol (`float`, *optional*, defaults to 1e-5):
                Relative tolerance of an adaptive solver.
            atol (`float`, *optional*, defaults to 1e-5):
                Absolute tolerance of an adaptive solver.
            height (`int`, *optional*):
                Height of the images in pixels; defaults to the size that the network was configured for.
            width (`int`, *optional*):
                Width of the images in pixels, likewise.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise. With one for each image, the images do not depend on the batch they are made in.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                The noise itself, standard normal on every path: it is scaled to the path's prior in here.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for what the integration ends with: latents, or pixels in about
                [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`FlowMatchPipelineOutput`] or a tuple `(images, nfe)`.
            callback_on_step_end (`Callable`, *optional*):
                Called after each step as `callback(pipeline, step_index, timestep, tensors)` with the timestep at
                which the step began. It returns a dictionary; `latents` in it replace those of the loop. With solvers
                of several stages it is called once a step, not once a stage.
            callback_on_step_end_tensor_inputs (`list[str]`, *optional*, defaults to `["latents"]`):
                Names of the tensors handed to the callback.

        Returns:
            [`FlowMatchPipelineOutput`] or `tuple`: the images and the number of calls of the network.

        Raises:
            ValueError: for arguments that do not fit the pipeline, before any work.
        """
        tensor_inputs = (
            ["latents"] if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        )
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            tensor_inputs = callback_on_step_end.tensor_inputs

        # 1. Labels, sizes, and a check of everything else
        device = self._execution_device
        if batch_size is None and np.ndim(class_labels) == 0:
            if latents is not None:
                batch_size = latents.shape[0]
            else:
                batch_size = len(generator) if isinstance(generator, list) else 1
        labels = self.prepare_class_labels(class_labels, batch_size, device)
        batch_size = batch_size if labels is None else len(labels)
        shape = self.latent_shape(height, width)
        self.check_inputs(
            batch_size,
            shape,
            guidance_scale,
            sigmas,
            timesteps,
            generator,
            latents,
            output_type,
            tensor_inputs,
        )
        self.check_solver(solver, rtol, atol, sigmas, timesteps, mu, callback_on_step_end)

        # 2. Noise
        latents = self.prepare_latents((batch_size, *shape), device, generator, latents)

        # 3. Integration from noise to data
        latents, nfe = self.integrate(
            latents,
            () if labels is None else (labels,),
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            timesteps=timesteps,
            mu=mu,
            solver=solver,
            rtol=rtol,
            atol=atol,
            generator=generator,
            callback_on_step_end=callback_on_step_end,
            tensor_inputs=tensor_inputs,
        )

        # 4. Images
        images = self.to_images(latents, output_type)

        # 5. Offloading
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, nfe)
        return FlowMatchPipelineOutput(images=images, nfe=nfe)
