# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


# Tests run in two processes, and tiny models gain nothing from more threads.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_state_of_accelerate_is_left() -> Iterator[None]:
    """The next test of a process chooses its own precision and device."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator() -> Accelerator:
    """One process on the CPU."""
    return Accelerator(cpu=True)
