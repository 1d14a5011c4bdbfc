# SPDX-License-Identifier: Apache-2.0
"""Untrained pipelines from folders of configs."""

import importlib
import json
import logging
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel, DiTTransformer2DModel, ModelMixin, SD3Transformer2DModel, UNet2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, AdaLayerNormZero, SD35AdaLayerNormZeroX
from torch import nn

from .components import check_one_network, has_weights
from .pipeline_flow_match import FlowMatchPipeline


logger = logging.getLogger(__name__)

# model_index.json may come from anywhere, and importing a module runs it.
LIBRARIES = ("diffusers", "diffusers_fm")


def init_pipeline(
    folder: str | os.PathLike,
    seed: int | None = None,
    vae: ModelMixin | str | os.PathLike | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> FlowMatchPipeline:
    """
    Builds a pipeline for training: what has weights is loaded, the rest starts from its config with random weights.

    The random start is each model's own, except that the output layer and the layers that modulate or gate by time
    and class start at zero (DiT, arXiv 2212.09748, section 3.2), which diffusers' models leave to the caller: the
    first prediction is 0, and each block of a transformer starts as the identity.

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

    Returns:
        [`FlowMatchPipeline`]: the pipeline in float32, its models in evaluation mode.

    Raises:
        ValueError: if there is no `folder` or no pipeline in it, it is not of a kind that can be built here, or `vae`
            is given for a pipeline that works on pixels.
    """
    path = Path(folder)
    if not path.is_dir():
        if path.is_absolute() or len(path.parts) > 2:
            raise ValueError(f"{str(folder)!r} is neither a folder nor the id of a repository on the Hub.")
        path = Path(FlowMatchPipeline.download(str(folder), revision=revision, variant=variant))
    if not (path / FlowMatchPipeline.config_name).is_file():
        raise ValueError(f"The folder {str(folder)!r} is not a pipeline: it holds no {FlowMatchPipeline.config_name}.")
    index = json.loads((path / FlowMatchPipeline.config_name).read_text(encoding="utf-8"))
    declared = {
        name: tuple(index[name])
        for name in ("scheduler", *FlowMatchPipeline._optional_components)
        if index.get(name, [None])[0] is not None
    }
    check_one_network(declared.get("unet"), declared.get("transformer"))
    if vae is not None and "vae" not in declared:
        raise ValueError(f"`vae` was given, but the pipeline {str(folder)!r} works on pixels.")
    components: dict[str, Any] = {}
    if vae is not None:
        components["vae"] = AutoModel.from_pretrained(str(vae)) if isinstance(vae, (str, os.PathLike)) else vae

    untrained = [
        name for name in declared if name != "scheduler" and name not in components and not has_weights(path / name)
    ]
    if "vae" in untrained:
        logger.warning(
            "The autoencoder of %s has random weights, and no model learns anything from its latents: give `vae` a"
            " trained one that fits %s.",
            folder,
            path / "vae" / "config.json",
        )
    with nullcontext() if seed is None else torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        for name in untrained:
            components[name] = _untrained_model(path / name, *declared[name])
    pipeline = FlowMatchPipeline.from_pretrained(path, variant=variant, **components)
    pipeline.register_to_config(_name_or_path=str(folder))
    return pipeline


def _untrained_model(folder: Path, library: str, class_name: str) -> ModelMixin:
    if library not in LIBRARIES:
        raise ValueError(f"A model of an untrained pipeline must be from {' or '.join(LIBRARIES)}, got {library!r}.")
    if not (folder / ModelMixin.config_name).is_file():
        raise ValueError(
            f"The pipeline's model_index.json names a {class_name}, but there is no config in {str(folder)!r}."
        )
    model_class = getattr(importlib.import_module(library), class_name)
    model = model_class.from_config(model_class.load_config(folder))
    _zero_output_layers(model)
    return model.eval()


def _zero_output_layers(model: ModelMixin) -> None:
    zeroed: list[nn.Module] = [
        module.linear
        for module in model.modules()
        if isinstance(module, (AdaLayerNormZero, AdaLayerNormContinuous, SD35AdaLayerNormZeroX))
    ]
    if isinstance(model, DiTTransformer2DModel):
        zeroed += [model.proj_out_1, model.proj_out_2]
    elif isinstance(model, SD3Transformer2DModel):
        zeroed += [model.proj_out]
    elif isinstance(model, UNet2DModel):
        zeroed += [model.conv_out]
    for module in zeroed:
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
