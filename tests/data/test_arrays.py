# SPDX-License-Identifier: Apache-2.0
"""Arrays as data: batches are the rows, and rows of another shape are named."""

from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from diffusers_fm.data.arguments import ArrayArguments, DataArguments
from diffusers_fm.data.arrays import ArrayData


VOLUMES = np.random.default_rng(0).normal(size=(5, 2, 3, 4)).astype(np.float32)


def rows(arrays: Any, **columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"array": list(arrays), **columns})


@pytest.mark.parametrize("kind", ["lists", "Array3D"])
def test_batches_are_the_rows(kind: str) -> None:
    dataset = rows(VOLUMES.tolist(), label=[0, 1, 2, 0, 1])
    if kind == "Array3D":
        dataset = dataset.cast_column("array", datasets.Array3D(shape=(2, 3, 4), dtype="float32"))
    keys = np.array([[0, 3], [7, 1], [0, 4]])
    batch = ArrayData(dataset, "array", (2, 3, 4), "label", 3)[keys]
    assert torch.equal(batch["data"], torch.from_numpy(VOLUMES[[3, 1, 4]]))
    assert batch["labels"].tolist() == [0, 1, 1]
    one_channel = ArrayData(dataset, "array", (1, 2, 3, 4), max_samples=3)
    assert len(one_channel) == 3 and one_channel[keys[1:2]]["data"].shape == (1, 1, 2, 3, 4)
    assert [len(group) for group in one_channel.groups(2)] == [2, 1]
    assert [len(batch["data"]) for batch in one_channel.spread_batches(9, 2)] == [2, 1]


def test_other_arrays_have_another_fingerprint() -> None:
    changed = VOLUMES.copy()
    changed[2, 0, 0, 0] += 1
    prints = [ArrayData(rows(arrays.tolist()), "array", (2, 3, 4)).fingerprint() for arrays in (VOLUMES, changed)]
    assert prints[0] != prints[1] and prints[0] == ArrayData(rows(VOLUMES.tolist()), "array", (2, 3, 4)).fingerprint()


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ([], "The data set is empty"),
        ([[1.0, 2.0]], r"Row 0 of 'array' must have the shape \(1, 3\), got the shape \(2,\)"),
        ([[[1.0], [2.0, 3.0]]], r"Row 0 of 'array' must have the shape \(1, 3\), got no numbers of one shape"),
        ([["a", "b", "c"]], "got no numbers of one shape"),
        ([[1.0, float("nan"), 2.0]], "Row 0 of 'array' holds values that are not finite"),
    ],
)
def test_rows_that_are_no_samples_are_named(arrays: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ArrayData(rows(arrays), "array", (1, 3))


def test_columns_and_arguments() -> None:
    dataset = rows(VOLUMES.tolist(), label=[0, None, 1, 1, 1])
    with pytest.raises(ValueError, match=r"'wave' is none of the columns \['array', 'label'\]"):
        ArrayData(dataset, "wave", (2, 3, 4))
    with pytest.raises(ValueError, match="Row 1 has no label in the column 'label'"):
        ArrayData(dataset, "array", (2, 3, 4), "label", 2)

    @dataclass(frozen=True, kw_only=True)
    class Both(DataArguments, ArrayArguments):
        pass

    with pytest.raises(ValueError, match="--random_flip does not go with --array_column array"):
        Both(dataset_name="x", array_column="array", random_flip=True)
