# SPDX-License-Identifier: Apache-2.0
"""Images, labels and captions from any `datasets` data set, with augmentations that depend on the seed alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from .buckets import assign_buckets
from .cache import content_key
from .captions import CaptionColumn
from .randomness import derive_seed, make_generator
from .sources import image_rows, read_labels
from .transforms import ImageTransform, image_size, to_pixels
from .unreadable import UnreadableImageError, reading


# Decoded images are kept in memory, in every process, if all of them together take no more than this.
MEMORY_BUDGET = 512 * 2**20


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
        self._unreadable: dict[int, tuple[int | str, str]] = {}
        self._untold: dict[int | str, str] = {}
        self._images = image_rows(dataset, image_column)
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
    def num_samples(self) -> int:
        """How many there are."""
        return len(self)

    @property
    def description(self) -> str:
        """What there is of it, for the log."""
        kept = "in memory" if self.in_memory else "decoded on the way"
        return f"{len(self)} images ({'latents cached' if self.read_moments is not None else kept})"

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all samples, `(num_samples,)`, or `None` without a label column."""
        return None if self._labels is None else self._labels.numpy()

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded and kept."""
        return self._kept is not None or self._stack is not None

    @property
    def unreadable(self) -> dict[int, tuple[int | str, str]]:
        """Rows, and why, of the samples, by number, of which it is known that they cannot be read."""
        return dict(self._unreadable)

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
                self.note_unreadable(error)
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

    def note_unreadable(self, error: UnreadableImageError) -> None:
        """
        Remember that an image cannot be read: others take its place.

        Args:
            error ([`UnreadableImageError`]):
                Which, and why.

        Raises:
            UnreadableImageError: if there are too many of them.
        """
        self._unreadable[error.index] = (error.row, error.reason)
        self._untold[error.row] = error.reason
        if len(self._unreadable) > self._max_unreadable:
            raise error

    def _batch(self, keys: np.ndarray) -> dict[str, Any]:
        indices = torch.from_numpy(keys[:, 1])
        mirrored = torch.from_numpy(self.transform.mirrored(self._seed, keys))
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
        with reading(int(self._rows[index]), index):
            return read(index)

    def _read_or_note(self, index: int, read: Callable[[int], Any]) -> Any:
        """The same, or `None` where that fails, which is noted."""
        try:
            return self._read(index, read)
        except UnreadableImageError as error:
            self.note_unreadable(error)
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
        images = []
        for index, place in zip(keys[:, 1].tolist(), self.transform.places(self._seed, keys)):
            pixels = self._read(index, self._decode) if self._kept is None else self._kept[index]
            images.append(self.transform.crop(pixels, self.size(index), place))
        return torch.from_numpy(np.stack(images))
