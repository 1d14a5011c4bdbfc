# SPDX-License-Identifier: Apache-2.0
"""Untrained pipelines from folders of configs."""

import importlib
import inspect
import json
import logging
import os
import pkgutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    AutoModel,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PreTrainedModel

from ..models.networks import NETWORKS
from ..models.pixel_autoencoder import can_be_identity, set_identity
from .base import FlowMatchPipelineBase
from .components import check_one_network, has_weights
from .pipeline_flow_match import FlowMatchPipeline
from .pipeline_flow_match_audio import FlowMatchAudioPipeline
from .pipeline_flow_match_upscale import FlowMatchUpscalePipeline


logger = logging.getLogger(__name__)

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)

# model_index.json may come from anywhere, and importing a module runs it.
LIBRARIES = ("diffusers", "diffusers_fm", "transformers")

# Classes with the components of another one, which is built in their place.
SAME_COMPONENTS = {
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "StableDiffusion3InpaintPipeline": "StableDiffusion3Pipeline",
}

OWN_CLASSES = {own.__name__: own for own in (FlowMatchUpscalePipeline, FlowMatchAudioPipeline)}

# Names of the components that read captions begin so.
TEXT_PARTS = ("text_encoder", "tokenizer")
# Files of a repository with which empty models and tokenizers are made.
WITHOUT_WEIGHTS = ["*.json", "*.txt", "*.model"]


def check_sd3_components(pipeline: StableDiffusion3Pipeline) -> None:
    """Raise a `ValueError` for a Stable Diffusion 3 pipeline that diffusers would refuse in a matrix product."""
    config = pipeline.transformer.config
    if pipeline.vae is not None and pipeline.vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"The autoencoder has {pipeline.vae.config.latent_channels} latent channels, the transformer"
            f" {config.in_channels}."
        )
    clips = [model for model in (pipeline.text_encoder, pipeline.text_encoder_2) if model is not None]
    if len(clips) == 2:
        pooled = sum(model.config.projection_dim for model in clips)
        if pooled != config.pooled_projection_dim:
            raise ValueError(
                f"`text_encoder` and `text_encoder_2` project to {pooled} dimensions together, the transformer's"
                f" `pooled_projection_dim` is {config.pooled_projection_dim}."
            )
        width = sum(model.config.hidden_size for model in clips)
        if width > config.joint_attention_dim:
            raise ValueError(
                f"`text_encoder` and `text_encoder_2` are {width} wide together, the transformer's"
                f" `joint_attention_dim` is {config.joint_attention_dim}."
            )
    t5 = pipeline.text_encoder_3
    if t5 is not None and t5.config.d_model != config.joint_attention_dim:
        raise ValueError(
            f"`text_encoder_3` is {t5.config.d_model} wide, the transformer's `joint_attention_dim` is"
            f" {config.joint_attention_dim}."
        )


