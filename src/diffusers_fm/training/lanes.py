# SPDX-License-Identifier: Apache-2.0
"""A stream in lanes: who reads which shard when, in which order, and where to go on after an interruption."""

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import fsspec.asyn
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, get_worker_info

from .randomness import derive_seed, epoch_order, make_generator
from .streaming import StreamData, StreamedRow
from .unreadable import IMAGE_ERRORS, UnreadableImageError


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanePosition:
    """
    Where a lane is.

    Args:
        turn (`int`), row (`int`):
            The shard, by its number among those of the lane, and the row in it, with which the block begins.
        taken (`int`):
            Rows taken from the block, in its shuffled order.
    """

    turn: int = 0
    row: int = 0
    taken: int = 0


class _Block:
    """Rows that are shuffled among each other: so many of one epoch as follow each other in a lane."""

    def __init__(self, rows: Iterator[tuple[LanePosition, StreamedRow] | None], size: int) -> None:
        self._rows, self._size = rows, size
        self.rows: list[StreamedRow] = []
        self.start = LanePosition()
        self._is_full = False

    def read_one(self) -> None:
        """One more row, if there is room."""
        if self._is_full:
            return
        found = next(self._rows)
        if found is None:
            # The end of an epoch, in which no row of the next is wanted.
            self._is_full = bool(self.rows)
            return
        position, row = found
        if not self.rows:
            self.start = position
        self.rows.append(row)
        self._is_full = len(self.rows) == self._size

    def fill(self) -> "_Block":
        """All of its rows."""
        while not self._is_full:
            self.read_one()
        return self

    def order(self, seed: int) -> list[int]:
        """The order in which they are taken."""
        generator = make_generator(seed, "block", *self.rows[0].visit)
        return torch.randperm(len(self.rows), generator=generator).tolist()


class Lane:
    """
    What one worker of one process reads: shard after shard, epoch after epoch, without end.

    All shards of an epoch, in an order that depends on seed and epoch, and after them those of the next, are dealt to
    the lanes like cards. A lane shuffles its rows in blocks of half the buffer, which do not cross an epoch; while one
    block is taken the next one is read. With more lanes than shards each shard is dealt several times, and a lane that
    is dealt one takes every so many-th row of it.

    Args:
        data ([`StreamData`]):
            What is read.
        number (`int`):
            Number of the lane.
        num_lanes (`int`):
            Lanes of all processes and workers.
        position ([`LanePosition`], *optional*):
            Where to begin.
    """

    def __init__(self, data: StreamData, number: int, num_lanes: int, position: LanePosition = LanePosition()) -> None:
        self._data, self._number, self._num_lanes = data, number, num_lanes
        self._parts = parts_of_shards(data.num_shards, num_lanes)
        self._order = (-1, np.empty(0, dtype=np.int64))
        self._rows = self._shuffled(position)
        self._unreadable = 0

    def batch(self, batch_size: int) -> dict[str, Any]:
        """
        The next batch.

        Args:
            batch_size (`int`):
                Its samples.

        Returns:
            `dict[str, Any]`: as of [`ImageData`], with `position`, where the lane is after it.

        Raises:
            ValueError: if a shard cannot be read, too many images cannot be, or labels or captions are missing.
        """
        rows: list[StreamedRow] = []
        pixels: list[np.ndarray] = []
        unreadable: dict[str, str] = {}
        position = LanePosition()
        while len(rows) < batch_size:
            row, position = next(self._rows)
            try:
                pixels.append(self._data.decode(row))
                rows.append(row)
            except IMAGE_ERRORS as error:
                unreadable[row.name] = str(error)
                self._unreadable += 1
                if self._unreadable > self._data.max_unreadable:
                    raise UnreadableImageError.of(-1, row.name, str(error)) from error
        batch = self._data.batch(rows, pixels)
        if unreadable:
            batch["unreadable"] = unreadable
        batch["position"] = {"lane": self._number, "epoch": rows[-1].epoch, **asdict(position)}
        return batch

    def _shuffled(self, position: LanePosition) -> Iterator[tuple[StreamedRow, LanePosition]]:
        """Rows, and the position after each."""
        rows, size = self._read(position), max(1, self._data.buffer_size // 2)
        block, taken = _Block(rows, size).fill(), position.taken
        while True:
            upcoming = _Block(rows, size)
            for place in block.order(self._data.seed)[taken:]:
                taken += 1
                yield block.rows[place], LanePosition(block.start.turn, block.start.row, taken)
                upcoming.read_one()
            block, taken = upcoming.fill(), 0

    def _read(self, position: LanePosition) -> Iterator[tuple[LanePosition, StreamedRow] | None]:
        """Rows in the order of the files, each with its own position, and `None` after the last one of an epoch."""
        first_row = position.row
        for turn in itertools.count(position.turn):
            epoch, shard, part = self._dealt(turn)
            for row, values in self._data.read(shard, first_row):
                if row % self._parts == part:
                    yield LanePosition(turn, row), StreamedRow(epoch, shard, row, values)
            first_row = 0
            if self._dealt(turn + 1)[0] != epoch:
                yield None

    def _dealt(self, turn: int) -> tuple[int, int, int]:
        """Epoch, shard and part of it that are the lane's at a turn."""
        num_pieces = self._data.num_shards * self._parts
        epoch, place = divmod(turn * self._num_lanes + self._number, num_pieces)
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(derive_seed(self._data.seed, "shards"), epoch, num_pieces))
        return epoch, *divmod(int(self._order[1][place]), self._parts)


