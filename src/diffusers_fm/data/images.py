# SPDX-License-Identifier: Apache-2.0
"""Map-style dataset of images, labels and captions, with augmentations that depend on the seed alone."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .buckets import assign_buckets
from .cache import content_key
from .clips import file_key
from .conditions import ConditionImages
from .decoded import MEMORY_BUDGET, column_key, read_once, read_pixels, read_sizes, unpack
from .randomness import derive_seed, make_generator, row_uniforms
from .sources import check_label, image_files, read_labels
from .transforms import ImageTransform, image_file
from .unreadable import UnreadableImageError, reading


T = TypeVar("T")


# Samples, evenly spread, whose files and captions are in a data set's fingerprint.
FINGERPRINT_ROWS = 4096
# Rows of captions that are read together.
READ_AT_ONCE = 1000


def caption_path(columns: Any, caption_column: str) -> tuple[str, ...]:
    """Column and fields of the captions, such as `json.caption`; refuses what holds no strings or lists of them."""
    path = (caption_column,) if caption_column in columns else tuple(caption_column.split("."))
    feature = columns
    for name in path:
        if not isinstance(feature, dict) or name not in feature:
            raise ValueError(
                f"There is no caption column {caption_column!r}; the columns are {list(columns)}. Name one with"
                " --caption_column; captions of a folder of images are in its metadata.jsonl."
            )
        feature = feature[name]
    inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    if not isinstance(inner, datasets.Value) or inner.dtype not in ("string", "large_string"):
        raise ValueError(
            f"The caption column {caption_column!r} must hold strings or lists of strings, got {feature};"
            f" the columns are {list(columns)}."
        )
    return path


def choose_caption(value: Any, number: float, row: int | str) -> str:
    """The caption, or the one of several that a number in [0, 1) chooses; `row` names it in the error."""
    captions = [value] if isinstance(value, str) else value
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"Row {row} has no caption: the column holds {value!r} there.")
    return captions[int(number * len(captions))]


class CaptionColumn:
    """
    Captions of the used rows of a data set, read on demand.

    Args:
        dataset (`datasets.Dataset`):
            The data set.
        caption_column (`str`):
            Column of strings, or of lists of strings; or a field of a column of dictionaries, such as `json.caption`.
        rows (`np.ndarray`):
            Numbers of the used rows.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice among several captions.
        max_missing (`int`, *optional*, defaults to 0):
            Rows that may be without a caption where all captions are collected.

    Raises:
        ValueError: if there is no such column, or it holds no strings.
    """

    def __init__(
        self, dataset: datasets.Dataset, caption_column: str, rows: np.ndarray, seed: int = 0, max_missing: int = 0
    ) -> None:
        path = caption_path(dataset.features, caption_column)
        if len(path) > 1:
            dataset = dataset.select_columns([path[0]]).flatten()
        self._values = dataset.select_columns([caption_column]).with_format(None)
        self._name = caption_column
        self._rows, self._seed, self._max_missing = rows, seed, max_missing

    def values(self, indices: np.ndarray) -> list[Any]:
        """Cells of the column, by numbers of samples."""
        return self._values[self._rows[indices].tolist()][self._name]

    def draw(self, keys: np.ndarray) -> list[str]:
        """A caption for each visit, `(epoch, sample)`; an [`UnreadableImageError`] names the row that has none."""
        captions, numbers = [], row_uniforms(self._seed, "caption", keys)
        for value, number, index in zip(self.values(keys[:, 1]), numbers, keys[:, 1].tolist()):
            row = int(self._rows[index])
            try:
                captions.append(choose_caption(value, number, row))
            except Exception:
                # Only now: no step enters the helper while all captions can be read.
                with reading(row, index):
                    raise
        return captions

    def distinct(self) -> Iterator[str]:
        """All captions, each once, in the order of the rows; a `ValueError` if too many rows have none."""
        seen: set[str] = set()
        missing = 0
        for start in range(0, len(self._rows), READ_AT_ONCE):
            indices = np.arange(start, min(start + READ_AT_ONCE, len(self._rows)))
            for row, value in zip(self._rows[indices].tolist(), self.values(indices)):
                try:
                    choose_caption(value, 0.0, row)
                except ValueError:
                    missing += 1
                    if missing > self._max_missing:
                        raise
                    continue
                for caption in [value] if isinstance(value, str) else value:
                    if caption not in seen:
                        seen.add(caption)
                        yield caption


def drop_captions(captions: Sequence[str], dropped: Sequence[bool]) -> list[str]:
    """Captions of a batch, the dropped ones empty: Stable Diffusion 3 takes the empty prompt for guidance."""
    return ["" if drop else caption for caption, drop in zip(captions, dropped)]


class ImageData(Dataset):
    """
    Images, labels and captions by epoch and row, batch by batch.

    Images are decoded and resized beforehand if all of them fit `MEMORY_BUDGET`; otherwise they are decoded at each
    visit, best in several loader workers.

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
            So many rows may be unreadable: without an image that can be decoded, a label or a caption. At each visit
            another one, chosen at random by epoch and row and of the same size, takes its place.
        folder (`Path`, *optional*):
            Folder in which decoded images are kept for other processes and later runs, read by memory map; without it
            each process decodes its own.
        condition_columns (`Mapping[str, str]`, *optional*):
            Names of arguments and of the columns of their images, see [`ConditionImages`].

    Attributes:
        captions ([`CaptionColumn`], *optional*):
            The captions.
        bucket_rows (`list[np.ndarray]`, *optional*):
            Numbers of the samples in each bucket, if the transform has buckets. A batch must be of one bucket.
        read_moments (`Callable`, *optional*):
            If set, batches hold `moments` in place of `images`: `read_moments(number, mirrored)` gives the
            autoencoder's posterior of an image.
        read_features (`Callable`, *optional*):
            If set, batches hold `features` too: `read_features(number, mirrored)` gives those of an image.

    Raises:
        ValueError: if the data set is empty, columns are missing or of the wrong type, a label is out of range, or too
            many rows cannot be read (named; at once if images are kept or there are buckets, else at the first visit).
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
        folder: Path | None = None,
        condition_columns: Mapping[str, str] | None = None,
    ) -> None:
        self._max_unreadable = max_unreadable
        self._unreadable: dict[int, tuple[int | str, str]] = {}
        self._unreported: dict[int | str, str] = {}
        self._files = image_files(dataset, image_column)
        if len(dataset) == 0:
            raise ValueError("The data set is empty.")
        self._rows = np.arange(len(dataset))
        if max_samples is not None and max_samples < len(dataset):
            order = torch.randperm(len(dataset), generator=make_generator(seed, "max_samples")).numpy()
            self._rows = np.sort(order[:max_samples])
        self.transform, self._seed = transform, seed
        self._labels = None
        if label_column is not None:
            labels = read_labels(dataset, label_column, num_classes)[self._rows]
            self._labels = torch.from_numpy(labels)
            for index in np.flatnonzero(labels == -1).tolist():
                self.read_or_note(index, lambda index: check_label(None, int(self._rows[index]), label_column, 0))
        self.captions = None
        if caption_column is not None:
            self.captions = CaptionColumn(dataset, caption_column, self._rows, seed, max_unreadable)
        self._conditions = None
        if condition_columns:
            self._conditions = ConditionImages(dataset, condition_columns, image_column, self._rows, transform)
        self.read_moments: Callable[[int, bool], torch.Tensor] | None = None
        self.read_features: Callable[[int, bool], torch.Tensor] | None = None
        self.bucket_rows: list[np.ndarray] | None = None
        self._bucket_of = None
        self._kept: list[np.ndarray] | None = None
        self._stack: torch.Tensor | None = None
        # Images that are not square take more; decoding stops where it no longer fits.
        fits = len(self) * transform.least_bytes <= memory_budget
        is_kept = folder is not None and (fits or bool(transform.buckets))
        key = column_key(self._files, self._rows, transform.folders) if is_kept else None
        if transform.buckets:
            sizes_key = key and content_key("sizes", key, transform.resolution)
            sizes, bad = read_once(folder, sizes_key, lambda: read_sizes(self._files, self._rows, transform))
            self._note_all(bad)
            self._bucket_of = assign_buckets(sizes.numpy(), transform.buckets)
            self.bucket_rows = [np.flatnonzero(self._bucket_of == bucket) for bucket in range(len(transform.buckets))]
        if fits:
            self._keep(folder, key, memory_budget)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return len(self)

    @property
    def description(self) -> str:
        """Number and whereabouts of the images, for the log."""
        kept = "in memory" if self.in_memory else "decoded on the way"
        return f"{len(self)} images ({'latents cached' if self.read_moments is not None else kept})"

    def fingerprint(self) -> dict[str, Any]:
        """Facts that identify the data of a resumed run; of files and captions those of `FINGERPRINT_ROWS` samples."""
        rows = np.unique(np.linspace(0, len(self) - 1, FINGERPRINT_ROWS).astype(np.int64))
        facts: dict[str, Any] = {"samples": len(self)}
        if self._labels is not None:
            facts["labels"] = content_key(self._labels.numpy().tobytes())
        if self.captions is not None:
            facts["captions"] = content_key(*map(str, self.captions.values(rows)))
        if self._conditions is not None:
            facts["conditions"] = self._conditions.fingerprint(rows)
        keys = []
        for index in rows.tolist():
            try:
                keys.append(self.file_key(index))
            except (ValueError, OSError):
                # Unreadable then and now.
                keys.append("")
        return {**facts, "images": content_key(*keys)}

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all samples, `(num_samples,)`, or `None` without a label column."""
        return None if self._labels is None else self._labels.numpy()

    @property
    def in_memory(self) -> bool:
        """True if all images are decoded beforehand."""
        return self._kept is not None or self._stack is not None

    @property
    def unreadable(self) -> dict[int, tuple[int | str, str]]:
        """Row and reason of each sample, by number, that is known to be unreadable."""
        return dict(self._unreadable)

    def __getitem__(self, keys: np.ndarray) -> dict[str, Any]:
        """
        A batch.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch (for augmentation) and number of each sample.

        Returns:
            `dict[str, Any]`: `images`, uint8 of shape `(batch_size, channels, height, width)` or what the transform's
            `as_batch` makes of them, or `moments`; with labels, `labels`, int64 of shape `(batch_size,)`; with
            captions, `captions`, a `list[str]`; with further columns of images, `conditions`, uint8 by the names of
            their arguments; and, where rows were found that cannot be read, `unreadable`, the reasons by row.
        """
        while True:
            try:
                batch = self._batch(self._readable(keys))
                break
            except UnreadableImageError as error:
                self.note_unreadable(error)
        if self._unreported:
            batch["unreadable"], self._unreported = self._unreported, {}
        return batch

    def _readable(self, keys: np.ndarray) -> np.ndarray:
        """The keys, with readable samples in the place of unreadable ones."""
        if not self._unreadable:
            return keys
        keys = keys.copy()
        for key in keys:
            epoch, index = key.tolist()
            groups = [np.arange(len(self))]
            if self.bucket_rows is not None and self._bucket_of is not None:
                # A batch of a bucket in which nothing can be read is one of the largest that has something.
                groups = [self.bucket_rows[self._bucket_of[index]], *sorted(self.bucket_rows, key=len, reverse=True)]
            readable = (rows for rows in groups if any(row not in self._unreadable for row in rows.tolist()))
            rows = next(readable, None)
            if rows is None:
                raise ValueError(f"None of the {len(self)} images can be read.")
            # The choice depends on which images can be read, not on when that was found out.
            attempt = 0
            while key[1] in self._unreadable:
                key[1] = rows[derive_seed(self._seed, "unreadable", epoch, index, attempt) % len(rows)]
                attempt += 1
        return keys

    def note_unreadable(self, error: UnreadableImageError) -> None:
        """Have others take the place of an unreadable sample; raises the error if there are too many."""
        self._unreadable[error.index] = (error.row, error.reason)
        self._unreported[error.row] = error.reason
        if len(self._unreadable) > self._max_unreadable:
            raise error

    def read_or_note(self, index: int, read: Callable[[int], T]) -> T | None:
        """Something of a sample, or `None` where it cannot be read: then others take its place."""
        try:
            with reading(int(self._rows[index]), index):
                return read(index)
        except UnreadableImageError as error:
            self.note_unreadable(error)
            return None

    def _note_all(self, packed: torch.Tensor) -> None:
        for index, reason in unpack(packed).items():
            self.note_unreadable(UnreadableImageError.of(index, int(self._rows[index]), reason))

    def _keep(self, folder: Path | None, key: str | None, memory_budget: int) -> None:
        """Decode all images, once for all processes and runs that share a folder, if they fit the budget."""
        transform, sizes = self.transform, [self.size(index) for index in range(len(self))]
        settings = (*map(str, (*transform.settings, sizes)), memory_budget)
        pixels_key = key and content_key("pixels", key, *settings)
        pixels, shapes, bad = read_once(
            folder, pixels_key, lambda: read_pixels(self._files, self._rows, transform, sizes, memory_budget)
        )
        self._note_all(bad)
        if not len(pixels):
            return
        if (shapes == torch.tensor(transform.size)).all():
            self._stack = pixels.view(len(self), transform.channels, *shapes[0].tolist())
            return
        parts = pixels.split((transform.channels * shapes.prod(1)).tolist())
        self._kept = [part.view(-1, *shape).numpy() for part, shape in zip(parts, shapes.tolist())]

    def _batch(self, keys: np.ndarray) -> dict[str, Any]:
        indices = torch.from_numpy(keys[:, 1])
        mirrored = torch.zeros(len(keys), dtype=torch.bool)
        if self.transform.random_flip:
            mirrored = torch.from_numpy(self.transform.mirrored(self._seed, keys))
        batch: dict[str, Any] = {}
        for name, read in (("moments", self.read_moments), ("features", self.read_features)):
            if read is not None:
                numbers = zip(indices.tolist(), mirrored.tolist())
                batch[name] = torch.stack([read(index, mirror) for index, mirror in numbers])
        images = None
        if self.read_moments is None or (self._conditions is not None and self._conditions.needs_image):
            images = self.pixels(keys)
        if self._conditions is not None:
            size, places = self.size(int(keys[0, 1])), self.transform.places(self._seed, keys)
            read = self._conditions.read(keys, images, size, places)
            batch["conditions"] = {name: _mirror(each, mirrored) for name, each in read.items()}
        if self.read_moments is None and images is not None:
            images = _mirror(images, mirrored)
            batch["images"] = images if self.transform.is_image else self.transform.as_batch(images)
        if self._labels is not None:
            batch["labels"] = self._labels[indices]
        if self.captions is not None:
            batch["captions"] = self.captions.draw(keys)
        return batch

    def groups(self, batch_size: int) -> list[np.ndarray]:
        """Numbers of all samples, int64, in batches of one size each, the last of a size perhaps smaller."""
        buckets = [np.arange(len(self))] if self.bucket_rows is None else self.bucket_rows
        return [rows[start : start + batch_size] for rows in buckets for start in range(0, len(rows), batch_size)]

    def spread_batches(self, num_samples: int, batch_size: int) -> Iterator[dict[str, Any]]:
        """Batches of at most so many samples, evenly spread over all of them; each batch is of one size."""
        rows = np.unique(np.linspace(0, len(self) - 1, num_samples).astype(np.int64)).tolist()
        for _, group in itertools.groupby(sorted(rows, key=self.size), self.size):
            same = np.array(list(group))
            for numbers in np.split(same, range(batch_size, len(same), batch_size)):
                batch = self[np.stack([np.zeros_like(numbers), numbers], axis=1)]
                # The run is to hear of them.
                self._unreported |= batch.pop("unreadable", {})
                yield batch

    def size(self, index: int) -> tuple[int, int]:
        """Height and width to which an image is brought."""
        if self._bucket_of is None:
            return self.transform.size
        return self.transform.buckets[self._bucket_of[index]]

    def pixels(self, keys: np.ndarray) -> torch.Tensor:
        """Images of one size, uint8 of shape `(batch_size, channels, height, width)`, cropped and not mirrored."""
        if self._stack is not None:
            return self._stack[torch.from_numpy(keys[:, 1])]
        images = []
        for index, place in zip(keys[:, 1].tolist(), self.transform.places(self._seed, keys)):
            pixels = self._decode(index) if self._kept is None else self._kept[index]
            images.append(self.transform.crop(pixels, self.size(index), place))
        return torch.from_numpy(np.stack(images))

    def file(self, index: int) -> bytes | str:
        """Contents or path of an image's file."""
        return image_file(self._cell(index), self.transform.folders)

    def file_key(self, index: int) -> str:
        """Digest of the contents of an image's file."""
        return file_key(self.file(index))

    def _cell(self, index: int) -> dict[str, Any] | None:
        return next(iter(self._files[int(self._rows[index])].values()))

    def _decode(self, index: int) -> np.ndarray:
        with reading(int(self._rows[index]), index):
            return self.transform.decode(self._cell(index), self.size(index))


def _mirror(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Some of the images mirrored."""
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images) if mirrored.any() else images
