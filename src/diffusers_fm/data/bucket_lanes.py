# SPDX-License-Identifier: Apache-2.0
"""Lanes of a stream whose batches hold images of one size each."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from .buckets import assign_buckets
from .lanes import BEGINNING, Block, Lane, LanePosition
from .randomness import derive_seed, epoch_order
from .streams import StreamData, StreamedRow


class BucketLane(Lane):
    """
    Like [`Lane`], for images in aspect-ratio buckets: the rows of a block are cut into batches of one size each.

    What is left of a block's buckets, less than a batch of each, is sorted by shape and cut into batches, too, of the
    size of the one in the middle: some images are cropped more than they would have to be, and none is left out,
    repeated, or kept for long. The rows beyond a multiple of the batch size wait for the next block.

    Args:
        data ([`StreamData`]):
            What is read; its transform has buckets.
        number (`int`):
            Number of the lane.
        num_lanes (`int`):
            Lanes of all processes and workers.
        batch_size (`int`):
            Samples in a batch.
        position ([`LanePosition`], *optional*):
            Where to begin; `taken` counts batches.
    """

    def __init__(
        self,
        data: StreamData,
        number: int,
        num_lanes: int,
        batch_size: int,
        position: LanePosition = BEGINNING,
    ) -> None:
        super().__init__(data, number, num_lanes, batch_size, position)
        self._batches = self._in_buckets(position)

    def batch(self) -> dict[str, Any]:
        """
        The next batch. A row whose image cannot be read is left out, and another of the batch stands in its place.

        Returns:
            `dict[str, Any]`: as of [`Lane`].

        Raises:
            ValueError: as [`Lane`].
        """
        unreadable: dict[str, str] = {}
        while True:
            wanted, size, position = next(self._batches)
            found = [(row, pixels) for row in wanted if (pixels := self._decode(row, size, unreadable)) is not None]
            if found:
                filled = itertools.islice(itertools.cycle(found), len(wanted))
                rows, pixels = zip(*filled)
                return self._batch(rows, pixels, size, unreadable, position)

    def _in_buckets(self, position: LanePosition) -> Iterator[tuple[list[StreamedRow], tuple[int, int], LanePosition]]:
        """Rows of a batch, their size, and the position after it."""
        size = self._block_size
        rows = self._read(*min(((position.turn, position.row), *position.waiting)))
        waiting, rows = self._before(position, rows)
        block, taken = Block(rows, size).fill(), position.taken
        while True:
            upcoming = Block(rows, size)
            at_hand = [*waiting, *(block.rows[place] for place in block.order(self._data.seed))]
            count = len(at_hand) // self._batch_size * self._batch_size
            before = tuple(row.place for row in waiting)
            for batch, size_of_batch in self._cut(at_hand[:count])[taken:]:
                taken += 1
                yield batch, size_of_batch, LanePosition(*block.rows[0].place, taken, before)
                for _ in batch:
                    upcoming.read_one()
            waiting, block, taken = at_hand[count:], upcoming.fill(), 0

    def _before(
        self, position: LanePosition, rows: Iterator[StreamedRow | None]
    ) -> tuple[list[StreamedRow], Iterator[StreamedRow | None]]:
        """The rows that wait when a block begins, and what follows from its first row on."""
        found: dict[tuple[int, int], StreamedRow] = {}
        while position.waiting:
            row = next(rows)
            if row is None:
                continue
            if row.place >= (position.turn, position.row):
                rows = itertools.chain([row], rows)
                break
            found[row.place] = row
        return [found[place] for place in position.waiting], rows

    def _cut(self, rows: Sequence[StreamedRow]) -> list[tuple[list[StreamedRow], tuple[int, int]]]:
        """Batches of rows, a multiple of the batch size, and the size of each, in a shuffled order."""
        if not rows:
            return []
        buckets = self._data.transform.buckets
        sizes = np.array([self._data.image_size(row) for row in rows])
        bucket_of = assign_buckets(sizes, buckets)
        groups: list[tuple[np.ndarray, int]] = []
        left: list[int] = []
        for bucket in range(len(buckets)):
            members = np.flatnonzero(bucket_of == bucket)
            count = len(members) // self._batch_size * self._batch_size
            groups += [(group, bucket) for group in members[:count].reshape(-1, self._batch_size)]
            left += members[count:].tolist()
        left.sort(key=lambda index: (sizes[index, 0] / sizes[index, 1], index))
        for group in np.array(left, dtype=np.int64).reshape(-1, self._batch_size):
            groups.append((group, int(bucket_of[group[len(group) // 2]])))
        order = epoch_order(derive_seed(self._data.seed, "buckets", *rows[0].visit), 0, len(groups))
        return [([rows[index] for index in groups[place][0]], buckets[groups[place][1]]) for place in order]
