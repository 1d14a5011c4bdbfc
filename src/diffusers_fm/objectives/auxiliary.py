# SPDX-License-Identifier: Apache-2.0
"""Options by which a network learns faster: their arguments, and auxiliary losses on hidden states of its blocks."""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from ..arguments import Arguments, Count, Fixed, Fraction, Needs, NotNegative, Range, Size, option
from ..data.arrays import ArrayData
from ..data.cache import DryAccelerator
from ..data.features import VisionEncoder, cache_features
from ..data.images import ImageData
from ..data.latents import precomputed_folder
from ..data.loading import TrainingData
from ..data.randomness import BatchSlice
from ..losses import alignment_loss, normalize_patches
from ..models.interval import TRANSFORMERS
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..training.arguments import TrainingArguments
from ..training.distributed import SHARDING
from ..training.ema import AUXILIARY
from ..training.run import TrainingRun


logger = logging.getLogger(__name__)

BelowOne = Annotated[float, Range(0, 1, open_high=True)]

# Folder of the network of the first blocks that an internal head leaves beside the pipeline.
INTERNAL_NETWORK = "internal_network"
# Numbers of blocks in configurations: of the first list, and of those after it.
NUM_BLOCKS, NUM_LATER_BLOCKS = "num_layers", "num_single_layers"


@dataclass(frozen=True, kw_only=True)
class LearningArguments(Arguments):
    """Options that may make learning faster; none of them leaves a trace in the saved pipeline."""

    _argument_group_name = "faster learning"

    weight_clip: BelowOne = option(
        0.0,
        "Least time at which the weight of the loss is taken, of the straight coordinates; 0.05 for a network that"
        " predicts the data (JiT, arXiv 2511.13720).",
    )
    contrastive_weight: BelowOne = option(
        0.0,
        "Weight of the distance to another sample's target; 0.05 in arXiv 2506.05350. The velocity is then biased, see"
        " the documentation.",
    )
    mixflow_slowing: Fraction = option(
        0.0, "Give the network points with more noise than their time says, up to this; 0.8 in arXiv 2512.19311."
    )
    shift_base_dimension: Count | None = option(
        None, "Shift times by sqrt(values of a sample / this); 4096 in arXiv 2510.11690."
    )
    repa_teacher: Fixed[str | None] = option(
        None, "Vision encoder of transformers, a folder or Hub id, with whose features a block is aligned."
    )
    repa_block: Fixed[Count | None] = option(
        None,
        "Number of the block that is aligned, from 1; by default after two sevenths of them, as the paper's 8 of 28.",
    )
    repa_weight: NotNegative = option(0.5, "Weight of the alignment.", source="arXiv 2410.06940")
    repa_projector: Fixed[str] = option(
        "mlp", "Projector of hidden states: mlp (arXiv 2410.06940), or conv (arXiv 2512.10794).", ["mlp", "conv"]
    )
    repa_width: Annotated[Fixed[Count], Needs("repa_projector", "mlp")] = option(
        2048, "Hidden width of the projector mlp.", source="arXiv 2410.06940"
    )
    repa_mean_share: Fraction | None = option(
        None, "Normalise features over the patches, less this share of their mean; 0.6 in arXiv 2512.10794."
    )
    repa_stop_step: Size | None = option(None, "Step from which there is no alignment any more.")
    repa_resolution: Count | None = option(None, "Side of the images for the encoder; by default its own.")
    cache_features: bool = option(False, "Compute the encoder's features once, to disk; needs --center_crop.")
    internal_block: Fixed[Count | None] = option(
        None, "Number of the block after which a second head predicts too (arXiv 2512.24176), from 1."
    )
    internal_weight: NotNegative = option(0.5, "Weight of that head's loss.", source="arXiv 2512.24176")
    self_block: Fixed[Count | None] = option(
        None,
        "Number of the block, from 1, that is aligned with the network's own later block at less noise (arXiv"
        " 2505.02831).",
    )
    self_teacher_block: Fixed[Count | None] = option(
        None, "Number of that later block; by default after five sevenths of them.", source="arXiv 2505.02831"
    )
    self_weight: NotNegative = option(0.2, "Weight of that alignment.")
    self_distance: Fraction = option(0.2, "Greatest distance of both times.", source="arXiv 2505.02831")

    def check(self) -> None:
        for name in ("repa_block", "repa_mean_share", "repa_stop_step", "repa_resolution", "cache_features"):
            value = getattr(self, name)
            if value not in (None, False) and self.repa_teacher is None:
                raise ValueError(f"--{name} {value} needs --repa_teacher.")
        if self.self_teacher_block is not None and self.self_block is None:
            raise ValueError(f"--self_teacher_block {self.self_teacher_block} needs --self_block.")
        if not isinstance(self, TrainingArguments):
            return
        if self.torch_compile and self.has_auxiliary:
            raise ValueError("--torch_compile does not go with --repa_teacher, --internal_block and --self_block.")
        for name, unset in (("num_frames", 1), ("audio_seconds", None)):
            if self.has_auxiliary and getattr(self, name, unset) != unset:
                options = "--repa_teacher, --internal_block and --self_block"
                raise ValueError(f"{options} are for images: leave out --{name}.")
        if self.contrastive_weight and self.train_batch_size == 1:
            raise ValueError("--contrastive_weight needs a --train_batch_size of at least 2, got 1.")
        for name in ("shift", "shift_base_resolution"):
            if self.shift_base_dimension is not None and getattr(self, name, None) is not None:
                raise ValueError(f"Of --{name} and --shift_base_dimension one may be given.")

    @property
    def has_auxiliary(self) -> bool:
        """True if there is an auxiliary loss."""
        return any(each is not None for each in (self.repa_teacher, self.internal_block, self.self_block))


