# SPDX-License-Identifier: Apache-2.0
"""Editing the class of an image with a trained class-conditional flow matching model."""

from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from ..applications.editing import Predict
from ..models.autoencoding import decode_latents
from .base import FlowMatchPipelineOutput, NetworkField
from .checks import Generators, Images, Labels, check_guidance, check_output
from .edits import EditOptions, FlowMatchInversionOutput, edit_images, invert
from .pipeline_flow_match import FlowMatchPipeline
from .sampling import default_mu


class FlowMatchEditPipeline(FlowMatchPipeline):
    r"""
    Changes the class of images and little else, by a class-conditional [`FlowMatchPipeline`] as it was trained.

    It has the components of a [`FlowMatchPipeline`] and loads every folder of one;
    `FlowMatchEditPipeline.from_pipe(pipeline)` shares the weights of one that is loaded.
    """

    # Its two velocities are guided each by a scale of its own.
    _takes_guider = False

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        source_class_labels: Labels,
        class_labels: Labels,
        method: str = "flowedit",
        strength: float = 0.75,
        num_inference_steps: int = 50,
        source_guidance_scale: float = 1.0,
        guidance_scale: float = 1.0,
        num_averages: int = 1,
        num_free_steps: int = 0,
        solver: str = "ab2",
        mu: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> FlowMatchPipelineOutput | tuple[Any, int]:
        """
        Edits images.

        Args:
            image (PIL images, `np.ndarray` or `torch.Tensor`):
                The images; arrays and tensors with values in [0, 1].
            source_class_labels (`int`, `str`, `list` of them, or `torch.Tensor`):
                What they show: one label, or one for each. `null_class`, where there is one, stands for any.
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`):
                What they shall show, likewise. An image for which this is the same is returned bit for bit.
            method (`str`, *optional*, defaults to `"flowedit"`):
                `"flowedit"`: by differences of velocities, without going to noise (arXiv 2412.08629, see
                [`~editing.flow_edit`]). `"inversion"`: to noise under the one class and back under the other.
            strength (`float`, *optional*, defaults to 0.75):
                How far back towards noise the edit begins, in (0, 1]: the part of `num_inference_steps` that is made.
                The lower, the more of the image stays.
            num_inference_steps (`int`, *optional*, defaults to 50):
                Steps of the whole way.
            source_guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale of classifier-free guidance under the source class.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                The same under the wanted class.
            num_averages (`int`, *optional*, defaults to 1):
                Draws of noise that each step of `"flowedit"` is averaged over.
            num_free_steps (`int`, *optional*, defaults to 0):
                Last steps of `"flowedit"` that follow the wanted class alone, which lets details change more.
            solver (`str`, *optional*, defaults to `"ab2"`):
                Solver of `"inversion"`, a method of [`~solvers.odeint`].
            mu (`float`, *optional*):
                Dynamic shift, see [`FlowMatchPipeline`].
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise of `"flowedit"`. With one for each image, the images do not depend on their batch.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for latents, or pixels in about [-1, 1].
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`FlowMatchPipelineOutput`] or a tuple `(images, nfe)`.

        Returns:
            [`FlowMatchPipelineOutput`] or `tuple`: The images and the number of calls of the network, two for each
            step; a call with guidance evaluates twice the batch and counts once.

        Raises:
            ValueError: For arguments that do not fit the pipeline or each other, before any work.
        """
        # 1. A check of everything
        self._check_guider()
        check_guidance(source_guidance_scale=source_guidance_scale, guidance_scale=guidance_scale)
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
        if self.num_classes == 0:
            raise ValueError("Editing needs a pipeline with classes, and this one has none.")
        for scale in (source_guidance_scale, guidance_scale):
            if scale != 1.0 and self.null_class is None:
                raise ValueError(f"A guidance scale of {scale} needs a null class, and this network has none: use 1.")
        data = self.to_data(image)
        check_output(len(data), output_type, generator)
        source_labels = self.prepare_class_labels(source_class_labels, len(data), data.device, allow_null=True)
        labels = self.prepare_class_labels(class_labels, len(data), data.device, allow_null=True)
        if mu is None and self.scheduler.config.use_dynamic_shifting:
            patch_size = unwrap_module(self.denoiser).config.get("patch_size", 1)
            mu = default_mu(self.scheduler, tuple(data.shape[1:]), patch_size)

        # 2. The edit; images that are to stay as they are take no part in what is returned
        under = (
            lambda: self._under(source_labels, source_guidance_scale),
            lambda: self._under(labels, guidance_scale),
        )
        network, unchanged = unwrap_module(self.denoiser), source_labels == labels
        timesteps = {"num_inference_steps": num_inference_steps, "mu": mu}
        images, nfe = edit_images(
            self,
            network,
            self.scheduler,
            image,
            data,
            unchanged,
            under,
            options,
            lambda: timesteps,
            lambda data: data if self.vae is None else decode_latents(self.vae, data),
        )
        return FlowMatchPipelineOutput(images=images, nfe=nfe) if return_dict else (images, nfe)

    @torch.no_grad()
    def invert(
        self,
        image: Images,
        class_labels: Labels = None,
        num_inference_steps: int = 25,
        solver: str = "heun",
    ) -> FlowMatchInversionOutput:
        """
        The noise that images come from, and the error of the way there and back.

        Args:
            image (PIL images, `np.ndarray` or `torch.Tensor`):
                The images; arrays and tensors with values in [0, 1].
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                What they show. Needed exactly if the model has classes.
            num_inference_steps (`int`, *optional*, defaults to 25):
                Steps of each way.
            solver (`str`, *optional*, defaults to `"heun"`):
                A method of [`~solvers.odeint`]; Heun's is of order 2 and has two calls of the network a step.

        Returns:
            [`FlowMatchInversionOutput`]: The noise and the errors.

        Raises:
            ValueError: If images or labels do not fit the pipeline.
        """
        data = self.to_data(image)
        labels = self.prepare_class_labels(class_labels, len(data), data.device, allow_null=True)
        output = invert(
            unwrap_module(self.denoiser), self.scheduler, self._under(labels, 1.0), data, num_inference_steps, solver
        )
        self.maybe_free_model_hooks()
        return output

    def _under(self, labels: torch.Tensor | None, guidance_scale: float) -> Predict:
        """The network under a condition, a function of x_t and t."""
        field = NetworkField(self, guidance_scale)
        return lambda x_t, t: field(x_t, t.to(x_t), *(() if labels is None else (labels,)))
