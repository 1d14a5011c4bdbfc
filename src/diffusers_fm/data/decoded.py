# SPDX-License-Identifier: Apache-2.0
"""Sizes and pixels of all images, read by threads and kept on disk: done once, not at each start of each process."""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow.compute as pc
import torch
from tqdm.auto import tqdm

from .cache import TensorCache, content_key
from .clips import frame_files
from .transforms import ImageTransform
from .unreadable import UnreadableImageError, reading


logger = logging.getLogger(__name__)

# Images are decoded beforehand if all of them together take no more bytes than this.
MEMORY_BUDGET = 512 * 2**20

READ_AT_ONCE = 64


def column_key(files: datasets.Dataset, rows: np.ndarray, folders: Sequence[Path] | None = None) -> str | None:
    """
    Digest of an undecoded image column: of its Arrow files or contents, and of paths, sizes and times of the image
    files that it names, in the folders in which they may be; `None` where these are on the network. What can be read
    depends on Pillow.
    """
    # A folder that is prepared anew keeps its fingerprint; its files do not keep their times.
    prepared = [f"{file['filename']} {os.stat(file['filename']).st_mtime_ns}" for file in files.cache_files]
    parts: list[bytes | str] = [files._fingerprint, *prepared, rows.tobytes(), PIL.__version__]
    parts += map(str, folders or ())
    column = files.column_names[0]
    batches: Any = files.with_format("arrow").iter(10_000)
    for batch in batches:
        cells = batch[column].combine_chunks()
        for path in pc.filter(cells.field("path"), pc.is_null(cells.field("bytes"))).drop_null().to_pylist():
            if folders is not None and "://" not in path:
                path = os.path.join(folders[0], path)
            try:
                for file in [path, *(frame_files(path) if os.path.isdir(path) else ())]:
                    state = os.stat(file)
                    parts.append(f"{file} {state.st_size} {state.st_mtime_ns}")
            except OSError:
                if "://" in path:
                    return None
                parts.append(path)
    return content_key(*parts)


def read_once(folder: Path | None, key: str | None, read: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Tensors by key from a [`TensorCache`], or computed and added to it; without folder or key computed alone."""
    if folder is None or key is None:
        return read()
    tensors = None
    try:
        # One folder for each key: a cache reads the index of every shard beside its own.
        cache = TensorCache(folder / key, {"what": "decoded images"})
        if key not in cache:
            tensors = read()
            with cache.writer() as writer:
                writer.add([key], [tensors])
            cache.refresh()
        return cache.read(key)
    except OSError as error:
        logger.warning("Images that are decoded cannot be kept in %r for the next run: %s.", str(folder), error)
        return read() if tensors is None else tensors


def read_sizes(files: datasets.Dataset, rows: np.ndarray, transform: ImageTransform) -> list[torch.Tensor]:
    """Heights and widths of images, int64 of shape `(num_images, 2)`, and the unreadable ones."""
    sizes = np.full((len(rows), 2), transform.resolution)
    unreadable = {}
    read = lambda number, cell: transform.size_of(cell)  # noqa: E731
    for number, size in enumerate(_read_all(files, rows, read, "Reading sizes")):
        if isinstance(size, UnreadableImageError):
            unreadable[number] = size.reason
        else:
            sizes[number] = size
    return [torch.from_numpy(sizes), _pack(unreadable)]


def read_pixels(
    files: datasets.Dataset,
    rows: np.ndarray,
    transform: ImageTransform,
    sizes: Sequence[tuple[int, int]],
    memory_budget: int,
) -> list[torch.Tensor]:
    """
    Pixels of all images, uint8, or samples of sounds, float32, one after another, none if they take more than the
    budget; heights and widths, int64 of shape `(num_images, 2)`; and the unreadable ones, which are black.
    """
    images, used = [], 0
    unreadable = {}
    read = lambda number, cell: transform.decode(cell, sizes[number])  # noqa: E731
    for number, pixels in enumerate(_read_all(files, rows, read, "Decoding images")):
        if isinstance(pixels, UnreadableImageError):
            unreadable[number] = pixels.reason
            pixels = np.zeros((transform.channels, *sizes[number]), np.uint8)
        images.append(pixels)
        used += pixels.nbytes
        if used > memory_budget:
            return [torch.empty(0, dtype=torch.uint8), torch.empty(0, 2, dtype=torch.int64), _pack({})]
    shapes = torch.tensor([image.shape[1:] for image in images])
    return [torch.from_numpy(np.concatenate([image.ravel() for image in images])), shapes, _pack(unreadable)]


def unpack(unreadable: torch.Tensor) -> dict[int, str]:
    """Reasons of unreadable images by number."""
    return {int(number): reason for number, reason in json.loads(unreadable.numpy().tobytes()).items()}


def _pack(unreadable: dict[int, str]) -> torch.Tensor:
    return torch.frombuffer(bytearray(json.dumps(unreadable).encode()), dtype=torch.uint8)


def _read_all(
    files: datasets.Dataset, rows: np.ndarray, read: Callable[[int, Any], Any], description: str
) -> Iterator[Any]:
    """Map `read(number, cell)` over all images by threads, in order; errors are [`UnreadableImageError`] results."""

    def try_some(start: int) -> list[Any]:
        found = []
        numbers = range(start, min(start + READ_AT_ONCE, len(rows)))
        for number, cell in zip(numbers, files[rows[numbers.start : numbers.stop].tolist()][column]):
            try:
                with reading(int(rows[number]), number):
                    found.append(read(number, cell))
            except UnreadableImageError as error:
                found.append(error)
        return found

    column = files.column_names[0]
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(rows), desc=description, delay=2) as bar:
        waiting: deque[Future[list[Any]]] = deque()
        starts = iter(range(0, len(rows), READ_AT_ONCE))
        while True:
            # Some are read ahead, not all: what does not fit into memory stops them.
            waiting.extend(pool.submit(try_some, start) for start in islice(starts, 32 - len(waiting)))
            if not waiting:
                return
            found = waiting.popleft().result()
            yield from found
            bar.update(len(found))