def loss_settings(args: Any, prediction_type: str) -> dict[str, Any]:
    """Arguments of [`~losses.flow_matching_loss`] that are the same in all steps."""
    return {
        "prediction_type": prediction_type,
        "weighting": args.weighting_scheme,
        "snr_gamma": args.snr_gamma,
        "weight_clip": args.weight_clip,
        # Batches of a dry run may have one sample.
        "contrastive_weight": 0.0 if args.dry_run else args.contrastive_weight,
    }


def learning_facts(args: LearningArguments) -> dict[str, str]:
    """Rows of a card: what the options have made of the velocity."""
    weight = args.contrastive_weight
    if not weight:
        return {}
    bias = f"(E[noise - data | x_t] - {weight:g} E[noise - data]) / {1 - weight:g}, by --contrastive_weight"
    return {"velocity learned": f"{bias}; `losses.undo_contrastive` gives the flow's own"}


@dataclass(frozen=True)
class StepInputs:
    """
    Part of a training step, for auxiliary losses.

    Args:
        step (`int`), part ([`BatchSlice`]), batch (`dict[str, Any]`):
            Number of the step, and its part.
        data, noise, x_t (`torch.Tensor` of shape `(batch_size, ...)`):
            Clean samples, noise, and the point between them that the network was given.
        t (`torch.Tensor` of shape `(batch_size,)`):
            Its time, 0 = data, 1 = noise.
        predict (`Callable`):
            `predict(x_t, t)` calls the model with the conditions of the part.
        loss (`Callable`):
            `loss(prediction)` is the loss of each sample, of shape `(batch_size,)`.
    """

    step: int
    part: BatchSlice
    batch: dict[str, Any]
    data: torch.Tensor
    noise: torch.Tensor
    x_t: torch.Tensor
    t: torch.Tensor
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    loss: Callable[[torch.Tensor], torch.Tensor]


class Auxiliary(nn.Module):
    """Auxiliary loss of a network in training: hooks on its blocks, and parameters that are trained with it."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Any] = []

    def losses(self, inputs: StepInputs) -> torch.Tensor:
        """Weighted losses of the samples, `(batch_size,)`, after the model was called for a step."""
        raise NotImplementedError

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self.handles:
            handle.remove()

    def save(self, folder: Path) -> None:
        """Save what sampling may use beside the pipeline; by default nothing."""


class AuxiliaryLosses(nn.ModuleList):
    """Auxiliary losses of a run, perhaps none."""

    def __iter__(self) -> Iterator[Any]:
        return super().__iter__()

    def losses(self, inputs: StepInputs) -> torch.Tensor:
        """Sum of the losses of the samples, `(batch_size,)`."""
        return torch.stack([each.losses(inputs) for each in self]).sum(0)

    def remove(self) -> None:
        """Take all hooks off again."""
        for each in self:
            each.remove()

    def save(self, folder: Path) -> None:
        """Save what sampling may use beside the pipeline."""
        for each in self:
            each.save(folder)


def block_lists(network: nn.Module) -> list[str]:
    """Names of the lists of a network's blocks, in the order in which they are called."""
    family = TRANSFORMERS.get(type(network).__name__)
    if family is not None:
        return list(family.lists)
    return [name for name, child in network.named_children() if isinstance(child, nn.ModuleList)]


