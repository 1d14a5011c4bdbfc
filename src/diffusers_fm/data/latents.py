# SPDX-License-Identifier: Apache-2.0
"""Latents of a batch, encoded in training or kept on disk."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.training_utils import offload_models
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..models import encode_moments, latents_of_moments
from .arguments import LatentArguments
from .cache import CachedRecords, DryAccelerator, TensorCache, content_key, model_fingerprint
from .images import ImageData
from .randomness import BatchSlice
from .streams import StreamData
from .unreadable import UnreadableImageError


logger = logging.getLogger(__name__)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Bytes to the range of models: uint8 to float32 in [-1, 1], where waveforms are already."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def latents_of_batch(
    pipeline: DiffusionPipeline,
    batch: dict[str, Any],
    device: torch.device,
    part: BatchSlice | None = None,
) -> torch.Tensor:
    """
    Data of a batch as the flow sees it: latents drawn from the autoencoder's posterior, computed or cached, or pixels
    where there is no autoencoder.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With the component `vae`, which may be `None`.
        batch (`dict[str, Any]`):
            With `images` or `moments`, or `data` as it is.
        device (`torch.device`):
            Where they are wanted.
        part ([`BatchSlice`], *optional*):
            Whose random numbers are taken; without it the mode of the posterior is.

    Returns:
        `torch.Tensor` of shape `(batch_size, channels, height, width)`: float32, pixels in [-1, 1].
    """
    if "data" in batch:
        return batch["data"].to(device, non_blocking=True)
    vae: Any = pipeline.vae
    if "moments" in batch:
        moments = batch["moments"].to(device, non_blocking=True)
    else:
        images = normalize(batch["images"].to(device, non_blocking=True))
        if vae is None:
            return images
        with torch.no_grad():
            moments = encode_moments(vae, images)
    generators = None if part is None else part.sample_generators("posterior", device)
    return latents_of_moments(vae, moments, generators, sample=part is not None)


def open_cache(accelerator: Accelerator, folder: Path, description: dict[str, str]) -> TensorCache:
    """[`TensorCache`] in a folder that all processes see; the main process makes it."""
    with accelerator.main_process_first():
        return TensorCache(folder, description)


def cache_latents(
    accelerator: Accelerator | DryAccelerator,
    data: ImageData,
    vae: ModelMixin,
    folder: Path,
    batch_size: int,
) -> TensorCache | None:
    """
    Encode all images once, and have the data set read the autoencoder's posteriors in place of images.

    Each visit still draws its own latents. A record is found by the bytes of the image's file and what is done to the
    image, the whole cache by the autoencoder. Mirrored images have records of their own. Every process calls it and
    does its share; what is there already is not done again.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        data ([`ImageData`]):
            The images, cropped at the centre. Its `read_moments` is set.
        vae (`ModelMixin`):
            The autoencoder; it is on the accelerator's device while it runs.
        folder (`Path`):
            Of the cache.
        batch_size (`int`):
            Images at once.

    Returns:
        [`TensorCache`]: the cache; `None` in a dry run, in which records have no contents and are not kept.

    Raises:
        ValueError: if images are cropped anywhere, more images cannot be read than the data admits, or the cache does
            not match.
    """
    if isinstance(accelerator, DryAccelerator):
        _refuse_moving_crops(data, "latents")
        return _expect_latents(accelerator, data, vae)
    description = {"what": "latents", "autoencoder": model_fingerprint(vae), "dtype": str(vae.dtype)}

    def encode(images: torch.Tensor) -> torch.Tensor:
        return encode_moments(vae, normalize(images))

    cache, data.read_moments = cache_images(accelerator, data, vae, encode, folder, description, batch_size)
    return cache


def _refuse_moving_crops(data: ImageData, what: str) -> None:
    if not data.transform.center_crop:
        what = what.capitalize()
        raise ValueError(f"{what} can be cached only of images that are always cropped alike: give --center_crop.")


def cache_images(
    accelerator: Accelerator,
    data: ImageData,
    model: ModelMixin | PreTrainedModel,
    encode: Callable[[torch.Tensor], torch.Tensor],
    folder: Path,
    description: dict[str, str],
    batch_size: int,
) -> tuple[TensorCache, CachedRecords]:
    """
    Keep what a frozen model makes of all images, each tensor under the bytes of its image's file and what is done to
    the image.

    Args:
        accelerator, data, folder, batch_size:
            As for [`cache_latents`].
        model (`nn.Module`):
            The model; it is on the accelerator's device while it runs.
        encode (`Callable`):
            Takes a batch of images, uint8 of shape `(batch_size, channels, height, width)`, and returns a tensor for
            each of them.
        description (`dict[str, str]`):
            Of the [`TensorCache`]; `what` is kept, and what it depends on.

    Returns:
        `tuple[TensorCache, CachedRecords]`: the cache and its reader.

    Raises:
        ValueError: as for [`cache_latents`].
    """
    what = description["what"]
    _refuse_moving_crops(data, what)
    cache = open_cache(accelerator, folder, description)
    shares = range(accelerator.process_index, len(data), accelerator.num_processes)
    bar = tqdm(shares, desc="Hashing images", disable=not accelerator.is_local_main_process)
    own = [(index, data.read_or_note(index, data.file_key) or "") for index in bar]
    file_keys = [key for _, key in sorted(gather_object(own))]
    _share_unreadable(data)
    mirrors = (False, True) if data.transform.random_flip else (False,)
    settings = data.transform.settings
    keys = [
        [content_key(file_key, *settings, *data.size(index), mirror) for mirror in mirrors]
        for index, file_key in enumerate(file_keys)
    ]

    # The same image twice is encoded once. Images of one size follow each other, to be encoded together.
    missing = {
        key: (data.size(index), index, mirror)
        for index, of_image in enumerate(keys)
        for key, mirror in zip(of_image, mirrors)
        if key not in cache and index not in data.unreadable
    }
    work = sorted((size, index, mirror, key) for key, (size, index, mirror) in missing.items())
    # Everybody has seen what is missing before anybody writes some of it.
    accelerator.wait_for_everyone()
    work = work[accelerator.process_index :: accelerator.num_processes]
    if missing:
        bar = tqdm(total=len(work), desc=f"Caching {what}", disable=not accelerator.is_local_main_process)
        with bar, cache.writer() as writer, offload_models(model, device=accelerator.device):
            while work:
                batch = [item for item in work[:batch_size] if item[0] == work[0][0]]
                work = work[len(batch) :]
                bar.update(len(batch))
                images, read = [], []
                for _, index, mirror, key in batch:
                    image = data.read_or_note(index, lambda index: data.pixels(np.array([[0, index]])))
                    if image is not None:
                        images.append(image.flip(-1) if mirror else image)
                        read.append(key)
                if images:
                    with torch.no_grad():
                        made = encode(data.transform.as_batch(torch.cat(images)).to(accelerator.device)).cpu()
                    writer.add(read, [[each] for each in made])
        accelerator.wait_for_everyone()
        cache.refresh()
        _share_unreadable(data)
        _note_twins(data, keys, cache)
    logger.info("%s of %d images are in %s, %d of them new.", what.capitalize(), len(data), folder, len(missing))
    return cache, CachedRecords(cache, keys)


def precomputed_folder(args: LatentArguments, output_dir: Path) -> Path:
    """Folder of a run's latents and text embeddings."""
    return Path(args.precomputed_dir or output_dir / "precomputed")


