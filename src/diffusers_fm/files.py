# SPDX-License-Identifier: Apache-2.0
"""Write files whole or not at all: aside, forced to disk, then renamed. Files of the user's stay."""

import errno
import itertools
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
from filelock import FileLock, Timeout


logger = logging.getLogger(__name__)

# Prefix of what is being written, or was when a run was killed.
PARTIAL = ".partial-"
LOCK = ".lock"
# Checksums of the files that runs wrote to a folder. Every other file there is the user's.
RECORD = ".written.json"
# Seconds in which the data workers of a killed run, which hold its lock too, notice that it is gone.
LOCK_TIMEOUT = 10
# The file that makes a folder a pipeline: first out, last in.
_INDEX = "model_index.json"
# Windows syncs no folders, and no files that are open for reading alone; nor do some network drives.
_CANNOT_SYNC = (errno.EACCES, errno.EBADF, errno.EINVAL, errno.ENOTSUP)

_locks: dict[Path, FileLock] = {}


def checksum(file: Path) -> str:
    """The 128-bit XXH3 hash of a file in hexadecimal digits, read in pieces at about the speed of memory."""
    state = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(2**22):
            state.update(piece)
    return state.hexdigest()


def sync_to_disk(*paths: Path) -> None:
    """Force files and folders' lists of names to disk, so that they outlast a power cut."""
    for path in paths:
        must = path.is_file() and os.access(path, os.W_OK)
        try:
            descriptor = os.open(path, os.O_RDWR if must else os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if must or error.errno not in _CANNOT_SYNC:
                raise


@contextmanager
def written_aside(file: Path) -> Iterator[Path]:
    """Path to write a file to, beside it, which then takes its place. After an error the file is as it was."""
    aside = file.with_name(f"{PARTIAL}{uuid.uuid4().hex[:8]}-{file.name}")
    try:
        yield aside
        sync_to_disk(aside)
        os.replace(aside, file)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def replace_text(file: Path, text: str) -> None:
    """Write a text file; if that fails or is cut short, the file is as it was."""
    with written_aside(file) as aside:
        aside.write_text(text, encoding="utf-8")


def replace_contents(folder: Path, write: Callable[[Path], None]) -> None:
    """
    Replace what an earlier call wrote to a folder by other files, all together. What else is there stays.

    The files are written to a folder aside, forced to disk, and only then moved into place, `model_index.json` last: a
    run that is killed while it writes leaves what was there, and one that is killed between two of the renames leaves
    no pipeline that is partly old and partly new. Where a file of the user's stands in the way, see [`make_way`].

    Args:
        folder (`Path`):
            Where they are to be.
        write (`Callable`):
            Called with the folder aside, which is empty.
    """
    aside, former = folder / f"{PARTIAL}export", folder / f"{PARTIAL}former"
    for leftover in (aside, former):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        sync_to_disk(*aside.rglob("*"), aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    files = [path.relative_to(aside).as_posix() for path in aside.rglob("*") if path.is_file()]
    # An old index in front of new weights would make a pipeline of both.
    files.sort(key=lambda name: (name == _INDEX, name))
    targets = {name: make_way(folder, name) for name in files}
    # Of the same components, such as other shards.
    parts = {name.split("/")[0] for name in files if "/" in name}
    old = {name for name in read_record(folder) if name.split("/")[0] in parts} | set(targets.values())
    old = {name for name in old if is_ours(folder, name)}
    record(folder, {target: checksum(aside / name) for name, target in targets.items()})
    for name in sorted(old, key=lambda name: (name != _INDEX, name)):
        _move(folder / name, former / name)
    for name in files:
        _move(aside / name, folder / targets[name])
    sync_to_disk(folder, *(folder / part for part in parts))
    for leftover in (aside, former):
        shutil.rmtree(leftover, ignore_errors=True)


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def read_record(folder: Path) -> dict[str, list[str]]:
    """Checksums of the files that runs wrote to a folder, the last few of each name."""
    file = folder / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def record(folder: Path, checksums: dict[str, str]) -> None:
    """Note files that are about to be moved into a folder, so that they count as the run's whenever it is killed."""
    known = read_record(folder)
    for name, digest in checksums.items():
        known[name] = [*(old for old in known.get(name, [])[-3:] if old != digest), digest]
    replace_text(folder / RECORD, json.dumps(known, indent=1, sort_keys=True) + "\n")


def is_ours(folder: Path, name: str) -> bool:
    """Return whether a file of a folder is as a run wrote it."""
    known = read_record(folder).get(name, ())
    return bool(known) and (folder / name).is_file() and checksum(folder / name) in known


def make_way(folder: Path, name: str) -> str:
    """
    Name for a file of a run, without loss of the user's. A text, a picture or a sound of the user's keeps its place,
    and the run's gets another; any other file of the user's is renamed: a pipeline cannot do without its own.
    """
    if not is_ours(folder, name) and (folder / name).exists() and Path(name).suffix in (".md", ".png", ".wav"):
        taken, name = name, Path(name).with_stem(f"{Path(name).stem}.new").as_posix()
        logger.warning("%s was not written by this run and stays: the run's is %s.", folder / taken, folder / name)
    parents = [folder / parent for parent in Path(name).parents if (folder / parent).is_file()]
    for path in (*parents, *([folder / name] if not is_ours(folder, name) else [])):
        if path.exists():
            set_aside(path)
    return name


def set_aside(path: Path, name: str | None = None, why: str = "was not written by this run") -> None:
    """Rename what stands in a run's way, with a warning that says why it does not belong to it."""
    names = (f"{name or path.name}.kept-{number}" for number in itertools.count(1))
    kept = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(kept)
    logger.warning("%s %s and stood in its way: it is %s now.", path, why, kept)


@contextmanager
def written_for_run(folder: Path, name: str) -> Iterator[Path]:
    """Path to write a run's file to, as [`written_aside`] gives it; a file of the user's of that name stays."""
    name = make_way(folder, name)
    with written_aside(folder / name) as aside:
        yield aside
        record(folder, {name: checksum(aside)})


def bind_folder(folder: Path, file_name: str, fingerprint: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    Bind a folder to a fingerprint in JSON types, everything that its contents depend on: the first call writes it to
    the file `file_name`. Later ones compare, and return the entries that differ, as found and as given.
    """
    file, given = folder / file_name, json.loads(json.dumps(fingerprint))
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(given, indent=2) + "\n")
    found = json.loads(file.read_text(encoding="utf-8"))
    names = [name for name in {**given, **found} if given.get(name) != found.get(name)]
    return {name: (found.get(name), given.get(name)) for name in names}


def sweep(folder: Path) -> None:
    """Remove what killed runs have left half-written in a folder and its subfolders."""
    for leftover in (*folder.glob(f"{PARTIAL}*"), *folder.glob(f"*/{PARTIAL}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def lock_folder(folder: Path) -> bool:
    """
    Lock an output folder until [`unlock_folder`] or the end of the process; whether it was unlocked. A `ValueError` if
    another process has it.
    """
    path = folder.resolve()
    if path in _locks:
        return False
    lock = FileLock(path / LOCK, timeout=LOCK_TIMEOUT, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"Another run is using the output folder {str(folder)!r}: wait for its end, or choose another"
            " --output_dir."
        ) from None
    _locks[path] = lock
    return True


def unlock_folder(folder: Path) -> None:
    """Let other processes use an output folder."""
    lock = _locks.pop(folder.resolve(), None)
    if lock is not None:
        lock.release()