def init_pipeline(
    folder: str | os.PathLike,
    seed: int | None = None,
    vae: ModelMixin | str | os.PathLike | None = None,
    revision: str | None = None,
    variant: str | None = None,
    *,
    pipeline_class: type[PipelineT] | None = None,
    text_encoders: str | os.PathLike | None = None,
    empty: bool = False,
) -> PipelineT:
    """
    Build a pipeline for training: what has weights is loaded, the rest starts from its config with random weights.

    The random start is each model's own, except that the output layer and the layers that modulate or gate by time
    and class start at zero (DiT, arXiv 2212.09748, section 3.2), which diffusers' models leave to the caller: the
    first prediction is 0, and each block of a transformer starts as the identity. An `AutoencoderKL` whose config
    admits it starts as the identity ([`~diffusers_fm.models.set_identity`]), so that the latents are the pixels.

    Args:
        folder (`str` or `os.PathLike`):
            A pipeline folder, such as those under `pipelines/`, or the id of a repository on the Hub.
        seed (`int`, *optional*):
            Seed of the random weights. Without it they come from torch's global generator.
        vae ([`~diffusers.ModelMixin`], `str` or `os.PathLike`, *optional*):
            A trained autoencoder, or its folder or Hub id, in place of the one in `folder`.
        revision (`str`, *optional*):
            Branch, tag or commit, if `folder` is a Hub id.
        variant (`str`, *optional*):
            Variant of the weights, such as `"fp16"`.
        pipeline_class (`type[DiffusionPipeline]`, *optional*):
            [`FlowMatchPipeline`], another one of this package or a text-to-image pipeline of diffusers, where only
            that one will do. By default the one that `model_index.json` names.
        text_encoders (`str` or `os.PathLike`, *optional*):
            Folder or Hub id of a pipeline whose text encoders and tokenizers take the place of those in `folder`; they
            are loaded in the dtype of their files.
        empty (`bool`, *optional*, defaults to `False`):
            Build the models on the meta device, to count with: they have shapes and no contents, and weights are
            neither read nor downloaded.

    Returns:
        A pipeline of that class, in float32, its models in evaluation mode.

    Raises:
        ValueError: if there is no `folder` or no pipeline in it, it is not of a kind that can be built here or not of
            `pipeline_class`, `vae` is given for a pipeline that works on pixels, `text_encoders` for one that reads
            no text, or a tokenizer has no files.
    """
    path = _local_folder(folder, pipeline_class or DiffusionPipeline, revision, variant, empty)
    index = json.loads((path / DiffusionPipeline.config_name).read_text(encoding="utf-8"))
    found = check_pipeline_class(folder, index, pipeline_class)
    declared = {
        name: tuple(index[name])
        for name in inspect.signature(found).parameters
        if isinstance(index.get(name), list) and index[name][0] is not None
    }
    if issubclass(found, FlowMatchPipelineBase):
        check_one_network(declared.get("unet"), declared.get("transformer"))
    if vae is not None and "vae" not in declared:
        raise ValueError(f"`vae` was given, but the pipeline {str(folder)!r} works on pixels.")
    components: dict[str, Any] = {}
    if isinstance(vae, (str, os.PathLike)):
        components["vae"] = _empty_autoencoder(str(vae)) if empty else AutoModel.from_pretrained(str(vae))
    elif vae is not None:
        components["vae"] = vae
    if text_encoders is not None:
        if issubclass(found, FlowMatchPipelineBase):
            raise ValueError(f"`text_encoders` was given, but the pipeline {str(folder)!r} reads no text.")
        components |= _text_parts(text_encoders, found, variant, empty)

    for name in [name for name in declared if name.startswith("tokenizer") and name not in components]:
        if not any((path / name).glob("*")):
            raise ValueError(
                f"The folder {str(path / name)!r} holds no tokenizer: give `text_encoders`, a pipeline"
                " with trained text encoders and their tokenizers."
            )
    untrained = [
        name
        for name in declared
        if name != "scheduler"
        and not name.startswith("tokenizer")
        and name not in components
        and (empty or not has_weights(path / name))
    ]
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]), _device(empty):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        for name in untrained:
            components[name] = untrained_model(path / name, *declared[name])
    if "vae" in untrained and not empty and not _start_as_identity(components["vae"]):
        logger.warning(
            "The autoencoder of %s has random weights, and no model learns anything from its latents: give `vae` a"
            " trained one that fits %s.",
            folder,
            path / "vae" / "config.json",
        )
    # diffusers asks for parts that a folder was saved without, such as the T5 of Stable Diffusion 3, by name.
    absent = {name: None for name in inspect.signature(found).parameters if index.get(name) == [None, None]}
    built: Any = found.from_pretrained(path, variant=None if empty else variant, **{**absent, **components})
    if issubclass(found, StableDiffusion3Pipeline):
        check_sd3_components(built)
    built.register_to_config(_name_or_path=str(folder))
    return built


def check_pipeline_class(
    folder: str | os.PathLike, index: dict[str, Any], pipeline_class: type[DiffusionPipeline] | None
) -> type[DiffusionPipeline]:
    """
    Class as which a pipeline is built, by its model_index.json: one of diffusers where it reads captions, else ours.
    A `ValueError` if that is not the wanted one.
    """
    name = index.get("_class_name")
    found: Any = FlowMatchPipeline
    if name in OWN_CLASSES:
        found = OWN_CLASSES[name]
    elif isinstance(name, str) and name.endswith("Pipeline"):
        stock = getattr(diffusers, SAME_COMPONENTS.get(name, name), None)
        if stock is not None and any(part.startswith(TEXT_PARTS) for part in inspect.signature(stock).parameters):
            found = stock
    if pipeline_class is not None and not issubclass(found, pipeline_class):
        raise ValueError(f"{str(folder)!r} holds a {name}, where a {pipeline_class.__name__} is needed.")
    return found


