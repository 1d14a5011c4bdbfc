# SPDX-License-Identifier: Apache-2.0
"""Where images come from: the splits of a data set, their columns, and what is wrong with them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import fsspec
import numpy as np

from .cache import content_key


AnyDataset = datasets.Dataset | datasets.IterableDataset
DatasetT = TypeVar("DatasetT", datasets.Dataset, datasets.IterableDataset)

HELD_OUT_SPLITS = ("validation", "test")

# Rows at the beginning of a stream that are looked at for what is true of all of them.
FIRST_ROWS = 100

# A folder of `save_to_disk` is read in so many shards.
SHARDS_OF_FOLDER = 64


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
    with _data_set_of(dataset_name, train_data_dir):
        if train_data_dir is not None:
            return datasets.load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir)
        saved = _load_from_disk(dataset_name)
        if saved is not None:
            return saved
        cache_dir = _cache_of(dataset_name, cache_dir)
        return datasets.load_dataset(dataset_name, dataset_config_name, cache_dir=cache_dir)


def stream_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
) -> datasets.IterableDatasetDict:
    """
    The same splits as of [`load_splits`], to be read from end to end, without a download or a preparation beforehand.

    Args:
        dataset_name (`str`, *optional*):
            As [`load_splits`] takes it.
        dataset_config_name (`str`, *optional*):
            As [`load_splits`] takes it.
        train_data_dir (`str`, *optional*):
            As [`load_splits`] takes it.
        cache_dir (`str`, *optional*):
            As [`load_splits`] takes it.

    Returns:
        `datasets.IterableDatasetDict`: the splits by name, with known columns.

    Raises:
        ValueError: as [`load_splits`], or if a split is empty and its files do not say what they hold.
    """
    with _data_set_of(dataset_name, train_data_dir):
        saved = None if dataset_name is None else _load_from_disk(dataset_name)
        if saved is not None:
            splits = {
                name: split.to_iterable_dataset(num_shards=min(len(split), SHARDS_OF_FOLDER))
                for name, split in saved.items()
                if len(split)
            }
        elif train_data_dir is not None:
            splits = datasets.load_dataset("imagefolder", data_dir=train_data_dir, cache_dir=cache_dir, streaming=True)
        else:
            cache_dir = _cache_of(dataset_name, cache_dir)
            splits = datasets.load_dataset(str(dataset_name), dataset_config_name, cache_dir=cache_dir, streaming=True)
        return datasets.IterableDatasetDict({name: with_features(split) for name, split in splits.items()})


@contextmanager
def _data_set_of(dataset_name: str | None, train_data_dir: str | None) -> Iterator[None]:
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else "both"
        raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")
    try:
        yield
    except (FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"No data set can be read from {dataset_name or train_data_dir!r}: {error}") from error


def _load_from_disk(dataset_name: str | None) -> datasets.DatasetDict | None:
    """What `save_to_disk` wrote, if that is what the folder is."""
    folder = Path(str(dataset_name))
    if (folder / "dataset_dict.json").is_file():
        return datasets.DatasetDict.load_from_disk(folder)
    if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
        return datasets.DatasetDict({"train": datasets.Dataset.load_from_disk(folder)})
    return None


def _cache_of(dataset_name: str | None, cache_dir: str | None) -> str | None:
    """Where `datasets` keeps what it prepares of a data set."""
    folder = Path(str(dataset_name))
    if not (folder / "README.md").is_file():
        return cache_dir
    # Of a folder with a card, `datasets` finds again what it has prepared by the folder's name and the card alone: it
    # takes another folder, or other files in this one, for the same data.
    state = [f"{path} {path.stat().st_mtime_ns}" for path in sorted(folder.resolve().rglob("*"))]
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / content_key(*state))


def choose_split(splits: Mapping[Any, DatasetT], name: str) -> DatasetT:
    """
    One split of a data set.

    Args:
        splits (`datasets.DatasetDict` or `datasets.IterableDatasetDict`):
            All splits.
        name (`str`):
            The wanted one.

    Returns:
        `datasets.Dataset` or `datasets.IterableDataset`: the split.

    Raises:
        ValueError: if there is no such split.
    """
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; its splits are {list(splits)}.")
    return splits[name]


def held_out_split_name(splits: Mapping[Any, AnyDataset], train_split: str) -> str | None:
    """
    The split to hold out if none is named: `validation`, else `test`, else none.

    Args:
        splits (`datasets.DatasetDict` or `datasets.IterableDatasetDict`):
            All splits.
        train_split (`str`):
            The split that is trained on.

    Returns:
        `str`, *optional*: its name.
    """
    return next((name for name in HELD_OUT_SPLITS if name in splits and name != train_split), None)


def check_image_column(dataset: AnyDataset, image_column: str) -> None:
    """
    Refuses a column that holds no images.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            With known columns.
        image_column (`str`):
            Of images, undecoded or not, of their files, or of paths.

    Raises:
        ValueError: if there is no such column, or it holds something else.
    """
    columns: Any = dataset.features
    if image_column not in columns:
        raise ValueError(f"There is no image column {image_column!r}; the columns are {list(columns)}.")
    feature = columns[image_column]
    as_files = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    as_value = isinstance(feature, datasets.Value) and feature.dtype in ("string", "binary")
    if not (isinstance(feature, datasets.Image) or as_files or as_value):
        raise ValueError(f"The column {image_column!r} holds {feature}, not images; the columns are {list(columns)}.")


def image_rows(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """
    A data set's images, decoded on access.

    Args:
        dataset (`datasets.Dataset`):
            The data set.
        image_column (`str`):
            As [`check_image_column`] admits.

    Returns:
        `datasets.Dataset`: of that column alone.

    Raises:
        ValueError: as [`check_image_column`].
    """
    check_image_column(dataset, image_column)
    feature = dataset.features[image_column]
    images = dataset.select_columns([image_column])
    if isinstance(feature, datasets.Image) and feature.decode:
        return images
    return images.cast_column(image_column, datasets.Image())


def check_label_column(dataset: AnyDataset, label_column: str, num_classes: int) -> None:
    """
    Refuses a column that holds no labels.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            With known columns.
        label_column (`str`):
            A column of `ClassLabel` or integers.
        num_classes (`int`):
            Classes of the model, for the message.

    Raises:
        ValueError: if there is no such column, or it holds something else.
    """
    columns: Any = dataset.features
    if label_column not in columns:
        raise ValueError(
            f"The model has {num_classes} classes, but there is no label column {label_column!r}; the columns are"
            f" {list(columns)}."
        )
    feature = columns[label_column]
    is_integer = isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint"))
    if not (isinstance(feature, datasets.ClassLabel) or is_integer):
        raise ValueError(
            f"The label column {label_column!r} must hold ClassLabel or integers, got {feature};"
            " `Dataset.class_encode_column` makes labels of names."
        )


def check_label(label: int | None, row: int | str, label_column: str, num_classes: int) -> None:
    """
    Refuses a label that is none of the model's classes.

    Args:
        label (`int`, *optional*):
            Of a row.
        row (`int` or `str`):
            Which row, for the message.
        label_column (`str`):
            Its column, for the message.
        num_classes (`int`):
            Classes of the model.

    Raises:
        ValueError: if it is missing or not in `0 .. num_classes - 1`.
    """
    # Image folders without class folders have labels of -1 where one is missing.
    if label is None or label == -1:
        raise ValueError(f"Row {row} has no label in the column {label_column!r}.")
    if not 0 <= label < num_classes:
        raise ValueError(
            f"The label {label} of row {row} is out of range: the model's classes are 0 to {num_classes - 1}."
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
    check_label_column(dataset, label_column, num_classes)
    labels = dataset.select_columns([label_column]).with_format(None)[:][label_column]
    for row, label in enumerate(labels):
        check_label(label, row, label_column, num_classes)
    return np.array(labels, dtype=np.int64)


def class_names(dataset: AnyDataset, label_column: str) -> dict[int, str] | None:
    """
    Names of the classes by label, as `id2label` of a pipeline.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`):
            The data set, with known columns.
        label_column (`str`):
            Its label column.

    Returns:
        `dict[int, str]`, *optional*: the names, if the column is a `ClassLabel`.
    """
    columns: Any = dataset.features
    feature = columns[label_column]
    return dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else None


def with_features(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """
    The data set with known columns: where the files do not say what they hold, what the first rows hold.

    Args:
        dataset (`datasets.IterableDataset`):
            Any.

    Returns:
        `datasets.IterableDataset`: the same rows.

    Raises:
        ValueError: if it is empty.
    """
    if dataset.features is not None:
        return dataset
    first = list(dataset.take(FIRST_ROWS))
    if not first:
        raise ValueError("The data set is empty.")
    return dataset.cast(datasets.Dataset.from_list(first).features)


def undecoded(dataset: datasets.IterableDataset, image_column: str) -> datasets.IterableDataset:
    """
    The data set with images as they are in the files.

    Args:
        dataset (`datasets.IterableDataset`):
            With known columns.
        image_column (`str`):
            Name of the column of images.

    Returns:
        `datasets.IterableDataset`: with values `{"bytes", "path"}` in that column.
    """
    dataset = dataset.decode(False)
    columns: Any = dataset.features
    if isinstance(columns[image_column], datasets.Image):
        return dataset
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def num_rows(dataset: datasets.IterableDataset) -> int | None:
    """
    The number of rows, where the data set's card says it.

    Args:
        dataset (`datasets.IterableDataset`):
            One split.

    Returns:
        `int`, *optional*: the number, or `None` if it is not known.
    """
    splits, name = dataset.info.splits, str(dataset.split)
    return splits[name].num_examples or None if splits and name in splits else None


def first_rows(dataset: datasets.IterableDataset, image_column: str, count: int) -> datasets.Dataset:
    """
    The first rows of a stream, in memory, images as they are in the files.

    Args:
        dataset (`datasets.IterableDataset`):
            One split.
        image_column (`str`):
            Name of the column of images.
        count (`int`):
            Rows at most.

    Returns:
        `datasets.Dataset`: the rows.

    Raises:
        ValueError: if there is no such column.
    """
    dataset = with_features(dataset)
    check_image_column(dataset, image_column)
    dataset = undecoded(dataset, image_column)
    rows = [{**row, image_column: _at_hand(row[image_column])} for row in dataset.take(count)]
    return datasets.Dataset.from_list(rows, features=dataset.features)


def _at_hand(image: dict[str, Any] | None) -> dict[str, Any] | None:
    """The file of an image, fetched if it is neither there nor on this machine."""
    if image is None or image["bytes"] is not None or Path(image["path"]).is_file():
        return image
    try:
        with fsspec.open(image["path"], "rb") as file:
            return {"bytes": file.read(), "path": image["path"]}
    except OSError:
        # Whoever reads it finds it missing.
        return image
