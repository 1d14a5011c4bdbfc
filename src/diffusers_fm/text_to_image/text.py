# SPDX-License-Identifier: Apache-2.0
"""Text encoders of any pipeline through its `encode_prompt`: computed, kept, dropped or trained."""

import copy
import inspect
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from diffusers.training_utils import offload_models
from torch import nn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from ..data.cache import DryAccelerator, TensorCache, content_key, model_fingerprint
from ..data.images import CaptionColumn
from ..data.latents import open_cache
from ..data.randomness import BatchSlice
from ..data.streams import StreamData
from ..pipelines.one_step import StandIn, Tree, leaves, map_tensors
from ..pipelines.prompt_memo import PromptMemo, key_of
from .arguments import TextToImageArguments


logger = logging.getLogger(__name__)

# A caption that no data set has; its place in the arguments of `encode_prompt` is where captions stand.
MARKER = "\N{SYMBOL FOR START OF TEXT}"


class TextEncoders:
    """
    Stands in for a pipeline's `encode_prompt` in training.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline with text encoders.
        trained (`Sequence[nn.Module]`, *optional*):
            Text encoders that are trained: gradients flow back to their parameters that require them.

    Attributes:
        separable (`bool`):
            Whether encoders are dropped or trained one by one, so that it has to be known what each of them decides.
        memo ([`PromptMemo`], *optional*):
            Kept answers, for the encoders that are not trained.

    Raises:
        ValueError: if the pipeline reads no text.
    """

    def __init__(self, pipeline: DiffusionPipeline, trained: Sequence[nn.Module] = ()) -> None:
        self.names = sorted(
            name
            for name, component in pipeline.components.items()
            if name.startswith("text_encoder") and isinstance(component, nn.Module)
        )
        if not self.names or "encode_prompt" not in dir(pipeline):
            raise ValueError(f"{type(pipeline).__name__} has no text encoder whose captions could be trained on.")
        self.pipeline = pipeline
        self.trained = [name for name in self.names if any(pipeline.components[name] is each for each in trained)]
        self.separable = False
        self.offload = False
        self.memo: PromptMemo | None = None
        self._parameters = list(inspect.signature(pipeline.encode_prompt).parameters)
        self._dropped: torch.Tensor | None = None
        self._gradients = False
        self._effects: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._outputs: dict[str, Tree] = {}

    @property
    def encoders(self) -> list[Any]:
        """The text encoders, in the order of their names."""
        return [self.pipeline.components[name] for name in self.names]

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        """The answer of `encode_prompt`."""
        arguments = {**dict(zip(self._parameters, args)), **kwargs}
        if self.separable and not self._effects:
            self._effects = {name: self._effect(arguments, name) for name in self.names}
        if self.memo is not None and not self.trained:
            tree = self.memo(**arguments)
        else:
            tree = self._encode(arguments)
        if self.memo is not None and self.trained:
            kept = leaves(self.memo(**arguments))
            for name in set(self.names) - set(self.trained):
                tree = self._take(tree, name, kept)
        if self._dropped is not None and self.separable:
            for name, rows in zip(self.names, self._dropped.T):
                tree = self._take(tree, name, [zero for _, zero in self._effects[name]], rows)
        return tree

    def _take(self, tree: Tree, name: str, values: Sequence[torch.Tensor], rows: torch.Tensor | None = None) -> Tree:
        """An answer with other values where an encoder decides, in some rows or in all."""
        numbers = itertools.count()

        def take(tensor: torch.Tensor) -> torch.Tensor:
            number = next(numbers)
            place = self._effects[name][number][0].to(tensor.device)
            if not place.any():
                return tensor
            if rows is not None:
                # The field asks with fewer samples than a batch has.
                own = rows[: len(tensor)].to(tensor.device)
                place = place & own.reshape(-1, *[1] * (tensor.ndim - 1))
            return torch.where(place, values[number].to(tensor), tensor)

        return map_tensors(take, tree)

    def _encode(self, arguments: dict[str, Any]) -> Tree:
        # diffusers warns of each long caption at each visit; one warning of the run counts them all.
        stock_logger = logging.getLogger(type(self.pipeline).__module__)
        level = stock_logger.level
        stock_logger.setLevel(logging.ERROR)
        pipeline = self.pipeline
        if self.memo is not None and self.trained:
            # Encoders whose answers are kept only say how many there are.
            pipeline = copy.copy(pipeline)
            for name in set(self._outputs) - set(self.trained):
                output = self._outputs[name]
                vars(pipeline)[name] = StandIn(self.pipeline.components[name], partial(_repeat, output))
        try:
            with (
                torch.set_grad_enabled(bool(self.trained) and self._gradients),
                offload_models(*self.encoders, device=arguments.get("device"), offload=self.offload),
            ):
                return pipeline.encode_prompt(**arguments)
        finally:
            stock_logger.setLevel(level)

    @contextmanager
    def dropping(self, dropped: torch.Tensor | None) -> Iterator[None]:
        """
        Within this context a call takes text encoders for zeros, each for some captions.

        diffusers does so with a T5 of Stable Diffusion 3 that is not loaded: a model that has learned this can be
        sampled without it (arXiv 2403.03206, section 5.3 and appendix B.3).

        Args:
            dropped (`torch.Tensor` of shape `(batch_size, num_encoders)`, *optional*):
                Booleans.
        """
        self._dropped, self._gradients = dropped, torch.is_grad_enabled()
        try:
            yield
        finally:
            self._dropped, self._gradients = None, False

    @torch.no_grad()
    def _effect(self, arguments: dict[str, Any], name: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Places of each tensor of an answer that an encoder decides, and their values without it."""
        modes = [(module, module.training) for encoder in self.encoders for module in encoder.modules()]
        for encoder in self.encoders:
            encoder.eval()
        two = [{**arguments, **_captions(arguments, [caption, caption])} for caption in ("", MARKER)]
        plain = [leaves(self._encode(each)) for each in two]

        def silence(module: nn.Module, inputs: Any, output: Tree) -> Tree:
            silent = map_tensors(_zeros, output)
            self._outputs[name] = map_tensors(lambda tensor: tensor[:1], silent)
            return silent

        handle = self.pipeline.components[name].register_forward_hook(silence)
        try:
            without = [leaves(self._encode(each)) for each in two]
        finally:
            handle.remove()
            for module, training in modes:
                module.training = training
        found = []
        for first, second, zero, other in zip(*plain, *without):
            alike = first.shape == second.shape == zero.shape == other.shape
            decided = (first != zero) | (second != other) if alike else torch.ones(1, dtype=torch.bool)
            if decided.any() and not (alike and len(first) == 2 and torch.equal(zero[decided], other[decided])):
                raise ValueError(
                    f"The text encoders of {type(self.pipeline).__name__} do not stand side by side: neither"
                    " --text_encoder_dropout nor --train_text_encoder works with it."
                )
            found.append((decided.any(0, keepdim=True), zero[:1]))
        return found


def _repeat(output: Tree, arguments: dict[str, Any]) -> Tree:
    """Output of an encoder for each of its inputs."""
    (count, *_) = next(value for value in arguments.values() if isinstance(value, torch.Tensor)).shape
    return map_tensors(lambda tensor: tensor.expand(count, *tensor.shape[1:]), output)


def _zeros(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.is_floating_point() else tensor


def _captions(arguments: dict[str, Any], captions: list[str]) -> dict[str, Any]:
    """Arguments of `encode_prompt` that are captions, replaced."""
    prompts = arguments["prompt"]
    given = {name for name, value in arguments.items() if value is prompts or (value == prompts and value is not None)}
    return {name: list(captions) for name in given}


def choose_encoder_dropout(text: TextEncoders, rates: Sequence[float]) -> list[float]:
    """Dropout of each text encoder, from one rate for all or one for each; a `ValueError` if the count differs."""
    count = len(text.names)
    if len(rates) not in (1, count):
        raise ValueError(
            f"--text_encoder_dropout must be one number in [0, 1], or one for each of the {count} text encoders, got"
            f" {list(rates)}."
        )
    return list(rates) * count if len(rates) == 1 else list(rates)


def draw_encoder_dropout(part: BatchSlice, rates: Sequence[float]) -> torch.Tensor | None:
    """Text encoders that are taken for zeros, for each caption of a part: booleans `(batch_size, num_encoders)`."""
    if not any(rates):
        return None
    numbers = [part.uniform(f"text_encoder_dropout {i}") for i in range(len(rates))]
    return torch.stack(numbers, dim=1) < torch.tensor(rates)


def weigh_prior(args: TextToImageArguments, captions: Sequence[str], losses: torch.Tensor) -> torch.Tensor:
    """Losses of a batch, those of images of the class times `--prior_loss_weight`."""
    if args.class_prompt is None:
        return losses
    weights = [args.prior_loss_weight if caption == args.class_prompt else 1.0 for caption in captions]
    return losses * torch.tensor(weights).to(losses)


def warn_of_long_captions(
    pipeline: DiffusionPipeline, captions: CaptionColumn | StreamData, max_sequence_length: int | None
) -> None:
    """Warn once of captions that are longer than the tokenizers read; of a stream, of those at its beginning."""
    distinct = list(captions.distinct())
    found = []
    for name, tokenizer in pipeline.components.items():
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            continue
        length = tokenizer.model_max_length
        if max_sequence_length is not None and not isinstance(tokenizer, CLIPTokenizer):
            length = max_sequence_length
        tokens = tokenizer(distinct, truncation=False, verbose=False).input_ids
        count = sum(len(each) > length for each in tokens)
        if count:
            found.append(f"{count} are longer than the {length} tokens of {name}")
    if found:
        logger.warning("Of %d different captions, %s; what is beyond is not read.", len(distinct), ", ".join(found))


class KeptCaptions(MutableMapping[Any, Tree]):
    """Answers of `encode_prompt` for single captions in a tensor cache, as [`PromptMemo`] keeps them."""

    def __init__(self, cache: TensorCache) -> None:
        self.cache = cache
        self._trees: dict[Any, Tree] = {}
        self._digests: dict[Any, str] = {}

    def __getitem__(self, key: Any) -> Tree:
        if key in self._trees:
            return self._trees[key]
        record = iter(self.cache.read(self.digest(key)))
        return map_tensors(lambda tensor: next(record), self._alike(key))

    def __setitem__(self, key: Any, tree: Tree) -> None:
        self._trees[key] = tree

    def __delitem__(self, key: Any) -> None:
        del self._trees[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._trees or self.digest(key) in self.cache

    def __iter__(self) -> Iterator[Any]:
        return iter(self._trees)

    def __len__(self) -> int:
        return len(self._trees)

    def digest(self, key: Any) -> str:
        """Name of a caption's record."""
        if key not in self._digests:
            self._digests[key] = content_key(repr(key))
        return self._digests[key]

    def _alike(self, key: Any) -> Tree:
        """A tree for the same arguments but for the caption."""
        names = [name for name, _ in key]
        return next(tree for other, tree in self._trees.items() if [name for name, _ in other] == names)


class _EveryCaption(dict[Any, Tree]):
    """Embeddings without contents, of every caption the same."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def __contains__(self, key: object) -> bool:
        return True

    def __getitem__(self, key: Any) -> Tree:
        return self._tree


def cache_captions(
    accelerator: Accelerator | DryAccelerator,
    captions: Iterable[str],
    text: TextEncoders,
    encode: Callable[[Sequence[str]], Any],
    compare: Callable[[Sequence[str]], Any],
    folder: Path,
) -> None:
    """
    Encode all captions, and the empty one, once, each alone. A record is found by the arguments of `encode_prompt`,
    the whole cache by the encoders. Every process calls it and does its share; what is there is not done again.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        captions (`Iterable[str]`):
            All captions.
        text ([`TextEncoders`]):
            Text encoders of the pipeline; from then on they answer from the cache.
        encode (`Callable`):
            Runs the pipeline for a list of captions up to its network.
        compare (`Callable`):
            Compares kept captions of different lengths with the encoders' own.
        folder (`Path`):
            Folder of the cache.
    """
    models = text.encoders
    distinct = list(dict.fromkeys([*captions, ""]))
    if isinstance(accelerator, DryAccelerator):
        text.memo = PromptMemo(text.pipeline, accelerator.device)
        encode([""])
        (tree,) = text.memo.kept.values()
        text.memo.kept = _EveryCaption(tree)
        accelerator.cached["cache of embeddings"] = len(distinct) * sum(tensor.nbytes for tensor in leaves(tree))
        return
    description = {
        "what": "text embeddings of single captions",
        "text encoders": model_fingerprint(*models),
        "dtype": ", ".join(str(model.dtype) for model in models),
    }
    cache = open_cache(accelerator, folder, description)
    kept = KeptCaptions(cache)
    memo = PromptMemo(text.pipeline)
    memo.kept = kept
    with offload_models(*models, device=accelerator.device):
        # The arguments that the pipeline gives, with the marker where captions stand.
        text.memo, trained, text.trained = memo, text.trained, []
        encode([MARKER])
        arguments = {caption: _with_caption(memo.asked, caption) for caption in distinct}
        keys = {caption: key_of(arguments[caption]) for caption in distinct}
        missing = sorted(caption for caption in distinct if keys[caption] not in kept)
        accelerator.wait_for_everyone()
        work = missing[accelerator.process_index :: accelerator.num_processes]
        if missing:
            bar = tqdm(work, desc="Caching text embeddings", disable=not accelerator.is_local_main_process)
            with cache.writer() as writer:
                for caption in bar:
                    memo(**arguments[caption])
                    writer.add([kept.digest(keys[caption])], [leaves(kept.pop(keys[caption]))])
            accelerator.wait_for_everyone()
            cache.refresh()
        text.trained = trained
        compare([min(distinct, key=len), max(distinct, key=len)])
    logger.info("Embeddings of %d captions are in %s, %d of them new.", len(distinct), folder, len(missing))


def _with_caption(arguments: dict[str, Any], caption: str) -> dict[str, Any]:
    """Arguments of `encode_prompt` for the marker, with another caption in its place."""
    return {name: [caption] if value == [MARKER] else value for name, value in arguments.items()}
