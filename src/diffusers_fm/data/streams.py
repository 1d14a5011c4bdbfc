# SPDX-License-Identifier: Apache-2.0
"""Images, labels and captions of a data set that is read from end to end and never all there."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch

from .captions import caption_path, choose_caption
from .randomness import row_uniforms
from .sources import (
    FIRST_ROWS,
    check_image_column,
    check_label,
    check_label_column,
    num_rows,
    undecoded,
    with_features,
)
from .transforms import ImageTransform, image_size, to_pixels
from .unreadable import UnreadableImageError, reading


# A data set of more shards is read in so many groups of shards: finding one's files takes a time that grows with them.
MAX_SHARDS = 1024

# Rows that `datasets` hands over at once.
READ_AT_ONCE = 16


@dataclass(frozen=True)
class StreamedRow:
    """
    A row of a stream, its image not decoded.

    Args:
        epoch (`int`):
            Which visit of the row it is.
        shard (`int`), row (`int`):
            Where it is.
        values (`dict[str, Any]`):
            Its columns.
        turn (`int`):
            Number of the shard among those of its lane.
    """

    epoch: int
    shard: int
    row: int
    values: dict[str, Any]
    turn: int

    @property
    def place(self) -> tuple[int, int]:
        """Where it is in its lane."""
        return self.turn, self.row

    @property
    def visit(self) -> tuple[int, int, int]:
        """What the random numbers of its augmentation depend on, beside the seed."""
        return self.epoch, self.shard, self.row

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.row} of shard {self.shard}"


class StreamData:
    """
    Images, labels and captions by shard: nothing is downloaded or prepared beforehand, and no row can be asked for by
    its number. [`LaneBatches`] makes batches of it.

    Args:
        dataset (`datasets.IterableDataset`):
            What `load_dataset(..., streaming=True)` gives.
        transform (`ImageTransform`):
            What is done to each image.
        image_column (`str`, *optional*, defaults to `"image"`):
            Name of the column of images.
        label_column (`str`, *optional*):
            Name of the column of labels; without it there are none.
        num_classes (`int`, *optional*, defaults to 0):
            Classes of the model, for checks.
        seed (`int`, *optional*, defaults to 0):
            Seed of the order and of augmentation.
        caption_column (`str`, *optional*):
            Name of the column of captions; without it there are none.
        max_unreadable (`int`, *optional*, defaults to 0):
            So many images may be unreadable, in each process and worker; the next one takes their place.
        buffer_size (`int`, *optional*, defaults to 1000):
            Rows, with images as they are in the files, among which a process or worker shuffles.

    Attributes:
        num_samples (`int`, *optional*):
            Rows in all shards, where the data set says it.
        num_shards (`int`):
            Shards, or groups of shards.

    Raises:
        ValueError: if the data set is empty, or columns are missing or of the wrong type.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: ImageTransform,
        image_column: str = "image",
        label_column: str | None = None,
        num_classes: int = 0,
        seed: int = 0,
        caption_column: str | None = None,
        max_unreadable: int = 0,
        buffer_size: int = 1000,
    ) -> None:
        dataset = with_features(dataset)
        check_image_column(dataset, image_column)
        if label_column is not None:
            check_label_column(dataset, label_column, num_classes)
        self._caption_path: tuple[str, ...] = ()
        if caption_column is not None:
            self._caption_path = caption_path(dataset.features, caption_column)
        columns = [image_column, label_column, self._caption_path[0] if self._caption_path else None]
        self._rows = undecoded(dataset, image_column).select_columns(
            list(dict.fromkeys(column for column in columns if column is not None))
        )
        self._image_column, self._label_column, self._num_classes = image_column, label_column, num_classes
        self.transform, self.seed, self.buffer_size = transform, seed, buffer_size
        self.max_unreadable = max_unreadable
        self.num_shards = min(dataset.num_shards, MAX_SHARDS)
        self.num_samples = num_rows(dataset)
        rows = itertools.chain.from_iterable(self.read(shard) for shard in range(self.num_shards))
        self._first = [values for _, values in itertools.islice(rows, 1 if caption_column is None else FIRST_ROWS)]
        if not self._first:
            raise ValueError("The data set is empty.")

    @property
    def description(self) -> str:
        """What there is of it, for the log."""
        count = "" if self.num_samples is None else f"{self.num_samples} "
        return f"{count}images streamed from {self.num_shards} shard{'s' if self.num_shards > 1 else ''}"

    @property
    def captions(self) -> "StreamData":
        """Itself, of which [`~StreamData.distinct`] can be asked."""
        return self

    def distinct(self) -> Iterator[str]:
        """
        The captions of the first rows, each once.

        Yields:
            `str`: a caption.
        """
        captions: dict[str, None] = {}
        for row, values in enumerate(self._first):
            value = self._caption_value(values)
            choose_caption(value, 0.0, row)
            captions |= dict.fromkeys([value] if isinstance(value, str) else value)
        yield from captions

    def read(self, shard: int, row: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        The rows of a shard.

        Args:
            shard (`int`):
                Number of the shard.
            row (`int`, *optional*, defaults to 0):
                The row to begin with.

        Yields:
            `tuple[int, dict[str, Any]]`: the row's number, and its columns, images as `{"bytes", "path"}`.

        Raises:
            ValueError: if the shard is damaged, or out of reach.
        """
        rows = self._rows.shard(self.num_shards, shard, contiguous=False)
        # Not `iter(rows)`, which in a loader's worker would give a part of the shard alone.
        batches = (rows.skip(row) if row else rows).iter(READ_AT_ONCE)
        while True:
            try:
                columns = next(batches, None)
            except Exception as error:
                raise ValueError(
                    f"Shard {shard} of the data set cannot be read from row {row} on: {error}."
                ) from error
            if columns is None:
                return
            for values in zip(*columns.values()):
                yield row, dict(zip(columns, values))
                row += 1

    def image_size(self, row: StreamedRow) -> tuple[int, int]:
        """
        The size of a row's image.

        Args:
            row ([`StreamedRow`]):
                The row.

        Returns:
            `tuple[int, int]`: height and width; those of the square, if it cannot be read.
        """
        value = row.values[self._image_column] or {"bytes": None, "path": None}
        file = value["path"] if value["bytes"] is None else value["bytes"]
        try:
            with reading(row.name):
                if isinstance(file, str) and not Path(file).is_file():
                    # Out of this machine, or in an archive.
                    width, height = datasets.Image().decode_example(value).size
                    return height, width
                return image_size(file)
        except UnreadableImageError:
            return self.transform.resolution, self.transform.resolution

    def decode(self, row: StreamedRow, size: tuple[int, int]) -> np.ndarray:
        """
        The pixels of a row's image, resized and not cropped.

        Args:
            row ([`StreamedRow`]):
                The row.
            size (`tuple[int, int]`):
                Height and width to cover.

        Returns:
            `np.ndarray` of shape `(channels, height, width)`: uint8.

        Raises:
            Exception: if it cannot be read.
        """
        value = row.values[self._image_column]
        if value is None:
            raise ValueError("there is none")
        image: PIL.Image.Image = datasets.Image().decode_example(value)
        return to_pixels(image, size, self.transform.channels, self.transform.multiple)

    def batch(
        self, rows: Sequence[StreamedRow], pixels: Sequence[np.ndarray], size: tuple[int, int]
    ) -> dict[str, Any]:
        """
        A batch, cropped and mirrored.

        Args:
            rows (`Sequence[StreamedRow]`):
                Its rows.
            pixels (`Sequence[np.ndarray]`):
                As [`~StreamData.decode`] gives them.
            size (`tuple[int, int]`):
                Their height and width.

        Returns:
            `dict[str, Any]`: as of [`ImageData`].

        Raises:
            ValueError: if a label or a caption is missing, or a label is out of range.
        """
        visits = np.array([row.visit for row in rows])
        places = self.transform.places(self.seed, visits)
        crops = [self.transform.crop(image, size, place) for image, place in zip(pixels, places)]
        mirrored = self.transform.mirrored(self.seed, visits)
        images = [crop[..., ::-1] if mirror else crop for crop, mirror in zip(crops, mirrored)]
        batch: dict[str, Any] = {"images": torch.from_numpy(np.stack(images))}
        if self._label_column is not None:
            labels = [row.values[self._label_column] for row in rows]
            for row, label in zip(rows, labels):
                check_label(label, row.name, self._label_column, self._num_classes)
            batch["labels"] = torch.tensor(labels, dtype=torch.int64)
        if self._caption_path:
            numbers = row_uniforms(self.seed, "caption", visits)
            batch["captions"] = [
                choose_caption(self._caption_value(row.values), number, row.name) for row, number in zip(rows, numbers)
            ]
        return batch

    def _caption_value(self, values: dict[str, Any]) -> Any:
        value: Any = values
        for name in self._caption_path:
            value = None if value is None else value[name]
        return value
