# SPDX-License-Identifier: Apache-2.0
"""Features of images by a vision encoder of transformers, computed in training or kept on disk."""

import inspect
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from .cache import model_fingerprint
from .images import ImageData
from .latents import cache_images


# Of encoders whose folder says nothing: pixels in [-1, 1].
MEAN = STD = (0.5, 0.5, 0.5)


class VisionEncoder:
    """
    Frozen vision encoder, whose last hidden states are a map of features.

    Args:
        folder (`str`):
            Folder or Hub id of any vision model of transformers: its `last_hidden_state` is a map, or a sequence that
            ends in the patches. Of a model of images and text the part of images is taken.
        resolution (`int`, *optional*):
            Side to which images are brought; by default that of the encoder's configuration.

    Raises:
        ValueError: if the folder holds no vision encoder, or its resolution is not known.
    """

    def __init__(self, folder: str, resolution: int | None = None) -> None:
        try:
            model: Any = AutoModel.from_pretrained(folder)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder!r} holds no model of transformers: {error}") from error
        if hasattr(model.config, "vision_config"):
            model = model.vision_model
        if "pixel_values" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{folder!r} holds a {type(model).__name__}, which takes no images.")
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        except OSError:
            settings = {}
        own = getattr(model.config, "image_size", None)
        resolution = resolution or (own if isinstance(own, int) else None)
        if resolution is None:
            raise ValueError(f"The {type(model).__name__} in {folder!r} has no `image_size`: give --repa_resolution.")
        self.model, self.resolution = model.requires_grad_(False).eval(), resolution
        self.mean, self.std = (
            torch.tensor(settings.get(name) or default).view(-1, 1, 1)
            for name, default in (("image_mean", MEAN), ("image_std", STD))
        )
        takes_any_size = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if takes_any_size and resolution != own else {}

    @property
    def num_channels(self) -> int:
        """Channels of the features."""
        config = self.model.config
        return config.hidden_sizes[-1] if hasattr(config, "hidden_sizes") else config.hidden_size

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """
        Features of images.

        Args:
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                uint8; grey ones are repeated to three channels, and alpha is left out.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_channels, rows, columns)`: float32, on the encoder's device.
        """
        pixels = images.to(self.model.device).float() / 255
        pixels = pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)
        sides = (self.resolution, self.resolution)
        if pixels.shape[-2:] != sides:
            pixels = F.interpolate(pixels, sides, mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.mean.to(pixels)) / self.std.to(pixels)
        hidden = self.model(pixel_values=pixels.to(self.model.dtype), **self._options).last_hidden_state.float()
        if hidden.ndim == 4:
            return hidden
        # Classes and registers come before the patches.
        side = self.resolution // self.model.config.patch_size
        return hidden[:, -(side**2) :].transpose(1, 2).unflatten(2, (side, side))


def cache_features(
    accelerator: Accelerator, data: ImageData, encoder: VisionEncoder, folder: Path, batch_size: int
) -> None:
    """
    Compute the features of all images once, in half precision, and have the data set read them beside the images.

    Args:
        accelerator, data, folder, batch_size:
            As for [`~data.latents.cache_latents`].
        encoder ([`VisionEncoder`]):
            The encoder.

    Raises:
        ValueError: as for [`~data.latents.cache_latents`].
    """
    description = {
        "what": "features",
        "encoder": model_fingerprint(encoder.model),
        "resolution": str(encoder.resolution),
        "pixels": f"{encoder.mean.flatten().tolist()} {encoder.std.flatten().tolist()}",
    }
    _, data.read_features = cache_images(
        accelerator, data, encoder.model, lambda images: encoder(images).half(), folder, description, batch_size
    )
