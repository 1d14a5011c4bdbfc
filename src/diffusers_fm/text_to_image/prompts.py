# SPDX-License-Identifier: Apache-2.0
"""Captions as Stable Diffusion 3 sees them: two CLIPs and, where there is one, a T5."""

import copy
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import offload_models

from ..data.cache import TensorCache, content_key
from ..pipelines.init_pipeline import ENCODERS


logger = logging.getLogger(__name__)

TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")

# Prompt embeddings `(batch_size, num_tokens, joint_attention_dim)` and pooled ones `(batch_size, pooled_dim)`.
Embeds = tuple[torch.Tensor, torch.Tensor]

# Captions of a batch to embeddings on the device of training.
ReadPrompts = Callable[[Sequence[str]], Embeds]

TOKENIZED_AT_ONCE = 1000


class PromptEncoder:
    """
    The text encoders of a pipeline. What it returns is what [`~diffusers.StableDiffusion3Pipeline.encode_prompt`]
    does, which it calls: both CLIPs' tokens beside each other, the T5's after them (zeros where there is no T5), and
    both CLIPs' pooled vectors.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            With text encoders and tokenizers.
        max_sequence_length (`int`):
            Tokens of the T5, or of the zeros in its place.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the encoders run.
        offload (`bool`, *optional*, defaults to `False`):
            Whether they are on the device only while they run.
        trained (`bool`, *optional*, defaults to `False`):
            Whether gradients flow back to parameters of the encoders that require them.

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
        self._pipeline, self._device, self._offload = pipeline, torch.device(device), offload
        self._trained = trained
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
        """The encoders that there are."""
        return [self._pipeline.components[name] for name in ENCODERS if self._pipeline.components[name] is not None]

    def __call__(self, captions: Sequence[str]) -> Embeds:
        """
        Encode captions; equal ones once.

        Args:
            captions (`Sequence[str]`):
                Captions of a batch.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: prompt embeddings of shape
            `(batch_size, num_clip_tokens + max_sequence_length, joint_attention_dim)` and pooled embeddings of shape
            `(batch_size, pooled_projection_dim)`, on the device, in the dtype of the encoders.
        """
        distinct = list(dict.fromkeys(captions))
        # Captions that are too long are counted once, not told at each visit.
        told = logging.getLogger(StableDiffusion3Pipeline.__module__)
        level = told.level
        told.setLevel(logging.ERROR)
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
            told.setLevel(level)
        embeds, _, pooled, _ = encoded
        if len(distinct) == len(captions):
            return embeds, pooled
        places = torch.tensor([distinct.index(caption) for caption in captions], device=embeds.device)
        return embeds[places], pooled[places]

    def token_ids(self, captions: Sequence[str], truncation: bool = True) -> list[list[list[int]]]:
        """
        What the encoders are given.

        Args:
            captions (`Sequence[str]`):
                Some captions.
            truncation (`bool`, *optional*, defaults to `True`):
                Whether to cut and pad to the encoders' lengths.

        Returns:
            `list[list[list[int]]]`: for each encoder and caption the numbers of the tokens.
        """
        options = [
            (self._pipeline.tokenizer, self.num_clip_tokens),
            (self._pipeline.tokenizer_2, self.num_clip_tokens),
        ]
        if self.has_t5:
            options.append((self._pipeline.tokenizer_3, self.max_sequence_length))
        if not truncation:
            return [tokenizer(list(captions), verbose=False).input_ids for tokenizer, _ in options]
        return [
            tokenizer(list(captions), padding="max_length", max_length=length, truncation=True).input_ids
            for tokenizer, length in options
        ]

    def count_too_long(self, captions: Iterable[str]) -> tuple[int, int]:
        """
        How many captions lose their end.

        Args:
            captions (`Iterable[str]`):
                All captions.

        Returns:
            `tuple[int, int]`: captions longer than the CLIPs take, and longer than the T5 takes.
        """
        counts = [0, 0]
        waiting: list[str] = []

        def count() -> None:
            lengths = [np.array([len(ids) for ids in each]) for each in self.token_ids(waiting, truncation=False)]
            counts[0] += int((np.maximum(lengths[0], lengths[1]) > self.num_clip_tokens).sum())
            counts[1] += int((lengths[2] > self.max_sequence_length).sum()) if self.has_t5 else 0
            waiting.clear()

        for caption in captions:
            waiting.append(caption)
            if len(waiting) == TOKENIZED_AT_ONCE:
                count()
        if waiting:
            count()
        return counts[0], counts[1]

    def keys(self, captions: Sequence[str]) -> list[str]:
        """
        Names of captions by what the encoders see of them.

        Args:
            captions (`Sequence[str]`):
                Some captions.

        Returns:
            `list[str]`: equal for captions with equal embeddings.
        """
        ids = self.token_ids(captions)
        return [
            content_key(self.max_sequence_length, *(np.array(each[i]).tobytes() for each in ids))
            for i in range(len(captions))
        ]

    def pack(self, embeds: Embeds) -> list[list[torch.Tensor]]:
        """
        Embeddings without the zeros that fill them up, to keep them.

        Args:
            embeds (`tuple[torch.Tensor, torch.Tensor]`):
                Of a batch.

        Returns:
            `list[list[torch.Tensor]]`: for each caption the CLIPs' tokens, their pooled vectors, and the T5's tokens
            if there is one.
        """
        tokens, pooled = embeds
        parts = [tokens[:, : self.num_clip_tokens, : sum(self._widths)], pooled]
        if self.has_t5:
            parts.append(tokens[:, self.num_clip_tokens :])
        return [[part[i] for part in parts] for i in range(len(tokens))]

    def unpack(self, records: Sequence[Sequence[torch.Tensor]]) -> Embeds:
        """
        The embeddings of [`pack`].

        Args:
            records (`Sequence[Sequence[torch.Tensor]]`):
                What was kept of each caption.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: of a batch, on the device.
        """
        clip, pooled, *t5 = (torch.stack(part).to(self._device) for part in zip(*records))
        width = self._pipeline.transformer.config.joint_attention_dim
        tokens = clip.new_zeros(len(clip), self.num_clip_tokens + self.max_sequence_length, width)
        tokens[:, : self.num_clip_tokens, : sum(self._widths)] = clip
        if t5:
            tokens[:, self.num_clip_tokens :] = t5[0]
        return tokens, pooled

    def drop(self, embeds: Embeds, dropped: torch.Tensor) -> Embeds:
        """
        Leave encoders out, each for some captions: what they say becomes zeros, as
        [`~diffusers.StableDiffusion3Pipeline`] puts in the place of a T5 that is not loaded. A model that has learned
        this can be sampled without the T5 (arXiv 2403.03206, section 5.3 and appendix B.3).

        Args:
            embeds (`tuple[torch.Tensor, torch.Tensor]`):
                Of a batch.
            dropped (`torch.Tensor` of shape `(batch_size, 3)`):
                Booleans for both CLIPs and the T5.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: new ones.
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
    """
    Embeddings from a cache in place of the encoders.

    Args:
        encoder ([`PromptEncoder`]):
            What the embeddings are of.
        cache ([`TensorCache`]):
            With all captions that will be asked for.
    """

    def __init__(self, encoder: PromptEncoder, cache: TensorCache) -> None:
        self._encoder, self._cache = encoder, cache
        self._keys: dict[str, str] = {}

    def __call__(self, captions: Sequence[str]) -> Embeds:
        """
        Embeddings of captions, as [`PromptEncoder`] gives them.

        Args:
            captions (`Sequence[str]`):
                Captions of a batch.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: prompt embeddings and pooled embeddings.

        Raises:
            ValueError: if one is not in the cache, or the cache is damaged.
        """
        new = list(dict.fromkeys(caption for caption in captions if caption not in self._keys))
        if new:
            self._keys.update(zip(new, self._encoder.keys(new)))
        for caption in captions:
            if self._keys[caption] not in self._cache:
                raise ValueError(f"The cache in {str(self._cache.folder)!r} has no embeddings of {caption!r}.")
        return self._encoder.unpack([self._cache.read(self._keys[caption]) for caption in captions])


