# SPDX-License-Identifier: Apache-2.0
"""Cache of text embeddings, computed by all processes together before training."""

import logging
from collections.abc import Iterable
from pathlib import Path

from accelerate import Accelerator
from diffusers.training_utils import offload_models
from tqdm.auto import tqdm

from ..data.cache import model_fingerprint
from ..data.latents import open_cache
from .prompts import CachedPrompts, PromptEncoder


logger = logging.getLogger(__name__)


def cache_prompts(
    accelerator: Accelerator, captions: Iterable[str], encoder: PromptEncoder, folder: Path, batch_size: int
) -> CachedPrompts:
    """
    Encode all captions, and the empty one, once, `batch_size` at a time. A record is found by the caption's tokens,
    the whole cache by the encoders. Every process calls it and does its share; what is there is not done again.
    """
    models = encoder.encoders
    description = {
        "what": "text embeddings",
        "text encoders": model_fingerprint(*models),
        "dtype": ", ".join(str(model.dtype) for model in models),
    }
    cache = open_cache(accelerator, folder, description)
    distinct = list(dict.fromkeys([*captions, ""]))
    missing = {
        key: caption
        for start in range(0, len(distinct), 1000)
        for key, caption in zip(encoder.keys(distinct[start : start + 1000]), distinct[start : start + 1000])
        if key not in cache
    }
    accelerator.wait_for_everyone()
    work = sorted(missing.items())[accelerator.process_index :: accelerator.num_processes]
    if missing:
        bar = tqdm(total=len(work), desc="Caching text embeddings", disable=not accelerator.is_local_main_process)
        with bar, cache.writer() as writer, offload_models(*models, device=accelerator.device):
            for start in range(0, len(work), batch_size):
                batch = work[start : start + batch_size]
                embeds = encoder([caption for _, caption in batch])
                writer.add([key for key, _ in batch], encoder.pack(embeds))
                bar.update(len(batch))
        accelerator.wait_for_everyone()
        cache.refresh()
    logger.info("Embeddings of %d captions are in %s, %d of them new.", len(distinct), folder, len(missing))
    return CachedPrompts(encoder, cache)
