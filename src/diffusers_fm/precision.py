# SPDX-License-Identifier: Apache-2.0
"""Double precision on devices that have it: Apple's have none."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """
    Copy values to the CPU in float64.

    One call of `to` with the device and the dtype fails on Apple's devices, or copies nothing without a word.

    Args:
        x (`torch.Tensor`):
            Any shape, on any device.

    Returns:
        `torch.Tensor`: The values; `x` itself if that is how they are.
    """
    return x.cpu().to(torch.float64)


def widest_float(x: torch.Tensor) -> torch.dtype:
    """
    The widest floating-point dtype of a tensor's device.

    Args:
        x (`torch.Tensor`):
            Any tensor.

    Returns:
        `torch.dtype`: float64, on Apple's devices float32.
    """
    return torch.float32 if x.device.type == "mps" else torch.float64


def read_numbers(name: str, values: Sequence[float] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """
    Read a list of numbers that a user gave, in whatever form.

    Args:
        name (`str`):
            What the values are called.
        values (`Sequence[float]`, `np.ndarray` or `torch.Tensor` of shape `(n,)`):
            The values, on any device and in any order of memory.

    Returns:
        `torch.Tensor` of shape `(n,)`: The values on the CPU in float64.

    Raises:
        ValueError: If they are not a list of numbers.
    """
    if isinstance(values, torch.Tensor):
        tensor = to_float64(values)
    else:
        # Plain numbers must not pass through float32, torch's choice for them.
        array: Any = np.asarray([x.item() if isinstance(x, torch.Tensor) else x for x in values])
        if array.dtype.kind not in "iuf":
            raise ValueError(f"`{name}` must be a list of numbers, got {list(values)[:3]}.")
        tensor = torch.from_numpy(array.astype(np.float64))
    if tensor.ndim != 1:
        raise ValueError(f"`{name}` must be a list of numbers, got the shape {tuple(tensor.shape)}.")
    return tensor
