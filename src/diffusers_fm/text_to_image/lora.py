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
from .arguments import LoraTrainingArguments


# The name that diffusers expects of an adapter that is being trained.
ADAPTER = "default"

# Every attention projection: of the image, of the text, and of the second attention (`attn2`) of Stable Diffusion 3.5.
TRANSFORMER_LAYERS = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split()
# diffusers reads adapters of a CLIP back if they are on these, or on `fc1` and `fc2`.
TEXT_ENCODER_LAYERS = "q_proj k_proj v_proj out_proj".split()

# The parts of a pipeline that `save_lora_weights` can write.
ADAPTED = ("transformer", "text_encoder", "text_encoder_2")


def adaptable_layers(model: nn.Module) -> list[str]:
    """
    Names of the layers that can have an adapter, those of all blocks as one.

    Args:
        model (`nn.Module`):
            Any, before it has adapters.

    Returns:
        `list[str]`: such as `attn.to_q`, sorted.
    """
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
    Freezes a model and gives it adapters, in float32, which change nothing yet: `W + alpha / rank * B A`, with B = 0.

    Args:
        model ([`~diffusers.ModelMixin`] or [`~transformers.PreTrainedModel`]):
            Changed in place.
        rank (`int`):
            Rows of A.
        alpha (`float`):
            Scale of the adapter; it is saved with it.
        layers (`Sequence[str]`):
            Ends of the names of the layers to adapt, such as `to_q` or `attn2.to_q`.
        blocks (`Sequence[int]`, *optional*):
            Numbers of the transformer blocks to adapt; all if left out.
        dropout (`float`, *optional*, defaults to 0.0):
            Part of the inputs of an adapter that is dropped in training.
        use_dora (`bool`, *optional*, defaults to `False`):
            Learn the lengths of the weights' rows as well (DoRA, arXiv 2402.09353). diffusers reads that back for a
            transformer, but not for a text encoder.
        seed (`int`, *optional*, defaults to 0):
            Of A.

    Raises:
        ValueError: if a layer or block does not exist (with the names that do), or PEFT is not installed.
    """
    from peft import LoraConfig

    _check_layers(model, layers)
    targets = [name for name in _layer_names(model) if _is_one_of(name, layers)]
    _check_blocks(model, blocks)
    if blocks is not None:
        inside = tuple(f"transformer_blocks.{block}." for block in blocks)
        targets = [name for name in targets if name.startswith(inside)]
    config = LoraConfig(
        r=rank,
        # A whole number stays one in the file, as PEFT writes it.
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=dropout,
        use_dora=use_dora,
        # The distribution of diffusers' own scripts: standard deviation 1 / rank.
        init_lora_weights="gaussian",
        target_modules=targets if blocks is not None else list(layers),
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.add_adapter(config, ADAPTER)
    # Not the path on this machine, which transformers notes.
    config.base_model_name_or_path = None
    for parameter in model.parameters():
        if parameter.requires_grad:
            # In 16 bits a step of the optimizer is smaller than the spacing of the numbers, and is lost.
            parameter.data = parameter.data.float()


def check_adaptable(pipeline: StableDiffusion3Pipeline, args: LoraTrainingArguments) -> None:
    """
    Refuses a transformer that the adapters do not fit, before any work.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            With weights.
        args ([`LoraTrainingArguments`]):
            Of the script.

    Raises:
        ValueError: if it is untrained, or has no such layers or blocks (with the names that there are).
    """
    _check_layers(pipeline.transformer, _transformer_layers(args))
    _check_blocks(pipeline.transformer, args.block_numbers)
    if not pipeline.transformer.proj_out.weight.any():
        raise ValueError(
            f"The transformer of {pipeline.config._name_or_path!r} is untrained: its output layer is zero, and no"
            " adapter in front of it learns anything. Train it first, with train_text_to_image_sd3.py."
        )


def add_adapters(pipeline: StableDiffusion3Pipeline, args: LoraTrainingArguments) -> None:
    """
    Gives adapters to the transformer of a pipeline and, with `--train_text_encoder`, to both CLIPs.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            Trained. Changed in place.
        args ([`LoraTrainingArguments`]):
            With a seed.

    Raises:
        ValueError: as [`add_lora`].
    """
    layers = {name: TEXT_ENCODER_LAYERS for name in ADAPTED[1:] if args.train_text_encoder}
    layers["transformer"] = _transformer_layers(args)
    for name, chosen in layers.items():
        add_lora(
            pipeline.components[name],
            args.rank,
            args.alpha,
            chosen,
            args.block_numbers if name == "transformer" else None,
            args.lora_dropout,
            args.use_dora,
            derive_seed(args.seed, "lora", name),
        )


def adapted_text_encoders(pipeline: StableDiffusion3Pipeline) -> list[Any]:
    """
    The CLIPs that have adapters.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            After [`add_adapters`].

    Returns:
        `list`: both or none.
    """
    return [pipeline.components[name] for name in ADAPTED[1:] if _has_lora(pipeline.components[name])]


def check_engine(accelerator: Accelerator, text_encoders: Sequence[nn.Module]) -> None:
    """
    Refuses engines that gather the weights of a model only while its own `forward` runs, where text encoders are
    trained: their captions are encoded before it.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        text_encoders (`Sequence[nn.Module]`):
            Those that are trained.

    Raises:
        ValueError: if there are some and the engine shards.
    """
    kind = accelerator.distributed_type
    if text_encoders and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(f"--train_text_encoder does not work with {kind.value}: use DDP, or leave it out.")


def parameter_groups(model: nn.Module, text_encoder_lr: float) -> list[dict[str, Any]]:
    """
    What an optimizer takes: the transformer's adapters at its own learning rate, those of the CLIPs at another.

    Args:
        model ([`TextToImageModel`]):
            With adapters.
        text_encoder_lr (`float`):
            The other one.

    Returns:
        `list[dict]`: one group, or two.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    own = [parameter for name, parameter in trained if not name.startswith("text_encoders.")]
    others = [parameter for name, parameter in trained if name.startswith("text_encoders.")]
    return [{"params": own}, *([{"params": others, "lr": text_encoder_lr}] if others else [])]


def save_lora(pipeline: StableDiffusion3Pipeline, folder: Path) -> None:
    """
    Writes the adapters of a pipeline as [`~diffusers.StableDiffusion3Pipeline.load_lora_weights`] reads them, with the
    configuration in the file's metadata; without it a reader would take the rank for alpha.

    Args:
        pipeline ([`~diffusers.StableDiffusion3Pipeline`]):
            With adapters of [`add_lora`].
        folder (`Path`):
            Where `pytorch_lora_weights.safetensors` is written.
    """
    from peft import get_peft_model_state_dict

    parts: dict[str, Any] = {}
    for name in ADAPTED:
        model = pipeline.components[name]
        if _has_lora(model):
            state = get_peft_model_state_dict(model, adapter_name=ADAPTER)
            parts[f"{name}_lora_layers"] = {key: value.detach().cpu().contiguous() for key, value in state.items()}
            parts[f"{name}_lora_adapter_metadata"] = model.peft_config[ADAPTER].to_dict()
    type(pipeline).save_lora_weights(folder, **parts)


def _has_lora(model: nn.Module | None) -> bool:
    return ADAPTER in getattr(model, "peft_config", {})


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


def _transformer_layers(args: LoraTrainingArguments) -> list[str]:
    given = args.lora_layers
    return list(TRANSFORMER_LAYERS) if given is None else [name.strip() for name in given.split(",")]
