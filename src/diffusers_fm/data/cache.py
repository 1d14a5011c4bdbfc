# SPDX-License-Identifier: Apache-2.0
"""Tensors on disk that are computed once: found by content, read by memory map, checked, and safe to interrupt."""

import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from torch import nn

from ..files import bind_folder


MANIFEST = "cache.json"

# What a model's config says that its answers do not depend on.
_NOT_CONTENT = ("transformers_version", "architectures", "dtype", "torch_dtype")


def content_key(*parts: bytes | str | int) -> str:
    """
    A name for what a computation depends on.

    Args:
        parts (`bytes`, `str` or `int`):
            The input and the settings.

    Returns:
        `str`: 32 hexadecimal digits, in practice different for different parts.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def model_fingerprint(*models: nn.Module) -> str:
    """
    A name for what models compute: of their classes, configs and weights, dtype included.

    Args:
        models (`nn.Module`):
            Models of diffusers or transformers.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=16)
    for model in models:
        config: Any = model.config
        config = dict(config) if isinstance(model, ModelMixin) else config.to_dict()
        content = {k: v for k, v in config.items() if not k.startswith("_") and k not in _NOT_CONTENT}
        digest.update(json.dumps([type(model).__name__, content], sort_keys=True, default=str).encode())
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


class TensorCache:
    """
    A folder of tensors by key. Each process that writes has files of its own: a file of bytes, and an index with a
    line for each record that is whole. Killed at any moment, it leaves what was finished; several processes, and
    several runs, may write at once.

    Args:
        folder (`Path`):
            Where it is; made if it is not there.
        description (`dict[str, Any]`):
            What it holds: `what`, and by further names what the tensors depend on beside their keys. It is written to
            `cache.json`, and must be the same whenever the folder is opened.

    Raises:
        ValueError: if the folder holds something else, or files of it are damaged.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.folder = folder
        other = bind_folder(folder, MANIFEST, description)
        if other:
            differences = ", ".join(f"{name} {found} and not {wanted}" for name, (found, wanted) in other.items())
            raise ValueError(
                f"The cache in {str(folder)!r} does not match this run: it was made with {differences}. Choose"
                " another --precomputed_dir, or remove the folder to compute it anew."
            )
        self._records: dict[str, tuple[str, int, int, list[tuple[str, list[int]]]]] = {}
        self._maps: dict[str, np.memmap] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getstate__(self) -> dict[str, Any]:
        # A memory map would be copied to loader workers as an array.
        return {**self.__dict__, "_maps": {}}

    def refresh(self) -> None:
        """Look at what other processes have written since."""
        for index in sorted(self.folder.glob("*.jsonl")):
            name = index.stem
            size = index.with_suffix(".bin").stat().st_size
            for line in index.read_text(encoding="utf-8").splitlines(keepends=True):
                # A line that was being written when the process was killed is incomplete.
                if not line.endswith("\n"):
                    continue
                key, start, checksum, layout = json.loads(line)
                if start + sum(_num_bytes(*entry) for entry in layout) > size:
                    self._refuse_damaged(name)
                self._records[key] = (name, start, checksum, layout)

    def read(self, key: str) -> list[torch.Tensor]:
        """
        The tensors of a record.

        Args:
            key (`str`):
                Of the record.

        Returns:
            `list[torch.Tensor]`: as they were written.

        Raises:
            KeyError: if there is none.
            ValueError: if its bytes are not those that were written.
        """
        name, start, checksum, layout = self._records[key]
        if name not in self._maps:
            self._maps[name] = np.memmap(self.folder / f"{name}.bin", dtype=np.uint8, mode="r")
        size = sum(_num_bytes(*entry) for entry in layout)
        content = np.array(self._maps[name][start : start + size])
        if zlib.crc32(content) != checksum:
            self._refuse_damaged(name)
        tensors, offset = [], 0
        for dtype, shape in layout:
            end = offset + _num_bytes(dtype, shape)
            tensors.append(torch.from_numpy(content[offset:end]).view(getattr(torch, dtype)).reshape(shape))
            offset = end
        return tensors

    def writer(self) -> "CacheWriter":
        """What adds records, a context manager."""
        return CacheWriter(self.folder)

    def _refuse_damaged(self, name: str) -> None:
        raise ValueError(
            f"The cache file {str(self.folder / (name + '.bin'))!r} is damaged: remove it and {name}.jsonl to compute"
            " what it held anew."
        )


class CacheWriter:
    """
    Adds records to a [`TensorCache`], in a file of this process. The index tells of nothing that is not on the disk.

    Args:
        folder (`Path`):
            Of the cache.
    """

    def __init__(self, folder: Path) -> None:
        name = f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._paths = (folder / f"{name}.bin", folder / f"{name}.jsonl")
        self._end = 0

    def __enter__(self) -> "CacheWriter":
        # The bytes first: an index without them would be damage.
        self._bytes = self._paths[0].open("wb")
        self._index = self._paths[1].open("w", encoding="utf-8")
        return self

    def __exit__(self, *exception: object) -> None:
        self._index.close()
        self._bytes.close()
        if self._end == 0:
            for path in reversed(self._paths):
                path.unlink()

    def add(self, keys: Sequence[str], records: Sequence[Sequence[torch.Tensor]]) -> None:
        """
        Write some records.

        Args:
            keys (`Sequence[str]`):
                Their keys.
            records (`Sequence[Sequence[torch.Tensor]]`):
                The tensors of each.
        """
        lines = []
        for key, tensors in zip(keys, records, strict=True):
            layout = [(str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for tensor in tensors]
            content = np.concatenate([_bytes_of(tensor) for tensor in tensors])
            self._bytes.write(content)
            lines.append(json.dumps([key, self._end, zlib.crc32(content), layout]) + "\n")
            self._end += content.size
        self._bytes.flush()
        os.fsync(self._bytes.fileno())
        self._index.write("".join(lines))
        self._index.flush()


def _num_bytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * getattr(torch, dtype).itemsize
