# SPDX-License-Identifier: Apache-2.0
"""Images, labels and captions from any `datasets` data set, with augmentations that depend on the seed alone."""

import io
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.ExifTags
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .buckets import assign_buckets
from .captions import CaptionColumn
from .randomness import derive_seed, make_generator, row_uniforms
from .tensor_cache import content_key
from .unreadable import UnreadableImageError


# Decoded images are kept in memory, in every process, if all of them together take no more than this.
MEMORY_BUDGET = 512 * 2**20

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


def _image_rows(dataset: datasets.Dataset, image_column: str) -> datasets.Dataset:
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


def to_pixels(image: PIL.Image.Image, size: tuple[int, int], channels: int, multiple: int = 1) -> np.ndarray:
    """
    An image's pixels, resized (bicubic, antialiased) to cover a size in both directions, if it does not fit already.

    Args:
        image (`PIL.Image.Image`):
            Any mode with 8 or 16 bits a channel.
        size (`tuple[int, int]`):
            Height and width to cover: one side has the wanted length, the other at least that.
        channels (`int`):
            1 for grey, 3 for RGB; images are converted.
        multiple (`int`, *optional*, defaults to 1):
            If it is resized, the other side's length is a multiple of this.

    Returns:
        `np.ndarray` of shape `(channels, height, width)`: uint8.

    Raises:
        ValueError: if the mode has no 8-bit form.
    """
    if image.mode.startswith("I;16"):
        image = PIL.Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"images of mode {image.mode!r} have no fixed range")
    image = image.convert("L" if channels == 1 else "RGB")
    height, width = size
    scale = max(height / image.height, width / image.width)
    if scale != 1:
        covering = (multiple * round(side * scale / multiple) for side in image.size)
        wanted = tuple(max(side, least) for side, least in zip(covering, (width, height)))
        image = image.resize(wanted, PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def image_size(file: bytes | str) -> tuple[int, int]:
    """
    The size of an image as it is seen, from the head of its file.

    Args:
        file (`bytes` or `str`):
            Its contents or its path.

    Returns:
        `tuple[int, int]`: height and width.

    Raises:
        OSError: if it is no image.
    """
    with PIL.Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        width, height = image.size
        # Orientations from 5 on lie on their side, and `datasets` turns them.
        lies = image.getexif().get(PIL.ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if lies else (height, width)


@dataclass(frozen=True)
class ImageTransform:
    """
    What is done to each image: resize so that it covers a size, crop to the size, perhaps mirror. The size is a
    square, or the bucket of the nearest aspect ratio.

    Args:
        resolution (`int`):
            Side of the square.
        channels (`int`):
            1 (grey) or 3 (RGB).
        center_crop (`bool`, *optional*, defaults to `False`):
            Crop at the centre; otherwise anywhere, anew at each visit.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the images, anew at each visit.
        buckets (`tuple[tuple[int, int], ...]`, *optional*):
            Heights and widths that take the square's place.
        multiple (`int`, *optional*, defaults to 1):
            Crops begin at multiples of so many pixels, where they can follow those of a smaller image.
    """

    resolution: int
    channels: int
    center_crop: bool = False
    random_flip: bool = False
    buckets: tuple[tuple[int, int], ...] = ()
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"Images have 1 or 3 channels, but the model takes {self.channels}.")


class ImageData(Dataset):
    """
    Images, labels and captions by epoch and row, batch by batch.

    Decoded and resized images are kept in memory if all of them fit `MEMORY_BUDGET`; otherwise they are decoded at
    each visit, best in several loader workers.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        transform (`ImageTransform`):
            What is done to each image.
        image_column (`str`, *optional*, defaults to `"image"`):
            Name of the column of images.
        label_column (`str`, *optional*):
            Name of the column of labels; without it there are none.
        num_classes (`int`, *optional*, defaults to 0):
            Classes of the model, for checks.
        seed (`int`, *optional*, defaults to 0):
            Seed of augmentation and of the choice of `max_samples`.
        max_samples (`int`, *optional*):
            Use so many rows, chosen at random.
        memory_budget (`int`, *optional*, defaults to `MEMORY_BUDGET`):
            Bytes of decoded images to keep at most.
        caption_column (`str`, *optional*):
            Name of the column of captions; without it there are none.
        max_unreadable (`int`, *optional*, defaults to 0):
            So many images may be unreadable. At each visit another one, chosen at random by epoch and row and of the
            same size, takes the place of such an image, with its own label and caption.

    Attributes:
        captions ([`CaptionColumn`], *optional*):
            The captions.
        bucket_rows (`list[np.ndarray]`, *optional*):
            Numbers of the samples in each bucket, if the transform has buckets. The samples of a batch must be of one.
        read_moments (`Callable`, *optional*):
            If set, batches hold `moments` in place of `images`: `read_moments(number, mirrored)` gives what the
            autoencoder says of an image.

    Raises:
        ValueError: if the data set is empty, columns are missing or of the wrong type, a label is missing or out of
            range, or an image cannot be read (with its row; at once if images are kept or there are buckets, else at
            its first visit).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: ImageTransform,
        image_column: str = "image",
        label_column: str | None = None,
        num_classes: int = 0,
        seed: int = 0,
        max_samples: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        caption_column: str | None = None,
        max_unreadable: int = 0,
    ) -> None:
        self._max_unreadable = max_unreadable
        self._unreadable: dict[int, tuple[int, str]] = {}
        self._untold: dict[int, str] = {}
        self._images = _image_rows(dataset, image_column)
        self._files = self._images.cast_column(image_column, datasets.Image(decode=False))
        if len(dataset) == 0:
            raise ValueError("The data set is empty.")
        self._rows = np.arange(len(dataset))
        if max_samples is not None and max_samples < len(dataset):
            order = torch.randperm(len(dataset), generator=make_generator(seed, "max_samples")).numpy()
            self._rows = np.sort(order[:max_samples])
        self._labels = None
        if label_column is not None:
            self._labels = torch.from_numpy(read_labels(dataset, label_column, num_classes)[self._rows])
        self.captions = None if caption_column is None else CaptionColumn(dataset, caption_column, self._rows, seed)
        self.transform = transform
        self._seed = seed
        self.read_moments: Callable[[int, bool], torch.Tensor] | None = None
        self.bucket_rows: list[np.ndarray] | None = None
        self._bucket_of = None
        if transform.buckets:
            sizes = [
                self._read_or_note(index, lambda index: image_size(self.file(index))) for index in range(len(self))
            ]
            sizes = [(transform.resolution,) * 2 if size is None else size for size in sizes]
            self._bucket_of = assign_buckets(np.array(sizes), transform.buckets)
            self.bucket_rows = [np.flatnonzero(self._bucket_of == bucket) for bucket in range(len(transform.buckets))]
        self._kept: list[np.ndarray] | None = None
        self._stack: torch.Tensor | None = None
        # Images that are not square take more; that many are decoded at first only to see whether it fits.
        if len(self) * transform.channels * transform.resolution**2 <= memory_budget:
            self._keep_in_memory(memory_budget)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all samples, `(num_samples,)`, or `None` without a label column."""
        return None if self._labels is None else self._labels.numpy()

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded and kept."""
        return self._kept is not None or self._stack is not None

    def __getitem__(self, keys: np.ndarray) -> dict[str, Any]:
        """
        A batch.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch (for augmentation) and number of each sample.

        Returns:
            `dict[str, Any]`: `images`, uint8 of shape `(batch_size, channels, height, width)`, or `moments`; with
            labels, `labels`, int64 of shape `(batch_size,)`; with captions, `captions`, a `list[str]`; and, where
            images were found that cannot be read, `unreadable`, the reasons by row.
        """
        while True:
            try:
                batch = self._batch(self._readable(keys))
                break
            except UnreadableImageError as error:
                self._note(error)
        if self._untold:
            batch["unreadable"], self._untold = self._untold, {}
        return batch

    def _readable(self, keys: np.ndarray) -> np.ndarray:
        """The keys, with readable images in the place of those that are known not to be."""
        if not self._unreadable:
            return keys
        keys = keys.copy()
        for key in keys:
            epoch, index = key.tolist()
            rows = np.arange(len(self))
            if self.bucket_rows is not None and self._bucket_of is not None:
                rows = self.bucket_rows[self._bucket_of[index]]
            if all(row in self._unreadable for row in rows.tolist()):
                raise ValueError(f"None of the {len(rows)} images of one size can be read.")
            # The choice depends on which images can be read, not on when that was found out.
            attempt = 0
            while key[1] in self._unreadable:
                key[1] = rows[derive_seed(self._seed, "unreadable", epoch, index, attempt) % len(rows)]
                attempt += 1
        return keys

    def _note(self, error: UnreadableImageError) -> None:
        self._unreadable[error.index] = (error.row, error.reason)
        self._untold[error.row] = error.reason
        if len(self._unreadable) > self._max_unreadable:
            raise error

    def _batch(self, keys: np.ndarray) -> dict[str, Any]:
        indices = torch.from_numpy(keys[:, 1])
        mirrored = torch.zeros(len(keys), dtype=torch.bool)
        if self.transform.random_flip:
            mirrored = torch.from_numpy(row_uniforms(self._seed, "flip", keys) < 0.5)
        batch: dict[str, Any] = {}
        if self.read_moments is not None:
            numbers = zip(indices.tolist(), mirrored.tolist())
            batch["moments"] = torch.stack([self.read_moments(index, mirror) for index, mirror in numbers])
        else:
            images = self.pixels(keys)
            if mirrored.any():
                images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
            batch["images"] = images
        if self._labels is not None:
            batch["labels"] = self._labels[indices]
        if self.captions is not None:
            batch["captions"] = self.captions.draw(keys)
        return batch

    def groups(self, batch_size: int) -> list[np.ndarray]:
        """
        All samples in batches of one size each, the last of a size perhaps smaller.

        Args:
            batch_size (`int`):
                Samples at once.

        Returns:
            `list[np.ndarray]`: their numbers, int64.
        """
        buckets = [np.arange(len(self))] if self.bucket_rows is None else self.bucket_rows
        return [rows[start : start + batch_size] for rows in buckets for start in range(0, len(rows), batch_size)]

    def size(self, index: int) -> tuple[int, int]:
        """
        The size to which an image is brought.

        Args:
            index (`int`):
                Number of the sample.

        Returns:
            `tuple[int, int]`: height and width.
        """
        if self._bucket_of is None:
            return self.transform.resolution, self.transform.resolution
        return self.transform.buckets[self._bucket_of[index]]

    def pixels(self, keys: np.ndarray) -> torch.Tensor:
        """
        Images of one size, cropped and not mirrored.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch and number of each sample.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: uint8.
        """
        return self._crop(keys) if self._stack is None else self._stack[torch.from_numpy(keys[:, 1])]

    def file_key(self, index: int) -> str:
        """
        A name for the contents of an image's file.

        Args:
            index (`int`):
                Number of the sample.

        Returns:
            `str`: equal for equal contents.
        """

        def read(index: int) -> str:
            file = self.file(index)
            return content_key(file if isinstance(file, bytes) else Path(file).read_bytes())

        return self._read(index, read)

    def file(self, index: int) -> bytes | str:
        """
        The file of an image.

        Args:
            index (`int`):
                Number of the sample.

        Returns:
            `bytes` or `str`: its contents, or its path.
        """
        file = next(iter(self._files[int(self._rows[index])].values()))
        if file is None:
            raise ValueError("there is none")
        return file["path"] if file["bytes"] is None else file["bytes"]

    def _read(self, index: int, read: Callable[[int], Any]) -> Any:
        """Something of an image; where that fails, the error names its row."""
        try:
            return read(index)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            row = int(self._rows[index])
            message = f"The image in row {row} of the data set cannot be read: {error}."
            raise UnreadableImageError(message, index, row, str(error)) from error

    def _read_or_note(self, index: int, read: Callable[[int], Any]) -> Any:
        """The same, or `None` where that fails, which is noted."""
        try:
            return self._read(index, read)
        except UnreadableImageError as error:
            self._note(error)
            return None

    def _decode(self, index: int) -> np.ndarray:
        image = next(iter(self._images[int(self._rows[index])].values()))
        if image is None:
            raise ValueError("there is none")
        return to_pixels(image, self.size(index), self.transform.channels, self.transform.multiple)

    def _keep_in_memory(self, memory_budget: int) -> None:
        kept, used = [], 0
        for index in range(len(self)):
            pixels = self._read_or_note(index, self._decode)
            # No visit shows the black image: another takes its place.
            kept.append(np.zeros((self.transform.channels, *self.size(index)), np.uint8) if pixels is None else pixels)
            used += kept[-1].nbytes
            if used > memory_budget:
                return
        side = self.transform.resolution
        if all(pixels.shape[1:] == (side, side) for pixels in kept):
            self._stack = torch.from_numpy(np.stack(kept))
        else:
            self._kept = kept

    def _crop(self, keys: np.ndarray) -> torch.Tensor:
        if self.transform.center_crop:
            down = across = np.full(len(keys), 0.5)
        else:
            down, across = row_uniforms(self._seed, "down", keys), row_uniforms(self._seed, "across", keys)
        multiple = self.transform.multiple
        images = []
        for index, y, x in zip(keys[:, 1].tolist(), down, across):
            height, width = self.size(index)
            pixels = self._read(index, self._decode) if self._kept is None else self._kept[index]
            top = multiple * int(y * ((pixels.shape[1] - height) // multiple + 1))
            left = multiple * int(x * ((pixels.shape[2] - width) // multiple + 1))
            images.append(pixels[:, top : top + height, left : left + width])
        return torch.from_numpy(np.stack(images))


def _leave_signals_to_the_run(worker: int) -> None:
    """
    Ctrl-C and a scheduler's signal reach the workers, too; the run still needs them to finish its step. SIGTERM is how
    they are ended with the run.
    """
    for number in (signal.SIGINT, *([signal.SIGUSR1] if os.name == "posix" else [])):
        signal.signal(number, signal.SIG_IGN)


def make_loader(data: ImageData, sampler: Sampler[np.ndarray], num_workers: int = 0) -> DataLoader:
    """
    A loader of whole batches, which a sampler names.

    Args:
        data (`ImageData`):
            The images.
        sampler (`Sampler`):
            Gives the keys of each batch.
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode images.

    Returns:
        `DataLoader`: of dictionaries, as [`ImageData`] gives them.
    """
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_run,
    )
