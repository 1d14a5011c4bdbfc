# SPDX-License-Identifier: Apache-2.0
"""Error of a row that cannot be read."""

from collections.abc import Iterator
from contextlib import contextmanager


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
