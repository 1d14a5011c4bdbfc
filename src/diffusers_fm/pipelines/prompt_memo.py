# SPDX-License-Identifier: Apache-2.0
"""Captions encoded once, alone, by a pipeline's own `encode_prompt`; batches put together from them."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .one_step import Tree, leaves, map_tensors


LIST, SHARED = "list", "shared"  # beside the number of an axis, and None
REFUSED = "refused"


class PromptMemo:
    """
    Stands in for a pipeline's `encode_prompt` and keeps what it says of each caption.

    How answers grow with the batch is seen from one caption given once and twice. Captions of different lengths are
    put together by zeros at the end; a velocity field compares the first such batch with the encoders' own.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline with a method `encode_prompt`.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
            Where embeddings are kept.

    Raises:
        ValueError: If the pipeline has no such method.
    """

    def __init__(self, pipeline: DiffusionPipeline, device: str | torch.device = "cpu") -> None:
        if "encode_prompt" not in dir(pipeline):
            raise ValueError(f"{type(pipeline).__name__} has no `encode_prompt` whose answers could be kept.")
        self.name, self.device = type(pipeline).__name__, device
        self.kept: dict[Any, Tree] = {}
        self._encode = pipeline.encode_prompt
        self._names = list(inspect.signature(self._encode).parameters)
        self.encode = self._encode
        self.unverified: Any = None  # arguments whose padding nobody has compared with the encoders' own
        self.asked: dict[str, Any] = {}  # arguments for the last caption
        self._axes: dict[Any, Tree] = {}
        self._masks: dict[Any, Tree] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Tree:
        """The answer of `encode_prompt`, put together from those for single captions."""
        arguments = {**dict(zip(self._names, args)), **kwargs}
        captions = arguments.get("prompt")
        given = any(isinstance(value, torch.Tensor) for value in arguments.values())
        copies = [
            value for name, value in arguments.items() if name.startswith("num_") and name.endswith("_per_prompt")
        ]
        if captions is None or given or any(count not in (None, 1) for count in copies):
            return self._encode(**arguments)
        size = 1 if isinstance(captions, str) else len(captions)
        singles = [_sample(arguments, size, i) for i in range(size)]
        trees = [self._one(single) for single in singles]
        joined = trees[0] if size == 1 else self._join(singles, trees)
        device = arguments.get("device")
        return joined if device is None else map_tensors(lambda tensor: tensor.to(device), joined)

    @torch.no_grad()
    def _one(self, single: dict[str, Any]) -> Tree:
        key, self.asked = key_of(single), single
        if key not in self.kept:
            try:
                tree = self._encode(**single)
                options = _options(single)
                if options not in self._axes:
                    self._axes[options] = find_axes(tree, self._encode(**_together(single, single)))
            except (AttributeError, TypeError) as error:
                raise ValueError(
                    f"{single['prompt'][0]!r} was not kept before {self.name} lost its encoders."
                ) from error
            self.kept[key] = map_tensors(lambda tensor: tensor.detach().to(self.device), tree)
        return self.kept[key]

    @torch.no_grad()
    def _join(self, singles: list[dict[str, Any]], trees: list[Tree]) -> Tree:
        options = _options(singles[0])
        axes = self._axes[options]
        shapes = {tuple(leaf.shape for leaf in leaves(tree)) for tree in trees}
        if len(shapes) == 1 or not _pads(axes):
            return merge(trees, axes, name=self.name)
        if options not in self._masks:
            lengths = [max((leaf.numel() for leaf in leaves(tree)), default=0) for tree in trees]
            short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
            self._masks[options] = self._padding(singles[short], singles[long], trees[short])
            self.unverified = options
        if self._masks[options] is REFUSED:
            raise ValueError(
                f"{self.name} pads captions so that a batch changes them: group captions of equal length, or take"
                " batches of one."
            )
        return merge(trees, axes, self._masks[options], self.name)

    def refuse(self) -> None:
        """Put no captions of different lengths together any more."""
        self._masks[self.unverified] = REFUSED

    def _padding(self, short: dict[str, Any], long: dict[str, Any], one: Tree) -> Tree:
        """Masks that only a padded batch has."""
        try:
            return _masks(one, self._encode(**_together(short, long)))
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"Captions of different lengths of {self.name} were not put together before it lost its encoders."
            ) from error


def remembered(encode: Callable[..., Tree]) -> Callable[..., Tree]:
    """An `encode_prompt` that computes each of its answers once, where its arguments are plain values."""
    names = list(inspect.signature(encode).parameters)
    kept: dict[Any, Tree] = {}

    def call(*args: Any, **kwargs: Any) -> Tree:
        arguments = {**dict(zip(names, args)), **kwargs}
        key = key_of(arguments)
        try:
            hash(key)
        except TypeError:
            return encode(**arguments)
        if key not in kept:
            # Some pipelines write into the lists that they are given.
            copies = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
            kept[key] = encode(**copies)
        return kept[key]

    return call


def merge(trees: list[Tree], axes: Tree, masks: Tree = None, name: str = "The pipeline") -> Tree:
    """Trees of single samples to that of a batch; where `masks` has a dtype, ones stand for a mask that is None."""
    lengths = [next((leaf.shape[1] for leaf in leaves(tree) if leaf.ndim == 3), 0) for tree in trees]
    return _merge(trees, axes, masks, lengths, name)


def _merge(trees: list[Tree], axes: Tree, masks: Tree, lengths: list[int], name: str) -> Tree:
    first = trees[0]
    if isinstance(masks, torch.dtype):
        trees = [torch.ones(1, n, dtype=masks) if tree is None else tree for n, tree in zip(lengths, trees)]
        axes = 0
    if axes == LIST:
        return [each for tree in trees for each in tree]
    if axes == SHARED:
        return max(trees, key=torch.Tensor.numel)
    if isinstance(axes, int):
        wide = [max(sizes) for sizes in zip(*(tree.shape for tree in trees))]
        return torch.cat([_pad(tree, wide, axes) for tree in trees], axes)
    if isinstance(first, dict):
        return {key: _merge([tree[key] for tree in trees], axes[key], None, lengths, name) for key in first}
    if isinstance(first, (list, tuple)):
        masks = masks or [None] * len(first)
        return type(first)(_merge(list(each), a, m, lengths, name) for each, a, m in zip(zip(*trees), axes, masks))
    if isinstance(first, torch.Tensor):
        raise ValueError(f"{name} packs the samples of a batch into one: take batches of one.")
    return first


def _pad(tensor: torch.Tensor, shape: list[int], axis: int) -> torch.Tensor:
    sizes = torch.Size(tensor.shape[i] if i == axis else size for i, size in enumerate(shape))
    if tensor.shape == sizes:
        return tensor
    padded = tensor.new_zeros(sizes)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    return padded


def find_axes(one: Tree, two: Tree) -> Tree:
    """Axis of each tensor of an answer that grows with the number of captions."""
    if isinstance(one, torch.Tensor):
        grown = [i for i, (a, b) in enumerate(zip(one.shape, two.shape)) if a != b]
        if not grown:
            return SHARED
        return grown[0] if len(grown) == 1 and two.shape[grown[0]] == 2 * one.shape[grown[0]] else None
    if isinstance(one, dict):
        return {name: find_axes(value, two[name]) for name, value in one.items()}
    if isinstance(one, (list, tuple)):
        return LIST if len(two) == 2 * len(one) > 0 else [find_axes(a, b) for a, b in zip(one, two)]
    return None


def _pads(axes: Tree) -> bool:
    """Return whether tensors of different lengths have to be put into one."""
    return any(map(_pads, axes)) if isinstance(axes, list) else isinstance(axes, int)


def _masks(one: Tree, truth: Tree) -> Tree:
    """The dtypes of tensors that a padded batch has and a single caption has not."""
    if one is None and isinstance(truth, torch.Tensor):
        return truth.dtype
    if isinstance(one, (list, tuple)):
        return [_masks(a, b) for a, b in zip(one, truth)]
    return None


def _sample(arguments: dict[str, Any], size: int, i: int) -> dict[str, Any]:
    """Arguments for one caption of a batch."""
    single = {
        name: [value[i]] if isinstance(value, list) and len(value) == size else value
        for name, value in arguments.items()
    }
    if isinstance(single["prompt"], str):
        single["prompt"] = [single["prompt"]]
    return {**single, "batch_size": 1} if "batch_size" in single else single


def _together(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Arguments for two captions."""
    both = {name: value + second[name] if isinstance(value, list) else value for name, value in first.items()}
    return {**both, "batch_size": 2} if "batch_size" in both else both


def key_of(arguments: dict[str, Any]) -> Any:
    """Name by which the answer to arguments for one caption is kept."""
    return tuple((name, _frozen(value)) for name, value in sorted(arguments.items()) if name != "device")


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return tuple((name, _frozen(each)) for name, each in value.items())
    return tuple(value) if isinstance(value, list) else value


def _options(single: dict[str, Any]) -> Any:
    """All but the words."""
    return tuple((name, "words" if isinstance(value, (str, tuple)) else value) for name, value in key_of(single))
