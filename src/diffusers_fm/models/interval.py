# SPDX-License-Identifier: Apache-2.0
"""
Conditioning of diffusers' networks on the end r of an interval, for flow maps, by hooks.

Class, weights and files of a network stay as they are. The last blocks of a transformer get the embedding of r in
place of that of t (Decoupled MeanFlow, arXiv 2510.24474): r = t is the trained flow, bit for bit. A UNet gets a second
time embedding that starts at zero.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn


@dataclass(frozen=True)
class TimeBlocks:
    """Location of a transformer's blocks, and of the argument that carries the time into them."""

    lists: tuple[str, ...]
    argument: str
    embedder: str | None = None
    # From the embedder's output to the argument; `time_scale` multiplies the time before the embedder.
    select: Callable[[Any, Any], torch.Tensor] = lambda model, output: output
    time_scale: float = 1.0


_FLUX_LIKE = ("transformer_blocks", "single_transformer_blocks")

TRANSFORMERS: dict[str, TimeBlocks] = {
    "AuraFlowTransformer2DModel": TimeBlocks(
        ("joint_transformer_blocks", "single_transformer_blocks"),
        "temb",
        "time_step_embed",
        lambda model, output: model.time_step_proj(output.to(model.dtype)),
    ),
    "BriaTransformer2DModel": TimeBlocks(_FLUX_LIKE, "temb", "time_embed"),
    "CogView4Transformer2DModel": TimeBlocks(
        ("transformer_blocks",), "temb", "time_condition_embed", lambda model, output: F.silu(output)
    ),
    # Its blocks embed the time themselves.
    "DiTTransformer2DModel": TimeBlocks(("transformer_blocks",), "timestep"),
    "FluxTransformer2DModel": TimeBlocks(_FLUX_LIKE, "temb", "time_text_embed", time_scale=1000.0),
    "HunyuanVideoTransformer3DModel": TimeBlocks(
        _FLUX_LIKE, "temb", "time_text_embed", lambda model, output: output[0]
    ),
    "LTXVideoTransformer3DModel": TimeBlocks(
        ("transformer_blocks",), "temb", "time_embed", lambda model, output: output[0].unsqueeze(1)
    ),
    "LongCatImageTransformer2DModel": TimeBlocks(_FLUX_LIKE, "temb", "time_embed", time_scale=1000.0),
    "PixArtTransformer2DModel": TimeBlocks(
        ("transformer_blocks",), "timestep", "adaln_single", lambda model, output: output[0]
    ),
    "QwenImageTransformer2DModel": TimeBlocks(("transformer_blocks",), "temb", "time_text_embed"),
    "SD3Transformer2DModel": TimeBlocks(("transformer_blocks",), "temb", "time_text_embed"),
    "SanaTransformer2DModel": TimeBlocks(
        ("transformer_blocks",), "timestep", "time_embed", lambda model, output: output[0]
    ),
    "WanTransformer3DModel": TimeBlocks(
        ("blocks",), "temb", "condition_embedder", lambda model, output: output[1].unflatten(1, (6, -1))
    ),
}
"""The transformers whose blocks can be conditioned on r, by class name."""

UNETS = ("UNet2DConditionModel", "UNet2DModel")
"""The UNets that take an [`IntervalEmbedding`], by class name."""


