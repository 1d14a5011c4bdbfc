# SPDX-License-Identifier: Apache-2.0
"""Processes of scripts, forked by a server that has imported what they need: imports take most of a short run."""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from unittest import mock

import torch


TIMEOUT = 300


@dataclass(frozen=True)
class Ended:
    """Exit code of a process, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


@functools.cache
def server() -> ForkServerContext:
    """Server of this process, which forks others."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_runs", "tiny_text_to_image"])
    found = os.pathsep.join(path for path in sys.path if path)
    with mock.patch.dict(os.environ, {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}):
        multiprocessing.forkserver.ensure_running()
    return context


def run_processes(file: Path, line: Sequence[object], num_processes: int = 1) -> list[Ended]:
    """Run a script, in processes that work together as those of `accelerate launch` do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(num_processes)]
        processes = []
        for rank, place in enumerate(places):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
            place.mkdir()
            words = [str(file), *map(str, line)]
            arguments = (words, variables if num_processes > 1 else {}, place)
            processes.append(server().Process(target=_run, args=arguments))
        end = time.monotonic() + TIMEOUT
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes) and time.monotonic() < end:
                # One that failed leaves the others waiting for it.
                if any(process.exitcode for process in processes):
                    end = min(end, time.monotonic() + 30)
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, (place / "stdout").read_text(), (place / "stderr").read_text())
            for process, place in zip(processes, places)
        ]


def check_processes(file: Path, line: Sequence[object], num_processes: int = 1) -> list[Ended]:
    """Run a script as [`run_processes`], in which no process may fail."""
    ended = run_processes(file, line, num_processes)
    assert [process.returncode for process in ended] == [0] * num_processes, ended[-1].stderr[-4000:]
    return ended


def _run(words: list[str], variables: dict[str, str], place: Path) -> None:
    """All of a process whose output is kept in files."""
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(variables)
    run_file(words)


def run_file(words: list[str]) -> None:
    """All of a process: a script and its arguments."""
    torch.set_num_threads(1)
    # A server of processes hands its own way of starting them on; a script that a user starts has the platform's.
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
