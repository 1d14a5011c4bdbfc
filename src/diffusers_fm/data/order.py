# SPDX-License-Identifier: Apache-2.0
"""Samplers of batches, endless and exact from any step, and the DataLoader over them."""

import bisect
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .randomness import derive_seed, epoch_order


class StreamSampler(Sampler[np.ndarray]):
    """
    Sampler of one process: epoch after epoch, each in its own order, without gaps.

    Step `s` takes the next `total` samples; accumulation steps and processes take consecutive parts of them. Any step
    can be the first, at no cost. A batch is epoch and row of each sample, int64 of shape `(batch_size, 2)`.

    Args:
        num_rows (`int`):
            Rows of the data set.
        seed (`int`):
            Seed of the run.
        batch_size (`int`):
            Samples a process handles at once.
        accumulation_steps (`int`, *optional*, defaults to 1):
            Batches a process handles in a step.
        num_processes (`int`, *optional*, defaults to 1):
            Processes that share a step.
        process (`int`, *optional*, defaults to 0):
            Rank of this one.
        samples_seen (`int`, *optional*, defaults to 0):
            Samples taken before.
        num_steps (`int`, *optional*, defaults to 1):
            Steps to serve.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process: int = 0,
        samples_seen: int = 0,
        num_steps: int = 1,
    ) -> None:
        self.num_rows, self.seed, self.batch_size = num_rows, seed, batch_size
        self.num_processes, self.process = num_processes, process
        self.samples_seen, self.num_batches = samples_seen, num_steps * accumulation_steps

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[np.ndarray]:
        orders: dict[int, np.ndarray] = {}
        for number in range(self.num_batches):
            start = self.samples_seen + (number * self.num_processes + self.process) * self.batch_size
            yield _visits(start, self.batch_size, self.seed, self.num_rows, orders)


class BucketSampler(StreamSampler):
    """
    Sampler for images of several sizes: a batch holds rows of one bucket.

    Each bucket is sampled by itself, epoch after epoch without gaps, in batches; no row is left out, repeated
    to fill a batch, or resized for company. The batches of all buckets are shuffled among each other within each
    epoch. Where the rows of a bucket are no multiple of the batch size, one of its batches lies across the boundary of
    two epochs: at the end of an epoch only rows of that one batch have been seen once more or once less often, and two
    rows of a bucket never differ by more than one visit. A bucket with fewer rows than a batch has its turn every few
    epochs.

    Buckets change from batch to batch, so accumulation steps and processes mix them.

    Args:
        bucket_rows (`Sequence[np.ndarray]`):
            Rows of each bucket. Together they are all rows of the data set.
        args, kwargs:
            From `seed` on, as of [`StreamSampler`]. A batch in which `samples_seen` lies is begun again.
    """

    def __init__(self, bucket_rows: Sequence[np.ndarray], *args: Any, **kwargs: Any) -> None:
        super().__init__(sum(map(len, bucket_rows)), *args, **kwargs)
        self.bucket_rows = [rows for rows in bucket_rows if len(rows)]

    def __iter__(self) -> Iterator[np.ndarray]:
        epoch, schedule = -1, np.empty((0, 2), dtype=np.int64)
        orders: dict[int, dict[int, np.ndarray]] = {}
        for number in range(self.num_batches):
            batch = self.samples_seen // self.batch_size + number * self.num_processes + self.process
            if not self._batches_before(epoch) <= batch < self._batches_before(epoch + 1):
                # The bound is generous: an epoch has at least one batch in as many epochs as rows go into a batch.
                epoch = bisect.bisect_right(
                    range((batch + 1) * 2 * self.batch_size), batch, key=lambda e: self._batches_before(e + 1)
                )
                schedule = self._schedule(epoch)
            bucket, turn = schedule[batch - self._batches_before(epoch)].tolist()
            rows, seed = self.bucket_rows[bucket], derive_seed(self.seed, "bucket", bucket)
            start = turn * self.batch_size
            keys = _visits(start, self.batch_size, seed, len(rows), orders.setdefault(bucket, {}))
            keys[:, 1] = rows[keys[:, 1]]
            yield keys

    def _turns_before(self, bucket: int, epoch: int) -> int:
        """Batches of a bucket in the epochs before this one, to the nearest whole number."""
        return (2 * max(epoch, 0) * len(self.bucket_rows[bucket]) + self.batch_size) // (2 * self.batch_size)

    def _batches_before(self, epoch: int) -> int:
        return sum(self._turns_before(bucket, epoch) for bucket in range(len(self.bucket_rows)))

    def _schedule(self, epoch: int) -> np.ndarray:
        """Bucket and turn of each batch of an epoch."""
        pairs = [
            (bucket, turn)
            for bucket in range(len(self.bucket_rows))
            for turn in range(self._turns_before(bucket, epoch), self._turns_before(bucket, epoch + 1))
        ]
        order = epoch_order(derive_seed(self.seed, "buckets"), epoch, len(pairs))
        return np.array(pairs, dtype=np.int64).reshape(-1, 2)[order]


def _visits(start: int, size: int, seed: int, num_rows: int, orders: dict[int, np.ndarray]) -> np.ndarray:
    """Epoch and row of samples `start` to `start + size`; `orders` keeps the orders of the epochs that they touch."""
    needed = range(start // num_rows, (start + size - 1) // num_rows + 1)
    for epoch in [old for old in orders if old not in needed]:
        del orders[epoch]
    keys = np.empty((size, 2), dtype=np.int64)
    for epoch in needed:
        if epoch not in orders:
            orders[epoch] = epoch_order(seed, epoch, num_rows)
        first = epoch * num_rows - start
        part = slice(max(0, first), min(size, first + num_rows))
        keys[part, 0] = epoch
        keys[part, 1] = orders[epoch][part.start - first : part.stop - first]
    return keys


def make_loader(
    data: Dataset, sampler: Sampler[np.ndarray] | None = None, num_workers: int = 0
) -> Iterable[dict[str, Any]]:
    """DataLoader of whole batches: of [`ImageData`] with a sampler, or of [`StreamBatches`] without."""
    if num_workers == 0 and sampler is not None and not torch.cuda.is_available():
        # Without workers, and with no memory to pin, a `DataLoader` adds nothing but its time.
        return map(data.__getitem__, sampler)
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
    )


def _ignore_signals(worker: int) -> None:
    """Ignore Ctrl-C and a scheduler's signal in a worker: the run needs it to finish its step. SIGTERM ends it."""
    for number in (signal.SIGINT, *([signal.SIGUSR1] if os.name == "posix" else [])):
        signal.signal(number, signal.SIG_IGN)
