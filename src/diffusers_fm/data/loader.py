# SPDX-License-Identifier: Apache-2.0
"""Batches, made by processes beside the run's own."""

import os
import signal
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def _leave_signals_to_the_run(worker: int) -> None:
    """
    Ctrl-C and a scheduler's signal reach the workers, too; the run still needs them to finish its step. SIGTERM is how
    they are ended with the run.
    """
    for number in (signal.SIGINT, *([signal.SIGUSR1] if os.name == "posix" else [])):
        signal.signal(number, signal.SIG_IGN)


def make_loader(
    data: Dataset, sampler: Sampler[np.ndarray] | None = None, num_workers: int = 0
) -> Iterable[dict[str, Any]]:
    """
    A loader of whole batches.

    Args:
        data (`Dataset`):
            An [`ImageData`], or what gives batches of itself, such as [`StreamBatches`].
        sampler (`Sampler`, *optional*):
            Gives the keys of each batch of an [`ImageData`].
        num_workers (`int`, *optional*, defaults to 0):
            Processes that decode images.

    Returns:
        `Iterable[dict[str, Any]]`: batches, as [`ImageData`] gives them.
    """
    if num_workers == 0 and sampler is not None and not torch.cuda.is_available():
        # Without workers, and with no memory to pin, a `DataLoader` adds nothing but its time.
        return map(data.__getitem__, sampler)
    return DataLoader(
        data,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_run,
    )
