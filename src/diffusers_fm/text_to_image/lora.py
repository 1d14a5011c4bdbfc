# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) of the network of a pipeline and of its CLIPs, through PEFT."""

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.loaders import PeftAdapterMixin
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from ..data.randomness import derive_seed
from ..pipelines.families import lora_layers
from .arguments import LoraTrainingArguments, check_peft, parse_blocks, parse_layers


# The name that diffusers expects of an adapter in training.
ADAPTER = "default"

# diffusers reads adapters of a CLIP back if they are on these, or on `fc1` and `fc2`.
CLIPS = (CLIPTextModel, CLIPTextModelWithProjection)
TEXT_ENCODER_LAYERS = "q_proj k_proj v_proj out_proj".split()

# Default of diffusers' own scripts.
TEXT_ENCODER_LEARNING_RATE = 5e-6


def adaptable_layers(model: nn.Module) -> list[str]:
    """Sorted names, such as `attn.to_q`, of the layers of all blocks that can have an adapter."""
    return sorted({re.sub(r"^.*?\.\d+\.", "", name, count=1) for name in _layer_names(model)})


def add_lora(
    model: ModelMixin | PreTrainedModel,
    rank: int,
    alpha: float,
    layers: Sequence[str],
    blocks: Sequence[int] | None = None,
    dropout: float = 0.0,
    use_dora: bool = False,
    seed: int = 0,
) -> None:
    """
    Freeze a model and give it adapters, in float32, which change nothing yet: `W + alpha / rank * B A`, with B = 0.

    Args:
        model ([`~diffusers.ModelMixin`] or [`~transformers.PreTrainedModel`]):
            Model to adapt in place.
        rank (`int`):
            Rows of A.
        alpha (`float`):
            Scale of the adapters, saved with them.
        layers (`Sequence[str]`):
            Ends of the names of the layers to adapt, such as `to_q` or `attn2.to_q`.
        blocks (`Sequence[int]`, *optional*):
            Numbers of the transformer blocks to adapt; all by default.
        dropout (`float`, *optional*, defaults to 0.0):
            Part of the inputs of an adapter that is dropped in training.
        use_dora (`bool`, *optional*, defaults to `False`):
            Learn the lengths of the weights' rows as well (DoRA, arXiv 2402.09353). diffusers reads that back for a
            transformer, but not for a text encoder.
        seed (`int`, *optional*, defaults to 0):
            Seed of A.

    Raises:
        ValueError: if a layer or block does not exist (with the names that do), or PEFT is not installed.
    """
    check_peft()
    from peft import LoraConfig

    _check_layers(model, layers)
    targets = list(layers)
    if blocks is not None:
        names = _block_names(model)
        _check_blocks(model, blocks)
        inside = tuple(f"{names[block]}." for block in blocks)
        targets = [name for name in _layer_names(model) if name.startswith(inside) and _is_one_of(name, layers)]
    config = LoraConfig(
        r=rank,
        # A whole number stays one in the file, as PEFT writes it.
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        use_dora=use_dora,
        # The distribution of diffusers' own scripts: standard deviation 1 / rank.
        init_lora_weights="gaussian",
        target_modules=targets,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.add_adapter(config, ADAPTER)
    # transformers notes the model's path on this machine.
    config.base_model_name_or_path = None
    for parameter in model.parameters():
        if parameter.requires_grad:
            # In 16 bits a step of the optimizer is smaller than the spacing of the numbers, and is lost.
            parameter.data = parameter.data.float()


def check_adaptable(pipeline: DiffusionPipeline, network: nn.Module, args: LoraTrainingArguments) -> None:
    """Refuse a network that is untrained, or lacks the layers or blocks of the adapters, and CLIPs without loader."""
    if not isinstance(network, PeftAdapterMixin):
        raise ValueError(
            f"diffusers has no adapters for the {type(network).__name__} of {type(pipeline).__name__}: train it whole,"
            " with train_text_to_image.py."
        )
    layers, blocks = _targets(pipeline, network, args)
    _check_layers(network, layers)
    _check_blocks(network, blocks)
    if args.train_text_encoder and not adapted_encoders(pipeline):
        raise ValueError(
            f"{type(pipeline).__name__} reads no adapters of text encoders: leave out --train_text_encoder."
        )
    outputs: list[Any] = [
        layer.weight for name, layer in network.named_children() if name == "proj_out" and _is_layer(layer)
    ]
    # A dry run has no weights to look at.
    if any(not weight.is_meta and not weight.any() for weight in outputs):
        raise ValueError(
            f"The {args.network} of {pipeline.config._name_or_path!r} is untrained: its output layer is zero, and no"
            " adapter in front of it learns anything. Train it first, with train_text_to_image.py."
        )


def check_engine(accelerator: Accelerator, args: LoraTrainingArguments) -> None:
    """
    Refuse to train text encoders with an engine that gathers the weights of a model only in its own `forward`:
    captions are encoded before it.
    """
    kind = accelerator.distributed_type
    if args.train_text_encoder and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"--train_text_encoder does not work with {kind.value}: use DDP, or leave it out.")


