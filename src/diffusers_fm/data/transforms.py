# SPDX-License-Identifier: Apache-2.0
"""Image files to pixels: decoded, resized, cropped and mirrored, as the seed and the visit alone decide."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import numpy as np
import PIL.ExifTags
import PIL.Image
import torch

from .randomness import row_uniforms


WHITE = (255, 255, 255)

# An image that covers a size is at most this many times as long as the size: the ends of a thinner one are cut off.
MAX_OVERHANG = 8

# The quarter turns and mirrors that undo each orientation of EXIF.
_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}

# Places on the network that a row may name, and archives in them.
_REMOTE = ("hf", "http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss")
_ARCHIVES = ("zip", "tar")


def image_file(value: dict[str, Any] | None, folders: Sequence[Path] | None = None) -> bytes | str:
    """
    The file of an image, fetched if it is not on this machine.

    Args:
        value (`dict[str, Any]`, *optional*):
            A cell of an undecoded image column: `{"bytes", "path"}`.
        folders (`Sequence[Path]`, *optional*):
            Local files must be in one of these folders; relative paths begin in the first. Without it, any file is
            read: only for rows that were not downloaded.

    Returns:
        `bytes` or `str`: its contents, or its path.

    Raises:
        ValueError: if there is no image, or the row names a file elsewhere.
    """
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise ValueError("there is none")
    if value["bytes"] is not None:
        return value["bytes"]
    path: str = value["path"]
    *archives, source = path.split("::")
    scheme, _, rest = source.rpartition("://")
    local = scheme in ("", "file")
    if folders is not None and scheme not in _REMOTE:
        place = os.path.realpath(os.path.join(folders[0], rest))
        inside = any(Path(place).is_relative_to(os.path.realpath(folder)) for folder in folders)
        if not (local and inside and all(hop.partition("://")[0] in _ARCHIVES for hop in archives)):
            raise ValueError(f"it names {path!r}, which is not in the folder of the data or of --image_folders")
        path = "::".join([*archives, place])
    if local and not archives:
        return path
    with fsspec.open(path, "rb") as file:
        return file.read()


def open_image(file: bytes | str) -> PIL.Image.Image:
    """Decode an image and turn it as its EXIF says; EXIF that cannot be read says nothing."""
    with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        image.load()
        turn = _TURNS.get(_orientation(image))
        return image if turn is None else image.transpose(turn)


def image_size(file: bytes | str) -> tuple[int, int]:
    """Height and width that [`open_image`] gives, from the head of the file."""
    with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        width, height = image.size
        # Pillow turns TIFF itself.
        lies = image.format != "TIFF" and _orientation(image) >= 5
    return (width, height) if lies else (height, width)


def _covering(shape: tuple[int, int], size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Lengths of an image's sides at which it covers a size, however long the other side is."""
    scale = max(wanted / side for wanted, side in zip(size, shape))
    if scale == 1 and all(side <= MAX_OVERHANG * wanted for side, wanted in zip(shape, size)):
        return shape
    height, width = (max(multiple * round(side * scale / multiple), low) for side, low in zip(shape, size))
    return height, width


def covered_size(shape: tuple[int, int], size: tuple[int, int], multiple: int = 1) -> tuple[int, int]:
    """Height and width to which [`to_pixels`] brings an image of a shape."""
    height, width = (min(side, MAX_OVERHANG * low) for side, low in zip(_covering(shape, size, multiple), size))
    return height, width


