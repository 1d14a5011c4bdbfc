# SPDX-License-Identifier: Apache-2.0
"""Results of long work on numbered items in files, shared by the processes of a run and kept when it ends early."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm.auto import tqdm

from ..files import bind_folder, written_aside


_FINGERPRINT = "fingerprint.json"

Work = Callable[[range], Mapping[str, np.ndarray]]


class ResultStore:
    """
    Folder of results. The items of a piece of work are cut into batches by their numbers, the processes take the
    batches in turn, and each result is one file, which appears whole or not at all. So

    - a run that was interrupted goes on where it was;
    - a batch holds the same items whatever the number of processes, and results are read in the order of the items:
      figures do not depend on how the work was shared.

    The folder must be one that all processes see.

    Args:
        folder (`Path`):
            Where the results are.
        accelerator (`accelerate.Accelerator`):
            Of the run.
        fingerprint (`dict[str, Any]`):
            Everything that the results depend on, in JSON types.

    Raises:
        ValueError: if the folder holds results of another fingerprint; the message names what differs.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, fingerprint: dict[str, Any]) -> None:
        self.folder, self._accelerator = folder, accelerator
        with accelerator.main_process_first():
            changed = bind_folder(folder, _FINGERPRINT, fingerprint)
        if changed:
            told = ", ".join(f"{name} was {held} and is {wanted}" for name, (held, wanted) in changed.items())
            raise ValueError(
                f"The folder {str(folder)!r} holds results of another evaluation ({told}): choose another"
                " --output_dir, or remove it."
            )

    def compute(self, name: str, count: int, batch_size: int, work: Work) -> None:
        """Do the `count` items that are not done; `work` gives arrays by name, a row for each item of a range."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        accelerator = self._accelerator
        batches = [range(first, min(first + batch_size, count)) for first in range(0, count, batch_size)]
        mine = list(enumerate(batches))[accelerator.process_index :: accelerator.num_processes]
        for number, items in tqdm(mine, desc=name, disable=not accelerator.is_main_process):
            file = self._file(name, number)
            if not file.is_file():
                results = work(items)
                with written_aside(file) as aside:
                    np.savez(aside, **results)
        accelerator.wait_for_everyone()

    def batch(self, name: str, array: str, number: int) -> np.ndarray:
        """Rows of an array in one batch of the results `name`."""
        with np.load(self._file(name, number)) as results:
            return results[array]

    def batches(self, name: str, array: str) -> Iterator[np.ndarray]:
        """Rows of an array of the results `name`, batch by batch, in the order of the items."""
        for file in sorted((self.folder / name).glob("[0-9]*.npz")):
            yield self.batch(name, array, int(file.stem))

    def read(self, name: str, array: str) -> np.ndarray:
        """All rows of [`batches`] in one array."""
        return np.concatenate(list(self.batches(name, array)))

    def _file(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:06d}.npz"
