# SPDX-License-Identifier: Apache-2.0
"""Data sources: the splits of a data set, their columns, and checks of them."""

import glob
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow.compute as pc
from datasets.data_files import FILES_TO_IGNORE
from datasets.packaged_modules.webdataset.webdataset import WebDataset

from .cache import content_key
from .folders import METADATA_FILES, is_data_folder, read_image_folder, split_of_name, suffixes_of
from .transforms import image_file
from .unreadable import UnreadableImageError, reading


logger = logging.getLogger(__name__)

AnyDataset = datasets.Dataset | datasets.IterableDataset
DatasetT = TypeVar("DatasetT", datasets.Dataset, datasets.IterableDataset)

HELD_OUT_SPLITS = ("validation", "test")

# Rows at the beginning of a stream that are looked at for what is true of all of them.
FIRST_ROWS = 100

# Shards in which a folder of images, or one of `save_to_disk`, is streamed.
SHARDS_OF_FOLDER = 64

# Modules of `datasets` by the suffix of the files that they read.
_MODULES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "webdataset",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".zip": "imagefolder",
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d+-of-\d+$")
_NUMBER_OF_SHARD = re.compile(r"-\d+-of-\d+$")


def load_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
    kind: str = "images",
) -> datasets.DatasetDict:
    """
    Load every split of a data set, from the Hub or from a local folder.

    Args:
        dataset_name (`str`, *optional*):
            A Hub id, or a local folder with parquet, arrow or image files, or one written by `save_to_disk`.
        dataset_config_name (`str`, *optional*):
            Configuration of the data set, where it has several.
        train_data_dir (`str`, *optional*):
            A folder of images, see [`read_image_folder`]. Exactly one of this and `dataset_name` is given.
        cache_dir (`str`, *optional*):
            Where `datasets` keeps downloaded and prepared files.
        kind (`str`, *optional*, defaults to `"images"`):
            What a local folder holds: `"images"`, `"videos"` or `"sounds"`.

    Returns:
        `datasets.DatasetDict`: the splits by name.

    Raises:
        ValueError: if both or neither are given, or there is nothing to read.
    """
    with _reading(dataset_name, train_data_dir):
        return _open(dataset_name, dataset_config_name, train_data_dir, cache_dir, kind, streaming=False)


def stream_splits(
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
    kind: str = "images",
) -> datasets.IterableDatasetDict:
    """
    Open every split of a data set as a stream of known columns, without a download or a preparation beforehand.
    Arguments and errors are those of [`load_splits`]; a split that is empty is an error, too.
    """
    with _reading(dataset_name, train_data_dir):
        splits = _open(dataset_name, dataset_config_name, train_data_dir, cache_dir, kind, streaming=True)
        for name, split in list(splits.items()):
            if isinstance(split, datasets.Dataset):
                del splits[name]
                if len(split):
                    splits[name] = split.to_iterable_dataset(num_shards=min(len(split), SHARDS_OF_FOLDER))
        return datasets.IterableDatasetDict({name: with_features(split) for name, split in splits.items()})


@contextmanager
def _reading(dataset_name: str | None, train_data_dir: str | None) -> Iterator[None]:
    if (dataset_name is None) == (train_data_dir is None):
        given = "neither" if dataset_name is None else "both"
        raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"No data set can be read from {dataset_name or train_data_dir!r}: {error}") from error