def to_pixels(
    image: PIL.Image.Image,
    size: tuple[int, int],
    channels: int,
    multiple: int = 1,
    background: tuple[int, int, int] = WHITE,
    resample: PIL.Image.Resampling = PIL.Image.Resampling.BICUBIC,
) -> np.ndarray:
    """
    An image's pixels, resized (bicubic, antialiased) to cover a size in both directions, if it does not fit already.

    Args:
        image (`PIL.Image.Image`):
            Any mode with 8 or 16 bits a channel.
        size (`tuple[int, int]`):
            Height and width to cover: one side has the wanted length, the other at least that, and at most
            `MAX_OVERHANG` times that, of which the middle is kept.
        channels (`int`):
            1 for grey, 3 for RGB; images are converted.
        multiple (`int`, *optional*, defaults to 1):
            If it is resized, the other side's length is a multiple of this.
        background (`tuple[int, int, int]`, *optional*, defaults to white):
            Colour behind what is transparent.
        resample (`PIL.Image.Resampling`, *optional*, defaults to bicubic):
            How pixels between pixels are found.

    Returns:
        `np.ndarray` of shape `(channels, height, width)`: uint8.

    Raises:
        ValueError: if the mode has no 8-bit form.
    """
    image = _opaque(image, background).convert("L" if channels == 1 else "RGB")
    shape = (image.height, image.width)
    wanted, covering = covered_size(shape, size, multiple), _covering(shape, size, multiple)
    if wanted != shape:
        spans = [side * part / whole for side, part, whole in zip(shape, wanted, covering)]
        (top, left), (bottom, right) = (
            [(side + sign * span) / 2 for side, span in zip(shape, spans)] for sign in (-1, 1)
        )
        image = image.resize((wanted[1], wanted[0]), resample, box=(left, top, right, bottom))
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _orientation(image: PIL.Image.Image) -> int:
    """Orientation of an image by its EXIF, 1 where that says none."""
    try:
        value = image.getexif().get(PIL.ExifTags.Base.Orientation)
    except Exception:  # EXIF is written by anybody, and parsed by Pillow as it comes.
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _opaque(image: PIL.Image.Image, background: tuple[int, int, int]) -> PIL.Image.Image:
    """An image with 8 bits a channel, composed over the background where it is transparent."""
    if image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode!r} have no fixed range")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        image = PIL.Image.fromarray(np.round(levels / 257).astype(np.uint8))
        if transparent is not None:
            image.putalpha(PIL.Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    elif image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # A PNG with 16 bits a channel, of which Pillow keeps the upper 8 of the pixels alone.
        image.info["transparency"] = tuple(level >> 8 for level in transparent)
    if not image.has_transparency_data:
        return image
    image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
    return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, background), image)


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
        background (`tuple[int, int, int]`, *optional*, defaults to white):
            Colour behind what is transparent.
        folders (`tuple[Path, ...]`, *optional*):
            Folders in which rows may name files, see [`image_file`].
    """

    resolution: int
    channels: int
    center_crop: bool = False
    random_flip: bool = False
    buckets: tuple[tuple[int, int], ...] = ()
    multiple: int = 1
    background: tuple[int, int, int] = WHITE
    # Whether models take the pixels as they are, without [`as_batch`].
    is_image: ClassVar[bool] = True
    folders: tuple[Path, ...] | None = None

    def __post_init__(self) -> None:
        if self.colours not in (1, 3):
            raise ValueError(f"Images have 1 or 3 channels, but the model takes {self.colours}.")

    @property
    def colours(self) -> int:
        """Channels of a picture."""
        return self.channels

    @property
    def size(self) -> tuple[int, int]:
        """Height and width without buckets."""
        return self.resolution, self.resolution

    @property
    def least_bytes(self) -> int:
        """Bytes of a sample that is not larger than its size."""
        return self.channels * self.resolution**2

    @property
    def settings(self) -> tuple[Any, ...]:
        """Settings that pixels depend on, besides file and size."""
        return self.channels, self.multiple, self.background

    def decode(self, value: dict[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
        """Pixels of a cell of an image column, uint8 of shape `(channels, height, width)`, covering a size."""
        image = open_image(image_file(value, self.folders))
        return to_pixels(image, size, self.channels, self.multiple, self.background)

    def size_of(self, value: dict[str, Any] | None) -> tuple[int, int]:
        """Height and width of a cell of an image column, from the head of its file."""
        return image_size(image_file(value, self.folders))

    def as_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Pixels as models take them, from those of shape `(batch_size, channels, height, width)`."""
        return images

    def places(self, seed: int, visits: np.ndarray) -> np.ndarray:
        """Crop positions, `(batch_size, 2)`, down and across, as fractions in [0, 1) of the room there is."""
        if self.center_crop:
            return np.full((len(visits), 2), 0.5)
        return np.stack([row_uniforms(seed, purpose, visits) for purpose in ("down", "across")], axis=1)

    def crop(self, pixels: np.ndarray, size: tuple[int, int], place: np.ndarray) -> np.ndarray:
        """The part of an image, `(channels, height, width)`, at a place as [`~ImageTransform.places`] draws it."""
        top, left = (
            self.multiple * int(part * ((length - side) // self.multiple + 1))
            for part, length, side in zip(place.tolist(), pixels.shape[1:], size)
        )
        return pixels[:, top : top + size[0], left : left + size[1]]

    def mirrored(self, seed: int, visits: np.ndarray) -> np.ndarray:
        """Mirroring of images, bool of shape `(batch_size,)`."""
        if not self.random_flip:
            return np.zeros(len(visits), dtype=bool)
        return row_uniforms(seed, "flip", visits) < 0.5