class IntervalEmbedding(ModelMixin, ConfigMixin):
    r"""
    Second time embedding of a UNet: `E(r) - E(t)`, zero for r = t and, before training, for all r.

    Args:
        time_embed_dim (`int`, *optional*, defaults to 512):
            Width of the UNet's own time embedding, four times its first `block_out_channels`.
        num_channels (`int`, *optional*, defaults to 256):
            Number of sines and cosines.
    """

    @register_to_config
    def __init__(self, time_embed_dim: int = 512, num_channels: int = 256) -> None:
        super().__init__()
        self.time_proj = Timesteps(num_channels, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(num_channels, time_embed_dim)
        nn.init.zeros_(self.time_embedding.linear_2.weight)
        nn.init.zeros_(self.time_embedding.linear_2.bias)

    def forward(self, timestep: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """
        Embed the end of an interval relative to its start.

        Args:
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                The start, as the UNet gets it.
            end (`torch.Tensor` of shape `(batch_size,)`):
                The end, in the same unit.

        Returns:
            `torch.Tensor` of shape `(batch_size, time_embed_dim)`: What the UNet's time embedding is raised by.
        """
        dtype = self.time_embedding.linear_1.weight.dtype
        at_end, at_start = (self.time_embedding(self.time_proj(time).to(dtype)) for time in (end, timestep))
        return at_end - at_start


class IntervalConditioning:
    """
    Condition a network on the end r of an interval, until `remove` is called.

    While `end` is `None` the network is the one it was. In a step of training set `end` before each call; gradient
    checkpointing runs the blocks again in the backward pass, and needs `end` to be that of the last call with
    gradients, which [`~flow_maps.flow_map_loss`] makes last. For sampling with an unchanged pipeline set a function.

    ```python
    conditioning = IntervalConditioning(transformer, first_block=8)

    def u(x, r, t, labels):
        conditioning.end = 1000 * r
        return transformer(x, timestep=1000 * t, class_labels=labels).sample
    ```

    Args:
        model (`ModelMixin`):
            A transformer of `TRANSFORMERS` or a UNet of `UNETS`.
        first_block (`int`, *optional*):
            Transformers: the first block that gets r, in the order of execution over all lists of blocks, from 1 to
            the number of blocks minus 1; by default two thirds of them get t. It is all that a configuration needs.
        embedding (`IntervalEmbedding`, *optional*):
            UNets: the second time embedding, on the device of the UNet; its parameters are to be trained too.

    Attributes:
        end (`torch.Tensor`, `Callable` or `None`):
            r in the unit of the network's `timestep`, of its shape or a single value; or a function from the
            `timestep` of a call to it.

    Raises:
        ValueError: If the network cannot be conditioned, or an argument does not go with it.
    """

    def __init__(
        self, model: ModelMixin, first_block: int | None = None, embedding: IntervalEmbedding | None = None
    ) -> None:
        name = model.__class__.__name__
        if name not in TRANSFORMERS and name not in UNETS:
            raise ValueError(
                f"{name} cannot be conditioned on the end of an interval; the networks that can are"
                f" {', '.join([*sorted(TRANSFORMERS), *UNETS])}."
            )
        if name in UNETS and (embedding is None or first_block is not None):
            raise ValueError(f"{name} needs an `embedding` and has no `first_block`, got {first_block!r}.")
        if name in TRANSFORMERS and embedding is not None:
            raise ValueError(f"{name} needs no `embedding`: its last blocks get the end in place of the start.")
        self.end: torch.Tensor | Callable[[torch.Tensor], torch.Tensor] | None = None
        self.first_block = first_block
        self._times: tuple[torch.Tensor, torch.Tensor] | None = None
        self._argument: torch.Tensor | None = None
        # Partial functions in place of closures: a deep copy of the network then has a conditioning of its own.
        hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._finish, always_call=True),
        ]
        if embedding is not None:
            hooks.append(model.get_submodule("time_embedding").register_forward_hook(partial(self._add, embedding)))
        else:
            hooks += self._hook_blocks(model, TRANSFORMERS[name])
        self._hooks = hooks

    @classmethod
    def of(cls, model: nn.Module) -> "IntervalConditioning | None":
        """
        The conditioning of a network, that of the copy for a deep copy.

        Args:
            model (`nn.Module`):
                The network.

        Returns:
            `IntervalConditioning` or `None`: The one that was made first and not removed.
        """
        for hook in model._forward_pre_hooks.values():
            if inspect.ismethod(hook) and isinstance(hook.__self__, cls):
                return hook.__self__
        return None

    def remove(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def _hook_blocks(self, model: ModelMixin, family: TimeBlocks) -> list[Any]:
        blocks = [block for name in family.lists for block in model.get_submodule(name).children()]
        if self.first_block is None:
            self.first_block = 2 * len(blocks) // 3
        if isinstance(self.first_block, bool) or self.first_block not in range(1, len(blocks)):
            raise ValueError(
                f"`first_block` must be an integer from 1 to {len(blocks) - 1} for this {model.__class__.__name__} of"
                f" {len(blocks)} blocks, got {self.first_block!r}."
            )
        hooks = []
        for block in blocks[self.first_block :]:
            position = list(inspect.signature(block.forward).parameters).index(family.argument)
            replace = partial(self._replace, family.argument, position)
            hooks.append(block.register_forward_pre_hook(replace, with_kwargs=True))
        if family.embedder is not None:
            embed = partial(self._embed, model)
            hooks.append(model.get_submodule(family.embedder).register_forward_hook(embed, with_kwargs=True))
        return hooks

    def _begin(self, model: ModelMixin, args: tuple, kwargs: dict[str, Any]) -> None:
        """Resolve `end` for this call."""
        self._times = self._argument = None
        if self.end is None:
            return
        start = torch.as_tensor(inspect.signature(model.forward).bind(*args, **kwargs).arguments["timestep"])
        end = torch.as_tensor(self.end(start) if callable(self.end) else self.end).to(start.device)
        if end.numel() != 1 and end.shape != start.shape:
            raise ValueError(f"`end` must have one value or the shape {tuple(start.shape)} of `timestep`, got {end}.")
        end = (end.reshape(()) if end.numel() == 1 else end).expand(start.shape)
        self._times = start, end
        # The argument itself, unless an embedder makes it of the end.
        self._argument = end

    def _finish(self, model: ModelMixin, args: tuple, output: Any) -> None:
        """Let the tensors of this call go, unless gradient checkpointing will run the blocks again."""
        if not (torch.is_grad_enabled() and model.is_gradient_checkpointing):
            self._times = self._argument = None

    def _embed(self, model: ModelMixin, embedder: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """Embed the end as the start has just been embedded."""
        if self._times is not None:
            family, start, end = TRANSFORMERS[model.__class__.__name__], args[0], self._times[1]
            end = end.to(start.dtype if start.is_floating_point() else end.dtype) * family.time_scale
            self._argument = family.select(model, embedder.forward(end, *args[1:], **kwargs))

    def _replace(
        self, name: str, position: int, block: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Exchange a block's argument of the start for that of the end."""
        if self._argument is not None and name in kwargs:
            kwargs = {**kwargs, name: self._argument}
        elif self._argument is not None:
            args = *args[:position], self._argument, *args[position + 1 :]
        return args, kwargs

    def _add(self, embedding: IntervalEmbedding, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Add the second time embedding to the UNet's own."""
        if self._times is None:
            return output
        start, end = (time.reshape(-1).to(output.device) for time in self._times)
        return output + embedding(start, end).to(output.dtype)