def _open(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    cache_dir: str | None,
    kind: str,
    streaming: bool,
) -> Any:
    """Splits of any source; those of a folder of images or of `save_to_disk` are no streams."""
    folder = Path(str(train_data_dir or dataset_name)).expanduser()
    options: dict[str, Any] = {"cache_dir": cache_dir, "streaming": streaming}
    if dataset_name is not None:
        if (folder / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(folder)
        if (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file():
            return datasets.DatasetDict({"train": datasets.Dataset.load_from_disk(folder)})
        if dataset_config_name is not None or not folder.is_dir() or (folder / "README.md").is_file():
            options["cache_dir"] = _cache_of(dataset_name, cache_dir)
            return _load(dataset_name, dataset_config_name, **options)
    counts, files = _find_files(folder, cache_dir)
    images = sum(counts[suffix] for suffix in suffixes_of(kind))
    if images > len(files) or not files or (train_data_dir is not None and images):
        rows: Any = read_image_folder(str(folder), kind)
        return datasets.DatasetDict(rows)
    module = Counter(_MODULES[os.path.splitext(file)[1].lower()] for file in files).most_common(1)[0][0]
    module = "imagefolder" if train_data_dir is not None else module
    data_files = _splits_of_files(folder, [f for f in files if _MODULES[os.path.splitext(f)[1].lower()] == module])
    return _load(module, data_files=data_files, **options)


def _or_none(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def decode_or_none(contents: bytes) -> Any:
        try:
            return decode(contents)
        except Exception:  # A field may be anything: whatever a decoder raises, the row counts as unreadable.
            return None

    return decode_or_none


class _TolerantWebDataset(WebDataset):
    """Reader of tar files for which a field that cannot be decoded, such as broken JSON, is missing."""

    DECODERS = {suffix: _or_none(decode) for suffix, decode in WebDataset.DECODERS.items()}


def _load(path: str, name: str | None = None, streaming: bool = False, **options: Any) -> Any:
    """`datasets.load_dataset`, with tar files of which a broken field ends no run."""
    builder = datasets.load_dataset_builder(path, name, **options)
    if isinstance(builder, WebDataset):
        builder._get_pipeline_from_tar = _TolerantWebDataset._get_pipeline_from_tar
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def _find_files(folder: Path, cache_dir: str | None) -> tuple[Counter[str], list[str]]:
    """Numbers of files by suffix, and the paths, in order, of those that `datasets` reads rows from."""
    counts: Counter[str] = Counter()
    files: list[str] = []
    seen = {os.path.realpath(cache_dir or datasets.config.HF_DATASETS_CACHE)}
    for place, folders, names in os.walk(folder, followlinks=True):
        kept = [name for name in folders if is_data_folder(os.path.join(place, name))]
        real = {name: os.path.realpath(os.path.join(place, name)) for name in kept}
        folders[:] = [name for name in kept if real[name] not in seen]
        seen |= set(real.values())
        for name in names:
            suffix = os.path.splitext(name)[1].lower()
            counts[suffix] += 1
            if suffix in _MODULES and not name.startswith(".") and name not in (*METADATA_FILES, *FILES_TO_IGNORE):
                files.append(os.path.join(place, name))
    return counts, sorted(files)


def _splits_of_files(folder: Path, files: list[str]) -> dict[str, list[str]]:
    """Files of each split: by names of shards, else by folders or names that begin or end with a split's word."""
    stems = {file: os.path.splitext(os.path.basename(file))[0] for file in files}
    shards = {file: match[1] for file, stem in stems.items() if (match := _SHARD.match(stem))}
    # Shards may have the name of the data set before that of the split.
    stems = {file: _NUMBER_OF_SHARD.sub("", stem) for file, stem in stems.items()}
    parents = {file: Path(file).relative_to(folder).parts[:-1] for file in files}
    split_of = shards or {
        file: word[0]
        for file in files
        if (word := next(filter(None, map(split_of_name, (*parents[file], stems[file]))), None)) is not None
    }
    if "train" not in split_of.values() and not shards:
        split_of = dict.fromkeys(files, "train")
    left_out = [os.path.relpath(file, folder) for file in files if file not in split_of]
    if left_out:
        logger.warning(
            "%d files of %r are read. %d are left out, as they are of no split, unlike the others: %s.",
            *(len(split_of), str(folder), len(left_out), ", ".join(left_out[:3]) + (", ..." if left_out[3:] else "")),
        )
    splits: dict[str, list[str]] = defaultdict(list)
    for file, split in split_of.items():
        splits[split].append(glob.escape(file))
    return dict(splits)


def _cache_of(dataset_name: str | None, cache_dir: str | None) -> str | None:
    """Folder for what `datasets` prepares of a data set."""
    folder = Path(str(dataset_name))
    if not (folder / "README.md").is_file():
        return cache_dir
    # Of a folder with a card, `datasets` finds again what it has prepared by the folder's name and the card alone: it
    # takes another folder, or other files in this one, for the same data.
    state = [f"{path} {path.stat().st_mtime_ns}" for path in sorted(folder.resolve().rglob("*"))]
    return str(Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / content_key(*state))


def data_folders(
    dataset_name: str | None, train_data_dir: str | None, cache_dir: str | None, image_folders: Sequence[str] = ()
) -> tuple[Path, ...] | None:
    """
    Folders in which rows of a data set may name image files, for [`ImageTransform`]: the data set's own, the caches
    of downloads, and for a local data set `image_folders`; `None`, any, for a folder of images, which names what was
    found in it.
    """
    for name in image_folders:
        if not Path(name).expanduser().is_dir():
            raise ValueError(f"--image_folders: there is no folder {name!r}.")
    if image_folders and not (dataset_name is not None and Path(dataset_name).expanduser().is_dir()):
        raise ValueError(
            f"--image_folders {' '.join(image_folders)} is for a local --dataset_name: rows of other data sets name"
            " no files of this machine."
        )
    if train_data_dir is not None:
        return None
    caches = (cache_dir, datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE)
    folders = (dataset_name, *image_folders, *caches)
    return tuple(Path(str(folder)).expanduser() for folder in folders if folder is not None)


def choose_split(splits: Mapping[Any, DatasetT], name: str) -> DatasetT:
    """One split of a data set; a `ValueError` names the others if there is no such split."""
    if name not in splits:
        raise ValueError(f"The data set has no split {name!r}; its splits are {list(splits)}.")
    return splits[name]


def held_out_split_name(splits: Mapping[Any, AnyDataset], train_split: str) -> str | None:
    """The split to hold out if none is named: `validation`, else `test`, else none."""
    return next((name for name in HELD_OUT_SPLITS if name in splits and name != train_split), None)


def check_image_column(dataset: AnyDataset, image_column: str) -> None:
    """Refuse a column that holds neither images nor sounds, decoded or not, nor their files or paths."""
    columns: Any = dataset.features
    if image_column not in columns:
        raise ValueError(f"There is no image column {image_column!r}; the columns are {list(columns)}.")
    feature = columns[image_column]
    as_files = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    as_value = isinstance(feature, datasets.Value) and feature.dtype in ("string", "binary")
    if not (isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)) or as_files or as_value):
        raise ValueError(f"The column {image_column!r} holds {feature}, not images; the columns are {list(columns)}.")


def image_files(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
    """The column of images alone, undecoded: `{"bytes", "path"}`."""
    check_image_column(dataset, image_column)
    return (
        dataset.select_columns([image_column])
        .with_format(None)
        .cast_column(image_column, datasets.Image(decode=False))
    )


def check_label_column(dataset: AnyDataset, label_column: str, num_classes: int) -> None:
    """Refuse a column that holds neither `ClassLabel` nor integers."""
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
    """Refuse a label that is missing, or none of the model's classes."""
    # Image folders without class folders have labels of -1 where one is missing.
    if label is None or label == -1:
        raise ValueError(f"Row {row} has no label in the column {label_column!r}.")
    if not 0 <= label < num_classes:
        raise ValueError(
            f"The label {label} of row {row} is out of range: the model's classes are 0 to {num_classes - 1}."
        )


def read_labels(dataset: datasets.Dataset, label_column: str, num_classes: int) -> np.ndarray:
    """Labels of all rows, int64 of shape `(num_rows,)`, -1 where one is missing; refuses those out of range."""
    check_label_column(dataset, label_column, num_classes)
    column: Any = dataset.select_columns([label_column]).with_format("arrow")[:][label_column]
    labels = pc.fill_null(column, -1).to_numpy().astype(np.int64)
    for row in np.flatnonzero((labels != -1) & ((labels < 0) | (labels >= num_classes)))[:1].tolist():
        check_label(int(labels[row]), row, label_column, num_classes)
    return labels


def class_names(dataset: AnyDataset, label_column: str) -> dict[int, str] | None:
    """Names of the classes by label, as `id2label` of a pipeline, if the column is a `ClassLabel`."""
    columns: Any = dataset.features
    feature = columns[label_column]
    return dict(enumerate(feature.names)) if isinstance(feature, datasets.ClassLabel) else None


def with_features(dataset: datasets.IterableDataset) -> datasets.IterableDataset:
    """The stream with known columns: where its files do not say what they hold, what the first rows hold."""
    if dataset.features is not None:
        return dataset
    first = list(dataset.take(FIRST_ROWS))
    if not first:
        raise ValueError("The data set is empty.")
    return dataset.cast(datasets.Dataset.from_list(first).features)


def undecoded(dataset: datasets.IterableDataset, image_column: str) -> datasets.IterableDataset:
    """The stream with images as they are in the files: `{"bytes", "path"}`."""
    dataset = dataset.decode(False)
    columns: Any = dataset.features
    if isinstance(columns[image_column], datasets.Image):
        return dataset
    return dataset.cast_column(image_column, datasets.Image(decode=False))


def num_rows(dataset: datasets.IterableDataset) -> int | None:
    """Rows of a split, where the data set's card says it."""
    splits, name = dataset.info.splits, str(dataset.split)
    return splits[name].num_examples or None if splits and name in splits else None


def first_rows(
    dataset: datasets.IterableDataset, image_column: str, count: int, folders: tuple[Path, ...] | None = None
) -> datasets.Dataset:
    """
    The first rows of a stream, in memory, images as they are in the files.

    Args:
        dataset (`datasets.IterableDataset`):
            One split.
        image_column (`str`):
            Name of the column of images.
        count (`int`):
            Rows at most.
        folders (`tuple[Path, ...]`, *optional*):
            Folders in which rows may name files, see [`data_folders`].

    Returns:
        `datasets.Dataset`: the rows.

    Raises:
        ValueError: if there is no such column.
    """
    dataset = with_features(dataset)
    check_image_column(dataset, image_column)
    dataset = undecoded(dataset, image_column)
    rows = [{**row, image_column: _at_hand(row[image_column], folders)} for row in dataset.take(count)]
    return datasets.Dataset.from_list(rows, features=dataset.features)


def _at_hand(image: dict[str, Any] | None, folders: tuple[Path, ...] | None) -> dict[str, Any] | None:
    """The file of an image, fetched if it is not on this machine; the reader of one out of reach finds it missing."""
    try:
        with reading(""):
            file = image_file(image, folders)
    except UnreadableImageError:
        return image
    return {"bytes": file, "path": None} if isinstance(file, bytes) else {"bytes": None, "path": file}
