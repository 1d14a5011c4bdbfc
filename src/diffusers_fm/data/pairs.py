# SPDX-License-Identifier: Apache-2.0
"""Pairs of noise and the sample that a trained flow makes of it, as a data set, for reflow (arXiv 2209.03003)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch.utils.data import Dataset

from ..files import bind_folder, written_aside
from .cache import content_key
from .sources import check_label_column, read_labels


# What the pairs of a folder depend on.
FINGERPRINT = ".pairs.json"


def missing_shards(
    accelerator: Accelerator, folder: Path, fingerprint: Mapping[str, Any]
) -> Iterator[tuple[Path, range]]:
    """
    Files of a data set of pairs that are not there yet, and the numbers of their pairs. Processes take them in turn.

    Args:
        accelerator (`accelerate.Accelerator`):
            Of the run.
        folder (`Path`):
            Of the data set, which all processes see.
        fingerprint (`Mapping[str, Any]`):
            Everything that the pairs depend on, in JSON types; `num_pairs` and `shard_size`, the pairs in a file.

    Yields:
        `tuple[Path, range]`: A file, for [`write_shard`], and the numbers of its pairs, from 0.

    Raises:
        ValueError: If the folder holds pairs of another fingerprint; the message names what differs.
    """
    with accelerator.main_process_first():
        changed = bind_folder(folder, FINGERPRINT, dict(fingerprint))
    if changed:
        differing = ", ".join(f"{name} was {held} and is {wanted}" for name, (held, wanted) in changed.items())
        raise ValueError(
            f"The folder {str(folder)!r} holds other pairs ({differing}): choose another --output_dir, or remove it."
        )
    count, size = fingerprint["num_pairs"], fingerprint["shard_size"]
    starts = range(0, count, size)
    for number in range(accelerator.process_index, len(starts), accelerator.num_processes):
        file = folder / f"train-{number:05d}-of-{len(starts):05d}.parquet"
        if not file.is_file():
            yield file, range(starts[number], min(starts[number] + size, count))


def write_shard(
    file: Path,
    noise: torch.Tensor,
    sample: torch.Tensor,
    labels: Sequence[int] | None = None,
    id2label: Mapping[Any, str] | None = None,
) -> None:
    """
    Write pairs to a parquet file, which appears whole or not at all.

    Args:
        file (`Path`):
            The file.
        noise (`torch.Tensor` of shape `(num_pairs, channels, height, width)`):
            Standard normal noise.
        sample (`torch.Tensor` of that shape):
            The pixels in [-1, 1] or the latents that a flow makes of it.
        labels (`Sequence[int]`, *optional*):
            The classes of the pairs.
        id2label (`Mapping`, *optional*):
            Names of all classes by label, as a pipeline's configuration has them.
    """
    array = datasets.Array3D(tuple(noise.shape[1:]), "float32")
    features: dict[str, Any] = {"noise": array, "sample": array}
    columns: dict[str, Any] = {"noise": noise.float().cpu().numpy(), "sample": sample.float().cpu().numpy()}
    if labels is not None:
        names = [name for _, name in sorted((int(label), name) for label, name in (id2label or {}).items())]
        features["label"] = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
        columns["label"] = list(labels)
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    with written_aside(file) as aside:
        rows.to_parquet(aside)


class PairData(Dataset):
    """
    Pairs of noise and data, and labels, by row, in the place of [`ImageData`]: nothing is augmented.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        shape (`tuple[int, int, int]`):
            Channels, height and width of a sample.
        noise_column (`str`), sample_column (`str`):
            Columns of arrays of that shape.
        label_column (`str`, *optional*):
            Column of labels; without it there are none.
        num_classes (`int`, *optional*, defaults to 0):
            Classes of the model, for checks.

    Raises:
        ValueError: If the data set is empty, columns are missing or of the wrong type, or a label is out of range.
    """

    bucket_rows = None

    def __init__(
        self,
        dataset: datasets.Dataset,
        shape: tuple[int, int, int],
        noise_column: str,
        sample_column: str,
        label_column: str | None = None,
        num_classes: int = 0,
    ) -> None:
        if len(dataset) == 0:
            raise ValueError("The data set is empty.")
        for name in (noise_column, sample_column):
            feature = dataset.features.get(name)
            found = tuple(feature.shape) if isinstance(feature, datasets.Array3D) else feature
            if found != tuple(shape):
                raise ValueError(
                    f"The column {name!r} must hold arrays of the shape {tuple(shape)} of this pipeline's samples, got"
                    f" {found}; the columns are {list(dataset.features)}."
                )
        self._labels = None
        if label_column is not None:
            check_label_column(dataset, label_column, num_classes)
            self._labels = torch.from_numpy(read_labels(dataset, label_column, num_classes))
        self._shape, self._columns = shape, (noise_column, sample_column)
        self._rows = dataset.select_columns(list(self._columns)).with_format("numpy")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_samples(self) -> int:
        """Number of pairs."""
        return len(self)

    @property
    def description(self) -> str:
        """Number of the pairs, for the log."""
        return f"{len(self)} pairs of noise and sample"

    def fingerprint(self) -> dict[str, Any]:
        """Facts that identify the data of a resumed run: the number of pairs, the labels, and some of the pairs."""
        facts: dict[str, Any] = {"samples": len(self)}
        if self._labels is not None:
            facts["labels"] = content_key(self._labels.numpy().tobytes())
        pairs = next(self.spread_batches(64, 64))
        return {**facts, "pairs": content_key(*(pairs[name].numpy().tobytes() for name in ("noise", "data")))}

    def spread_batches(self, num_samples: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of at most so many pairs, evenly spread over all of them."""
        rows = np.unique(np.linspace(0, len(self) - 1, num_samples).astype(np.int64))
        for numbers in np.split(rows, range(batch_size, len(rows), batch_size)):
            yield self[np.stack([np.zeros_like(numbers), numbers], axis=1)]

    def size(self, index: int) -> tuple[int, int]:
        """Height and width of a sample."""
        return self._shape[1], self._shape[2]

    def __getitem__(self, keys: np.ndarray) -> dict[str, Any]:
        """
        A batch.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch and number of each pair.

        Returns:
            `dict[str, Any]`: `noise` and `data`, float32 of shape `(batch_size, channels, height, width)`, and with
            labels `labels`, int64 of shape `(batch_size,)`.
        """
        rows = self._rows[keys[:, 1]]
        noise, data = (torch.from_numpy(np.asarray(rows[name], dtype=np.float32)) for name in self._columns)
        batch = {"noise": noise, "data": data}
        if self._labels is not None:
            batch["labels"] = self._labels[torch.from_numpy(keys[:, 1])]
        return batch
