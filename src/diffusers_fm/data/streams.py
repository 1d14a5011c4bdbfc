# SPDX-License-Identifier: Apache-2.0
"""Streams: shards read by processes and workers, shuffled in blocks, resumed at the batch that was trained on last."""

import contextlib
import itertools
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import datasets
import fsspec.asyn
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, get_worker_info

from .buckets import assign_buckets
from .cache import content_key
from .images import caption_path, choose_caption
from .randomness import derive_seed, epoch_order, make_generator, row_uniforms
from .sources import (
    FIRST_ROWS,
    check_image_column,
    check_label,
    check_label_column,
    num_rows,
    undecoded,
    with_features,
)
from .transforms import ImageTransform
from .unreadable import UnreadableImageError, reading


logger = logging.getLogger(__name__)

# A data set of more shards is read in so many groups of shards: finding one's files takes a time that grows with them.
MAX_SHARDS = 1024

# Rows that `datasets` hands over at once, with a state to go on from.
READ_AT_ONCE = 16

# Shards, evenly spread, whose first rows are read where a few rows are to stand for all.
MEASURED_SHARDS = 8


@dataclass(frozen=True)
class StreamedRow:
    """Row of a stream, its image not decoded, and the position from which a reader finds it again."""

    epoch: int
    shard: int
    row: int
    values: dict[str, Any]
    position: dict[str, Any]

    @property
    def visit(self) -> tuple[int, int, int]:
        """Keys of the random numbers of its augmentation."""
        return self.epoch, self.shard, self.row

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"{self.row} of shard {self.shard}"


