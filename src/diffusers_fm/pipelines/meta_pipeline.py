# SPDX-License-Identifier: Apache-2.0
"""Pipelines without weights, to count with."""

import importlib
import inspect
import json
import os
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import snapshot_download

from .init_pipeline import ENCODERS, LIBRARIES, check_pipeline_class, untrained_model


PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)


def meta_pipeline(
    folder: str | os.PathLike,
    pipeline_class: type[PipelineT],
    vae: str | os.PathLike | None = None,
    revision: str | None = None,
    text_encoders: str | os.PathLike | None = None,
) -> PipelineT:
    """
    A pipeline whose models are on the meta device: they have shapes and no contents, and take no memory. Weights and
    tokenizers are neither read nor downloaded.

    Args:
        folder (`str` or `os.PathLike`):
            A pipeline folder, trained or not, or the id of a repository on the Hub.
        pipeline_class (`type[DiffusionPipeline]`):
            [`FlowMatchPipeline`] or [`~diffusers.StableDiffusion3Pipeline`].
        vae (`str` or `os.PathLike`, *optional*):
            An autoencoder, its folder or Hub id, in place of the one in `folder`.
        revision (`str`, *optional*):
            Branch, tag or commit, if `folder` is a Hub id.
        text_encoders (`str` or `os.PathLike`, *optional*):
            A Stable Diffusion 3 pipeline whose text encoders take the place of those in `folder`.

    Returns:
        A pipeline of that class, in float32, without tokenizers.

    Raises:
        ValueError: if there is no pipeline of that class.
    """
    path = _configs(folder, revision)
    index = _read(path / DiffusionPipeline.config_name)
    check_pipeline_class(folder, index, pipeline_class)
    components = _models(path, index, pipeline_class)
    if text_encoders is not None:
        others = _configs(text_encoders, None)
        found = _models(others, _read(others / DiffusionPipeline.config_name), pipeline_class)
        components |= {name: found[name] for name in ENCODERS}
    if vae is not None:
        config = _read(_configs(vae, None) / ModelMixin.config_name)
        with torch.device("meta"):
            components["vae"] = getattr(diffusers, config["_class_name"]).from_config(config)
    return pipeline_class(**components)


def _configs(folder: str | os.PathLike, revision: str | None) -> Path:
    if Path(folder).is_dir():
        return Path(folder)
    return Path(snapshot_download(str(folder), revision=revision, allow_patterns=["*.json"]))


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"There is no {file.name} in {str(file.parent)!r}.")
    return json.loads(file.read_text(encoding="utf-8"))


def _models(path: Path, index: dict[str, Any], pipeline_class: type[DiffusionPipeline]) -> dict[str, Any]:
    """The scheduler, the models on the meta device, settings, and nothing in the place of tokenizers."""
    parts: dict[str, Any] = {}
    for name, parameter in inspect.signature(pipeline_class).parameters.items():
        entry = index.get(name)
        if not isinstance(entry, list):
            if name in index or parameter.default is inspect.Parameter.empty:
                parts[name] = entry
            continue
        library, class_name = entry
        parts[name] = None
        if library not in (None, *LIBRARIES):
            raise ValueError(f"A part of a pipeline must be from {', '.join(LIBRARIES)}, got {library!r}.")
        if name == "scheduler":
            part_class = getattr(importlib.import_module(library), class_name)
            parts[name] = part_class.from_pretrained(path, subfolder=name)
        elif library is not None and not name.startswith("tokenizer"):
            with torch.device("meta"):
                parts[name] = untrained_model(path / name, library, class_name)
    return parts
