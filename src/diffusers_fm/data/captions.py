# SPDX-License-Identifier: Apache-2.0
"""Caption column: one of several captions for each visit of an image."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np

from .randomness import row_uniforms
from .unreadable import reading


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
            try:
                captions.append(choose_caption(value, number, int(self._rows[index])))
            except Exception:
                with reading(int(self._rows[index]), index):
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
