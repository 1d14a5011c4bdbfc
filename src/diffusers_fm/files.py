# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there: written aside, forced to disk, and moved into place."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


# What is being written, or was when a run was killed, has a name that begins so.
PARTIAL = ".partial-"

# The file that makes a folder a pipeline goes last.
_LAST = "model_index.json"


def sync_to_disk(*paths: Path) -> None:
    """
    Force files and folders to disk, so that they outlast a power cut.

    Args:
        paths (`Path`):
            What to force; of a folder, its list of names.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def replace_text(file: Path, text: str) -> None:
    """
    Write a text file; if that fails or is cut short, the file is as it was.

    Args:
        file (`Path`):
            The file, which may exist.
        text (`str`):
            All of its contents.
    """
    # Several processes may write the same file.
    aside = file.with_name(f"{PARTIAL}{os.getpid()}-{file.name}")
    try:
        aside.write_text(text, encoding="utf-8")
        sync_to_disk(aside)
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def replace_contents(folder: Path, write: Callable[[Path], None]) -> None:
    """
    Write files and subfolders of a folder all together, in place of those of the same names. What else is in the
    folder stays.

    They are written to a folder aside, forced to disk, and only then moved into place, `model_index.json` last: a run
    that is killed while it writes leaves what was there, and one that is killed between two of the renames leaves no
    pipeline that is partly old and partly new.

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
    former.mkdir()
    names = sorted((path.name for path in aside.iterdir()), key=lambda name: (name == _LAST, name))
    # An old index in front of new weights would make a pipeline of both.
    for name in reversed(names):
        if (folder / name).exists():
            (folder / name).rename(former / name)
    for name in names:
        (aside / name).rename(folder / name)
    sync_to_disk(folder)
    aside.rmdir()
    shutil.rmtree(former, ignore_errors=True)


def bind_folder(folder: Path, file_name: str, fingerprint: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    Bind a folder to what its contents depend on: the first call writes that down, later ones compare.

    Args:
        folder (`Path`):
            The folder; made if it is not there.
        file_name (`str`):
            Name of the file in it that holds the fingerprint.
        fingerprint (`dict[str, Any]`):
            Everything that the contents depend on, in JSON types.

    Returns:
        `dict[str, tuple[Any, Any]]`: the entries that differ, as found and as given; empty if the folder fits.
    """
    file, given = folder / file_name, json.loads(json.dumps(fingerprint))
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(given, indent=2) + "\n")
    found = json.loads(file.read_text(encoding="utf-8"))
    names = [name for name in {**given, **found} if given.get(name) != found.get(name)]
    return {name: (found.get(name), given.get(name)) for name in names}
