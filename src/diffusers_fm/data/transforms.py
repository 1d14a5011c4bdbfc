# SPDX-License-Identifier: Apache-2.0
"""What is done to an image: resized, cropped and mirrored, as the seed and the visit alone decide."""

import io
from dataclasses import dataclass

import numpy as np
import PIL.ExifTags
import PIL.Image

from .randomness import row_uniforms


def to_pixels(image: PIL.Image.Image, size: tuple[int, int], channels: int, multiple: int = 1) -> np.ndarray:
    """
    An image's pixels, resized (bicubic, antialiased) to cover a size in both directions, if it does not fit already.

    Args:
        image (`PIL.Image.Image`):
            Any mode with 8 or 16 bits a channel.
        size (`tuple[int, int]`):
            Height and width to cover: one side has the wanted length, the other at least that.
        channels (`int`):
            1 for grey, 3 for RGB; images are converted.
        multiple (`int`, *optional*, defaults to 1):
            If it is resized, the other side's length is a multiple of this.

    Returns:
        `np.ndarray` of shape `(channels, height, width)`: uint8.

    Raises:
        ValueError: if the mode has no 8-bit form.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode!r} have no fixed range")
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        covering = (multiple * round(side * scale / multiple) for side in image.size)
        wanted = tuple(max(side, least) for side, least in zip(covering, (width, height)))
        image = image.resize(wanted, PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_size(file: bytes | str) -> tuple[int, int]:
    """
    The size of an image as it is seen, from the head of its file.

    Args:
        file (`bytes` or `str`):
            Its contents or its path.

    Returns:
        `tuple[int, int]`: height and width.

    Raises:
        OSError: if it is no image.
    """
    with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        width, height = image.size
        # Orientations from 5 on lie on their side, and `datasets` turns them.
        lies = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if lies else (height, width)


@dataclass(frozen=True)
class ImageTransform:
    """
    What is done to each image: resize so that it covers a size, crop to the size, perhaps mirror. The size is a
    square, or the bucket of the nearest aspect ratio.

    Args:
        resolution (`int`):
            Side of the square.
        channels (`int`):
            1 (grey) or 3 (RGB).
        center_crop (`bool`, *optional*, defaults to `False`):
            Crop at the centre; otherwise anywhere, anew at each visit.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the images, anew at each visit.
        buckets (`tuple[tuple[int, int], ...]`, *optional*):
            Heights and widths that take the square's place.
        multiple (`int`, *optional*, defaults to 1):
            Crops begin at multiples of so many pixels, where they can follow those of a smaller image.
    """

    resolution: int
    channels: int
    center_crop: bool = False
    random_flip: bool = False
    buckets: tuple[tuple[int, int], ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"Images have 1 or 3 channels, but the model takes {self.channels}.")

    def places(self, seed: int, visits: np.ndarray) -> np.ndarray:
        """
        Where images are cropped.

        Args:
            seed (`int`):
                Seed of the run.
            visits (`np.ndarray` of shape `(batch_size, num_keys)`):
                Epoch and number of each image.

        Returns:
            `np.ndarray` of shape `(batch_size, 2)`: how far down and across of what there is, in [0, 1).
        """
        if self.center_crop:
            return np.full((len(visits), 2), 0.5)
        return np.stack([row_uniforms(seed, purpose, visits) for purpose in ("down", "across")], axis=1)

    def crop(self, pixels: np.ndarray, size: tuple[int, int], place: np.ndarray) -> np.ndarray:
        """
        Part of an image.

        Args:
            pixels (`np.ndarray` of shape `(channels, height, width)`):
                The image, at least as large as the part.
            size (`tuple[int, int]`):
                Height and width of the part.
            place (`np.ndarray` of shape `(2,)`):
                As [`~ImageTransform.places`] draws it.

        Returns:
            `np.ndarray` of shape `(channels, *size)`: a view.
        """
        top, left = (
            self.multiple * int(part * ((length - side) // self.multiple + 1))
            for part, length, side in zip(place.tolist(), pixels.shape[1:], size)
        )
        return pixels[:, top : top + size[0], left : left + size[1]]

    def mirrored(self, seed: int, visits: np.ndarray) -> np.ndarray:
        """
        Which images are mirrored.

        Args:
            seed (`int`):
                Seed of the run.
            visits (`np.ndarray` of shape `(batch_size, num_keys)`):
                Epoch and number of each image.

        Returns:
            `np.ndarray` of shape `(batch_size,)`: bool.
        """
        if not self.random_flip:
            return np.zeros(len(visits), dtype=bool)
        return row_uniforms(seed, "flip", visits) < 0.5
