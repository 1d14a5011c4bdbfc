# SPDX-License-Identifier: Apache-2.0
"""A stream in lanes: which shard is read when, in which order, and where to go on after an interruption."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from .randomness import derive_seed, epoch_order, make_generator
from .streams import StreamData, StreamedRow
from .unreadable import UnreadableImageError, reading


@dataclass(frozen=True)
class LanePosition:
    """
    Where a lane is.

    Args:
        turn (`int`), row (`int`):
            The shard, by its number among those of the lane, and the row in it, with which the block begins.
        taken (`int`):
            Rows, or batches, taken from the block, in their shuffled order.
        waiting (`tuple[tuple[int, int], ...]`, *optional*):
            Rows before the block, by turn and row, that were not taken before it began.
    """

    turn: int = 0
    row: int = 0
    taken: int = 0
    waiting: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, turn: int, row: int, taken: int, waiting: Sequence[Sequence[int]]) -> "LanePosition":
        """From what JSON, or a loader, makes of it."""
        return cls(turn, row, taken, tuple((turn, row) for turn, row in waiting))


BEGINNING = LanePosition()


class Block:
    """
    Rows that are shuffled among each other: so many of one epoch as follow each other in a lane.

    Args:
        rows (`Iterator`):
            Where they come from, `None` among them where an epoch ends.
        size (`int`):
            So many at most.
    """

    def __init__(self, rows: Iterator[StreamedRow | None], size: int) -> None:
        self._rows, self._size = rows, size
        self.rows: list[StreamedRow] = []
        self._is_full = False

    def read_one(self) -> None:
        """One more row, if there is room."""
        if self._is_full:
            return
        row = next(self._rows)
        if row is None:
            # The end of an epoch, in which no row of the next is wanted.
            self._is_full = bool(self.rows)
            return
        self.rows.append(row)
        self._is_full = len(self.rows) == self._size

    def fill(self) -> "Block":
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
        batch_size (`int`):
            Samples in a batch.
        position ([`LanePosition`], *optional*):
            Where to begin.
    """

    def __init__(
        self,
        data: StreamData,
        number: int,
        num_lanes: int,
        batch_size: int,
        position: LanePosition = BEGINNING,
    ) -> None:
        self._data, self._number, self._num_lanes, self._batch_size = data, number, num_lanes, batch_size
        self._parts = parts_of_shards(data.num_shards, num_lanes)
        self._block_size = max(1, data.buffer_size // 2)
        self._order = (-1, np.empty(0, dtype=np.int64))
        self._rows = self._shuffled(position)
        self._unreadable = 0

    def batch(self) -> dict[str, Any]:
        """
        The next batch.

        Returns:
            `dict[str, Any]`: as of [`ImageData`], with `position`, where the lane is after it.

        Raises:
            ValueError: if a shard cannot be read, too many images cannot be, or labels or captions are missing.
        """
        rows: list[StreamedRow] = []
        pixels: list[np.ndarray] = []
        unreadable: dict[str, str] = {}
        position, side = BEGINNING, self._data.transform.resolution
        while len(rows) < self._batch_size:
            row, position = next(self._rows)
            decoded = self._decode(row, (side, side), unreadable)
            if decoded is not None:
                rows.append(row)
                pixels.append(decoded)
        return self._batch(rows, pixels, (side, side), unreadable, position)

    def _decode(self, row: StreamedRow, size: tuple[int, int], unreadable: dict[str, str]) -> np.ndarray | None:
        """The pixels of a row, or `None` where they cannot be read, which is noted."""
        try:
            with reading(row.name):
                return self._data.decode(row, size)
        except UnreadableImageError as error:
            unreadable[row.name] = error.reason
            self._unreadable += 1
            if self._unreadable > self._data.max_unreadable:
                raise
            return None

    def _batch(
        self,
        rows: Sequence[StreamedRow],
        pixels: Sequence[np.ndarray],
        size: tuple[int, int],
        unreadable: dict[str, str],
        position: LanePosition,
    ) -> dict[str, Any]:
        batch = self._data.batch(rows, pixels, size)
        if unreadable:
            batch["unreadable"] = unreadable
        batch["position"] = {"lane": self._number, "epoch": rows[-1].epoch, **asdict(position)}
        return batch

    def _shuffled(self, position: LanePosition) -> Iterator[tuple[StreamedRow, LanePosition]]:
        """Rows, and the position after each."""
        rows, size = self._read(position.turn, position.row), self._block_size
        block, taken = Block(rows, size).fill(), position.taken
        while True:
            upcoming = Block(rows, size)
            for place in block.order(self._data.seed)[taken:]:
                taken += 1
                yield block.rows[place], LanePosition(*block.rows[0].place, taken)
                upcoming.read_one()
            block, taken = upcoming.fill(), 0

    def _read(self, first_turn: int, first_row: int) -> Iterator[StreamedRow | None]:
        """Rows in the order of the files, and `None` after the last one of an epoch."""
        for turn in itertools.count(first_turn):
            epoch, shard, part = self._dealt(turn)
            for row, values in self._data.read(shard, first_row):
                if row % self._parts == part:
                    yield StreamedRow(epoch, shard, row, values, turn)
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
