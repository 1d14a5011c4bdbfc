# SPDX-License-Identifier: Apache-2.0
"""Captions from any column: one of several for each visit of an image."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np

from .randomness import row_uniforms


READ_AT_ONCE = 1000


def caption_path(columns: Any, caption_column: str) -> tuple[str, ...]:
    """
    Where captions are.

    Args:
        columns (`datasets.Features`):
            The columns of a data set.
        caption_column (`str`):
            One of strings, or of lists of strings; or a field of a column of dictionaries, such as `json.caption`.

    Returns:
        `tuple[str, ...]`: the column, and the fields in it.

    Raises:
        ValueError: if there is no such column, or it holds no strings.
    """
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
    """
    The caption of one visit.

    Args:
        value (`str` or `list[str]`):
            What the column holds for the row: a caption, or several, of which one is chosen.
        number (`float`):
            In [0, 1); it chooses.
        row (`int` or `str`):
            Which row, for the error.

    Returns:
        `str`: the caption, which may be empty.

    Raises:
        ValueError: if there is none.
    """
    captions = [value] if isinstance(value, str) else value
    if not captions or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"Row {row} has no caption: the column holds {value!r} there.")
    return captions[int(number * len(captions))]


class CaptionColumn:
    """
    The captions of a data set, read when they are needed.

    Args:
        dataset (`datasets.Dataset`):
            The rows.
        caption_column (`str`):
            Column of strings, or of lists of strings; or a field of a column of dictionaries, such as `json.caption`.
        rows (`np.ndarray`):
            The rows that are used, by number.
        seed (`int`, *optional*, defaults to 0):
            Seed of the choice among several captions.

    Raises:
        ValueError: if there is no such column, or it holds no strings.
    """

    def __init__(self, dataset: datasets.Dataset, caption_column: str, rows: np.ndarray, seed: int = 0) -> None:
        path = caption_path(dataset.features, caption_column)
        if len(path) > 1:
            dataset = dataset.select_columns([path[0]]).flatten()
        self._values = dataset.select_columns([caption_column]).with_format(None)
        self._name = caption_column
        self._rows, self._seed = rows, seed

    def draw(self, keys: np.ndarray) -> list[str]:
        """
        Captions of a batch.

        Args:
            keys (`np.ndarray` of shape `(batch_size, 2)`):
                Epoch and number of each sample.

        Returns:
            `list[str]`: a caption for each.

        Raises:
            ValueError: if a row has none.
        """
        rows = self._rows[keys[:, 1]]
        values = self._values[rows.tolist()][self._name]
        numbers = row_uniforms(self._seed, "caption", keys)
        return [choose_caption(value, number, row) for value, number, row in zip(values, numbers, rows.tolist())]

    def distinct(self) -> Iterator[str]:
        """
        All captions of all rows, each once, in the order in which they first come.

        Yields:
            `str`: a caption.

        Raises:
            ValueError: if a row has none.
        """
        seen: set[str] = set()
        for start in range(0, len(self._rows), READ_AT_ONCE):
            rows = self._rows[start : start + READ_AT_ONCE].tolist()
            for row, value in zip(rows, self._values[rows][self._name]):
                choose_caption(value, 0.0, row)
                for caption in [value] if isinstance(value, str) else value:
                    if caption not in seen:
                        seen.add(caption)
                        yield caption


def drop_captions(captions: Sequence[str], dropped: Sequence[bool]) -> list[str]:
    """
    Some captions made empty, to learn what guidance starts from: [`~diffusers.StableDiffusion3Pipeline`] takes the
    encoded empty string for that.

    Args:
        captions (`Sequence[str]`):
            Captions of a batch.
        dropped (`Sequence[bool]`):
            Which of them to drop.

    Returns:
        `list[str]`: the captions.
    """
    return ["" if drop else caption for caption, drop in zip(captions, dropped)]
