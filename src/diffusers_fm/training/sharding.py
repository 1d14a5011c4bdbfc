# SPDX-License-Identifier: Apache-2.0
"""Weights in shards (FSDP2): what is sharded is a copy, and the script's own models stay whole, to sample and save."""

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from .ema import EMA


# Engines whose checkpoints are in a format of their own.
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)

_CALLED_FROM_OUTSIDE = (CombinedTimestepLabelEmbeddings,)

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fsdp_plugin(mixed_precision: str | None) -> FullyShardedDataParallelPlugin | None:
    """
    What `accelerate launch` was told of FSDP.

    Args:
        mixed_precision (`str`, *optional*):
            `"no"`, `"fp16"` or `"bf16"`; by default what was launched.

    Returns:
        `FullyShardedDataParallelPlugin`, *optional*: `None` if it was not asked for.

    Raises:
        ValueError: if it is FSDP of version 1.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP of version {plugin.fsdp_version} is not supported, its shards have no names: use FSDP2"
            " (fsdp_version: 2, training_scripts/accelerate/fsdp2.yaml)."
        )
    dtype = _DTYPES.get(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if dtype is not None:
        # Gradients are added up in float32, as DDP does. Inputs are left to autocast: accelerate's own policy would
        # cast the times, too, and bfloat16 knows times to two of a thousand.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
        )
    return plugin


def shard_on_cpu(accelerator: Accelerator, plugin: FullyShardedDataParallelPlugin | None) -> None:
    """
    Let accelerate shard on the CPU, too, where it would run DDP without a word.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        plugin (`FullyShardedDataParallelPlugin`, *optional*):
            What it was given.
    """
    if plugin is not None and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Both, as accelerate does: whoever asks for its state anew gets what the second one says.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin


def block_names(model: nn.Module) -> list[str]:
    """The classes of the blocks that a model's networks are a list of: what is gathered and given up together."""
    lists = (child for network in model.children() for child in network.children() if isinstance(child, nn.ModuleList))
    names = {type(block).__name__ for blocks in lists for block in blocks}
    # `DiTTransformer2DModel` calls that of its first block from outside of the block.
    return sorted(names | {type(part).__name__ for part in model.modules() if isinstance(part, _CALLED_FROM_OUTSIDE)})


class ShownWeights:
    """
    The weights that are validated and saved, in the models of the script's pipeline.

    With FSDP2 the models of the pipeline are not trained: their copy is, in shards. The main process keeps them whole,
    on the CPU, and takes up the weights when they are looked at; the other processes keep nothing of them.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        model (`nn.Module`):
            Of the script: all that is trained, called as `model(x_t, timesteps, *conditions)`.

    Attributes:
        ema ([`EMA`], *optional*):
            The averages; set when there is one.
        average (`Callable`):
            A context in which the trained model has the average that is to be shown; by default none.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.ema: EMA | None = None
        self.average: Callable[[], AbstractContextManager[None]] = nullcontext
        self._accelerator = accelerator
        self._whole = model
        self._trained: nn.Module | None = None

    def for_training(self) -> nn.Module:
        """
        What is to be prepared and trained.

        Returns:
            `nn.Module`: the model itself, or a copy of it if it will be sharded.

        Raises:
            ValueError: if it cannot be trained in shards: it is trained in part, or the device lacks the precision.
        """
        accelerator = self._accelerator
        if accelerator.distributed_type != DistributedType.FSDP:
            return self._whole
        plugin: Any = accelerator.state.fsdp_plugin
        if not all(parameter.requires_grad for parameter in self._whole.parameters()):
            raise ValueError("FSDP2 works for models that are trained as a whole, not for adapters: use DDP.")
        norms = any(isinstance(module, nn.GroupNorm) for module in self._whole.modules())
        if norms and accelerator.device.type == "cpu" and accelerator.mixed_precision != "no":
            raise ValueError(
                f"FSDP2 with --mixed_precision {accelerator.mixed_precision} does not work on the CPU for a network"
                " with group norms, such as a UNet: use --mixed_precision no."
            )
        if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = block_names(self._whole)
        self._trained = copy.deepcopy(self._whole)
        self._in_autocast(self._trained)
        # The loop changes no prediction in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self._whole.to("cpu" if accelerator.is_main_process else "meta")
        return self._trained

    def _in_autocast(self, model: nn.Module) -> None:
        """As accelerate does with models that are not sharded."""
        forward = model.forward

        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            with self._accelerator.autocast():
                return forward(*args, **kwargs)

        model.forward = autocast_forward

    @property
    def bare(self) -> nn.Module:
        """The model as the script made it, without shards or wrappers; its values may be old."""
        return self._whole

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within this context the script's models have the weights that would be saved. Every process enters it."""
        with self.average(), self._whole_weights():
            yield

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        if self._trained is None:
            yield
            return
        is_main = self._accelerator.is_main_process
        if is_main:
            self._whole.to(self._accelerator.device)
        self._gather()
        try:
            yield
        finally:
            if is_main:
                self._whole.to("cpu")

    @torch.no_grad()
    def _gather(self) -> None:
        """Take the weights and buffers of the shards into the whole model of the main process."""
        assert self._trained is not None
        bare = self._accelerator.unwrap_model(self._trained, keep_torch_compile=False)
        targets = {**dict(self._whole.named_parameters()), **dict(self._whole.named_buffers())}
        for named in (bare.named_parameters(), bare.named_buffers()):
            for name, tensor in named:
                value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self._accelerator.is_main_process:
                    targets[name].copy_(value)
