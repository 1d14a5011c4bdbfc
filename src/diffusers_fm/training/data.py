# SPDX-License-Identifier: Apache-2.0
"""Images and labels from any `datasets` data set, in an order and with augmentations that depend on the seed alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .randomness import epoch_order, make_generator, row_uniforms


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


def to_pixels(image: PIL.Image.Image, resolution: int, channels: int) -> np.ndarray:
    """
    An image's pixels, its shorter side resized to `resolution` (bicubic, antialiased) if it is not that already.

    Args:
        image (`PIL.Image.Image`):
            Any mode with 8 or 16 bits a channel.
        resolution (`int`):
            The wanted length of the shorter side.
        channels (`int`):
            1 for grey, 3 for RGB; images are converted.

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
    shorter = min(image.size)
    if shorter != resolution:
        width, height = (max(resolution, round(side * resolution / shorter)) for side in image.size)
        image = image.resize((width, height), PIL.Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass(frozen=True)
class ImageTransform:
    """
    What is done to each image: resize the shorter side, crop to a square, perhaps mirror.

    Args:
        resolution (`int`):
            Side of the square.
        channels (`int`):
            1 (grey) or 3 (RGB).
        center_crop (`bool`, *optional*, defaults to `False`):
            Crop at the centre; otherwise anywhere, anew at each visit.
        random_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the images, anew at each visit.
    """

    resolution: int
    channels: int
    center_crop: bool = False
    random_flip: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"Images have 1 or 3 channels, but the model takes {self.channels}.")


class ImageData(Dataset):
    """
    Images and labels by epoch and row, batch by batch.

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

    Raises:
        ValueError: if the data set is empty, columns are missing or of the wrong type, a label is missing or out of
            range, or an image cannot be read (with its row; at once if images are kept, else at its first visit).
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
    ) -> None:
        self._images = _image_rows(dataset, image_column)
        if len(dataset) == 0:
            raise ValueError("The data set is empty.")
        self._rows = np.arange(len(dataset))
        if max_samples is not None and max_samples < len(dataset):
            order = torch.randperm(len(dataset), generator=make_generator(seed, "max_samples")).numpy()
            self._rows = np.sort(order[:max_samples])
        self._labels = None
        if label_column is not None:
            self._labels = torch.from_numpy(read_labels(dataset, label_column, num_classes)[self._rows])
        self.transform = transform
        self._seed = seed
        self._kept: list[np.ndarray] | None = None
        self._stack: torch.Tensor | None = None
        # Images that are not square take more; that many are decoded at first only to see whether it fits.
        if len(self) * transform.channels * transform.resolution**2 <= memory_budget:
            self._keep_in_memory(memory_budget)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def in_memory(self) -> bool:
        """Whether all images are decoded and kept."""
        return self._kept is not None or self._stack is not None

    def __getitem__(self, keys: np.ndarray) -> dict[str, torch.Tensor]:
        """
        A batch.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch (for augmentation) and number of each sample.

        Returns:
            `dict[str, torch.Tensor]`: `images`, uint8 of shape `(batch_size, channels, resolution, resolution)`, and,
            with labels, `labels`, int64 of shape `(batch_size,)`.
        """
        indices = torch.from_numpy(keys[:, 1])
        if self._stack is not None:
            images = self._stack[indices]
        else:
            images = self._crop(keys)
        if self.transform.random_flip:
            flip = torch.from_numpy(row_uniforms(self._seed, "flip", keys) < 0.5)
            images = torch.where(flip[:, None, None, None], images.flip(-1), images)
        batch = {"images": images}
        if self._labels is not None:
            batch["labels"] = self._labels[indices]
        return batch

    def _decode(self, index: int) -> np.ndarray:
        row = int(self._rows[index])
        try:
            image = next(iter(self._images[row].values()))
            if image is None:
                raise ValueError("there is none")
            return to_pixels(image, self.transform.resolution, self.transform.channels)
        except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
            raise ValueError(f"The image in row {row} of the data set cannot be read: {error}.") from error

    def _keep_in_memory(self, memory_budget: int) -> None:
        kept, used = [], 0
        for index in range(len(self)):
            kept.append(self._decode(index))
            used += kept[-1].nbytes
            if used > memory_budget:
                return
        side = self.transform.resolution
        if all(pixels.shape[1:] == (side, side) for pixels in kept):
            self._stack = torch.from_numpy(np.stack(kept))
        else:
            self._kept = kept

    def _crop(self, keys: np.ndarray) -> torch.Tensor:
        side = self.transform.resolution
        if self.transform.center_crop:
            down = across = np.full(len(keys), 0.5)
        else:
            down, across = row_uniforms(self._seed, "down", keys), row_uniforms(self._seed, "across", keys)
        images = []
        for index, y, x in zip(keys[:, 1], down, across):
            pixels = self._decode(index) if self._kept is None else self._kept[index]
            top, left = int(y * (pixels.shape[1] - side + 1)), int(x * (pixels.shape[2] - side + 1))
            images.append(pixels[:, top : top + side, left : left + side])
        return torch.from_numpy(np.stack(images))


class StreamSampler(Sampler[np.ndarray]):
    """
    One process's share of an endless stream of samples: epoch after epoch, each in its own order, without gaps.

    Step `s` takes `total` samples of the stream; accumulation steps and processes take consecutive parts of them. Any
    step can be the first, at no cost.

    Args:
        num_rows (`int`):
            Rows of the data set.
        seed (`int`):
            Seed of the run.
        batch_size (`int`):
            Samples a process handles at once.
        accumulation_steps (`int`, *optional*, defaults to 1):
            Batches a process handles in a step.
        num_processes (`int`, *optional*, defaults to 1):
            Processes that share a step.
        process (`int`, *optional*, defaults to 0):
            Rank of this one.
        samples_seen (`int`, *optional*, defaults to 0):
            Where in the stream to begin.
        num_steps (`int`, *optional*, defaults to 1):
            Steps to serve.
    """

    def __init__(
        self,
        num_rows: int,
        seed: int,
        batch_size: int,
        accumulation_steps: int = 1,
        num_processes: int = 1,
        process: int = 0,
        samples_seen: int = 0,
        num_steps: int = 1,
    ) -> None:
        self.num_rows, self.seed, self.batch_size = num_rows, seed, batch_size
        self.num_processes, self.process = num_processes, process
        self.samples_seen = samples_seen
        self.num_batches = num_steps * accumulation_steps

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[np.ndarray]:
        orders: dict[int, np.ndarray] = {}
        for number in range(self.num_batches):
            start = self.samples_seen + (number * self.num_processes + self.process) * self.batch_size
            positions = np.arange(start, start + self.batch_size)
            epochs, places = positions // self.num_rows, positions % self.num_rows
            orders = {
                epoch: orders[epoch] if epoch in orders else epoch_order(self.seed, epoch, self.num_rows)
                for epoch in np.unique(epochs).tolist()
            }
            rows = np.array([orders[epoch][place] for epoch, place in zip(epochs.tolist(), places)])
            yield np.stack([epochs, rows], axis=1)


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
        data, batch_size=None, sampler=sampler, num_workers=num_workers, pin_memory=torch.cuda.is_available()
    )
