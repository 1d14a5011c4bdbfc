# SPDX-License-Identifier: Apache-2.0
"""Where images come from: the splits of a data set, their columns, and what is wrong with them."""

from pathlib import Path

import datasets
import numpy as np

from .tensor_cache import content_key


HELD_OUT_SPLITS = ("validation", "test")


def load_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
) -> datasets.DatasetDict:
    """
    Loads every split of a data set, from the Hub or from a local folder.

    Args:
        dataset_name (`str`, *optional*):
            A Hub id, or a local folder with parquet, arrow or image files, or one written by `save_to_disk`.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set, where it has several.
        train_data_dir (`str`, *optional*):
            A folder of images, classes in subfolders if there are classes. Exactly one of this and `dataset_name` is
            given.
        cache_dir (`str`, *optional*):
            Where `datasets` keeps downloaded and prepared files.

    Returns:
        `datasets.DatasetDict`: the splits by name.

    Raises:
        ValueError: if both or neither are given, or there is nothing to read.
    """
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else "both"
        raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")
    try:
        if train_data_dir is not None:
            return datasets.load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)
        folder = Path(str(dataset_name))
        if (folder / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(folder)
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            return datasets.DatasetDict({"train": datasets.Dataset.load_from_disk(folder)})
        if (folder / "README.md").is_file():
            # Of a folder with a card, `datasets` finds again what it has prepared by the folder's name and the card
            # alone: it takes another folder, or other files in this one, for the same data.
            state = [f"{path} {path.stat().st_mtime_ns}" for path in sorted(folder.resolve().rglob("*"))]
            cache_dir = str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / content_key(*state))
        return datasets.load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"No data set can be read from {dataset_name or train_data_dir!r}: {error}") from error


def choose_split(splits: datasets.DatasetDict, name: str) -> datasets.Dataset:
    """
    One split of a data set.

    Args:
        splits (`datasets.DatasetDict`):
            All splits.
        name (`str`):
            The wanted one.

    Returns:
        `datasets.Dataset`: the split.

    Raises:
        ValueError: if there is no such split.
    """
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; its splits are {list(splits)}.")
    return splits[name]


def held_out_split_name(splits: datasets.DatasetDict, train_split: str) -> str | None:
    """
    The split to hold out if none is named: `validation`, else `test`, else none.

    Args:
        splits (`datasets.DatasetDict`):
            All splits.
        train_split (`str`):
            The split that is trained on.

    Returns:
        `str`, *optional*: its name.
    """
    return next((name for name in HELD_OUT_SPLITS if name in splits and name != train_split), None)


def image_rows(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The data set with its image column decoded on access."""
    if image_column not in dataset.column_names:
        raise ValueError(f"There is no image column {image_column!r}; the columns are {dataset.column_names}.")
    feature = dataset.features[image_column]
    if isinstance(feature, datasets.Image):
        return (
            dataset.select_columns([image_column])
            if feature.decode
            else dataset.cast_column(image_column, datasets.Image()).select_columns([image_column])
        )
    as_files = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    if as_files or (isinstance(feature, datasets.Value) and feature.dtype in ("string", "binary")):
        return dataset.select_columns([image_column]).cast_column(image_column, datasets.Image())
    raise ValueError(
        f"The column {image_column!r} holds {feature}, not images; the columns are {dataset.column_names}."
    )


def read_labels(dataset: datasets.Dataset, label_column: str, num_classes: int) -> np.ndarray:
    """
    All labels of a data set, checked.

    Args:
        dataset (`datasets.Dataset`):
            The data set.
        label_column (`str`):
            A column of `ClassLabel` or integers.
        num_classes (`int`):
            Classes of the model.

    Returns:
        `np.ndarray` of shape `(num_rows,)`: int64 labels in `0 .. num_classes - 1`.

    Raises:
        ValueError: if the column is missing or not of integers, or a label is missing or out of range.
    """
    if label_column not in dataset.column_names:
        raise ValueError(
            f"The model has {num_classes} classes, but there is no label column {label_column!r}; the columns are"
            f" {dataset.column_names}."
        )
    feature = dataset.features[label_column]
    is_integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    if not (isinstance(feature, datasets.ClassLabel) or is_integer):
        raise ValueError(
            f"The label column {label_column!r} must hold ClassLabel or integers, got {feature};"
            " `Dataset.class_encode_column` makes labels of names."
        )
    labels = dataset.select_columns([label_column]).with_format(None)[:][label_column]
    for row, label in enumerate(labels):
        # Image folders without class folders have labels of -1 where one is missing.
        if label is None or label == -1:
            raise ValueError(f"Row {row} has no label in the column {label_column!r}.")
        if not 0 <= label < num_classes:
            raise ValueError(
                f"The label {label} of row {row} is out of range: the model's classes are 0 to {num_classes - 1}."
            )
    return np.array(labels, dtype=np.int64)


def class_names(dataset: datasets.Dataset, label_column: str) -> dict[int, str] | None:
    """
    Names of the classes by label, as `id2label` of a pipeline.

    Args:
        dataset (`datasets.Dataset`):
            The data set.
        label_column (`str`):
            Its label column.

    Returns:
        `dict[int, str]`, *optional*: the names, if the column is a `ClassLabel`.
    """
    feature = dataset.features[label_column]
    return dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else None
