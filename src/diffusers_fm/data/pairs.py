# SPDX-License-Identifier: Apache-2.0
"""Pairs of noise and the sample that a trained flow makes of it, as a data set, for reflow (arXiv 2209.03003)."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator

from ..files import bind_folder, written_aside


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
