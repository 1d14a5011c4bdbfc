# SPDX-License-Identifier: Apache-2.0
"""Upscaling of images with a flow matching model that sees the low-resolution image, in pixels or in latents."""

import functools
from collections.abc import Sequence
from typing import Any

import PIL.Image
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiTTransformer2DModel,
    ModelMixin,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DModel,
)
from diffusers.guiders import BaseGuidance
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from torch.nn import functional

from ..models.autoencoding import encode_latents
from ..models.class_embedder import ClassEmbedder
from ..models.interval import IntervalEmbedding
from ..paths import OTPath
from .base import FlowMatchPipelineBase, FlowMatchPipelineOutput
from .checks import Callback, Generators, Images, Labels, is_number, is_whole, read_images
from .components import check_upscale_channels
from .resampling import resize_bicubic
from .sampling import SamplingOptions
from .tiling import TileGrid


# Modes of PIL images that become those of so many channels without loss.
LOSSLESS_MODES = {1: ("L", "1"), 3: ("RGB", "L", "1"), 4: ("RGBA",)}


class FlowMatchUpscalePipeline(FlowMatchPipelineBase):
    r"""
    Draws high-resolution images that a low-resolution image may have come from (arXiv 2210.02747, section 6.3).

    The low-resolution image is enlarged (bicubic) and joined to x_t by channels, as pixels, or as latents where there
    is an autoencoder. So the network has `in_channels = 2 * out_channels`. It may have one input channel more, for the
    level of the noise that was added to the enlarged image (noise augmentation, Ho et al., arXiv 2106.15282): a
    channel, because every network has channels, and the classes stay free for classes.

    Args:
        scheduler, unet, transformer, vae, class_embedder, num_classes, id2label:
            As in [`FlowMatchPipeline`].
        scale_factor (`int`, *optional*, defaults to 4):
            How many times larger an image becomes if a call does not say. What the network was trained for.
        guider, guiding_network, guidance_space, guidance_interval (*optional*):
            As in [`FlowMatchPipeline`], between classes.
        interval_embedding ([`IntervalEmbedding`], *optional*):
            As for [`FlowMatchPipeline`].

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
        scale_factor: int = 4,
        interval_embedding: IntervalEmbedding | None = None,
        guider: BaseGuidance | None = None,
        guiding_network: ModelMixin | None = None,
        guidance_space: str | None = None,
        guidance_interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            *(scheduler, unet, transformer, vae, class_embedder, num_classes, id2label, interval_embedding),
            *(guider, guiding_network, guidance_space, guidance_interval),
        )
        if not is_whole(scale_factor, 2):
            raise ValueError(f"`scale_factor` must be a whole number of 2 or more, got {scale_factor!r}.")
        self.register_to_config(scale_factor=scale_factor)

    @staticmethod
    def _check_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
        check_upscale_channels(network, vae)

    @property
    def data_channels(self) -> int:
        """Channels of x_t: those of the images, or of the latents."""
        config = unwrap_module(self.denoiser).config
        return config.in_channels if config.out_channels is None else config.out_channels

    @property
    def takes_noise_level(self) -> bool:
        """True if the network has a channel for the noise level of the low-resolution image."""
        return unwrap_module(self.denoiser).config.in_channels == 2 * self.data_channels + 1

    def preprocess(self, image: Images) -> torch.Tensor:
        """Low-resolution images of a call as a float32 tensor in [-1, 1], checked."""
        channels = self.image_channels
        images = image if isinstance(image, list) else [image]
        if images and all(isinstance(one, PIL.Image.Image) for one in images):
            accepted = LOSSLESS_MODES.get(channels)
            if accepted is None:
                raise ValueError(f"No PIL image has the {channels} channels of this pipeline: give arrays or tensors.")
            for one in images:
                if one.mode not in accepted:
                    raise ValueError(
                        f"`image` must be of the mode {' or '.join(accepted)} for this pipeline, got {one.mode}: use"
                        f" `image.convert({accepted[0]!r})`."
                    )
            sizes = sorted({one.size for one in images})
            if len(sizes) > 1:
                raise ValueError(f"All images of a call must be of one size, got {sizes} (width, height).")
            images = [one if one.mode == accepted[0] else one.convert(accepted[0]) for one in images]
        else:
            images = image
        pixels = read_images("image", images, self.image_processor).to(torch.float32)
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            raise ValueError(
                f"`image` must have {channels} channels for this pipeline, got the shape {tuple(pixels.shape)}"
                " (batch_size, channels, height, width)."
            )
        return pixels

    def encode_condition(self, pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """
        Low-resolution images as the network sees them, without noise: enlarged, and encoded where there is an
        autoencoder. At the bottom and the right the last row and column are repeated up to a size that the network
        takes.

        Args:
            pixels (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Low-resolution images with values in [-1, 1].
            size (`tuple[int, int]`):
                Height and width of the high-resolution images.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: float32, of the shape of x_t.
        """
        enlarged = resize_bicubic(pixels, size)
        height, width = self.padded_size(*size)
        if (height, width) != size:
            enlarged = functional.pad(enlarged, (0, width - size[1], 0, height - size[0]), mode="replicate")
        return enlarged if self.vae is None else encode_latents(self.vae, enlarged, sample=False)

    def augment_condition(
        self, condition: torch.Tensor, noise_level: torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        What [`predict`] takes: the condition on its way to noise, with a channel for how far it went if the network
        has one (truncated conditioning augmentation, arXiv 2106.15282, section 4).

        Args:
            condition (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                As [`encode_condition`] gives it.
            noise_level (`torch.Tensor` of shape `(batch_size,)`):
                s in [0, 1] of `(1 - s) * condition + s * noise`, whatever the path of the pipeline: 0 is none.
            noise (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                Standard normal noise. Without it the condition is clean.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels or channels + 1, height, width)`.
        """
        if noise is not None:
            condition = OTPath().sample(condition, noise, noise_level)
        if self.takes_noise_level:
            level = noise_level.to(condition)[:, None, None, None].expand(-1, 1, *condition.shape[2:])
            condition = torch.cat([condition, level], dim=1)
        return condition

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        condition: torch.Tensor,
        class_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Call the network at x_t, as in sampling; see [`FlowMatchPipeline.predict`].

        Args:
            sample, timestep, class_labels:
                As there.
            condition (`torch.Tensor` of shape `(batch_size, condition_channels, height, width)`):
                As [`augment_condition`] gives it.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`.
        """
        model_input = self.scheduler.scale_model_input(sample, timestep)
        return self._call_network(torch.cat([model_input, condition.to(model_input)], dim=1), timestep, class_labels)

    def _predict_tiles(
        self,
        tiles: TileGrid,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        args: tuple[torch.Tensor, ...],
        guidance_scale: float,
    ) -> torch.Tensor:
        """[`predict_guided`] tile by tile."""
        condition, *labels = args
        return tiles.blend(
            lambda window: self.predict_guided(sample[window], timestep, (condition[window], *labels), guidance_scale)
        )

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """Smallest size in pixels that holds an image and that the network takes."""
        multiple = self.size_multiple
        return -(-height // multiple) * multiple, -(-width // multiple) * multiple

    def check_sizes(
        self, low: tuple[int, int], height: int | None, width: int | None, num_images_per_prompt: int
    ) -> tuple[int, int]:
        """Size of the high-resolution images; raises a `ValueError` for one that is smaller than the image."""
        if not is_whole(num_images_per_prompt):
            raise ValueError(f"`num_images_per_prompt` must be 1 or more, got {num_images_per_prompt!r}.")
        factor = self.config.scale_factor
        size = (low[0] * factor if height is None else height, low[1] * factor if width is None else width)
        if not all(is_whole(side, least) for side, least in zip(size, low)):
            raise ValueError(
                f"`height` and `width` must not be below those of the image, {low[0]} x {low[1]}, got"
                f" {size[0]} x {size[1]}."
            )
        return size

    def make_tiles(self, size: tuple[int, int], tile_size: int | None, tile_overlap: int | None) -> TileGrid | None:
        """Tiles of a call on a canvas of `size` pixels, if there is more than one."""
        multiple, factor = self.size_multiple, self.vae_scale_factor
        if tile_size is None:
            if tile_overlap is not None:
                raise ValueError(f"`tile_overlap` {tile_overlap} has no meaning without a `tile_size`.")
            return None
        if not is_whole(tile_size) or tile_size % multiple:
            raise ValueError(f"`tile_size` must be a positive multiple of {multiple}, got {tile_size!r}.")
        if tile_overlap is None:
            tile_overlap = tile_size // 4 // multiple * multiple
        if not is_whole(tile_overlap, 0) or tile_overlap >= tile_size or tile_overlap % multiple:
            raise ValueError(
                f"`tile_overlap` must be a multiple of {multiple} from 0 to {tile_size - multiple}, got"
                f" {tile_overlap}."
            )
        tile = (min(tile_size, size[0]), min(tile_size, size[1]))
        if tile == size:
            return None
        height, width = (side // factor for side in size)
        _, *tile_shape = self.latent_shape(*tile)
        # A tile that is as high or as wide as the canvas has no neighbour on that side.
        return TileGrid((height, width), tuple(tile_shape), tile_overlap // factor, multiple // factor)

    @torch.no_grad()
    def __call__(
        self,
        image: Images,
        class_labels: Labels = None,
        noise_level: float = 0.0,
        num_images_per_prompt: int = 1,
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
        tile_size: int | None = None,
        tile_overlap: int | None = None,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
    ) -> FlowMatchPipelineOutput | tuple[Any, int]:
        """
        Upscales images.

        Args:
            image (PIL image, `list` of PIL images, `np.ndarray` or `torch.Tensor`):
                What to upscale: images of one size. Arrays are `(batch_size, height, width, channels)`, tensors
                `(batch_size, channels, height, width)`, with values in [0, 1].
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor`, *optional*):
                What is on the images, for a model with classes: labels, or names of the config's `id2label`, one for
                each image or one for all. A model with a null class can do without.
            noise_level (`float`, *optional*, defaults to 0.0):
                Noise to add to the enlarged image, from 0 (none) to 1 (the image is gone): for models that were
                trained with it, where the image has faults that those of training had not.
            num_images_per_prompt (`int`, *optional*, defaults to 1):
                Number of samples for each image. Those of the first image come first.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale w of classifier-free guidance between classes; 1 is off. The image is seen by both sides.
            height (`int`, *optional*):
                Height of the upscaled image in pixels, any number from the image's own; by default `scale_factor`
                times that.
            width (`int`, *optional*):
                Width of the upscaled image in pixels, likewise.
            tile_size (`int`, *optional*):
                Height and width of tiles in pixels of the upscaled image, for images larger than the network or the
                memory takes. Their answers are blended at every call of the network, see [`TileGrid`].
            tile_overlap (`int`, *optional*):
                Least overlap of neighbouring tiles in pixels; by default a quarter of a tile.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                Source of the noise: one, or one for each sample.
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                The noise itself, standard normal on every path, for all samples, of the padded size.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for what the integration ends with, of the padded size.
            num_inference_steps, sigmas, timesteps, mu, solver, rtol, atol, return_dict, callback_on_step_end,
            callback_on_step_end_tensor_inputs (*optional*):
                As in [`FlowMatchPipeline`].

        Returns:
            [`FlowMatchPipelineOutput`] or `tuple`: the images, and the number of calls of the network, in which a call
            for all tiles counts once.

        Raises:
            ValueError: for arguments that do not fit the pipeline, before any work.
        """
        # 1. Sizes, labels, and a check of everything else
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
        pixels = self.preprocess(image)
        size = self.check_sizes((pixels.shape[-2], pixels.shape[-1]), height, width, num_images_per_prompt)
        padded = self.padded_size(*size)
        tiles = self.make_tiles(padded, tile_size, tile_overlap)
        if tiles is None:
            self.latent_shape(*padded)
        shape = (self.data_channels, *(side // self.vae_scale_factor for side in padded))
        labels = self._prepare_labels(class_labels, len(pixels), guidance_scale, device)
        batch_size = len(pixels) * num_images_per_prompt
        self.check_inputs(batch_size, shape, options)
        if not (is_number(noise_level) and 0.0 <= noise_level <= 1.0):
            raise ValueError(f"`noise_level` must be in [0, 1], got {noise_level!r}.")

        # 2. The condition, each sample with its own noise
        condition = self.encode_condition(pixels.to(device), size).repeat_interleave(num_images_per_prompt, dim=0)
        noise = None
        if noise_level > 0:
            noise = randn_tensor(condition.shape, generator=generator, device=device, dtype=condition.dtype)
        condition = self.augment_condition(condition, torch.full((batch_size,), float(noise_level)), noise)
        args = (condition,) if labels is None else (condition, labels.repeat_interleave(num_images_per_prompt))

        # 3. Noise
        latents = self.prepare_latents((batch_size, *shape), device, generator, latents)

        # 4. Integration from noise to data
        predict = None if tiles is None else functools.partial(self._predict_tiles, tiles)
        latents, nfe = self.integrate(latents, args, options, predict)

        # 5. Images
        images = self.to_images(latents, output_type, size)

        # 6. Offloading
        self.maybe_free_model_hooks()

        if not return_dict:
            return (images, nfe)
        return FlowMatchPipelineOutput(images=images, nfe=nfe)

    def _prepare_labels(
        self, class_labels: Labels, num_images: int, guidance_scale: float, device: torch.device
    ) -> torch.Tensor | None:
        """Labels of the images; images without labels are of the null class, where there is one."""
        if class_labels is None and self.num_classes and self.null_class is not None:
            if guidance_scale != 1.0:
                raise ValueError(f"`guidance_scale` {guidance_scale} needs `class_labels`, got None.")
            return torch.full((num_images,), self.null_class, dtype=torch.int64, device=device)
        return self.prepare_class_labels(class_labels, num_images, device)