def cache_all_latents(
    accelerator: Accelerator | DryAccelerator,
    data: Iterable[ImageData | StreamData | None],
    vae: ModelMixin,
    folder: Path,
    batch_size: int,
) -> None:
    """[`cache_latents`] of all data sets that there are, in the subfolder `latents`."""
    for each in data:
        if isinstance(each, ImageData):
            cache_latents(accelerator, each, vae, folder / "latents", batch_size)


def _expect_latents(accelerator: DryAccelerator, data: ImageData, vae: ModelMixin) -> None:
    """Have the data set read moments without contents, and note the bytes that those of all its images would take."""
    sizes = [data.size(index) for index in range(len(data))]
    with torch.no_grad():
        moments = {
            size: encode_moments(
                vae, data.transform.as_batch(torch.empty(1, data.transform.channels, *size, device="meta"))
            )[0]
            for size in set(sizes)
        }
    data.read_moments = lambda index, mirrored: moments[data.size(index)]
    num_bytes = (1 + data.transform.random_flip) * sum(moments[size].nbytes for size in sizes)
    accelerator.cached["cache of latents"] = accelerator.cached.get("cache of latents", 0) + num_bytes


def _share_unreadable(data: ImageData) -> None:
    """Every process learns of what any of them could not read: no process asks the cache for that."""
    for index, (row, reason) in gather_object(sorted(data.unreadable.items())):
        data.note_unreadable(UnreadableImageError.of(index, row, reason))


def _note_twins(data: ImageData, keys: Sequence[Sequence[str]], cache: TensorCache) -> None:
    """Images that are not in the cache because one with the same bytes could not be read cannot be read either."""
    reasons = {key: reason for index, (_, reason) in data.unreadable.items() for key in keys[index]}
    for index, of_image in enumerate(keys):
        if index not in data.unreadable and any(key not in cache for key in of_image):

            def refuse(index: int, reason: str = reasons[of_image[0]]) -> None:
                raise ValueError(reason)

            data.read_or_note(index, refuse)
