# SPDX-License-Identifier: Apache-2.0
"""What a flow can do besides drawing: carry images to noise and back, mix them, and tell how likely they are."""

from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.image_processor import VaeImageProcessor

from ..likelihood import BitsPerDim, Likelihood, bits_per_dim, log_likelihood
from ..models.autoencoding import encode_latents
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..solvers import Solution
from .base import NetworkField, flow_end


Images = PIL.Image.Image | list[PIL.Image.Image] | np.ndarray | torch.Tensor
Labels = int | str | list[int] | list[str] | torch.Tensor | None


class FlowTransportMixin:
    """
    Methods of [`FlowMatchPipeline`] that follow the flow in either direction.

    All of them integrate in coordinates in which every path is the same, on a grid that is finer towards the data,
    with [`~transport.transport`] and [`~likelihood.log_likelihood`].
    """

    if TYPE_CHECKING:
        scheduler: FlowMatchScheduler
        vae: ModelMixin | None
        vae_scale_factor: int
        image_processor: VaeImageProcessor
        null_class: int | None
        sample_shape: tuple[int, int, int]
        _execution_device: torch.device

        def predict(
            self, sample: torch.Tensor, timestep: torch.Tensor | float, class_labels: torch.Tensor | None = None
        ) -> torch.Tensor: ...

        def prepare_class_labels(
            self,
            class_labels: Labels,
            batch_size: int | None = None,
            device: torch.device | str = "cpu",
            allow_null: bool = False,
        ) -> torch.Tensor | None: ...

        def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]: ...

        def transport(
            self, x_t: torch.Tensor, start: float, end: float, args: tuple[torch.Tensor, ...] = (), **options: Any
        ) -> Solution: ...

    @torch.no_grad()
    def encode(
        self,
        images: Images,
        class_labels: Labels = None,
        num_inference_steps: int | None = 64,
        solver: str | None = None,
    ) -> torch.Tensor:
        """
        Carry images along the flow to the noise that they come from (arXiv 2210.02747, equation 1).

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as diffusers takes them: PIL images, arrays `(batch_size, height, width, channels)` or tensors
                `(batch_size, channels, height, width)` with values in [0, 1].
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                The classes of the images. Needed exactly if the model has classes.
            num_inference_steps (`int`, *optional*, defaults to 64):
                Number of steps; `None` for adaptive steps, to 1e-5.
            solver (`str`, *optional*):
                A method of [`~solvers.odeint`]. Defaults to `"abm3"`, of one call of the network a step, and to
                `"dopri5"` for adaptive steps.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: About standard normal noise, in float32,
            on every path: what `__call__` and [`decode`] take.

        Raises:
            ValueError: If images or labels do not fit the pipeline.
        """
        data, args = self._data_and_labels(images, class_labels)
        noise = self._carry(data, args, 0.0, 1.0, num_inference_steps, solver)
        return noise / self.scheduler.init_noise_sigma

    @torch.no_grad()
    def decode(
        self,
        noise: torch.Tensor,
        class_labels: Labels = None,
        num_inference_steps: int | None = 64,
        output_type: str = "pil",
        solver: str | None = None,
    ) -> Any:
        """
        Carry noise along the flow to images: the way back of [`encode`].

        Args:
            noise (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Standard normal noise, such as [`encode`] returns.
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                What to draw. Other classes than those that were encoded give the images' counterparts in them.
            num_inference_steps (`int`, *optional*, defaults to 64):
                Number of steps; `None` for adaptive steps.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            solver (`str`, *optional*):
                As for [`encode`].

        Returns:
            The images, as `output_type` says.

        Raises:
            ValueError: If noise, labels or the output type do not fit the pipeline.
        """
        self._check_shape("noise", noise)
        labels = self.prepare_class_labels(class_labels, len(noise), noise.device, allow_null=True)
        x_1 = noise.float() * self.scheduler.init_noise_sigma
        data = self._carry(x_1, () if labels is None else (labels,), 1.0, 0.0, num_inference_steps, solver)
        return self.to_images(data, output_type)

    @torch.no_grad()
    def interpolate(
        self,
        first: Images,
        second: Images,
        num_images: int = 8,
        class_labels: Labels = None,
        num_inference_steps: int | None = 64,
        output_type: str = "pil",
    ) -> Any:
        """
        Images between two images, along the great circle through the noise that they come from.

        Args:
            first (PIL image, `np.ndarray` or `torch.Tensor`):
                One image, where the sequence begins.
            second (PIL image, `np.ndarray` or `torch.Tensor`):
                One image, where it ends.
            num_images (`int`, *optional*, defaults to 8):
                Length of the sequence, both ends included; at least 2.
            class_labels (`int`, `str`, `list` of two of them, *optional*):
                The class of both, or of each. Between two classes, the first half is drawn in the first one.
            num_inference_steps (`int`, *optional*, defaults to 64):
                Number of steps in each direction; `None` for adaptive steps.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.

        Returns:
            The images, as `output_type` says.

        Raises:
            ValueError: If the images or labels do not fit the pipeline, or `num_images` is below 2.
        """
        if num_images < 2:
            raise ValueError(f"`num_images` must be at least 2, got {num_images}.")
        data = torch.cat([self.to_data(first), self.to_data(second)])
        if len(data) != 2:
            raise ValueError(f"`first` and `second` must be one image each, got {len(data)} together.")
        labels = self.prepare_class_labels(class_labels, 2, data.device)
        noise = self._carry(data, () if labels is None else (labels,), 0.0, 1.0, num_inference_steps)
        a, b = noise.double().flatten(1)
        angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
        part = torch.linspace(0, 1, num_images, dtype=torch.float64, device=a.device)[:, None]
        if angle < 1e-6:
            between = a + part * (b - a)
        else:
            between = (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)
        between = between.float().reshape(num_images, *noise.shape[1:])
        args = () if labels is None else (torch.where(part[:, 0] < 0.5, labels[0], labels[1]),)
        return self.to_images(self._carry(between, args, 1.0, 0.0, num_inference_steps), output_type)

    def log_likelihood(
        self,
        images: Images,
        class_labels: Labels = None,
        latent_space: bool = False,
        **options: Any,
    ) -> Likelihood:
        """
        The log-density of images under the model, by change of variables (arXiv 2210.02747, appendix C).

        It is the density of pixels scaled to [-1, 1], in nats, of the plain flow: with guidance, or after distillation
        to few steps, the velocity has no density that belongs to it.

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as diffusers takes them, see [`encode`].
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                The classes of the images: the density is the conditional one. Needed exactly if the model has classes;
                `null_class`, where there is one, asks for the density without a class.
            latent_space (`bool`, *optional*, defaults to `False`):
                Latent pipelines have a density of latents only, which says nothing of pixels: `True` asks for that.
            options:
                Arguments of [`~likelihood.log_likelihood`]: `divergence`, `num_probes`, `num_steps`, `batch_size`,
                `generator`, ...

        Returns:
            [`~likelihood.Likelihood`]: Log-densities of shape `(batch_size,)`, the noise, and the work it took.

        Raises:
            ValueError: If the pipeline is a latent one and `latent_space` is not set, or images or labels do not fit.
        """
        self._check_space(latent_space)
        data, args = self._data_and_labels(images, class_labels)
        options = {"start": flow_end(self.scheduler, 0.0), "end": flow_end(self.scheduler, 1.0)} | options
        config = self.scheduler.config
        return log_likelihood(
            NetworkField(self), data, self.scheduler.path, prediction_type=config.prediction_type, args=args, **options
        )

    def bits_per_dim(
        self,
        images: torch.Tensor,
        class_labels: Labels = None,
        num_samples: int = 1,
        levels: int = 256,
        **options: Any,
    ) -> BitsPerDim:
        """
        Bits per dimension of images of whole levels, by uniform dequantisation (arXiv 2210.02747, appendix E.1).

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Whole numbers from 0 to `levels - 1`, of an integer type.
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                The classes of the images. Needed exactly if the model has classes.
            num_samples (`int`, *optional*, defaults to 1):
                Values of the dequantisation noise for each image: the K of the paper.
            levels (`int`, *optional*, defaults to 256):
                Number of levels of a value.
            options:
                Arguments of [`~likelihood.log_likelihood`].

        Returns:
            [`~likelihood.BitsPerDim`]: Bits per dimension of shape `(batch_size,)`, and the work it took.

        Raises:
            ValueError: If the pipeline is a latent one, or images or labels do not fit.
        """
        self._check_space(False)
        self._check_shape("images", images)
        images = images.to(self._execution_device)
        labels = self.prepare_class_labels(class_labels, len(images), images.device, allow_null=True)
        options = {"start": flow_end(self.scheduler, 0.0), "end": flow_end(self.scheduler, 1.0)} | options
        return bits_per_dim(
            NetworkField(self),
            images,
            self.scheduler.path,
            num_samples=num_samples,
            levels=levels,
            prediction_type=self.scheduler.config.prediction_type,
            args=() if labels is None else (labels,),
            **options,
        )

    @torch.no_grad()
    def to_data(self, images: Images) -> torch.Tensor:
        """
        Images as the flow sees them: pixels in [-1, 1], or latents by the mode of the autoencoder's posterior.

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as diffusers takes them, see [`encode`].

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: In float32, on the pipeline's device.

        Raises:
            ValueError: If number of channels or size do not fit the pipeline.
        """
        pixels = self.image_processor.preprocess(images).to(self._execution_device, torch.float32)
        data = pixels if self.vae is None else encode_latents(self.vae, pixels, sample=False)
        self._check_shape("images", data)
        return data

    def _check_shape(self, name: str, data: torch.Tensor) -> None:
        factor = self.vae_scale_factor
        shape = tuple(data.shape)
        if len(shape) != 4 or shape[1:] != self.latent_shape(shape[-2] * factor, shape[-1] * factor):
            expected = (shape[0] if shape else 0, *self.sample_shape)
            raise ValueError(f"`{name}` must have the shape {expected} for this pipeline, got {shape}.")

    def _check_space(self, latent_space: bool) -> None:
        if (self.vae is not None) != latent_space:
            raise ValueError(
                f"This pipeline has a density of {'pixels' if self.vae is None else 'latents'}, got `latent_space` "
                f"{latent_space}."
            )

    def _data_and_labels(self, images: Images, class_labels: Labels) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        data = self.to_data(images)
        labels = self.prepare_class_labels(class_labels, len(data), data.device, allow_null=True)
        return data, () if labels is None else (labels,)

    def _carry(
        self,
        x: torch.Tensor,
        args: tuple[torch.Tensor, ...],
        start: float,
        end: float,
        num_steps: int | None,
        solver: str | None = None,
    ) -> torch.Tensor:
        method = solver or ("abm3" if num_steps is not None else "dopri5")
        return self.transport(x, start, end, args, method=method, num_steps=num_steps).x.float()
