# SPDX-License-Identifier: Apache-2.0
"""Images of further columns that go with an image: sources, masks, depths, with its crop and its mirror."""

from collections.abc import Mapping
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch

from .cache import content_key
from .clips import file_key
from .sources import image_files
from .transforms import ImageTransform, covered_size, image_file, open_image, to_pixels
from .unreadable import reading


def is_mask(argument: str) -> bool:
    """Return whether an argument of a pipeline takes masks: grey, and resized without grey levels between."""
    return "mask" in argument


class ConditionImages:
    """
    Images of further columns of a data set, decoded at each visit.

    Each is brought to the shape of the image that it goes with and cut and mirrored with it, so that pixels that lie
    on each other in two pictures of one shape still do. Of a picture of another shape the middle is taken.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        columns (`Mapping[str, str]`):
            Names of arguments and of their columns. Where the column is that of the images, it is the image itself,
            or the first frame of a video.
        image_column (`str`):
            Column of the images.
        rows (`np.ndarray`):
            Numbers of the used rows.
        transform ([`ImageTransform`]):
            What is done to each image.

    Raises:
        ValueError: if there is no such column, it holds no images, or masks are to be the images themselves.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        columns: Mapping[str, str],
        image_column: str,
        rows: np.ndarray,
        transform: ImageTransform,
    ) -> None:
        for name, column in columns.items():
            if is_mask(name) and column == image_column:
                raise ValueError(f"--call_columns {name}={column}: masks need a column of their own.")
        self._columns, self._image_column, self._rows, self._transform = dict(columns), image_column, rows, transform
        self._files = {column: image_files(dataset, column) for column in {image_column, *columns.values()}}

    @property
    def needs_image(self) -> bool:
        """True if the image itself is one of them."""
        return self._image_column in self._columns.values()

    def fingerprint(self, numbers: np.ndarray) -> str:
        """Digest of arguments, columns and the files of some samples."""
        names = (f"{name}={column}" for name, column in self._columns.items())
        files = (self._key(column, number) for column in self._columns.values() for number in numbers.tolist())
        return content_key(*names, *files)

    def read(
        self, keys: np.ndarray, images: torch.Tensor | None, size: tuple[int, int], places: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """
        Images of a batch, cropped and not mirrored.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch and number of each sample.
            images (`torch.Tensor` of shape `(batch_size, channels, height, width)`, *optional*):
                The images that they go with, needed for columns that are that of the images.
            size (`tuple[int, int]`):
                Height and width of the batch.
            places (`np.ndarray` of shape `(batch_size, 2)`):
                Crops, as [`~ImageTransform.places`] draws them.

        Returns:
            `dict[str, torch.Tensor]`: uint8 of shape `(batch_size, channels, height, width)`; masks have one channel.
        """
        found: dict[str, torch.Tensor] = {}
        for name, column in self._columns.items():
            if column == self._image_column:
                assert images is not None
                found[name] = images[:, : self._transform.colours]
                continue
            parts = []
            for number, place in zip(keys[:, 1].tolist(), places):
                with reading(int(self._rows[number]), number):
                    parts.append(self._transform.crop(self._pixels(name, column, number, size), size, place))
            found[name] = torch.from_numpy(np.stack(parts))
        return found

    def _file(self, column: str, number: int) -> dict[str, Any] | None:
        return self._files[column][int(self._rows[number])][column]

    def _key(self, column: str, number: int) -> str:
        try:
            return file_key(image_file(self._file(column, number), self._transform.folders))
        except (ValueError, OSError):
            # Unreadable then and now.
            return ""

    def _pixels(self, name: str, column: str, number: int, size: tuple[int, int]) -> np.ndarray:
        """Pixels of the shape to which the image that they go with is brought."""
        transform, mask = self._transform, is_mask(name)
        shape = covered_size(transform.size_of(self._file(self._image_column, number)), size, transform.multiple)
        try:
            image = open_image(image_file(self._file(column, number), transform.folders))
        except (OSError, ValueError) as error:
            raise ValueError(f"the image of column {column!r}: {error}") from error
        resample = PIL.Image.Resampling.NEAREST if mask else PIL.Image.Resampling.BICUBIC
        pixels = to_pixels(image, shape, 1 if mask else transform.colours, 1, transform.background, resample)
        top, left = ((length - side) // 2 for length, side in zip(pixels.shape[1:], shape))
        return pixels[:, top : top + shape[0], left : left + shape[1]]