class TrainedPrompts:
    """
    Embeddings by CLIPs that are trained, which answer anew each time, and by a T5 that is not.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            With the text encoders.
        prompts (`Callable`):
            What gives the T5's part, such as a cache; what it says of the CLIPs is not used.
        max_sequence_length (`int`):
            Tokens of the T5, or of the zeros in its place.
        device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
            Where the CLIPs are.
    """

    def __init__(
        self,
        pipeline: StableDiffusion3Pipeline,
        prompts: ReadPrompts,
        max_sequence_length: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._prompts = None if pipeline.text_encoder_3 is None else prompts
        clips = copy.copy(pipeline)
        clips.text_encoder_3 = clips.tokenizer_3 = None
        self._clips = PromptEncoder(clips, max_sequence_length, device, trained=True)

    def __call__(self, captions: Sequence[str]) -> Embeds:
        """
        Embeddings of captions, as [`PromptEncoder`] gives them, with gradients where they are on.

        Args:
            captions (`Sequence[str]`):
                Captions of a batch.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: prompt embeddings and pooled embeddings.
        """
        tokens, pooled = self._clips(captions)
        if self._prompts is not None:
            count = self._clips.num_clip_tokens
            tokens = torch.cat([tokens[:, :count], self._prompts(captions)[0][:, count:]], dim=1)
        return tokens, pooled
