# SPDX-License-Identifier: Apache-2.0
"""Text embeddings of Stable Diffusion 3: two CLIPs and, where there is one, a T5; computed, cached or trained."""

import copy
import itertools
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models
from tqdm.auto import tqdm

from ..data.cache import DryAccelerator, TensorCache, content_key, model_fingerprint
from ..data.latents import open_cache
from ..pipelines.init_pipeline import ENCODERS


logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

# Prompt embeddings `(batch_size, num_tokens, joint_attention_dim)` and pooled ones `(batch_size, pooled_dim)`.
Embeds = tuple[torch.Tensor, torch.Tensor]

# Captions of a batch to embeddings on the device of training.
EncodeCaptions = Callable[[Sequence[str]], Embeds]

TOKENIZED_AT_ONCE = 1000


class PromptEncoder:
    """
    Text encoders of a pipeline, called through its own [`~diffusers.StableDiffusion3Pipeline.encode_prompt`]: token
    embeddings of both CLIPs side by side, after them those of the T5 (zeros without a T5), and the pooled embeddings
    of both CLIPs.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            Pipeline with text encoders and tokenizers.
        max_sequence_length (`int`):
            Tokens of the T5, or of the zeros in its place.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Device on which the encoders run.
        offload (`bool`, *optional*, defaults to `False`):
            Keep them on the device only while they run.
        trained (`bool`, *optional*, defaults to `False`):
            Let gradients flow back to parameters of the encoders that require them.

    Raises:
        ValueError: if the pipeline has no CLIP, or their tokens do not fit the transformer.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        max_sequence_length: int,
        device: torch.device | str = "cpu",
        offload: bool = False,
        trained: bool = False,
    ) -> None:
        missing = [name for name in (*ENCODERS[:2], *TOKENIZERS[:2]) if pipeline.components[name] is None]
        if missing:
            raise ValueError(f"Captions are encoded by two CLIPs, but the pipeline has no {' and no '.join(missing)}.")
        self._pipeline, self._device = pipeline, torch.device(device)
        self._offload, self._trained = offload, trained
        self.max_sequence_length = max_sequence_length
        self.has_t5 = pipeline.text_encoder_3 is not None
        first, second = pipeline.text_encoder.config, pipeline.text_encoder_2.config
        self.num_clip_tokens = pipeline.tokenizer_max_length
        self._widths = (first.hidden_size, second.hidden_size)
        self._pooled_widths = (first.projection_dim, second.projection_dim)
        transformer = pipeline.transformer.config
        if sum(self._widths) > transformer.joint_attention_dim:
            raise ValueError(
                f"The tokens of the CLIPs are {sum(self._widths)} wide together, but the transformer takes"
                f" {transformer.joint_attention_dim} (`joint_attention_dim`)."
            )
        if sum(self._pooled_widths) != transformer.pooled_projection_dim:
            raise ValueError(
                f"The pooled vectors of the CLIPs are {sum(self._pooled_widths)} wide together, but the transformer"
                f" takes {transformer.pooled_projection_dim} (`pooled_projection_dim`)."
            )

    @property
    def encoders(self) -> list[Any]:
        """Text encoders that the pipeline has."""
        return [self._pipeline.components[name] for name in ENCODERS if self._pipeline.components[name] is not None]

    def __call__(self, captions: Sequence[str]) -> Embeds:
        """
        Encode the captions of a batch; equal ones once.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: prompt embeddings of shape
            `(batch_size, num_clip_tokens + max_sequence_length, joint_attention_dim)` and pooled embeddings of shape
            `(batch_size, pooled_projection_dim)`, on the device, in the dtype of the encoders.
        """
        distinct = list(dict.fromkeys(captions))
        # One warning of the run counts all captions that are too long; diffusers would warn of each at each visit.
        stock_logger = logging.getLogger(StableDiffusion3Pipeline.__module__)
        level = stock_logger.level
        stock_logger.setLevel(logging.ERROR)
        try:
            with (
                torch.set_grad_enabled(self._trained and torch.is_grad_enabled()),
                offload_models(*self.encoders, device=self._device, offload=self._offload),
            ):
                # Its annotation allows for `None`, which it returns for negative prompts that are not asked for.
                encoded: Any = self._pipeline.encode_prompt(
                    prompt=distinct,
                    prompt_2=None,
                    prompt_3=None,
                    device=self._device,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.max_sequence_length,
                )
        finally:
            stock_logger.setLevel(level)
        embeds, _, pooled, _ = encoded
        if len(distinct) == len(captions):
            return embeds, pooled
        rows = torch.tensor([distinct.index(caption) for caption in captions], device=embeds.device)
        return embeds[rows], pooled[rows]

    def _token_ids(self, captions: Sequence[str], **options: Any) -> list[list[list[int]]]:
        """Numbers of the tokens, by encoder and caption; tokenizers take `max_length` and the options."""
        lengths = {"tokenizer": self.num_clip_tokens, "tokenizer_2": self.num_clip_tokens}
        if self.has_t5:
            lengths["tokenizer_3"] = self.max_sequence_length
        return [
            self._pipeline.components[name](list(captions), max_length=length, verbose=False, **options).input_ids
            for name, length in lengths.items()
        ]

    def count_too_long(self, captions: Iterable[str]) -> tuple[int, int]:
        """Count the captions that are longer than the CLIPs read, and than the T5 reads."""
        too_long = [0, 0]
        left = iter(captions)
        while batch := list(itertools.islice(left, TOKENIZED_AT_ONCE)):
            first, second, *t5 = ([len(ids) for ids in each] for each in self._token_ids(batch, truncation=False))
            too_long[0] += sum(max(lengths) > self.num_clip_tokens for lengths in zip(first, second))
            too_long[1] += sum(length > self.max_sequence_length for each in t5 for length in each)
        return too_long[0], too_long[1]

    def keys(self, captions: Sequence[str]) -> list[str]:
        """Keys of captions in a cache, equal for captions with equal tokens and thus embeddings."""
        ids = self._token_ids(captions, padding="max_length", truncation=True)
        return [
            content_key(self.max_sequence_length, *(np.array(tokens).tobytes() for tokens in of_caption))
            for of_caption in zip(*ids)
        ]

    def pack(self, embeds: Embeds) -> list[list[torch.Tensor]]:
        """Embeddings of each caption without zeros: the CLIPs' tokens, their pooled vectors, and the T5's tokens."""
        tokens, pooled = embeds
        parts = [tokens[:, : self.num_clip_tokens, : sum(self._widths)], pooled]
        if self.has_t5:
            parts.append(tokens[:, self.num_clip_tokens :])
        return [[part[i] for part in parts] for i in range(len(tokens))]

    def unpack(self, records: Sequence[Sequence[torch.Tensor]]) -> Embeds:
        """Embeddings of a batch, on the device, from records of [`pack`]."""
        clip, pooled, *t5 = (torch.stack(part).to(self._device) for part in zip(*records))
        width = self._pipeline.transformer.config.joint_attention_dim
        tokens = clip.new_zeros(len(clip), self.num_clip_tokens + self.max_sequence_length, width)
        tokens[:, : self.num_clip_tokens, : sum(self._widths)] = clip
        if t5:
            tokens[:, self.num_clip_tokens :] = t5[0]
        return tokens, pooled

    def drop(self, embeds: Embeds, dropped: torch.Tensor) -> Embeds:
        """
        Replace encoders by zeros, each for some captions, as [`~diffusers.StableDiffusion3Pipeline`] does with a T5
        that is not loaded. A model that has learned this can be sampled without the T5 (arXiv 2403.03206, section 5.3
        and appendix B.3).

        Args:
            embeds (`tuple[torch.Tensor, torch.Tensor]`):
                Embeddings of a batch.
            dropped (`torch.Tensor` of shape `(batch_size, 3)`):
                Booleans for both CLIPs and the T5.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: new embeddings of the same shapes.
        """
        tokens, pooled = (part.clone() for part in embeds)
        dropped = dropped.to(tokens.device)
        (first, second), (pooled_first, _) = self._widths, self._pooled_widths
        tokens[dropped[:, 0], : self.num_clip_tokens, :first] = 0
        tokens[dropped[:, 1], : self.num_clip_tokens, first : first + second] = 0
        tokens[dropped[:, 2], self.num_clip_tokens :] = 0
        pooled[dropped[:, 0], :pooled_first] = 0
        pooled[dropped[:, 1], pooled_first:] = 0
        return tokens, pooled


class CachedPrompts:
    """Text embeddings from a cache, in place of the encoders that made it."""

    def __init__(self, encoder: PromptEncoder, cache: TensorCache) -> None:
        self._encoder, self._cache = encoder, cache
        self._keys: dict[str, str] = {}

    def __call__(self, captions: Sequence[str]) -> Embeds:
        """Embeddings as [`PromptEncoder`] gives them; a `ValueError` if the cache lacks a caption or is damaged."""
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._keys))
        if new:
            self._keys.update(zip(new, self._encoder.keys(new)))
        for caption in captions:
            if self._keys[caption] not in self._cache:
                raise ValueError(f"The cache in {str(self._cache.folder)!r} has no embeddings of {caption!r}.")
        return self._encoder.unpack([self._cache.read(self._keys[caption]) for caption in captions])


def cache_prompts(
    accelerator: Accelerator | DryAccelerator,
    captions: Iterable[str],
    encoder: PromptEncoder,
    folder: Path,
    batch_size: int,
) -> EncodeCaptions:
    """
    Encode all captions, and the empty one, once, `batch_size` at a time. A record is found by the caption's tokens,
    the whole cache by the encoders. Every process calls it and does its share; what is there is not done again.
    """
    models = encoder.encoders
    distinct = list(dict.fromkeys([*captions, ""]))
    if isinstance(accelerator, DryAccelerator):
        record = encoder.pack(encoder([""]))[0]
        accelerator.cached["cache of embeddings"] = len(distinct) * sum(tensor.nbytes for tensor in record)
        return lambda captions: encoder.unpack([record] * len(captions))
    description = {
        "what": "text embeddings",
        "text encoders": model_fingerprint(*models),
        "dtype": ", ".join(str(model.dtype) for model in models),
    }
    cache = open_cache(accelerator, folder, description)
    missing = {
        key: caption
        for start in range(0, len(distinct), TOKENIZED_AT_ONCE)
        for batch in [distinct[start : start + TOKENIZED_AT_ONCE]]
        for key, caption in zip(encoder.keys(batch), batch)
        if key not in cache
    }
    accelerator.wait_for_everyone()
    work = sorted(missing.items())[accelerator.process_index :: accelerator.num_processes]
    if missing:
        bar = tqdm(total=len(work), desc="Caching text embeddings", disable=not accelerator.is_local_main_process)
        with bar, cache.writer() as writer, offload_models(*models, device=accelerator.device):
            for start in range(0, len(work), batch_size):
                batch = work[start : start + batch_size]
                writer.add([key for key, _ in batch], encoder.pack(encoder([caption for _, caption in batch])))
                bar.update(len(batch))
        accelerator.wait_for_everyone()
        cache.refresh()
    logger.info("Embeddings of %d captions are in %s, %d of them new.", len(distinct), folder, len(missing))
    return CachedPrompts(encoder, cache)


class TrainedPrompts:
    """Text embeddings by CLIPs in training, with gradients where they are on, and by the T5 of `prompts`."""

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        prompts: EncodeCaptions,
        max_sequence_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._prompts = None if pipeline.text_encoder_3 is None else prompts
        clips = copy.copy(pipeline)
        clips.text_encoder_3 = clips.tokenizer_3 = None
        self._clips = PromptEncoder(clips, max_sequence_length, device, trained=True)

    def __call__(self, captions: Sequence[str]) -> Embeds:
        """Embeddings of captions as [`PromptEncoder`] gives them."""
        tokens, pooled = self._clips(captions)
        if self._prompts is not None:
            count = self._clips.num_clip_tokens
            tokens = torch.cat([tokens[:, :count], self._prompts(captions)[0][:, count:]], dim=1)
        return tokens, pooled
