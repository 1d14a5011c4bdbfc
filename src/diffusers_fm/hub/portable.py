# SPDX-License-Identifier: Apache-2.0
"""Files that may leave this machine, without its paths in them."""

import json
import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


# Weights by the names that diffusers, transformers and PEFT give them: whole or in shards, with a variant or without.
WEIGHTS = tuple(
    f"{name}{part}.safetensors{index}"
    for name in ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "adapter_model")
    for part in ("", ".*", "-?????-of-?????")
    for index in ("", ".index.json", ".index.*.json")
)
# The files of a pipeline, and those that a run or an evaluation adds. All others stay: optimizer states, data,
# pickles, code, and what a user has put there.
ROOT_FILES = (
    *("README.md", "model_index.json", "scheduler_config.json", "config.json", "training_args.json", "metrics.json"),
    *("log.jsonl", "grid.png", "image_*.png", "sound_*.wav"),
    *WEIGHTS,
)
# Figures and their plots; not pictures of the data.
EVALUATION_FILES = ("metrics.json", "*.csv", "*_by_calls.png", "loss_by_time.png", "trajectories.png")
# Configurations and weights of a component; of tokenizers and image processors their tables too.
COMPONENT_FILES = (
    *("config.json", "*_config.json", "tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json"),
    *("merges.txt", "vocab.txt", "spiece.model", "tokenizer.model", "*.tiktoken", "chat_template.*"),
    *WEIGHTS,
)
# Files of settings, in which a string may be a path.
SETTINGS = ("model_index.json", "*config.json", "training_args.json", "metrics.json")

LOADED = re.compile(r"""((?:from_pretrained|load_lora_weights)\(["'])([^"'\n]+)(["'])""")


def portable_files(folder: Path) -> dict[str, Path | bytes]:
    """
    Files of a folder that may be uploaded: the components that its `model_index.json` names, the files of a run, and
    the figures in its folder `evaluation`. By path in the repository, with their contents where those lose a path.
    """
    found = {path.name: path for path in folder.iterdir() if _matches(path, ROOT_FILES)}
    parts = dict.fromkeys(components(folder), COMPONENT_FILES) | {"evaluation": EVALUATION_FILES}
    for part, patterns in parts.items():
        if (folder / part).is_dir():
            inside = (path for path in (folder / part).iterdir() if _matches(path, patterns))
            found |= {f"{part}/{path.name}": path for path in inside}
    return {name: _cleaned(found[name]) or found[name] for name in sorted(found)}


def clean_settings(folder: Path) -> None:
    """Take the paths of this machine out of the configurations that were saved to a folder."""
    inside = (path for name in components(folder) for path in (folder / name).glob("*config.json"))
    for path in (folder / "model_index.json", folder / "scheduler_config.json", *inside):
        content = _cleaned(path)
        if content is not None:
            path.write_bytes(content)


def components(folder: Path) -> list[str]:
    """Names of the components of a pipeline folder, without empty ones; none where there is no pipeline."""
    index = folder / "model_index.json"
    if not index.is_file():
        return []
    entries = read_settings(index)
    return [name for name, entry in entries.items() if isinstance(entry, list) and entry and entry[0] is not None]


def read_settings(path: Path) -> Any:
    """Contents of a JSON file; a `ValueError` with its name if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file {str(path)!r} is not JSON: {error}.") from error


def portable_card(text: str, repo_id: str, own: Collection[str]) -> str:
    """The text of a card whose example loads the repository in place of `own` names, and no folder of this machine."""

    def portable(found: re.Match[str]) -> str:
        call, name, end = found.groups()
        name = repo_id if name in own else f"path/to/{last_part(name)}" if is_local(name) else name
        return f"{call}{name}{end}"

    return LOADED.sub(portable, text)


def without_local_paths(value: Any) -> Any:
    """Settings (JSON types) with the last part of absolute paths, and without the folder that was loaded from."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not (re.match("_.*name_or_path$", k) and is_local(v))}
        return {k: without_local_paths(v) for k, v in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_local_paths(entry) for entry in value]
    return last_part(value) if isinstance(value, str) and _is_absolute(value) else value


def last_part(path: str) -> str:
    """Last part of a path of any system, or the path itself where it has none."""
    return PureWindowsPath(path).name or PurePosixPath(path).name or path


def is_local(name: Any) -> bool:
    """Return whether a model or a data set is named by a path of this machine."""
    return isinstance(name, str) and (_is_absolute(name) or Path(name).exists())


def _is_absolute(text: str) -> bool:
    if re.match(r"~[^/\\]*[/\\]|file:", text):
        return True
    windows = PureWindowsPath(text)
    return len(windows.parts) > 1 and (text.startswith("/") or windows.is_absolute())


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return path.is_file() and path.name[0] != "." and any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _cleaned(path: Path) -> bytes | None:
    """Contents of a file of settings without local paths, `None` if that changes nothing."""
    if not _matches(path, SETTINGS):
        return None
    settings = read_settings(path)
    cleaned = without_local_paths(settings)
    return None if cleaned == settings else (json.dumps(cleaned, indent=2) + "\n").encode()