def parts_of_shards(num_shards: int, num_lanes: int) -> int:
    """Into how many parts shards are divided, so that there is one for every lane."""
    return math.ceil(num_lanes / num_shards)


class StreamPosition:
    """
    Where a run is in a stream: of the batches that training took, not of those that workers have made beforehand.

    Args:
        num_lanes (`int`):
            Lanes of all processes and workers.
        num_shards (`int`), buffer_size (`int`):
            Of the [`StreamData`].
        num_batches (`int`, *optional*, defaults to 0):
            Batches that were taken, by all processes.
        lanes (`dict[int, LanePosition]`, *optional*):
            Where the lanes are that were read.

    Attributes:
        epoch (`int`):
            That of the last row that this process took.
    """

    def __init__(
        self,
        num_lanes: int,
        num_shards: int,
        buffer_size: int,
        num_batches: int = 0,
        lanes: dict[int, LanePosition] | None = None,
    ) -> None:
        self.num_lanes, self.num_shards, self.buffer_size = num_lanes, num_shards, buffer_size
        self.num_batches, self.lanes = num_batches, dict(lanes or {})
        self._own: dict[int, LanePosition] = {}
        self.epoch = 0

    @classmethod
    def of_run(
        cls, data: StreamData, num_processes: int, num_workers: int, saved: dict[str, Any] | None
    ) -> "StreamPosition":
        """
        Where a run begins.

        Args:
            data ([`StreamData`]):
                What is read.
            num_processes (`int`):
                Processes of the run.
            num_workers (`int`):
                Workers of each.
            saved (`dict[str, Any]`, *optional*):
                What the checkpoint that is resumed says, see [`~StreamPosition.gather`].

        Returns:
            [`StreamPosition`]: at the beginning, or where the checkpoint was made.

        Raises:
            ValueError: if the stream, the processes or the workers do not fit the resumed run.
        """
        readers = num_processes * max(1, num_workers)
        if saved is None:
            return cls(readers, data.num_shards, data.buffer_size)
        lanes = {int(number): LanePosition(*position) for number, position in saved["lanes"].items()}
        position = cls(**{**saved, "lanes": lanes})
        if position.num_lanes % readers:
            raise ValueError(
                f"The run that is resumed reads its stream in {position.num_lanes} lanes: the processes times"
                f" --dataloader_num_workers must divide that, got {num_processes} x {num_workers}."
            )
        for name, value in (("num_shards", data.num_shards), ("buffer_size", data.buffer_size)):
            if getattr(position, name) != value:
                raise ValueError(
                    f"The stream of the run that is resumed had {name} {getattr(position, name)} and has {value} now:"
                    " the position cannot be found again."
                )
        return position

    def watch(self, batches: Iterator[dict[str, Any]], num_processes: int) -> Iterator[dict[str, Any]]:
        """
        Batches, with the positions taken out and noted.

        Args:
            batches (`Iterator[dict[str, Any]]`):
                Of this process, as [`LaneBatches`] gives them.
            num_processes (`int`):
                Processes that take as many.

        Yields:
            `dict[str, Any]`: the same without `position`.
        """
        for batch in batches:
            position = batch.pop("position")
            self.epoch = position["epoch"]
            self._own[position["lane"]] = LanePosition(position["turn"], position["row"], position["taken"])
            self.num_batches += num_processes
            yield batch

    def gather(self, num_processes: int) -> dict[str, Any]:
        """
        The position over all processes, for a checkpoint. Every process calls it.

        Args:
            num_processes (`int`):
                Processes of the run.

        Returns:
            `dict[str, Any]`: what [`~StreamPosition.of_run`] takes, as JSON has it.
        """
        own = [self._own]
        for lanes in gather_object(own) if num_processes > 1 else own:
            self.lanes |= lanes
        return {
            "num_lanes": self.num_lanes,
            "num_shards": self.num_shards,
            "buffer_size": self.buffer_size,
            "num_batches": self.num_batches,
            "lanes": {str(number): [at.turn, at.row, at.taken] for number, at in sorted(self.lanes.items())},
        }


