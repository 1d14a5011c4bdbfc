# SPDX-License-Identifier: Apache-2.0
"""Arguments of the pipelines' calls: numbers, images, and answers of networks."""

import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import ModelMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

# Modes of PIL images whose numbers are levels from 0 to 255 of channels.
MODES = ("L", "LA", "RGB", "RGBA")

# How far outside [0, 1] rounding may leave a value of an image.
ROUNDING = 1e-3

Images = PIL.Image.Image | list[PIL.Image.Image] | np.ndarray | torch.Tensor
Labels = int | str | list[int] | list[str] | torch.Tensor | None
Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[..., dict[str, Any]] | PipelineCallback | MultiPipelineCallbacks


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number, and no string that looks like one."""
    return isinstance(value, Real) and math.isfinite(value)


def is_whole(value: Any, least: int = 1) -> bool:
    """Return whether a value is a whole number of at least `least`."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def check_output(batch_size: int, output_type: str, generator: Generators) -> None:
    """Raise a `ValueError` for an unknown kind of output, or another number of generators than of images."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}.")
    generators = generator if isinstance(generator, list) else [] if generator is None else [generator]
    if not all(isinstance(one, torch.Generator) for one in generators):
        raise ValueError(f"`generator` must be a torch.Generator, or a list of one for each image, got {generator!r}.")
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(f"{len(generator)} generators were given for a batch of {batch_size}.")


def check_guidance(**scales: float) -> None:
    """Raise a `ValueError` for scales of guidance, by name, that are no finite numbers."""
    for name, scale in scales.items():
        if not is_number(scale):
            raise ValueError(f"`{name}` must be a finite number, got {scale!r}.")


def check_noise(name: str, noise: torch.Tensor) -> None:
    """Raise a `ValueError` for noise that is not of finite floating-point numbers."""
    if not isinstance(noise, torch.Tensor):
        raise ValueError(f"`{name}` must be a tensor, got {noise!r}.")
    if not (noise.is_floating_point() and bool(noise.isfinite().all())):
        raise ValueError(
            f"`{name}` must be finite and floating-point, got {noise.dtype} or values that are not finite."
        )


def read_images(name: str, images: Images, processor: VaeImageProcessor, channels: int | None = None) -> torch.Tensor:
    """
    Images as a batch for a network.

    Args:
        name (`str`):
            The argument's name, for errors.
        images (PIL images, `np.ndarray` or `torch.Tensor`):
            One image or several: PIL images, arrays `(batch_size, height, width, channels)` or tensors
            `(batch_size, channels, height, width)`, floating-point with values in [0, 1].
        processor (`VaeImageProcessor`):
            Makes the batch.
        channels (`int`, *optional*):
            Channels that are wanted: of 1, PIL images with a palette become grey, else of colour.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height, width)`: As the processor gives it.

    Raises:
        ValueError: If there is no image, values of arrays and tensors are integers or out of range, or the numbers of
            PIL images are no levels from 0 to 255.
    """
    parts = images if isinstance(images, list) else [images]
    if not parts:
        raise ValueError(f"`{name}` is an empty list: at least one image must be given.")
    read = []
    for part in parts:
        if isinstance(part, np.ndarray):
            # Arrays that run backwards, such as mirrored images, are nothing that torch takes.
            part = np.ascontiguousarray(part)
        if isinstance(part, (np.ndarray, torch.Tensor)):
            values = torch.as_tensor(part)
            if values.numel() == 0:
                raise ValueError(f"`{name}` must hold at least one image, got the shape {tuple(values.shape)}.")
            lowest, highest = (value.item() for value in values.aminmax())
            in_range = -ROUNDING <= lowest and highest <= 1 + ROUNDING
            if not values.is_floating_point() or not in_range:
                raise ValueError(
                    f"`{name}` must be floating-point with values in [0, 1], got {values.dtype} with values from"
                    f" {lowest:g} to {highest:g}."
                )
            # diffusers would take a value below 0 as a sign of another scale, and leave all of them as they are.
            part = part.clip(0, 1)
        elif not isinstance(part, PIL.Image.Image):
            raise ValueError(f"`{name}` must be PIL images, arrays or tensors, got {part!r}.")
        else:
            part = _with_levels(name, part, channels)
        read.append(part)
    return processor.preprocess(read if isinstance(images, list) else read[0])


def _with_levels(name: str, image: PIL.Image.Image, channels: int | None) -> PIL.Image.Image:
    """A PIL image of one of `MODES`: numbers of the other modes are bits, places in a palette, or of another scale."""
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "P":
        return image.convert({1: "L", 4: "RGBA"}.get(channels or 3, "RGB"))
    if image.mode not in MODES:
        raise ValueError(
            f"`{name}` must be PIL images of the modes 1, P, {', '.join(MODES)}, got {image.mode}: convert them first."
        )
    return image


def read_frames(name: str, images: Images, processor: VaeImageProcessor, channels: int | None = None) -> torch.Tensor:
    """[`read_images`], or videos, as tensors of shape `(batch_size, frames, channels, height, width)`: then of shape
    `(batch_size, channels, frames, height, width)`."""
    if not (isinstance(images, torch.Tensor) and images.ndim == 5):
        return read_images(name, images, processor, channels)
    return read_images(name, images.flatten(0, 1), processor).unflatten(0, images.shape[:2]).transpose(1, 2)


def write_frames(
    pixels: torch.Tensor, processor: VaeImageProcessor, output_type: str, in_range: Sequence[bool] | None = None
) -> Any:
    """Images of a batch of pixels, or videos of shape `(batch_size, channels, frames, height, width)`.

    `in_range` says for each sample whether its values are in [-1, 1], and not in [0, 1]; by default all are.
    """
    changed = [True] * len(pixels) if in_range is None else list(in_range)
    if pixels.ndim == 4:
        return processor.postprocess(pixels, output_type, changed)
    count = pixels.shape[2]
    changed = [each for each in changed for _ in range(count)]
    frames = processor.postprocess(pixels.transpose(1, 2).flatten(0, 1), output_type, changed)
    if isinstance(frames, list):
        return [frames[i : i + count] for i in range(0, len(frames), count)]
    return frames.reshape(len(pixels), count, *frames.shape[1:])


def check_finite(network: ModelMixin, *results: torch.Tensor) -> None:
    """Raise a `ValueError` if NaN or infinity has come out of a network."""
    if not all(bool(result.isfinite().all()) for result in results):
        raise ValueError(
            f"The network, {network.__class__.__name__} in {network.dtype}, gave values that are not finite."
        )