def add_adapters(pipeline: DiffusionPipeline, args: LoraTrainingArguments) -> list[Any]:
    """Give adapters to the network and, with `--train_text_encoder`, to the CLIPs, which are returned."""
    encoders = adapted_encoders(pipeline) if args.train_text_encoder else []
    targets = _targets(pipeline, pipeline.components[args.network], args)
    parts: dict[str, Any] = {**dict.fromkeys(encoders, (TEXT_ENCODER_LAYERS, None)), args.network: targets}
    for name, (layers, blocks) in parts.items():
        add_lora(
            pipeline.components[name],
            args.rank,
            args.lora_alpha,
            layers,
            blocks,
            args.lora_dropout,
            args.use_dora,
            derive_seed(args.seed, "lora", name),
        )
    return [pipeline.components[name] for name in encoders]


def adapted_encoders(pipeline: DiffusionPipeline) -> list[str]:
    """Names of the CLIPs whose adapters the pipeline's `save_lora_weights` writes."""
    written = [name.removesuffix("_lora_layers") for name in _save_arguments(pipeline)]
    return [name for name in written if isinstance(pipeline.components.get(name), CLIPS)]


def _save_arguments(pipeline: DiffusionPipeline) -> list[str]:
    if "save_lora_weights" not in dir(pipeline):
        return []
    return list(inspect.signature(type(pipeline).save_lora_weights).parameters)  # pyright: ignore


def text_encoder_learning_rate(args: LoraTrainingArguments) -> float:
    """Learning rate of the CLIPs' adapters."""
    if args.text_encoder_lr is not None:
        return args.text_encoder_lr
    return args.learning_rate if args.optimizer == "prodigy" else TEXT_ENCODER_LEARNING_RATE


def parameter_groups(model: nn.Module, text_encoder_lr: float) -> list[dict[str, Any]]:
    """Trained parameters of a [`TrainedField`] for the optimizer, with a rate of their own for text encoders."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = [parameter for name, parameter in trained if not name.startswith("text_encoders.")]
    others = [parameter for name, parameter in trained if name.startswith("text_encoders.")]
    return [{"params": own}, *([{"params": others, "lr": text_encoder_lr}] if others else [])]


def save_lora(pipeline: DiffusionPipeline, folder: Path) -> None:
    """
    Write adapters as `pytorch_lora_weights.safetensors`: in the format of the pipeline's own `load_lora_weights`, or,
    where it has none, in that of the network's `load_lora_adapter`. Their configuration is in the file's metadata:
    without it a reader would take the rank for alpha.
    """
    from peft import get_peft_model_state_dict

    taken = _save_arguments(pipeline)
    parts: dict[str, Any] = {}
    for name, model in pipeline.components.items():
        if not isinstance(model, nn.Module) or not _has_adapters(model):
            continue
        if f"{name}_lora_layers" not in taken:
            network: Any = model
            network.save_lora_adapter(folder, adapter_name=ADAPTER)
            continue
        state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
        parts[f"{name}_lora_layers"] = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        if f"{name}_lora_adapter_metadata" in taken:
            parts[f"{name}_lora_adapter_metadata"] = model.peft_config[ADAPTER].to_dict()  # pyright: ignore
    if parts:
        type(pipeline).save_lora_weights(folder, **parts)  # pyright: ignore


def _has_adapters(model: nn.Module | None) -> bool:
    return model is not None and any(".lora_A." in name for name, _ in model.named_parameters())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Conv2d))


def _layer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if _is_layer(module)]


def _is_one_of(name: str, layers: Sequence[str]) -> bool:
    return any(f".{name}".endswith(f".{layer}") for layer in layers)


def _check_layers(model: nn.Module, layers: Sequence[str]) -> None:
    names = _layer_names(model)
    unknown = [layer for layer in layers if not any(_is_one_of(name, [layer]) for name in names)]
    if unknown:
        raise ValueError(
            f"{model.__class__.__name__} has no layers {', '.join(map(repr, unknown))} for an adapter; it has"
            f" {', '.join(adaptable_layers(model))}."
        )


def _check_blocks(model: nn.Module, blocks: Sequence[int] | None) -> None:
    count = len(_block_names(model))
    unknown = [block for block in blocks or () if not 0 <= block < count]
    if unknown:
        raise ValueError(f"{model.__class__.__name__} has no blocks {unknown}; its blocks are 0 to {count - 1}.")


def _block_names(model: nn.Module) -> list[str]:
    """Names of the blocks, through all lists of blocks in their order."""
    lists = [(name, child) for name, child in model.named_children() if isinstance(child, nn.ModuleList)]
    return [f"{name}.{i}" for name, child in lists if "block" in name for i in range(len(child))]


def _targets(
    pipeline: DiffusionPipeline, network: nn.Module, args: LoraTrainingArguments
) -> tuple[list[str], list[int] | None]:
    """Layers and blocks of the network to adapt."""
    layers = lora_layers(pipeline, network) if args.lora_layers is None else parse_layers(args.lora_layers)
    return layers, None if args.lora_blocks is None else parse_blocks(args.lora_blocks)