class LaneBatches(IterableDataset):
    """
    One process's batches of a stream, for a loader: the lanes take turns, over all processes and workers.

    Args:
        data ([`StreamData`]):
            What is read.
        position ([`StreamPosition`]):
            Where to begin.
        batch_size (`int`):
            Samples in a batch.
        num_batches (`int`):
            Batches of this process.
        num_processes (`int`, *optional*, defaults to 1):
            Processes that read.
        process (`int`, *optional*, defaults to 0):
            Rank of this one.
    """

    def __init__(
        self,
        data: StreamData,
        position: StreamPosition,
        batch_size: int,
        num_batches: int,
        num_processes: int = 1,
        process: int = 0,
    ) -> None:
        self._data, self._batch_size, self._num_batches = data, batch_size, num_batches
        self._num_processes = num_processes
        self._first = position.num_batches + process
        self._num_lanes, self._positions = position.num_lanes, dict(position.lanes)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            # A lock that was held when this process was forked is never released in it.
            fsspec.asyn.reset_lock()
        lanes: dict[int, Lane] = {}
        # A loader takes the workers' batches in turn. Lanes take turns by the number of the batch among all, so that
        # each comes back to the same worker.
        for batch in range(worker, self._num_batches, num_workers):
            number = (self._first + batch * self._num_processes) % self._num_lanes
            if number not in lanes:
                position = self._positions.get(number, LanePosition())
                lanes[number] = Lane(self._data, number, self._num_lanes, position)
            yield lanes[number].batch(self._batch_size)


def tell_of_divided_shards(data: StreamData, num_lanes: int) -> None:
    """Say so, if shards are read several times over."""
    parts = parts_of_shards(data.num_shards, num_lanes)
    if parts > 1:
        logger.warning(
            "%d readers (processes times workers) share %d shards of the data set: each shard is read %d times an"
            " epoch, by as many readers, which take their parts of its rows. More shards or fewer readers read less.",
            num_lanes,
            data.num_shards,
            parts,
        )
