# SPDX-License-Identifier: Apache-2.0
"""The batches of a stream for all processes and workers, and where a run is in them."""

import logging
from collections.abc import Iterator
from dataclasses import astuple
from typing import Any

import fsspec.asyn
from accelerate.utils import gather_object
from torch.utils.data import IterableDataset, get_worker_info

from .bucket_lanes import BucketLane
from .lanes import BEGINNING, Lane, LanePosition, parts_of_shards
from .streams import StreamData


logger = logging.getLogger(__name__)


class StreamPosition:
    """
    Where a run is in a stream: of the batches that training took, not of those that workers have made beforehand.

    Args:
        num_lanes (`int`):
            Lanes of all processes and workers.
        num_shards (`int`), buffer_size (`int`):
            Of the [`StreamData`].
        batch_size (`int`, *optional*):
            Samples in a batch, where the position depends on it: with aspect-ratio buckets.
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
        batch_size: int | None = None,
        num_batches: int = 0,
        lanes: dict[int, LanePosition] | None = None,
    ) -> None:
        self.num_lanes, self.num_shards, self.buffer_size = num_lanes, num_shards, buffer_size
        self.batch_size = batch_size
        self.num_batches, self.lanes = num_batches, dict(lanes or {})
        self._own: dict[int, LanePosition] = {}
        self.epoch = 0

    @classmethod
    def of_run(
        cls, data: StreamData, batch_size: int, num_processes: int, num_workers: int, saved: dict[str, Any] | None
    ) -> "StreamPosition":
        """
        Where a run begins.

        Args:
            data ([`StreamData`]):
                What is read.
            batch_size (`int`):
                Samples in a batch.
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
        properties = {
            "num_shards": data.num_shards,
            "buffer_size": data.buffer_size,
            "batch_size": batch_size if data.transform.buckets else None,
        }
        if saved is None:
            return cls(readers, **properties)
        lanes = {int(number): LanePosition.of(*position) for number, position in saved["lanes"].items()}
        position = cls(**{**saved, "lanes": lanes})
        if position.num_lanes % readers:
            raise ValueError(
                f"The run that is resumed reads its stream in {position.num_lanes} lanes: the processes times"
                f" --dataloader_num_workers must divide that, got {num_processes} x {num_workers}."
            )
        for name, value in properties.items():
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
            lane, self.epoch = position.pop("lane"), position.pop("epoch")
            self._own[lane] = LanePosition.of(**position)
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
            "batch_size": self.batch_size,
            "num_batches": self.num_batches,
            "lanes": {str(number): list(astuple(position)) for number, position in sorted(self.lanes.items())},
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
                position = self._positions.get(number, BEGINNING)
                kind = BucketLane if self._data.transform.buckets else Lane
                lanes[number] = kind(self._data, number, self._num_lanes, self._batch_size, position)
            yield lanes[number].batch()


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
