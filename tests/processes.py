# SPDX-License-Identifier: Apache-2.0
"""Processes of scripts, forked by a server that has imported what they need: imports take most of a short run."""

import atexit
import functools
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ForkServer
from pathlib import Path
from typing import Any
from unittest import mock

import torch


TIMEOUT = 300


@dataclass(frozen=True)
class Ended:
    """Exit code of a process, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Task:
    """All of a process: a script, or code, and its arguments, the variables that it has besides, and where it runs."""

    words: list[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    prepare: Callable[[], None] | None = None


def ensure_running(server: ForkServer, *modules: str) -> None:
    """Start a server that has imported the modules."""
    server.set_forkserver_preload(list(modules))
    found = os.pathsep.join(path for path in sys.path if path)
    with mock.patch.dict(os.environ, {"PYTHONPATH": found, "OMP_NUM_THREADS": "1"}):
        server.ensure_running()


@functools.cache
def server() -> ForkServerContext:
    """Server of this process, which has imported what scripts need."""
    ensure_running(multiprocessing.forkserver._forkserver, "preloaded")
    return multiprocessing.get_context("forkserver")


@functools.cache
def stock_server() -> ForkServer:
    """Server that knows the stock libraries alone, for readers who may not have this package or import it anew."""
    server = ForkServer()
    ensure_running(server, "preloaded_stock")
    return server


def make_tasks(
    file: Path,
    line: Sequence[object],
    num_processes: int = 1,
    prepare: Callable[[], None] | None = None,
    folder: Path | None = None,
    **more: str,
) -> list[Task]:
    """
    Tasks of a script, whose processes work together as those of `accelerate launch` do: in a folder, with `more`
    variables, after `prepare`, such as the work of a `sitecustomize`. Their server is started.
    """
    server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words, tasks = [str(file), *map(str, line)], []
    for rank in range(num_processes):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables |= {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        tasks.append(Task(words, {**more, **(variables if num_processes > 1 else {})}, folder, prepare))
    return tasks


def run_tasks(tasks: Sequence[Task]) -> list[Ended]:
    """Run processes side by side."""
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(number)) for number in range(len(tasks))]
        processes = []
        for task, place in zip(tasks, places):
            place.mkdir()
            processes.append(context.Process(target=run_task, args=(task, place)))
        end = time.monotonic() + TIMEOUT
        try:
            for process in processes:
                process.start()
            while any(process.is_alive() for process in processes) and time.monotonic() < end:
                # One that failed leaves the others waiting for it.
                if any(process.exitcode for process in processes):
                    end = min(end, time.monotonic() + 30)
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, (place / "stdout").read_text(), (place / "stderr").read_text())
            for process, place in zip(processes, places)
        ]


def check_processes(*task: Any, **more: Any) -> list[Ended]:
    """Run the tasks of [`make_tasks`], in which no process may fail."""
    ended = run_tasks(make_tasks(*task, **more))
    assert [process.returncode for process in ended] == [0] * len(ended), ended[-1].stderr[-4000:]
    return ended


def run_stock(code: str, *arguments: object, folder: Path | None = None, **variables: str) -> Ended:
    """Run code in a process that has imported the stock libraries and nothing of this package; it may not fail."""
    connect = stock_server().connect_to_new_process
    with mock.patch("multiprocessing.forkserver.connect_to_new_process", connect):
        (ended,) = run_tasks([Task(["-c", code, *map(str, arguments)], variables, folder, _check_stock)])
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended


def _check_stock() -> None:
    """Nothing of this package is there."""
    assert not [name for name in sys.modules if name.startswith("diffusers_fm")]


def run_task(task: Task, place: Path) -> None:
    """All of a process whose output is kept in the files `stdout` and `stderr` of a folder."""
    for name, stream in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(place / name, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.update(task.variables)
    if task.folder is not None:
        os.chdir(task.folder)
    if "HF_ENDPOINT" in task.variables:
        _be_client()
    # What the server would do at its end is its own affair, and what the script asks for is not done by itself.
    atexit._clear()
    try:
        if task.prepare is not None:
            task.prepare()
        run_file(task.words)
    finally:
        atexit._run_exitfuncs()


def launch_task(task: Task, place: Path) -> None:
    """All of a process that starts another one, as the launcher does, and waits for its end."""
    process = multiprocessing.get_context("fork").Process(target=run_task, args=(task, place))
    process.start()
    process.join()


def _be_client() -> None:
    """Have the client of the Hub read its variables again, and who talks to it."""
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            importlib.reload(sys.modules[name])
    # Functions such as `create_repo` are methods of one client, which was made before.
    importlib.import_module("huggingface_hub.hf_api").api.endpoint = os.environ["HF_ENDPOINT"]


def run_file(words: list[str]) -> None:
    """A script, or `-c` and code, and its arguments."""
    torch.set_num_threads(1)
    # A server of processes hands its own way of starting them on; a script that a user starts has the platform's.
    multiprocessing.set_start_method("fork", force=True)
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.path.insert(0, "")
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        return
    sys.argv = words
    # The launcher, if there is one, is whoever started this process.
    if "diffusers_fm.training.distributed" in sys.modules:
        sys.modules["diffusers_fm.training.distributed"]._LAUNCHER = os.getppid()
    runpy.run_path(words[0], run_name="__main__")
