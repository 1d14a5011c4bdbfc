# SPDX-License-Identifier: Apache-2.0
"""What processes of a run in shards do before anything else: accelerate shards on the CPU, and threads are told of."""

import atexit
import os
import sys
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
TASKS = Path("/proc/self/task")


def prepare() -> None:
    """Prepare this process, if a launcher started it for work with others."""
    if "RANK" not in os.environ:
        return
    if TASKS.is_dir():
        # Registered before anything else is, so that it is the last thing that a process does.
        atexit.register(tell_of_threads)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        shard_on_cpu()


def variables(folder: Path) -> dict[str, str]:
    """Those of a launcher whose processes prepare themselves by a module in the folder."""
    (folder / "sitecustomize.py").write_text("import engines\nengines.prepare()\n")
    found = {**os.environ, "OMP_NUM_THREADS": "1"}
    paths = [str(ROOT / "src"), str(ROOT / "tests"), str(folder)]
    return {**found, "PYTHONPATH": os.pathsep.join(paths)}


def check_threads(written: str) -> None:
    """Threads of a process group that outlive the interpreter abort one of two processes now and then."""
    threads = [line for line in written.splitlines() if line.startswith("Threads at exit:")]
    assert len(threads) == (2 if TASKS.is_dir() else 0)
    assert not any("gloo" in line for line in threads), threads


def tell_of_threads() -> None:
    """Write the names of the threads that are left."""
    names = [(task / "comm").read_text().strip() for task in TASKS.iterdir()]
    print("\nThreads at exit:", *names, file=sys.stderr)


def shard_on_cpu() -> None:
    """Where there is no GPU, accelerate runs DDP without a word; its state decides."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    former = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        former(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