class StreamData:
    """
    Streamed images, labels and captions: nothing is downloaded or prepared beforehand, and rows have no numbers.

    Args:
        dataset (`datasets.IterableDataset`):
            Split of `load_dataset(..., streaming=True)`.
        transform (`ImageTransform`):
            Size, crop and mirroring of the images.
        image_column, label_column, num_classes, seed, caption_column:
            As of [`ImageData`].
        max_unreadable (`int`, *optional*, defaults to 0):
            So many rows may be unreadable (image, label or caption), for each reader; the next ones take their place.
        buffer_size (`int`, *optional*, defaults to 1000):
            Rows that a reader holds to shuffle them, images as they are in the files.

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
        self._caption_path = () if caption_column is None else caption_path(dataset.features, caption_column)
        columns = dict.fromkeys((image_column, label_column, *self._caption_path[:1]))
        self._rows = undecoded(dataset, image_column).select_columns([name for name in columns if name is not None])
        self._image_column, self._label_column, self._num_classes = image_column, label_column, num_classes
        self.transform, self.seed, self.buffer_size = transform, seed, buffer_size
        self.max_unreadable = max_unreadable
        self.num_shards = min(dataset.num_shards, MAX_SHARDS)
        self.num_samples = num_rows(dataset)
        rows = itertools.chain.from_iterable(self.read(shard) for shard in range(self.num_shards))
        self._first = [values for _, values, _ in itertools.islice(rows, 1 if caption_column is None else FIRST_ROWS)]
        if not self._first:
            raise ValueError("The data set is empty.")

    @property
    def description(self) -> str:
        """Number of images and shards, for the log."""
        count = "" if self.num_samples is None else f"{self.num_samples} "
        return f"{count}images streamed from {self.num_shards} shard{'s' if self.num_shards > 1 else ''}"

    def fingerprint(self) -> dict[str, Any]:
        """Facts by which a resumed run knows its data again: shards, rows where they are known, and the first row."""
        values = dict(self._first[0])
        image = values.pop(self._image_column)
        # The folder may have been moved.
        file = None if image is None else image["bytes"] or PurePath(image["path"]).name
        row = content_key(repr(file), *map(repr, values.values()))
        return {"shards": self.num_shards, "samples": self.num_samples, "first row": row}

    @property
    def captions(self) -> "StreamData":
        """The stream itself, for [`~StreamData.distinct`]."""
        return self

    def distinct(self) -> Iterator[str]:
        """Captions of the first rows, each once."""
        captions: dict[str, None] = {}
        for row, values in enumerate(self._first):
            try:
                with reading(row):
                    value = self._caption_value(values, row)
            except UnreadableImageError:
                if not self.max_unreadable:
                    raise
                continue
            captions |= dict.fromkeys([value] if isinstance(value, str) else value)
        yield from captions

    def read(
        self, shard: int, row: int = 0, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[int, dict[str, Any], dict[str, Any] | None]]:
        """Yield number and columns of each row of a shard, and the state of `datasets` to read it again from."""
        rows = self._rows.shard(self.num_shards, shard, contiguous=False)
        if state is not None:
            rows.load_state_dict(state)
        # Not `iter(rows)`, which in a DataLoader's worker would give a part of the shard alone.
        chunks = rows.iter(READ_AT_ONCE)
        for start in itertools.count(row // READ_AT_ONCE * READ_AT_ONCE, READ_AT_ONCE):
            try:
                columns = next(chunks, None)
                following = rows.state_dict()
            except Exception as error:
                raise ValueError(
                    f"Shard {shard} of the data set cannot be read from row {max(start, row)} on: {error}."
                ) from error
            if columns is None:
                return
            for number, values in enumerate(zip(*columns.values()), start):
                if number >= row:
                    yield number, dict(zip(columns, values)), state
            state = following

    def image_size(self, row: StreamedRow) -> tuple[int, int]:
        """Height and width of a row's image; those of the square, if it cannot be read."""
        try:
            with reading(row.name):
                return self.transform.size_of(row.values[self._image_column])
        except UnreadableImageError:
            return self.transform.size

    def decode(self, row: StreamedRow, size: tuple[int, int]) -> np.ndarray:
        """Check a row's label and caption, and decode its image to cover a height and width."""
        with reading(row.name):
            if self._label_column is not None:
                check_label(row.values[self._label_column], row.name, self._label_column, self._num_classes)
            if self._caption_path:
                self._caption_value(row.values, row.name)
            return self.transform.decode(row.values[self._image_column], size)

    def batch(
        self, rows: Sequence[StreamedRow], pixels: Sequence[np.ndarray], size: tuple[int, int]
    ) -> dict[str, Any]:
        """Batch of decoded rows, cropped to a height and width and mirrored: keys as of [`ImageData`]."""
        visits = np.array([row.visit for row in rows])
        places = self.transform.places(self.seed, visits)
        crops = [self.transform.crop(image, size, place) for image, place in zip(pixels, places)]
        mirrored = self.transform.mirrored(self.seed, visits)
        images = [crop[..., ::-1] if mirror else crop for crop, mirror in zip(crops, mirrored)]
        batch: dict[str, Any] = {"images": self.transform.as_batch(torch.from_numpy(np.stack(images)))}
        if self._label_column is not None:
            batch["labels"] = torch.tensor([row.values[self._label_column] for row in rows], dtype=torch.int64)
        if self._caption_path:
            batch["captions"] = [
                choose_caption(self._caption_value(row.values, row.name), number, row.name)
                for row, number in zip(rows, row_uniforms(self.seed, "caption", visits))
            ]
        return batch

    def spread_batches(self, num_samples: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of the first rows of the shards, at most so many; rows that cannot be read are left out."""
        shards = range(0, self.num_shards, -(-self.num_shards // MEASURED_SHARDS))
        size = self.transform.size
        for shard in shards:
            rows, pixels = [], []
            for number, values, _ in itertools.islice(self.read(shard), -(-num_samples // len(shards))):
                row = StreamedRow(0, shard, number, values, {})
                with contextlib.suppress(UnreadableImageError):
                    pixels.append(self.decode(row, size))
                    rows.append(row)
            for first in range(0, len(rows), batch_size):
                yield self.batch(rows[first : first + batch_size], pixels[first : first + batch_size], size)

    def _caption_value(self, values: dict[str, Any], row: int | str) -> str | list[str]:
        """Caption of a row, or its captions; a `ValueError` if there is none."""
        value: Any = values
        for name in self._caption_path:
            value = None if value is None else value[name]
        choose_caption(value, 0.0, row)
        return value


class ShardReader:
    """
    Shard reader of one worker: shard after shard, epoch after epoch, without end.

    The shards of an epoch, in an order drawn from seed and epoch, and after them those of the next, are dealt to the
    readers in turn. With more readers than shards each shard is dealt several times, and each of its readers takes
    every so many-th row. A reader shuffles its rows in blocks of half the buffer, which end with an epoch; while
    batches are taken from one block the next one is read.

    With aspect-ratio buckets a block is cut into batches of one size each. Rows that are left over, less than a batch
    for each bucket, are sorted by shape and cut into batches of the size of the middle one: some images are cropped
    more than they would have to be, and none is left out or repeated. The last block of an epoch is completed to whole
    batches from the next epoch.
    """

    def __init__(
        self, data: StreamData, number: int, num_readers: int, batch_size: int, position: dict[str, Any] | None = None
    ) -> None:
        self._data, self._number, self._num_readers, self._batch_size = data, number, num_readers, batch_size
        self._parts = math.ceil(num_readers / data.num_shards)
        self._group_size = batch_size if data.transform.buckets else 1
        self._block_size = max(1, data.buffer_size // 2 // self._group_size) * self._group_size
        self._order = (-1, np.empty(0, dtype=np.int64))
        self._groups = self._read_groups(**(position or {"turn": 0, "row": 0, "state": None, "taken": 0}))
        self._unreadable: set[str] = set()
        self._in_vain = 0

    def batch(self) -> dict[str, Any]:
        """Next batch, with the reader's position after it. Other rows stand in for those that cannot be read."""
        rows: list[StreamedRow] = []
        pixels: list[np.ndarray] = []
        unreadable: dict[str, str] = {}
        while True:
            group, size, position = next(self._groups)
            for row in group:
                try:
                    pixels.append(self._data.decode(row, size))
                except UnreadableImageError as error:
                    unreadable[row.name] = error.reason
                    self._unreadable.add(row.name)
                    self._in_vain += 1
                    limit = self._data.max_unreadable
                    # If there are only a few rows, and none can be read, they come again and again.
                    if len(self._unreadable) > limit or self._in_vain > 100 * limit:
                        raise
                else:
                    rows.append(row)
                    self._in_vain = 0
            if len(rows) == self._batch_size or (rows and self._data.transform.buckets):
                break
        filled = [place % len(rows) for place in range(self._batch_size)]
        batch = self._data.batch([rows[place] for place in filled], [pixels[place] for place in filled], size)
        if unreadable:
            batch["unreadable"] = unreadable
        batch["position"] = {"reader": self._number, "epoch": rows[-1].epoch, **position}
        return batch

    def _read_groups(
        self, turn: int, row: int, state: dict[str, Any] | None, taken: int
    ) -> Iterator[tuple[Sequence[StreamedRow], tuple[int, int], dict[str, Any]]]:
        """Groups of rows that are taken together, their size, and the position after them."""
        blocks = self._read_blocks(turn, row, state)
        block = next(filter(None, blocks))
        while True:
            upcoming = None
            for group, size in self._cut(block)[taken:]:
                taken += 1
                yield group, size, {**block[0].position, "taken": taken}
                for _ in group:
                    upcoming = upcoming or next(blocks)
            block, taken = upcoming or next(filter(None, blocks)), 0

    def _read_blocks(self, turn: int, row: int, state: dict[str, Any] | None) -> Iterator[list[StreamedRow] | None]:
        """Rows that are shuffled among each other; `None` after each row until a block is whole."""
        block: list[StreamedRow] = []
        for each in self._read(turn, row, state):
            is_last = block and block[0].epoch != each.epoch and len(block) % self._group_size == 0
            if is_last or len(block) == self._block_size:
                yield block
                block = []
            block.append(each)
            yield None

    def _read(self, turn: int, row: int, state: dict[str, Any] | None) -> Iterator[StreamedRow]:
        """Rows in the order of the files."""
        while True:
            epoch, shard, part = self._dealt(turn)
            for number, values, before in self._data.read(shard, row, state):
                if number % self._parts == part:
                    yield StreamedRow(epoch, shard, number, values, {"turn": turn, "row": number, "state": before})
            turn, row, state = turn + 1, 0, None

    def _dealt(self, turn: int) -> tuple[int, int, int]:
        """Epoch, shard, and part of that shard, at a turn of the reader."""
        num_pieces = self._data.num_shards * self._parts
        epoch, piece = divmod(turn * self._num_readers + self._number, num_pieces)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(derive_seed(self._data.seed, "shards"), epoch, num_pieces))
        return epoch, *divmod(int(self._order[1][piece]), self._parts)

    def _cut(self, block: list[StreamedRow]) -> list[tuple[Sequence[StreamedRow], tuple[int, int]]]:
        """Shuffle a block, and cut it into groups of rows that are taken together, with their size."""
        seed, visit, transform = self._data.seed, block[0].visit, self._data.transform
        order = torch.randperm(len(block), generator=make_generator(seed, "block", *visit)).tolist()
        rows = [block[place] for place in order]
        if not transform.buckets:
            return [([row], transform.size) for row in rows]
        sizes = np.array([self._data.image_size(row) for row in rows])
        bucket_of = assign_buckets(sizes, transform.buckets)
        members = [np.flatnonzero(bucket_of == bucket) for bucket in range(len(transform.buckets))]
        whole = [each[: len(each) // self._batch_size * self._batch_size] for each in members]
        left = np.concatenate([each[len(part) :] for each, part in zip(members, whole)])
        left = left[np.lexsort((left, sizes[left, 0] / sizes[left, 1]))]
        groups = np.concatenate([*whole, left]).reshape(-1, self._batch_size)
        order = epoch_order(derive_seed(seed, "buckets", *visit), 0, len(groups))
        return [
            ([rows[index] for index in group], transform.buckets[bucket_of[group[len(group) // 2]]])
            for group in groups[order]
        ]


class StreamPosition:
    """
    Position of a run in a stream: after the batches that training took, not those that workers have made ahead.

    Readers stay as many when a run is resumed: their number must be a multiple of processes times workers. A `saved`
    position, see [`~StreamPosition.gather`], that does not fit raises a `ValueError`.
    """

    def __init__(
        self,
        data: StreamData,
        batch_size: int,
        num_processes: int,
        num_workers: int,
        saved: dict[str, Any] | None = None,
    ) -> None:
        self.data, self.batch_size, self.num_processes = data, batch_size, num_processes
        workers = num_processes * max(1, num_workers)
        self._fixed: dict[str, Any] = {
            "num_shards": data.num_shards,
            "buffer_size": data.buffer_size,
            "batch_size": batch_size if data.transform.buckets else None,
        }
        if saved is None:
            saved = {"num_readers": workers, "num_batches": 0, "readers": {}, **self._fixed}
        elif saved.keys() != {"num_readers", "num_batches", "readers", *self._fixed}:
            raise ValueError(
                f"The checkpoint's position in its stream ({', '.join(saved)}) is that of another version of"
                " diffusers_fm and cannot be read: resume with that version, or begin a new run."
            )
        self.num_readers: int = saved["num_readers"]
        self.num_batches: int = saved["num_batches"]
        self.readers: dict[int, dict[str, Any]] = {int(each): at for each, at in saved["readers"].items()}
        self._own: dict[int, dict[str, Any]] = {}
        self.epoch = 0
        if self.num_readers % workers:
            raise ValueError(
                f"The run that is resumed reads its stream with {self.num_readers} readers: the processes times"
                f" --dataloader_num_workers must divide that, got {num_processes} x {num_workers}."
            )
        for name, value in self._fixed.items():
            if saved[name] != value:
                raise ValueError(
                    f"The stream of the run that is resumed had {name} {saved[name]} and has {value} now:"
                    " the position cannot be found again."
                )
        if self.num_readers > data.num_shards:
            logger.warning(
                "%d readers (processes times workers) share %d shards of the data set: each shard is read %d times an"
                " epoch, in parts of its rows. More shards or fewer readers read less.",
                self.num_readers,
                data.num_shards,
                math.ceil(self.num_readers / data.num_shards),
            )

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Take the positions out of this process's batches and note them."""
        for batch in batches:
            position = batch.pop("position")
            self.epoch = position.pop("epoch")
            self._own[position.pop("reader")] = position
            self.num_batches += self.num_processes
            yield batch

    def gather(self, num_processes: int) -> dict[str, Any]:
        """Position of all processes as JSON has it, for a checkpoint. Every process calls it."""
        for readers in gather_object([self._own]) if num_processes > 1 else [self._own]:
            self.readers |= readers
        return {
            "num_readers": self.num_readers,
            "num_batches": self.num_batches,
            "readers": {str(number): self.readers[number] for number in sorted(self.readers)},
            **self._fixed,
        }


class StreamBatches(IterableDataset):
    """Batches of a stream for one process's DataLoader: the readers take turns, over all processes and workers."""

    def __init__(self, position: StreamPosition, num_batches: int, process: int = 0) -> None:
        self._data, self._batch_size, self._num_readers = position.data, position.batch_size, position.num_readers
        self._numbers = range(
            position.num_batches + process,
            position.num_batches + process + num_batches * position.num_processes,
            position.num_processes,
        )
        self._positions = dict(position.readers)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            # A lock that was held when this process was forked is never released in it.
            fsspec.asyn.reset_lock()
        readers: dict[int, ShardReader] = {}
        # A DataLoader takes the workers' batches in turn. Readers take turns by the number of the batch among all, so
        # that each comes back to the same worker.
        for batch in self._numbers[worker::num_workers]:
            number = batch % self._num_readers
            if number not in readers:
                reader = (number, self._num_readers, self._batch_size, self._positions.get(number))
                readers[number] = ShardReader(self._data, *reader)
            yield readers[number].batch()
