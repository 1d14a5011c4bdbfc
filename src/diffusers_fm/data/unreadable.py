# SPDX-License-Identifier: Apache-2.0
"""Rows that cannot be read: named once each, counted over all processes, and limited in number."""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object


logger = logging.getLogger(__name__)


class UnreadableImageError(ValueError):
    """
    Error of a row whose image, label or caption cannot be read. A DataLoader's worker passes on the message alone.

    Args:
        message (`str`):
            The sentence.
        index (`int`, *optional*, defaults to -1):
            Number of the sample.
        row (`int` or `str`, *optional*, defaults to -1):
            Row of the data set.
        reason (`str`, *optional*, defaults to `""`):
            Why.
    """

    def __init__(self, message: str, index: int = -1, row: int | str = -1, reason: str = "") -> None:
        super().__init__(message)
        self.index, self.row, self.reason = index, row, reason

    @classmethod
    def of(cls, index: int, row: int | str, reason: str) -> "UnreadableImageError":
        """The error of a sample."""
        return cls(f"The image in row {row} of the data set cannot be read: {reason}.", index, row, reason)


@contextmanager
def reading(row: int | str, index: int = -1) -> Iterator[None]:
    """Turn any exception of reading a row (its image, EXIF, label or caption) into [`UnreadableImageError`]."""
    try:
        yield
    except UnreadableImageError:
        raise
    except Exception as error:
        # Decoders raise what they like: struct.error, TypeError, ZeroDivisionError, ImportError, ...
        raise UnreadableImageError.of(index, row, str(error).rstrip(".") or type(error).__name__) from error


class UnreadableImages:
    """
    Rows of a run that cannot be read.

    Args:
        limit (`int`):
            More of them than these are an error.
        rows (`Collection[int | str]`, *optional*):
            Those that were known when the run was interrupted: numbers, or names of rows of a stream.
    """

    def __init__(self, limit: int, rows: Collection[int | str] = ()) -> None:
        self.rows: set[Any] = set(rows)
        self._limit = limit

    def watch(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Take the `unreadable` rows out of batches, log and count them; a `ValueError` names them if too many."""
        for batch in batches:
            for row, reason in batch.pop("unreadable", {}).items():
                if row not in self.rows:
                    logger.error("The image in row %s cannot be read (%s); another takes its place.", row, reason)
                    self.rows.add(row)
            self._check()
            yield batch

    def gather(self, accelerator: Accelerator) -> int:
        """Count them over all processes. Every process calls it."""
        if accelerator.num_processes > 1:
            self.rows |= set(gather_object(sorted(self.rows)))
        self._check()
        return len(self.rows)

    def _check(self) -> None:
        if len(self.rows) > self._limit:
            named = ", ".join(map(str, sorted(self.rows)[:20])) + (", ..." if len(self.rows) > 20 else "")
            raise ValueError(
                f"{len(self.rows)} images cannot be read, and --max_unreadable_images is {self._limit}. Their rows are"
                f" {named}."
            )