def _device(empty: bool) -> AbstractContextManager[Any]:
    return torch.device("meta") if empty else nullcontext()


def _local_folder(
    folder: str | os.PathLike,
    pipeline_class: type[DiffusionPipeline],
    revision: str | None,
    variant: str | None,
    empty: bool,
) -> Path:
    path = Path(folder)
    if not path.is_dir():
        if path.is_absolute() or len(path.parts) > 2:
            raise ValueError(f"{str(folder)!r} is neither a folder nor the id of a repository on the Hub.")
        if empty:
            path = Path(snapshot_download(str(folder), revision=revision, allow_patterns=WITHOUT_WEIGHTS))
        else:
            path = Path(pipeline_class.download(str(folder), revision=revision, variant=variant))
    if not (path / DiffusionPipeline.config_name).is_file():
        raise ValueError(f"The folder {str(folder)!r} is not a pipeline: it holds no {DiffusionPipeline.config_name}.")
    return path


def _text_parts(
    source: str | os.PathLike, pipeline_class: type[DiffusionPipeline], variant: str | None, empty: bool
) -> dict[str, Any]:
    """Text encoders and tokenizers of a pipeline; what it lacks is `None`."""
    names = list(inspect.signature(pipeline_class).parameters)
    parts = [name for name in names if name.startswith(TEXT_PARTS)]
    models: dict[str, Any] = {name: None for name in names if name not in (*parts, "scheduler")}
    if empty:
        source = _local_folder(source, pipeline_class, None, variant, empty)
        index = json.loads((source / DiffusionPipeline.config_name).read_text(encoding="utf-8"))
        with _device(empty):
            for name in parts:
                if not name.startswith("tokenizer"):
                    models[name] = None if index[name][0] is None else untrained_model(source / name, *index[name])
        variant = None
    others = pipeline_class.from_pretrained(str(source), variant=variant, **models)
    return {name: getattr(others, name) for name in parts}


def _empty_autoencoder(source: str) -> ModelMixin:
    config: Any = AutoModel.load_config(source)
    with _device(True):
        return getattr(diffusers, config["_class_name"]).from_config(config)


def _start_as_identity(model: ModelMixin) -> bool:
    if not (isinstance(model, (AutoencoderKL, AutoencoderKLWan)) and can_be_identity(model)):
        return False
    set_identity(model)
    return True


def untrained_model(folder: Path, library: str, class_name: str) -> ModelMixin | PreTrainedModel:
    """A model from its config, in evaluation mode, with random weights; library and class are of model_index.json."""
    own = NETWORKS.get(f"{library}.{class_name}")
    families = {module.name for module in pkgutil.iter_modules(diffusers.pipelines.__path__)}
    if library not in LIBRARIES and library in families:
        # A model that one family of diffusers has beside its pipelines, named by the family's module.
        library = f"diffusers.pipelines.{library}"
    elif own is None and library not in LIBRARIES:
        raise ValueError(
            f"The {class_name} of an untrained pipeline is from the module {library!r}, which is not one of"
            f" {', '.join(LIBRARIES)}: import the module that calls `diffusers_fm.register_network({class_name})`"
            " before, in a training script with --import_modules."
        )
    if not (folder / ModelMixin.config_name).is_file():
        raise ValueError(
            f"The pipeline's model_index.json names a {class_name}, but there is no config in {str(folder)!r}."
        )
    model_class: Any = getattr(importlib.import_module(library), class_name) if own is None else own
    if library == "transformers":
        return model_class(model_class.config_class.from_pretrained(folder)).eval()
    model = model_class.from_config(model_class.load_config(folder))
    _zero_output_layers(model)
    return model.eval()


def _zero_output_layers(model: ModelMixin) -> None:
    zeroed: list[nn.Module] = [
        module.linear
        for module in model.modules()
        if isinstance(
            module, (AdaLayerNormZero, AdaLayerNormZeroSingle, AdaLayerNormContinuous, SD35AdaLayerNormZeroX)
        )
    ]
    if isinstance(model, DiTTransformer2DModel):
        zeroed += [model.proj_out_1, model.proj_out_2]
    elif isinstance(model, UNet2DModel):
        zeroed += [model.conv_out]
    zeroed += [layer for name, layer in model.named_children() if name == "proj_out"]
    for module in zeroed:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
