# SPDX-License-Identifier: Apache-2.0
"""What may leave this machine: an explicit list of files, without the paths of the machine in them."""

import json
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


# A pipeline's own files, and what a run or an evaluation writes beside it. What is not here stays: optimizer states,
# data, pickles, code.
ROOT_FILES = (
    "README.md",
    "model_index.json",
    "scheduler_config.json",
    "config.json",
    "*.safetensors",
    "*.safetensors.index*.json",
    "grid.png",
    "image_*.png",
    "training_args.json",
    "log.jsonl",
    "metrics.json",
)
# Of an evaluation, figures and their plots; not pictures of the data beside samples.
EVALUATION_FILES = ("metrics.json", "*.csv", "*_by_calls.png", "loss_by_time.png", "ways.png")
# Configurations and weights of a component; of tokenizers and image processors their tables too.
COMPONENT_FILES = ("*.json", "*.safetensors", "merges.txt", "vocab.txt", "*.model", "*.jinja")
# Files of settings, in which a string may be a path.
SETTINGS = ("model_index.json", "*config.json", "training_args.json", "metrics.json")


def portable_files(folder: Path) -> dict[str, Path | bytes]:
    """
    What of a folder may be uploaded: the components that its `model_index.json` names, the files of a run that are in
    `ROOT_FILES`, and the figures in its folder `evaluation`.

    Args:
        folder (`Path`):
            A pipeline folder, one of LoRA weights, or one of a single model or scheduler.

    Returns:
        `dict[str, Path | bytes]`: by path in the repository, sorted: the file, or its contents where those are
        changed, see [`without_local_paths`].
    """
    found = {path.name: path for path in folder.iterdir() if _matches(path, ROOT_FILES)}
    parts = dict.fromkeys(components(folder), COMPONENT_FILES) | {"evaluation": EVALUATION_FILES}
    for part, patterns in parts.items():
        if (folder / part).is_dir():
            inside = (path for path in (folder / part).iterdir() if _matches(path, patterns))
            found |= {f"{part}/{path.name}": path for path in inside}
    return {name: _cleaned(found[name]) for name in sorted(found)}


def components(folder: Path) -> list[str]:
    """
    The names of a pipeline's components, those that it leaves empty not counted.

    Args:
        folder (`Path`):
            A pipeline folder.

    Returns:
        `list[str]`: the names, none if the folder holds no pipeline.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return []
    entries = json.loads(index.read_text(encoding="utf-8"))
    return [name for name, entry in entries.items() if isinstance(entry, list) and entry and entry[0] is not None]


def without_local_paths(value: Any) -> Any:
    """
    Settings without the paths of this machine. An absolute path becomes its last part, and what a component was loaded
    from is left out if that is a path.

    Args:
        value (`Any`):
            JSON's types.

    Returns:
        `Any`: the same, changed where need be.
    """
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (k.endswith("name_or_path") and k[0] == "_" and _is_local(v))}
        return {k: without_local_paths(v) for k, v in kept.items()}
    if isinstance(value, list):
        return [without_local_paths(entry) for entry in value]
    if not isinstance(value, str) or not _is_absolute(value):
        return value
    return PureWindowsPath(value).name or PurePosixPath(value).name


def _is_local(value: Any) -> bool:
    return isinstance(value, str) and (_is_absolute(value) or Path(value).exists())


def _is_absolute(text: str) -> bool:
    if text.startswith(("~/", "file:")):
        return True
    windows = PureWindowsPath(text)
    return len(windows.parts) > 1 and (text.startswith("/") or windows.is_absolute())


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return path.is_file() and path.name[0] != "." and any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _cleaned(path: Path) -> Path | bytes:
    if not _matches(path, SETTINGS):
        return path
    settings = json.loads(path.read_text(encoding="utf-8"))
    cleaned = without_local_paths(settings)
    return path if cleaned == settings else (json.dumps(cleaned, indent=2) + "\n").encode()
