# SPDX-License-Identifier: Apache-2.0
"""Files are whole or not there, on every system, and the user's stay."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from processes import server

from diffusers_fm.files import (
    PARTIAL,
    RECORD,
    lock_folder,
    replace_contents,
    replace_text,
    sweep,
    sync_to_disk,
    unlock_folder,
    written_aside,
    written_for_run,
)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in (RECORD, ".lock"))
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def writes(**files: str) -> Callable[[Path], None]:
    """Writes files to a folder; `__` in a name stands for a slash."""

    def write(folder: Path) -> None:
        for name, text in files.items():
            file = folder / name.replace("__", "/").replace("_json", ".json").replace("_md", ".md")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    return write


def export(version: str) -> Callable[[Path], None]:
    return writes(model_index_json=version, README_md=version, unet__config_json=version, unet__weights=version)


def exported(version: str) -> dict[str, str]:
    return dict.fromkeys(["README.md", "model_index.json", "unet/config.json", "unet/weights"], version)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "figures.npz"
    with written_aside(file) as aside:
        assert aside.suffix == ".npz"
        assert aside.name.startswith(PARTIAL)
        aside.write_text("first")
        assert not file.exists()
    with pytest.raises(TypeError), written_aside(file) as aside:
        aside.write_text("sec") + "ond"
    with pytest.raises(FileNotFoundError), written_aside(file):
        pass
    assert contents(tmp_path) == {"figures.npz": "first"}
    replace_text(file, "second")
    assert contents(tmp_path) == {"figures.npz": "second"}


def test_what_a_run_did_not_write_stays(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    mine = writes(README_md="mine", unet__notes="mine", unet__config_json="mine", samples__step="mine", vae="mine")
    mine(tmp_path)
    replace_contents(tmp_path, lambda folder: (export("1")(folder), writes(vae__weights="1")(folder)))
    kept = {"README.md": "mine", "unet/notes": "mine", "samples/step": "mine"}
    kept |= {"unet/config.json.kept-1": "mine", "vae.kept-1": "mine"}
    first = {**exported("1"), "vae/weights": "1", "README.new.md": "1", **kept}
    assert contents(tmp_path) == first
    assert "README.md was not written by this run and stays" in caplog.text
    assert "config.json was not written by this run and stood in its way" in caplog.text
    caplog.clear()
    # The next one replaces what is the run's, and says nothing.
    replace_contents(tmp_path, export("2"))
    assert contents(tmp_path) == {**exported("2"), "vae/weights": "1", "README.new.md": "2", **kept}
    assert caplog.messages[1:] == []


def test_what_the_user_changed_is_the_users(tmp_path: Path) -> None:
    replace_contents(tmp_path, export("1"))
    (tmp_path / "README.md").write_text("my own card")
    (tmp_path / "unet" / "weights").write_text("my own weights")
    replace_contents(tmp_path, export("2"))
    kept = {"README.md": "my own card", "README.new.md": "2", "unet/weights.kept-1": "my own weights"}
    assert contents(tmp_path) == {**exported("2"), **kept}


def test_other_files_of_the_same_components_go(tmp_path: Path) -> None:
    shards = writes(unet__weights_1="1", unet__weights_index_json="1", vae__weights="1")
    replace_contents(tmp_path, shards)
    (tmp_path / "unet" / "variant").write_text("mine")
    replace_contents(tmp_path, export("2"))
    # A reader would take an index for one of what is there now.
    assert contents(tmp_path) == {**exported("2"), "vae/weights": "1", "unet/variant": "mine"}


def test_pictures_of_the_users_stay(tmp_path: Path) -> None:
    for name in ("grid.png", "samples/step-2.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for version in ("1", "2"):
        for name in ("grid.png", "samples/step-2.png", "samples/step-4.png"):
            with written_for_run(tmp_path, name) as aside:
                aside.write_text(version)
    mine = {"grid.png": "mine", "samples/step-2.png": "mine"}
    ours = dict.fromkeys(["grid.new.png", "samples/step-2.new.png", "samples/step-4.png"], "2")
    assert contents(tmp_path) == {**mine, **ours}


def test_a_run_that_is_killed_between_two_renames_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename
    num_renames = 0
    for limit in range(100):
        folder = tmp_path / str(limit)
        replace_contents(folder, export("1"))
        (folder / "unet" / "notes").write_text("mine")
        num_renames = 0

        def killed(self: Path, target: Path, limit: int = limit) -> Path:
            nonlocal num_renames
            num_renames += 1
            if num_renames > limit:
                raise KeyboardInterrupt
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", killed)
        try:
            replace_contents(folder, export("2"))
        except KeyboardInterrupt:
            monkeypatch.undo()
            found = {name: text for name, text in contents(folder).items() if not name.startswith(PARTIAL)}
            # With an index, all is of one version.
            assert "model_index.json" not in found or found.items() >= exported("1").items()
            replace_contents(folder, export("3"))
            assert contents(folder) == {**exported("3"), "unet/notes": "mine"}
        else:
            monkeypatch.undo()
            break
    assert num_renames == 2 * len(exported("1"))


class Windows:
    """The rules of Windows for `os.open` and `os.fsync`."""

    def __init__(self) -> None:
        self.open, self.fsync = os.open, os.fsync
        self.modes: dict[int, int] = {}
        self.synced: list[str] = []
        self.names: dict[int, str] = {}

    def opens(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = self.open(path, flags, *args, **kwargs)
        self.modes[descriptor], self.names[descriptor] = flags & (os.O_RDWR | os.O_WRONLY), os.path.basename(path)
        return descriptor

    def syncs(self, descriptor: int) -> None:
        if not self.modes[descriptor]:
            raise OSError(errno.EBADF, "Bad file descriptor")
        self.synced.append(self.names[descriptor])
        self.fsync(descriptor)


def test_files_are_synced_as_windows_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = Windows()
    with monkeypatch.context() as patched:
        patched.setattr(os, "open", system.opens)
        patched.setattr(os, "fsync", system.syncs)
        replace_contents(tmp_path, export("1"))
        replace_text(tmp_path / "log.jsonl", "line")
        # Nobody may write to a file of a stock pipeline that was copied with its permissions.
        (tmp_path / "read-only").write_text("mine")
        patched.setattr(os, "access", lambda path, mode: Path(path).name != "read-only")
        sync_to_disk(tmp_path / "read-only")
    assert contents(tmp_path) == {**exported("1"), "log.jsonl": "line", "read-only": "mine"}
    assert {name.rpartition("-")[2] for name in system.synced} >= {"log.jsonl", "weights", "config.json"}


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")

    def fails(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(OSError, match="Input/output error"):
            sync_to_disk(path)


def test_leftovers_are_swept(tmp_path: Path) -> None:
    writes(notes="mine", unet__config_json="1")(tmp_path)
    expected = contents(tmp_path)
    for name in (f"{PARTIAL}removed-checkpoint-2", f"{PARTIAL}export/unet", f"unet/{PARTIAL}deep"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("half")
    (tmp_path / "unet" / f"{PARTIAL}1-weights").write_text("half")
    sweep(tmp_path)
    assert contents(tmp_path) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "unet"]


def hold(folder: Path, locked: Event) -> None:
    """All of a process that has a folder locked until it is killed."""
    lock_folder(folder)
    locked.set()
    time.sleep(100)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within this context another process has a folder locked, which is then killed."""
    locked = server().Event()
    process = server().Process(target=hold, args=(folder, locked))
    process.start()
    try:
        assert locked.wait(60)
        yield
    finally:
        process.kill()
        process.join()


def test_a_locked_folder_is_refused_until_its_process_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        monkeypatch.setattr("diffusers_fm.files.LOCK_TIMEOUT", 0.1)
        with pytest.raises(
            ValueError, match=r"Another run is using the output folder .*: wait for its end, or choose"
        ):
            lock_folder(tmp_path)
    # Twice by one process, and by another spelling of the folder: the same run.
    lock_folder(tmp_path)
    lock_folder(tmp_path / ".." / tmp_path.name)
    unlock_folder(tmp_path)
    unlock_folder(tmp_path)
    with held(tmp_path):
        pass
