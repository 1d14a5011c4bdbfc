# SPDX-License-Identifier: Apache-2.0
"""Arrays of any rank as data: sequences, volumes, latents, points."""

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .cache import content_key
from .images import FINGERPRINT_ROWS
from .randomness import make_generator
from .sources import read_labels


class ArrayData(Dataset):
    """
    Arrays and labels by row, batch by batch; the counterpart of [`ImageData`].

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        column (`str`):
            Column of arrays or of nested lists of numbers, all of `shape`; an axis of one channel may be left out.
        shape (`tuple[int, ...]`):
            Shape of a sample as the network takes it, `(channels, ...)`.
        label_column (`str`, *optional*), num_classes (`int`, *optional*, defaults to 0):
            Column of the labels, and classes of the model.
        seed (`int`, *optional*, defaults to 0), max_samples (`int`, *optional*):
            Use so many rows, chosen at random by the seed.
        noise_column (`str`, *optional*):
            Column of noise of that shape, which belongs to the arrays: pairs for reflow.

    Raises:
        ValueError: if the data set is empty, a column is missing, or a row is not of that shape or not finite.
    """

    bucket_rows = None

    def __init__(
        self,
        dataset: datasets.Dataset,
        column: str,
        shape: tuple[int, ...],
        label_column: str | None = None,
        num_classes: int = 0,
        seed: int = 0,
        max_samples: int | None = None,
        noise_column: str | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("The data set is empty.")
        self._columns = {"data": column} if noise_column is None else {"data": column, "noise": noise_column}
        for name in self._columns.values():
            if name not in dataset.column_names:
                raise ValueError(f"{name!r} is none of the columns {dataset.column_names}.")
        if max_samples is not None and max_samples < len(dataset):
            order = torch.randperm(len(dataset), generator=make_generator(seed, "max_samples")).numpy()
            dataset = dataset.select(np.sort(order[:max_samples]))
        self.labels = None if label_column is None else read_labels(dataset, label_column, num_classes)
        missing = [] if self.labels is None else np.flatnonzero(self.labels == -1)[:1].tolist()
        if missing:
            raise ValueError(f"Row {missing[0]} has no label in the column {label_column!r}.")
        self._shape = shape
        self._dataset = dataset.with_format("numpy", columns=list(self._columns.values()))
        self._read(np.arange(1))

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self)

    @property
    def description(self) -> str:
        """Number and shape of the arrays, for the log."""
        noise = ", each with its noise" if "noise" in self._columns else ""
        return f"{len(self)} arrays of {' x '.join(map(str, self._shape))}{noise}"

    def fingerprint(self) -> dict[str, Any]:
        """Facts that identify the data of a resumed run, with the contents of `FINGERPRINT_ROWS` samples."""
        rows = np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_ROWS).astype(np.int64))
        contents = [array.tobytes() for array in self._read(rows).values()]
        facts: dict[str, Any] = {"samples": len(self), "arrays": content_key(*contents)}
        return facts if self.labels is None else {**facts, "labels": content_key(self.labels.tobytes())}

    def size(self, index: int) -> tuple[int, ...]:
        """Sizes of a sample, without its channels."""
        return self._shape[1:]

    def groups(self, batch_size: int) -> list[np.ndarray]:
        """Numbers of all samples, int64, in batches, the last perhaps smaller."""
        return [np.arange(start, min(start + batch_size, len(self))) for start in range(0, len(self), batch_size)]

    def spread_batches(self, num_samples: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of at most so many samples, evenly spread over all of them."""
        rows = np.unique(np.linspace(0, len(self) - 1, num_samples).astype(np.int64))
        for numbers in np.split(rows, range(batch_size, len(rows), batch_size)):
            yield self[np.stack([np.zeros_like(numbers), numbers], axis=1)]

    def __getitem__(self, keys: np.ndarray) -> dict[str, Any]:
        """
        A batch.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch and number of each sample.

        Returns:
            `dict[str, Any]`: `data` and perhaps `noise`, float32 of shape `(batch_size, channels, ...)`; with labels,
            `labels`, int64 of shape `(batch_size,)`.
        """
        batch: dict[str, Any] = {name: torch.from_numpy(array) for name, array in self._read(keys[:, 1]).items()}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[keys[:, 1]])
        return batch

    def _read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of some rows, float32, and their noise."""
        values = self._dataset[rows]
        return {name: self._checked(rows, column, values[column]) for name, column in self._columns.items()}

    def _checked(self, rows: np.ndarray, column: str, values: Any) -> np.ndarray:
        """Arrays of a column as one, float32."""
        arrays = []
        for row, value in zip(rows.tolist(), values):
            try:
                array = _float32(value)
                found = f"the shape {array.shape}"
            except (ValueError, TypeError):
                array, found = np.empty(0), "no numbers of one shape"
            if array.shape not in (self._shape, self._shape[self._shape[0] == 1 :]):
                raise ValueError(f"Row {row} of {column!r} must have the shape {self._shape}, got {found}.")
            if not np.isfinite(array).all():
                raise ValueError(f"Row {row} of {column!r} holds values that are not finite.")
            arrays.append(array.reshape(self._shape))
        return np.stack(arrays)


def _float32(value: Any) -> np.ndarray:
    """Nested lists and arrays of numbers as one array."""
    array = np.asarray(value)
    return (np.stack([_float32(part) for part in array]) if array.dtype == object else array).astype(np.float32)
