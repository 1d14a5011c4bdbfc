# SPDX-License-Identifier: Apache-2.0
"""Tensor cache on disk: safetensors shards, found by content, memory-mapped, checked, and safe to interrupt."""

import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..files import bind_folder, written_aside


MANIFEST = "cache.json"

# A shard is written when it has so many bytes, or is so many seconds old: a killed process loses no more than that.
SHARD_BYTES = 64 * 2**20
SHARD_SECONDS = 30.0

# Entries of a model's config that its answers do not depend on.
_NOT_CONTENT = ("transformers_version", "architectures", "dtype", "torch_dtype")


def content_key(*parts: bytes | str | int) -> str:
    """Digest of the input and the settings of a computation, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else repr(part).encode()
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def model_fingerprint(*models: nn.Module) -> str:
    """Digest of the classes, configs and weights, dtype included, of models of diffusers or transformers."""
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


def _checksum(tensors: Sequence[torch.Tensor]) -> int:
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(_bytes_of(tensor), checksum)
    return checksum


@dataclass
class DryAccelerator:
    """
    Accelerator of a dry run: one process on the meta device, which notes the bytes of caches and of frozen models that
    are no part of the pipeline, and writes none.
    """

    mixed_precision: str
    cached: dict[str, int] = field(default_factory=dict)
    frozen: int = 0
    device = torch.device("meta")
    distributed_type = DistributedType.NO
    num_processes = 1
    is_main_process = True

    def main_process_first(self) -> AbstractContextManager[None]:
        return nullcontext()

    def accumulate(self, *models: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()


class TensorCache:
    """
    Records of tensors by key. A shard is never changed: several processes, and several runs, may write at once, and
    one that is killed leaves whole shards.

    Args:
        folder (`Path`):
            Where it is; made if it is not there.
        description (`dict[str, Any]`):
            `what` the records are, and by further names what they depend on beside their keys. It is written to
            `cache.json`, and must be the same whenever the folder is opened.

    Raises:
        ValueError: if the folder holds something else, or shards of it are damaged.
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
        # Shard, number of tensors and checksum of each record.
        self._records: dict[str, tuple[str, int, int]] = {}
        self._shards: dict[str, Any] = {}
        self._known: set[str] = set()
        self.refresh()

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    def refresh(self) -> None:
        """Look at what other processes have written since."""
        found = {path.name for path in self.folder.glob("*.safetensors") if not path.name.startswith(".")}
        for name in sorted(found - self._known):
            for key, value in self._shard(name).metadata().items():
                count, checksum = value.split()
                self._records[key] = (name, int(count), int(checksum))
        self._known |= found

    def read(self, key: str) -> list[torch.Tensor]:
        """The tensors of a record, memory-mapped; a `ValueError` if they are not what was written."""
        name, count, checksum = self._records[key]
        tensors = [self._shard(name).get_tensor(f"{key}.{number}") for number in range(count)]
        if _checksum(tensors) != checksum:
            self._refuse_damaged(name)
        return tensors

    def writer(self) -> "CacheWriter":
        """Context manager that adds records."""
        return CacheWriter(self.folder)

    def _shard(self, name: str) -> Any:
        if name not in self._shards:
            try:
                self._shards[name] = safe_open(self.folder / name, framework="pt")
            except SafetensorError:
                self._refuse_damaged(name)
        return self._shards[name]

    def _refuse_damaged(self, name: str) -> None:
        path = str(self.folder / name)
        raise ValueError(f"The cache file {path!r} is damaged: remove it to compute what it held anew.")


class CachedRecords:
    """Reader of what is kept of images, by the key of each image and of its mirror image."""

    def __init__(self, cache: TensorCache, keys: list[list[str]]) -> None:
        self._cache = cache
        self._keys = np.array(keys)

    def __call__(self, index: int, mirrored: bool) -> torch.Tensor:
        """Tensor of an image, such as its moments, as [`~diffusers_fm.models.encode_moments`] gives them."""
        return self._cache.read(str(self._keys[index, int(mirrored)]))[0]


class CacheWriter:
    """Writer of shards to the folder of a [`TensorCache`]; leaving it writes the last one, after errors too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        self._records: dict[str, str] = {}
        self._begun = 0.0

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._write()

    def add(self, keys: Sequence[str], records: Sequence[Sequence[torch.Tensor]]) -> None:
        """Add records, each some tensors, under their keys."""
        if not self._records:
            self._begun = time.monotonic()
        for key, tensors in zip(keys, records, strict=True):
            # Rows of a batch share its memory, which safetensors refuses.
            own = [tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for tensor in tensors]
            self._tensors |= {f"{key}.{number}": tensor for number, tensor in enumerate(own)}
            self._records[key] = f"{len(own)} {_checksum(own)}"
        size = sum(tensor.nbytes for tensor in self._tensors.values())
        if size >= SHARD_BYTES or time.monotonic() - self._begun >= SHARD_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._records:
            with written_aside(self._folder / f"{uuid.uuid4().hex}.safetensors") as aside:
                save_file(self._tensors, aside, metadata=self._records)
            self._tensors, self._records = {}, {}
