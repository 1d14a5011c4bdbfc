# SPDX-License-Identifier: Apache-2.0
"""Image generation with a flow matching model, unconditional or by class, and its flow in both directions."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import unwrap_module

from ..applications.anomaly import AnomalyScore, noise_test
from ..likelihood import BitsPerDim, Likelihood, bits_per_dim, log_likelihood
from ..models.autoencoding import encode_latents
from ..precision import to_float64
from .base import FlowMatchPipelineBase, FlowMatchPipelineOutput, NetworkField, flow_end
from .checks import (
    Callback,
    Generators,
    Images,
    Labels,
    check_finite,
    check_noise,
    check_output,
    is_whole,
    read_images,
)
from .flow_map import check_flow
from .sampling import SamplingOptions
from .stock import stock_pipeline


class FlowMatchPipeline(FlowMatchPipelineBase):
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
        interval_embedding ([`IntervalEmbedding`], *optional*):
            Second time embedding of a few-step `UNet2DModel`, for the end of a step.
        guider ([`~diffusers.guiders.BaseGuidance`], *optional*):
            Guider of diffusers, in place of `guidance_scale`, see [`~pipelines.guidance.Guidance`]. `__call__` alone
            uses it: [`encode`], [`decode`] and densities are those of the plain flow.
        guiding_network ([`~diffusers.ModelMixin`], *optional*):
            Network to guide away from (arXiv 2406.02507), with the labels of the wanted images: an earlier or smaller
            one of the same class. Without it, the null class is.
        guidance_space (`str`, *optional*):
            What the guider is handed, `velocity`, `sample` or `epsilon`; by default what its paper means.
        guidance_interval (`Sequence[float]`, *optional*):
            Least and greatest of the scheduler's `sigmas` at which to guide (arXiv 2404.07724).
        id2label (`dict`, *optional*):
            Names of the classes by label; a name may list synonyms separated by commas.

    Raises:
        ValueError: if the components do not fit together.
    """

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
        class_labels: Labels = None,
        batch_size: int | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int | None = None,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        mu: float | None = None,
        solver: str | None = None,
        rtol: float | None = None,
        atol: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
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
            num_inference_steps (`int`, *optional*):
                Number of solver steps, by default the scheduler's `default_num_inference_steps`, or 50.
                Each takes `scheduler.order` calls of the network, the last one fewer where a path ends in a single
                straight step.
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
        # 1. Labels, sizes, and a check of everything else
        options = SamplingOptions(
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            sigmas=sigmas,
            timesteps=timesteps,
            mu=mu,
            solver=solver,
            rtol=rtol,
            atol=atol,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        device = self._execution_device
        if batch_size is None and np.ndim(class_labels) == 0:
            if latents is not None:
                batch_size = latents.shape[0]
            else:
                batch_size = len(generator) if isinstance(generator, list) else 1
        labels = self.prepare_class_labels(class_labels, batch_size, device)
        batch_size = batch_size if labels is None else len(labels)
        shape = self.latent_shape(height, width)
        self.check_inputs(batch_size, shape, options)

        # 2. Noise
        latents = self.prepare_latents((batch_size, *shape), device, generator, latents)

        # 3. Integration from noise to data
        latents, nfe = self.integrate(latents, () if labels is None else (labels,), options)

        # 4. Images
        images = self.to_images(latents, output_type)

        # 5. Offloading
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, nfe)
        return FlowMatchPipelineOutput(images=images, nfe=nfe)

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
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"` or `"latent"`.
            num_inference_steps, solver (*optional*):
                As for [`encode`].

        Returns:
            The images, as `output_type` says.

        Raises:
            ValueError: If noise, labels or the output type do not fit the pipeline.
        """
        check_noise("noise", noise)
        self._check_shape("noise", noise, self.data_channels, 1)
        check_output(len(noise), output_type, None)
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
            first, second (PIL image, `np.ndarray` or `torch.Tensor`):
                One image each, of one size, where the sequence begins and ends.
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
        if not is_whole(num_images, 2):
            raise ValueError(f"`num_images` must be at least 2, got {num_images!r}.")
        check_output(num_images, output_type, None)
        ends = [self.to_data(first), self.to_data(second)]
        if sum(map(len, ends)) != 2:
            raise ValueError(f"`first` and `second` must be one image each, got {sum(map(len, ends))} together.")
        if ends[0].shape != ends[1].shape:
            shapes = " and ".join(str(tuple(end.shape[1:])) for end in ends)
            raise ValueError(f"`first` and `second` must be of one size, got {shapes}.")
        data = torch.cat(ends)
        labels = self.prepare_class_labels(class_labels, 2, data.device)
        noise = self._carry(data, () if labels is None else (labels,), 0.0, 1.0, num_inference_steps)
        a, b = to_float64(noise).flatten(1)
        angle = torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))
        part = torch.linspace(0, 1, num_images, dtype=torch.float64)[:, None]
        if angle < 1e-6:
            between = a + part * (b - a)
        else:
            between = (torch.sin((1 - part) * angle) * a + torch.sin(part * angle) * b) / torch.sin(angle)
        between = between.reshape(num_images, *noise.shape[1:]).float().to(noise.device)
        args = () if labels is None else (torch.where((part[:, 0] < 0.5).to(labels.device), labels[0], labels[1]),)
        return self.to_images(self._carry(between, args, 1.0, 0.0, num_inference_steps), output_type)

    def to_stock(self) -> DiffusionPipeline:
        """
        A pipeline of diffusers alone with the same images, for readers who do not have this package.

        A [`~diffusers.DDPMPipeline`] for a UNet without classes, with the scheduler of
        [`FlowMatchScheduler.to_stock`]; a [`~diffusers.DDIMPipeline`] on the path `vp_discrete` or after
        [`with_velocity`], the same where the grid is `leading`, or `trailing` and the number of steps divides
        `num_train_timesteps`; a [`~diffusers.DiTPipeline`] for a DiT whose grid is `trailing`, with guidance, and in
        pixels by an autoencoder that is the identity. Nothing else of diffusers samples a flow of such networks.

        Returns:
            [`~diffusers.DiffusionPipeline`]: It shares the weights.

        Raises:
            ValueError: If there is none; the message says why, or names every setting that stands in the way.
        """
        return stock_pipeline(self)

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
            images, class_labels:
                As for [`encode`]. The density is that of the class; `null_class`, where there is one, asks for the
                density without a class.
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
        return self._density(log_likelihood, data, args, **options)

    def anomaly_score(self, images: Images, class_labels: Labels = None, **options: Any) -> AnomalyScore:
        """
        How unlike the training data images are: by their density, and by the noise that they come from.

        [`~anomaly.alarm_threshold`] makes a threshold of the scores of held-out images.

        Args:
            images, class_labels:
                As for [`encode`]. Without labels a model with a null class scores images as those of any class.
            options:
                Arguments of [`~likelihood.log_likelihood`].

        Returns:
            [`~anomaly.AnomalyScore`]: Minus the log-density, of pixels or of latents, and the test of the noise.

        Raises:
            ValueError: If images or labels do not fit, or the model has classes, no null class, and no labels.
        """
        labels = self.null_class if class_labels is None and self.num_classes else class_labels
        data, args = self._data_and_labels(images, labels)
        result: Likelihood = self._density(log_likelihood, data, args, **options)
        noise = result.noise / self.scheduler.init_noise_sigma
        return AnomalyScore(-result.log_prob / data[0].numel(), noise_test(noise))

    def bits_per_dim(
        self,
        images: Images,
        class_labels: Labels = None,
        num_samples: int = 1,
        levels: int = 256,
        **options: Any,
    ) -> BitsPerDim:
        """
        Bits per dimension of images of whole levels, by uniform dequantisation (arXiv 2210.02747, appendix E.1).

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A tensor of whole numbers from 0 to `levels - 1`, of an integer type and of shape
                `(batch_size, channels, height, width)`; or what [`encode`] takes, with values in [0, 1] that are
                multiples of `1 / (levels - 1)`.
            class_labels (*optional*):
                As for [`encode`].
            num_samples (`int`, *optional*, defaults to 1):
                Values of the dequantisation noise for each image: the K of the paper.
            levels (`int`, *optional*, defaults to 256):
                Number of levels of a value. The lowest is -1 for the network, and the highest 1, as in [`encode`].
            options:
                Arguments of [`~likelihood.log_likelihood`], and `spacing` of [`~likelihood.bits_per_dim`].

        Returns:
            [`~likelihood.BitsPerDim`]: Bits per dimension of shape `(batch_size,)`, and the work it took.

        Raises:
            ValueError: If the pipeline is a latent one, or images or labels do not fit.
        """
        self._check_space(False)
        if not isinstance(images, torch.Tensor) or images.is_floating_point():
            images = self._levels(images, levels)
        self._check_shape("images", images, self.image_channels, 1)
        images = images.to(self._execution_device)
        labels = self.prepare_class_labels(class_labels, len(images), images.device, allow_null=True)
        args = () if labels is None else (labels,)
        if is_whole(levels, 2):
            options = {"spacing": 2 / (levels - 1)} | options
        return self._density(bits_per_dim, images, args, num_samples=num_samples, levels=levels, **options)

    def _levels(self, images: Images, levels: int) -> torch.Tensor:
        """Levels of images with values in [0, 1], of which each must be one."""
        if not is_whole(levels, 2):
            raise ValueError(f"`levels` must be a whole number of at least 2, got {levels!r}.")
        values = (self.to_data(images) + 1) * ((levels - 1) / 2)
        whole = values.round()
        if (values - whole).abs().max() > 0.01:
            raise ValueError(
                f"`images` must hold multiples of 1 / {levels - 1}, whole levels of {levels}, got values between them."
            )
        return whole.long()

    def _density(
        self, measure: Callable[..., Any], x: torch.Tensor, args: tuple[torch.Tensor, ...], **options: Any
    ) -> Any:
        check_flow(self.scheduler, "A likelihood")
        ends = {"start": flow_end(self.scheduler, 0.0), "end": flow_end(self.scheduler, 1.0)}
        path, kind = self.scheduler.path, self.scheduler.config.prediction_type
        result = measure(NetworkField(self), x, path, prediction_type=kind, args=args, **ends | options)
        check_finite(unwrap_module(self.denoiser), result.log_prob)
        return result

    @torch.no_grad()
    def to_data(self, images: Images) -> torch.Tensor:
        """
        Images as the flow sees them: pixels in [-1, 1], or latents by the mode of the autoencoder's posterior.

        Args:
            images (PIL images, `np.ndarray` or `torch.Tensor`):
                A batch as diffusers takes them, see [`encode`]; of samples that are no images, a tensor of shape
                `(batch_size, *sample_shape)` as the network takes it.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: In float32, on the pipeline's device.

        Raises:
            ValueError: If number of channels or size do not fit the pipeline.
        """
        if self._num_dims != 3:
            check_noise("images", images)
            self._check_shape("images", images, self.image_channels, 1)
            return images.to(self._execution_device, torch.float32)
        pixels = read_images("images", images, self.image_processor, self.image_channels).to(
            self._execution_device, torch.float32
        )
        self._check_shape("images", pixels, self.image_channels, self.vae_scale_factor)
        return pixels if self.vae is None else encode_latents(self.vae, pixels, sample=False)

    def _check_shape(self, name: str, data: torch.Tensor, channels: int, factor: int) -> None:
        """Raise a `ValueError` for other pixels than the model's, with a `factor` of 1 for what the network takes."""
        shape, scale = tuple(data.shape), self.vae_scale_factor // factor
        if self._num_dims != 3:
            expected = (shape[0] if shape else 0, *self.sample_shape)
            if shape != expected:
                raise ValueError(f"`{name}` must have the shape {expected} for this pipeline, got {shape}.")
            return
        if len(shape) == 4 and shape[1] == channels:
            self.latent_shape(shape[2] * scale, shape[3] * scale)
            return
        any_size = unwrap_module(self.denoiser).config.sample_size is None
        sides = ("height", "width") if any_size else tuple(side * factor for side in self.sample_shape[1:])
        expected = f"({', '.join(map(str, (shape[0] if shape else 0, channels, *sides)))})"
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
