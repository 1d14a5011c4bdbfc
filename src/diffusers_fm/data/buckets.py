# SPDX-License-Identifier: Apache-2.0
"""Aspect-ratio buckets: a few sizes for images of any shape."""

from collections.abc import Sequence

import numpy as np
from diffusers.training_utils import parse_buckets_string


def make_buckets(resolution: int, multiple: int, max_aspect_ratio: float = 2.0) -> list[tuple[int, int]]:
    """
    Sizes of about the area of a square, from upright to lying.

    For each width that is a multiple of `multiple`, the height is the largest multiple that keeps the area within the
    square's: no size costs more than the square, which diffusers' `generate_aspect_ratio_buckets` does not promise.

    Args:
        resolution (`int`):
            Side of the square, a multiple of `multiple`. The square itself is one of the sizes.
        multiple (`int`):
            All sides are multiples of it.
        max_aspect_ratio (`float`, *optional*, defaults to 2.0):
            Longer to shorter side at most.

    Returns:
        `list[tuple[int, int]]`: heights and widths, by falling height.

    Raises:
        ValueError: if `resolution` is no multiple of `multiple`, or the ratio is below 1.
    """
    if resolution % multiple:
        raise ValueError(f"The resolution must be a multiple of {multiple} for buckets, got {resolution}.")
    if not max_aspect_ratio >= 1:
        raise ValueError(f"The largest aspect ratio must be at least 1, got {max_aspect_ratio}.")
    sizes = set()
    for shorter in range(multiple, resolution + 1, multiple):
        longer = resolution**2 // shorter // multiple * multiple
        if longer <= max_aspect_ratio * shorter:
            sizes |= {(longer, shorter), (shorter, longer)}
    return sorted(sizes, key=lambda size: (-size[0], size[1]))


def parse_buckets(text: str) -> list[tuple[int, int]]:
    """Heights and widths from the command line, such as `"1024,1024;832,1216"`."""
    try:
        return parse_buckets_string(text)
    except ValueError as error:
        raise ValueError(f'Buckets must read like "1024,1024;832,1216" (height,width;...), got {text!r}.') from error


def assign_buckets(sizes: np.ndarray, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """
    Bucket of each image: the nearest aspect ratio, by its logarithm, and of equal ones the nearest in area. (In the
    cross products of diffusers' `find_nearest_bucket` larger buckets seem farther.)

    Args:
        sizes (`np.ndarray` of shape `(num_images, 2)`):
            Heights and widths of the images.
        buckets (`Sequence[tuple[int, int]]`):
            Heights and widths of the buckets.

    Returns:
        `np.ndarray` of shape `(num_images,)`: numbers of buckets, int64.
    """
    log_sizes, log_buckets = np.log(np.asarray(sizes, dtype=float)), np.log(np.asarray(buckets, dtype=float))
    # Rounded, so that equal aspect ratios are told apart by area and not by the last bit.
    distance = np.abs(np.subtract.outer(log_sizes @ [1, -1], log_buckets @ [1, -1])).round(9)
    distance_in_area = np.abs(np.subtract.outer(log_sizes.sum(1), log_buckets.sum(1)))
    return np.lexsort((distance_in_area, distance), axis=1)[:, 0]
