# SPDX-License-Identifier: Apache-2.0
"""Pairs of images for the training of an upscaler, and the quality of upscaled images."""

from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch

from ..applications.image_quality import psnr, ssim
from ..data.images import ImageData
from ..data.randomness import make_generator
from ..data.transforms import ImageTransform, image_size
from ..data.unreadable import UnreadableImageError, reading
from ..pipelines import FlowMatchUpscalePipeline
from ..pipelines.resampling import downscale, resize_bicubic
from ..training.validation import EVALUATION_SEED, make_grid, quiet_copy


SAMPLES_IN_A_ROW = 2


class PairedImageData(ImageData):
    """
    High-resolution images with low-resolution ones of their own, cropped and mirrored alike.

    A pair of which one image cannot be read counts as one image that cannot be read: another pair takes its place.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        transform (`ImageTransform`):
            What is done to the high-resolution images; the others are brought to a size `scale_factor` times smaller.
        conditioning_image_column (`str`):
            Name of the column of low-resolution images.
        scale_factor (`int`):
            How many times smaller they are.
        columns:
            Arguments of [`ImageData`].

    Raises:
        ValueError: as [`ImageData`], or if an image is not `scale_factor` times larger than its partner (at once if
            images are kept in memory, else at its first visit).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: ImageTransform,
        conditioning_image_column: str,
        scale_factor: int,
        seed: int = 0,
        max_samples: int | None = None,
        **columns: Any,
    ) -> None:
        super().__init__(dataset, transform, seed=seed, max_samples=max_samples, **columns)
        small = replace(transform, resolution=transform.resolution // scale_factor, multiple=1)
        shared = {name: columns[name] for name in ("max_unreadable", "memory_budget", "folder") if name in columns}
        self.conditioning_images = ImageData(
            dataset, small, conditioning_image_column, seed=seed, max_samples=max_samples, **shared
        )
        self.scale_factor = scale_factor
        # A pair goes as a whole: another image in the place of one of them would make a pair of strangers.
        for index, (row, reason) in self.conditioning_images.unreadable.items():
            self.note_unreadable(UnreadableImageError.of(index, row, reason))
        if self.in_memory:
            for index in sorted(set(range(len(self))) - set(self.unreadable)):
                self._check_pair(index, self.read_or_note(index, self._sizes))

    def _batch(self, keys: np.ndarray) -> dict[str, Any]:
        """Batch of [`ImageData`], with `conditioning_images`, uint8 and `scale_factor` times smaller."""
        if not self.in_memory:
            for index in keys[:, 1].tolist():
                with reading(int(self._rows[index]), index):
                    sizes = self._sizes(index)
                self._check_pair(index, sizes)
        return {**super()._batch(keys), "conditioning_images": self.conditioning_images._batch(keys)["images"]}

    def _sizes(self, index: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return image_size(self.file(index)), image_size(self.conditioning_images.file(index))

    def _check_pair(self, index: int, sizes: tuple[tuple[int, int], tuple[int, int]] | None) -> None:
        if sizes is None:
            return
        large, small = sizes
        if large != (small[0] * self.scale_factor, small[1] * self.scale_factor):
            raise ValueError(
                f"The images in row {int(self._rows[index])} of the data set are no pair: {large[0]} x {large[1]}"
                f" is not {self.scale_factor} times {small[0]} x {small[1]}."
            )


def low_resolution(batch: dict[str, Any], scale_factor: int) -> torch.Tensor:
    """
    The low-resolution images of a batch: the data set's own, or made by antialiased bicubic resampling and rounded to
    8 bits, see [`~pipelines.resampling.downscale`].

    Args:
        batch (`dict[str, Any]`):
            With `images`, uint8 of shape `(batch_size, channels, height, width)`, and perhaps `conditioning_images`.
        scale_factor (`int`):
            How many times smaller they are.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height / scale_factor, width / scale_factor)`: uint8.
    """
    if "conditioning_images" in batch:
        return batch["conditioning_images"]
    return downscale(batch["images"], scale_factor)


def upscaling_report(
    pipeline: FlowMatchUpscalePipeline,
    data: ImageData,
    num_images: int,
    num_rows: int,
    num_inference_steps: int | None,
    guidance_scale: float = 1.0,
    noise_level: float = 0.0,
    batch_size: int = 64,
) -> tuple[dict[str, float], PIL.Image.Image | None]:
    """
    Upscaled held-out images: how near single samples are to the originals, beside bicubic enlargement, and a picture.

    Args:
        pipeline ([`FlowMatchUpscalePipeline`]):
            What is measured. Its scheduler is left as it is.
        data ([`ImageData`]):
            The held-out images, of which the first are taken.
        num_images (`int`):
            Images to measure.
        num_rows (`int`):
            Rows of the picture: low resolution, bicubic, two samples, original; 0 for none.
        num_inference_steps (`int`, *optional*):
            Steps of the solver; `None` for the scheduler's own number.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Scale of classifier-free guidance, 1 is off.
        noise_level (`float`, *optional*, defaults to 0.0):
            Noise to add to the condition.
        batch_size (`int`, *optional*, defaults to 64):
            Images at once.

    Returns:
        `tuple[dict[str, float], PIL.Image.Image | None]`: the means of `psnr` (of 8-bit images, in dB), `ssim`,
        `bicubic_psnr` and `bicubic_ssim`; and the picture.
    """
    num_images, num_rows = min(num_images, len(data)), min(num_rows, len(data))
    measured: dict[str, list[torch.Tensor]] = {}
    rows: list[list[PIL.Image.Image]] = []
    with quiet_copy(pipeline) as sampler:
        for start in range(0, max(num_images, num_rows), batch_size):
            numbers = np.arange(start, min(start + batch_size, max(num_images, num_rows)))
            batch = data[np.stack([np.zeros_like(numbers), numbers], axis=1)]
            small = low_resolution(batch, pipeline.config.scale_factor)
            originals = batch["images"].float() / 255
            bicubic = (resize_bicubic(small, tuple(originals.shape[-2:])) / 255).clamp(0, 1)
            samples = [
                sampler(
                    small.float() / 255,
                    class_labels=batch.get("labels"),
                    noise_level=noise_level,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    generator=[
                        make_generator(EVALUATION_SEED, "upscaled", number, copy) for number in numbers.tolist()
                    ],
                    output_type="pt",
                )
                .images.float()
                .cpu()
                for copy in range(SAMPLES_IN_A_ROW if start < num_rows else 1)
            ]
            for name, images in (("", samples[0]), ("bicubic_", bicubic)):
                count = max(0, num_images - start)
                images = (images * 255).round() / 255
                measured.setdefault(f"{name}psnr", []).append(psnr(images[:count], originals[:count]))
                measured.setdefault(f"{name}ssim", []).append(_ssim(images[:count], originals[:count]))
            enlarged = torch.nn.functional.interpolate(small.float() / 255, originals.shape[-2:], mode="nearest")
            for row in range(min(len(numbers), num_rows - start)):
                pictures = [images[row] for images in (enlarged, bicubic, *samples, originals)]
                rows.append(pipeline.image_processor.postprocess(2 * torch.stack(pictures) - 1))
    figures = {name: torch.cat(values).mean().item() for name, values in measured.items()} if num_images else {}
    return figures, make_grid(rows) if rows else None


def _ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """With the standard window of 11 pixels; in images that are smaller, with 7 or what fits."""
    side = min(images.shape[-2:])
    return ssim(images, references, 11 if side >= 11 else min(7, side - 1 + side % 2))
