# SPDX-License-Identifier: Apache-2.0
"""Settings of all tests."""

import own_home as own_home


# isort: split
import functools
import gc
import multiprocessing
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_pipelines
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.utils._pytree import tree_map_only
from xdist.scheduler import LoadFileScheduling

from diffusers_fm.models.networks import NETWORKS
from diffusers_fm.paths import PATHS
from diffusers_fm.timesteps import DENSITIES
from diffusers_fm.training import metrics


ROOT = Path(__file__).parents[1]

# Tests run in two processes, and tiny models gain nothing from more threads.
torch.set_num_threads(1)


class Scheduling(LoadFileScheduling):
    """Whole files for a worker; all that start [`processes`] are for one of them, which alone starts their servers."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "processes" if _starts_processes(file) else file


@functools.cache
def _starts_processes(file: str) -> bool:
    """Whether a file of tests imports them."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.search(r"^(from|import) (processes|engines)\b", text, re.MULTILINE) is not None


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    return Scheduling(config, log)


def pytest_collection_finish() -> None:
    """Leave what was imported out of collections of garbage, which runs ask for: most objects are of modules."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_process_is_left() -> Iterator[None]:
    """Processes of tests that failed end with the tests: Python would wait for them."""
    yield
    for child in multiprocessing.active_children():
        child.kill()


@pytest.fixture(autouse=True, scope="session")
def operations_are_counted_once() -> Iterator[None]:
    """A run counts the operations of its network, which takes longer than a few steps: once for each of a form."""
    count, known = metrics.forward_flops, {}

    def forward_flops(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> int:
        def form(tensor: torch.Tensor) -> tuple[Any, ...]:
            return tensor.shape, tensor.dtype

        tensors = [(name, *form(tensor)) for name, tensor in model.state_dict(keep_vars=True).items()]
        key = repr((type(model), model, getattr(model, "config", None), model.training, tensors))
        key += repr(tree_map_only(torch.Tensor, form, (args, kwargs)))
        if key not in known:
            known[key] = count(model, args, kwargs)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "forward_flops", forward_flops)
        yield


@pytest.fixture(autouse=True)
def no_state_of_accelerate_is_left() -> Iterator[None]:
    """The next test of a process chooses its own precision and device."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def what_a_test_registers_goes_with_it() -> Iterator[None]:
    """The next test finds the built-in paths, densities and networks alone."""
    tables: list[dict[str, Any]] = [PATHS, DENSITIES, NETWORKS]
    before = [table.copy() for table in tables]
    yield
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.fixture(scope="module")
def networks_of_one_level() -> Iterator[None]:
    """Tiny UNets have one level, and take half as long: for tests of many steps, whatever the network is."""
    one: dict[str, Any] = {"block_out_channels": (8,)}
    one |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_pipelines, "tiny_unet", functools.partial(tiny_pipelines.tiny_unet, **one))
        yield


@pytest.fixture
def accelerator() -> Accelerator:
    """One process on the CPU."""
    return Accelerator(cpu=True)