def choose_block(network: nn.Module, number: int | None, share: float, option: str) -> tuple[int, nn.Module]:
    """Number, from 1, and block of a network's first list, by default after a share of them."""
    lists = block_lists(network)
    blocks = list(network.get_submodule(lists[0]).children()) if lists else []
    if not blocks:
        raise ValueError(f"--{option} needs a network with a list of blocks, and a {type(network).__name__} has none.")
    number = max(1, round(share * len(blocks))) if number is None else number
    if number > len(blocks):
        raise ValueError(f"--{option} must be from 1 to {len(blocks)} for this network, got {number}.")
    return number, blocks[number - 1]


def hidden_width(network: Any, number: int) -> int:
    """Channels after a block."""
    config = network.config
    if "num_attention_heads" in config and "attention_head_dim" in config:
        return config.num_attention_heads * config.attention_head_dim
    if "block_out_channels" in config:
        return config.block_out_channels[number - 1]
    raise ValueError(f"It is not known how many channels the blocks of a {type(network).__name__} have.")


def as_map(hidden: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Hidden states as a map `(batch_size, channels, rows, columns)`; tokens by height and width of the image."""
    if hidden.ndim == 4:
        return hidden
    count, (height, width) = hidden.shape[1], size
    rows = round(math.sqrt(count * height / width))
    columns = round(rows * width / height)
    if rows * columns != count:
        raise ValueError(f"The {count} tokens of a block are no map of an image of {height} x {width}.")
    return hidden.transpose(1, 2).unflatten(2, (rows, columns))


def hidden_states(output: Any) -> torch.Tensor:
    """Hidden states of the image in a block's output: of several tensors the last, after those of the text."""
    if isinstance(output, torch.Tensor):
        return output
    return [each for each in output if isinstance(each, torch.Tensor)][-1]


class Kept:
    """Hidden states after a block in the last call of the network, and the hook that keeps them."""

    def __init__(self, block: nn.Module) -> None:
        self.output: Any = None
        self.handle = block.register_forward_hook(self._keep)

    def _keep(self, block: nn.Module, args: Any, output: Any) -> None:
        self.output = output

    @property
    def hidden(self) -> torch.Tensor:
        return hidden_states(self.output)


class ProjectedBlock(Auxiliary):
    """Auxiliary loss on the projected hidden states of a block."""

    def __init__(self, model: nn.Module, network: nn.Module, number: int, block: nn.Module, width: int) -> None:
        super().__init__()
        self.channels = hidden_width(network, number)
        self.projector: nn.Module = nn.Sequential(
            *(nn.Conv2d(self.channels, width, 1), nn.SiLU(), nn.Conv2d(width, width, 1), nn.SiLU())
        )
        self._kept, self.projected, self.size = Kept(block), torch.empty(0), (1, 1)
        # In the call of the model, so that engines that wrap it see the projector's part too.
        self.handles = [self._kept.handle, model.register_forward_hook(self._project)]

    def _project(self, model: nn.Module, args: Any, output: Any) -> None:
        # A model whose samples are sequences is given the size of the image.
        self.size = next((each for each in args if isinstance(each, tuple)), args[0].shape[-2:])
        if torch.is_grad_enabled():
            self.projected = self.projector(as_map(self._kept.hidden, self.size).float())


class FeatureAlignment(ProjectedBlock):
    """Alignment of a block with a vision encoder's features of the clean image (REPA, arXiv 2410.06940)."""

    def __init__(self, args: LearningArguments, model: nn.Module, network: nn.Module, encoder: VisionEncoder) -> None:
        number, block = choose_block(network, args.repa_block, 2 / 7, "repa_block")
        super().__init__(model, network, number, block, args.repa_width)
        channels = encoder.num_channels
        if args.repa_projector == "conv":
            self.projector = nn.Conv2d(self.channels, channels, 3, padding=1)
        else:
            self.projector.append(nn.Conv2d(args.repa_width, channels, 1))  # pyright: ignore[reportCallIssue]
        # In a tuple, which hides it: the encoder has no part in the state.
        self._encoder, self._args = (encoder,), args

    def losses(self, inputs: StepInputs) -> torch.Tensor:
        """See [`Auxiliary`]."""
        args = self._args
        if args.repa_stop_step is not None and inputs.step >= args.repa_stop_step:
            # Engines wait for a gradient of every parameter.
            return 0.0 * self.projected.flatten(1).sum(1)
        features = inputs.batch["features"] if "features" in inputs.batch else self._encoder[0](inputs.batch["images"])
        if args.repa_mean_share is not None:
            features = normalize_patches(features.float(), args.repa_mean_share)
        return args.repa_weight * alignment_loss(self.projected, features)


class SelfAlignment(ProjectedBlock):
    """
    Alignment of a block with a later block of the same network at less noise (SRA, arXiv 2505.02831), without
    gradient. The paper's teacher has averaged weights and its loss is another one.
    """

    def __init__(
        self, args: LearningArguments, model: nn.Module, network: nn.Module, scheduler: FlowMatchScheduler
    ) -> None:
        number, block = choose_block(network, args.self_block, 0, "self_block")
        later, teacher = choose_block(network, args.self_teacher_block, 5 / 7, "self_teacher_block")
        if later <= number:
            raise ValueError(f"--self_teacher_block must be above --self_block {number}, got {later}.")
        width = hidden_width(network, later)
        super().__init__(model, network, number, block, width)
        self.projector.append(nn.Conv2d(width, width, 1))  # pyright: ignore[reportCallIssue]
        self._teacher, self._args, self._path = Kept(teacher), args, scheduler.path
        self.handles.append(self._teacher.handle)

    def losses(self, inputs: StepInputs) -> torch.Tensor:
        """See [`Auxiliary`]."""
        path, projected, args = self._path, self.projected, self._args
        distance = args.self_distance * inputs.part.uniform("self_alignment").to(inputs.t)
        t = path.time_at((path.ratio(inputs.t) - distance).clamp(min=path.ratio_min))
        with torch.no_grad():
            inputs.predict(path.sample(inputs.data, inputs.noise, t), t)
        features = as_map(self._teacher.hidden, self.size).float()
        return args.self_weight * alignment_loss(projected, features)


class InternalHead(Auxiliary):
    """
    Second head, of the form of the network's own, that predicts from the hidden states of an early block, with the
    same loss (internal guidance, arXiv 2512.24176).
    """

    def __init__(self, args: LearningArguments, network: Any) -> None:
        super().__init__()
        number, block = choose_block(network, args.internal_block, 0, "internal_block")
        first, *later = block_lists(network)
        config = network.config
        if NUM_BLOCKS not in config or len(later) > 1 or (later and NUM_LATER_BLOCKS not in config):
            raise ValueError(f"--internal_block does not work for a {type(network).__name__}.")
        self._args, self._number, self._kept = args, number, Kept(block)
        self.handles = [self._kept.handle]
        none_later = {NUM_LATER_BLOCKS: 0} if later else {}
        early = type(network).from_config(config, **{NUM_BLOCKS: 1, **none_later})
        heads = {name: child for name, child in early.named_children() if "out" in name}
        self.heads = nn.ModuleDict(heads)
        for name, child in network.named_children():
            if name not in heads and name not in (first, *later):
                setattr(early, name, child)
        for name, parameter in network.named_parameters(recurse=False):
            setattr(early, name, parameter)
        # In the place of the early blocks stands one that returns what they have returned.
        stand_in = copy.copy(network.get_submodule(first)[0])
        vars(stand_in).update(forward=self._replay, _forward_hooks={}, _forward_pre_hooks={})
        setattr(early, first, nn.ModuleList([stand_in]))
        # In a tuple: most of it is the network itself.
        self._networks = network, early, none_later

    def _replay(self, *args: Any, **kwargs: Any) -> Any:
        return self._kept.output

    def losses(self, inputs: StepInputs) -> torch.Tensor:
        """See [`Auxiliary`]."""
        network, early, _ = self._networks
        vars(network)["forward"] = early.forward
        try:
            prediction = inputs.predict(inputs.x_t, inputs.t)
        finally:
            del vars(network)["forward"]
        return self._args.internal_weight * inputs.loss(prediction)

    def save(self, folder: Path) -> None:
        """Save the network of the early blocks and this head in the folder `INTERNAL_NETWORK`, for guidance by it."""
        network, _, none_later = self._networks
        early = type(network).from_config(network.config, **{NUM_BLOCKS: self._number, **none_later})
        trained = {**network.state_dict(), **self.heads.state_dict()}
        try:
            early.load_state_dict({name: trained[name] for name in early.state_dict()})
        except (KeyError, RuntimeError) as error:
            logger.warning("No network of the first %d blocks is saved, its last is another: %s", self._number, error)
            return
        early.save_pretrained(folder / INTERNAL_NETWORK)


def begin_auxiliaries(
    run: TrainingRun[Any], model: nn.Module, network: nn.Module, scheduler: FlowMatchScheduler, data: TrainingData
) -> AuxiliaryLosses:
    """
    Auxiliary losses of `--repa_teacher`, `--internal_block` and `--self_block`.

    Their parameters become part of the model, so that they are optimized and checkpointed with it, and no part of the
    network. Every process calls it.

    Args:
        run ([`TrainingRun`]):
            With the arguments.
        model (`nn.Module`):
            All that is trained, before [`TrainingRun.begin`].
        network (`nn.Module`):
            Network of the pipeline.
        scheduler ([`FlowMatchScheduler`]):
            With the path.
        data ([`ImageData`], [`StreamData`] or [`ArrayData`]):
            Training data, whose features are cached.

    Returns:
        [`AuxiliaryLosses`]: empty without such options, and in a dry run.

    Raises:
        ValueError: if the network has no such blocks, or the engine shards it.
    """
    args, accelerator = run.args, run.accelerator
    if not args.has_auxiliary:
        return AuxiliaryLosses()
    if accelerator.distributed_type in SHARDING:
        raise ValueError(
            "--repa_teacher, --internal_block and --self_block do not go with FSDP2 and DeepSpeed: use DDP."
        )
    network, made = unwrap_module(network), AuxiliaryLosses()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(run.seed)
        if args.repa_teacher is not None:
            encoder = VisionEncoder(args.repa_teacher, args.repa_resolution)
            made.append(FeatureAlignment(args, model, network, encoder))
            _prepare_features(run, data, encoder)
        if args.internal_block is not None:
            made.append(InternalHead(args, network))
        if args.self_block is not None:
            made.append(SelfAlignment(args, model, network, scheduler))
    model.add_module(AUXILIARY, made.train())
    return AuxiliaryLosses() if isinstance(accelerator, DryAccelerator) else made


def _prepare_features(run: TrainingRun[Any], data: TrainingData, encoder: VisionEncoder) -> None:
    """Have features computed, by an encoder on the device or once for all."""
    args, accelerator = run.args, run.accelerator
    if args.cache_latents and not args.cache_features:
        raise ValueError("--repa_teacher with --cache_latents, which leaves no images, needs --cache_features.")
    if isinstance(data, ArrayData) or (args.cache_features and not isinstance(data, ImageData)):
        needs = "--cache_features needs images that are known beforehand" if args.cache_features else "needs images"
        raise ValueError(f"--repa_teacher {args.repa_teacher}: {needs}, got a {type(data).__name__}.")
    if isinstance(accelerator, DryAccelerator):
        accelerator.frozen += 0 if args.cache_features else encoder.model.get_memory_footprint()
        return
    if args.cache_features:
        folder = precomputed_folder(args, run.output_dir) / "features"
        cache_features(accelerator, data, encoder, folder, args.train_batch_size)
    else:
        encoder.model.to(accelerator.device)
