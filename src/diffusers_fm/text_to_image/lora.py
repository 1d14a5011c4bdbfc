# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (LoRA, arXiv 2106.09685) of a Stable Diffusion 3 pipeline, through PEFT."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import ModelMixin, StableDiffusion3Pipeline
from torch import nn
from transformers import PreTrainedModel

from ..data.randomness import derive_seed
from .arguments import LoraTrainingArguments, check_peft, parse_blocks, parse_layers


# The name that diffusers expects of an adapter in training.
ADAPTER = "default"

# Every attention projection: of the image, of the text, and of the second attention (`attn2`) of Stable Diffusion 3.5.
TRANSFORMER_LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
# diffusers reads adapters of a CLIP back if they are on these, or on `fc1` and `fc2`.
TEXT_ENCODER_LAYERS = "q_proj k_proj v_proj out_proj".split()

# The parts of a pipeline that `save_lora_weights` can write.
ADAPTED = ("transformer", "text_encoder", "text_encoder_2")

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
    _check_blocks(model, blocks)
    targets = list(layers)
    if blocks is not None:
        inside = tuple(f"transformer_blocks.{block}." for block in blocks)
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


def check_adaptable(pipeline: StableDiffusion3Pipeline, args: LoraTrainingArguments) -> None:
    """Refuse a transformer that is untrained, or lacks the layers or blocks of the adapters."""
    layers, blocks = _targets(args)
    _check_layers(pipeline.transformer, layers)
    _check_blocks(pipeline.transformer, blocks)
    weight = pipeline.transformer.proj_out.weight
    # A dry run has no weights to look at.
    if not weight.is_meta and not weight.any():
        raise ValueError(
            f"The transformer of {pipeline.config._name_or_path!r} is untrained: its output layer is zero, and no"
            " adapter in front of it learns anything. Train it first, with train_text_to_image_sd3.py."
        )


def check_engine(accelerator: Accelerator, args: LoraTrainingArguments) -> None:
    """
    Refuse to train text encoders with an engine that gathers the weights of a model only in its own `forward`:
    captions are encoded before it.
    """
    kind = accelerator.distributed_type
    if args.train_text_encoder and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"--train_text_encoder does not work with {kind.value}: use DDP, or leave it out.")


def add_adapters(pipeline: StableDiffusion3Pipeline, args: LoraTrainingArguments) -> None:
    """Give adapters to the transformer of a pipeline and, with `--train_text_encoder`, to both CLIPs."""
    parts = {name: (TEXT_ENCODER_LAYERS, None) for name in ADAPTED[1:] if args.train_text_encoder}
    for name, (layers, blocks) in {**parts, "transformer": _targets(args)}.items():
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


def adapted_text_encoders(pipeline: StableDiffusion3Pipeline) -> list[Any]:
    """CLIPs that have adapters: both or none."""
    return [pipeline.components[name] for name in ADAPTED[1:] if _has_adapters(pipeline.components[name])]


def text_encoder_learning_rate(args: LoraTrainingArguments) -> float:
    """Learning rate of the CLIPs' adapters."""
    if args.text_encoder_lr is not None:
        return args.text_encoder_lr
    return args.learning_rate if args.optimizer == "prodigy" else TEXT_ENCODER_LEARNING_RATE


def parameter_groups(model: nn.Module, text_encoder_lr: float) -> list[dict[str, Any]]:
    """Trained parameters of a [`TextToImageModel`] for the optimizer, with an own rate for text encoders."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = [parameter for name, parameter in trained if not name.startswith("text_encoders.")]
    others = [parameter for name, parameter in trained if name.startswith("text_encoders.")]
    return [{"params": own}, *([{"params": others, "lr": text_encoder_lr}] if others else [])]


def save_lora(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """
    Write adapters as `pytorch_lora_weights.safetensors`, for
    [`~diffusers.StableDiffusion3Pipeline.load_lora_weights`]. Their configuration is in the file's metadata: without
    it a reader would take the rank for alpha.
    """
    from peft import get_peft_model_state_dict

    parts: dict[str, Any] = {}
    for name in ADAPTED:
        model = pipeline.components[name]
        if _has_adapters(model):
            state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
            parts[f"{name}_lora_layers"] = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            parts[f"{name}_lora_adapter_metadata"] = model.peft_config[ADAPTER].to_dict()
    type(pipeline).save_lora_weights(folder, **parts)


def _has_adapters(model: nn.Module | None) -> bool:
    return model is not None and any(".lora_A." in name for name, _ in model.named_parameters())


def _layer_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


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
    if blocks is None:
        return
    count = len(model.get_submodule("transformer_blocks"))  # pyright: ignore[reportArgumentType]
    unknown = [block for block in blocks if not 0 <= block < count]
    if unknown:
        raise ValueError(f"{model.__class__.__name__} has no blocks {unknown}; its blocks are 0 to {count - 1}.")


def _targets(args: LoraTrainingArguments) -> tuple[list[str], list[int] | None]:
    """Layers and blocks of the transformer to adapt."""
    layers = TRANSFORMER_LAYERS if args.lora_layers is None else parse_layers(args.lora_layers)
    return list(layers), None if args.lora_blocks is None else parse_blocks(args.lora_blocks)
