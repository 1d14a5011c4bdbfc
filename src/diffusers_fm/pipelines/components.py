# SPDX-License-Identifier: Apache-2.0
"""Components of the pipelines: checks, loading, sharing, and the call of the network."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    DiTTransformer2DModel,
    ModelMixin,
    SchedulerMixin,
    SD3Transformer2DModel,
    UNet2DModel,
)
from diffusers.guiders import BaseGuidance
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.embeddings import LabelEmbedding
from diffusers.utils.torch_utils import unwrap_module
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from ..hub.cards import CardContent, model_card
from ..hub.push import PushMixin, hub_reason
from ..models.autoencoding import spatial_scale_factor
from ..models.class_embedder import ClassEmbedder
from ..models.interval import IntervalEmbedding
from ..models.networks import argument_names, call_network, is_registered
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .cards import pipeline_content
from .checks import Labels, is_whole
from .guidance import GUIDANCE_SETTINGS, check_guidance_settings, without_guidance
from .sampling import default_steps


# How far from an end the flow begins where the network's answer leaves the velocity without a limit there, and the
# least t that a network of the logarithm of time is given.
MARGIN = 1e-4

# Networks whose forward takes what a pipeline gives.
STOCK_NETWORKS = (UNet2DModel, DiTTransformer2DModel, SD3Transformer2DModel)

OR_OWN = "a network of your own is registered first by `diffusers_fm.register_network`"

NOT_IMPORTED = "The pipeline {!r} has a {} from the module {!r}, which is not imported: import it before loading."

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".flashpack")

PipelineT = TypeVar("PipelineT", bound=DiffusionPipeline)


class KeepDtypeMixin:
    """`from_pipe` without a cast."""

    @classmethod
    def from_pipe(cls: type[PipelineT], pipeline: DiffusionPipeline, **kwargs: Any) -> PipelineT:  # type: ignore[misc]
        """
        Make a pipeline of this class that shares the components of another one.

        Args:
            pipeline ([`~diffusers.DiffusionPipeline`]):
                The other pipeline.
            kwargs (*optional*):
                Arguments of [`~diffusers.DiffusionPipeline.from_pipe`], such as components that the other one lacks.
                Its own way is to cast everything to float32, in both pipelines: here dtypes stay as they are unless
                `torch_dtype` asks for one.

        Returns:
            The pipeline.

        Raises:
            ValueError: If a component is missing, or they do not fit together.
        """
        kwargs = without_guidance(kwargs)
        cast = kwargs.get("torch_dtype") is not None or kwargs.get("dtype") is not None
        # The cast is the last thing that diffusers' method does, by a call of `to`.
        made = cls if cast else type(cls.__name__, (cls,), {"to": lambda self, **_: self})
        parent: Any = super(KeepDtypeMixin, made)
        shared = parent.from_pipe(pipeline, **kwargs)
        shared.__class__ = cls
        return shared


def has_weights(folder: Path) -> bool:
    """Return whether a component's folder holds weights of any format and variant."""
    return any(path.suffix in WEIGHT_SUFFIXES for path in folder.glob("*.*"))


def keep_labels(network: nn.Module) -> None:
    """Have a network keep its labels in training too: a `LabelEmbedding` would drop a tenth of them by itself."""
    for module in network.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0


def check_one_network(unet: object, transformer: object) -> None:
    """Raise a `ValueError` if a pipeline has both networks or neither."""
    if (unet is None) == (transformer is None):
        given = "neither was" if unet is None else "both were"
        raise ValueError(f"A FlowMatchPipeline needs either `unet` or `transformer`, {given} given.")


def check_components(
    unet: ModelMixin | None,
    transformer: ModelMixin | None,
    vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None,
    class_embedder: ClassEmbedder | None,
    num_classes: int | None,
) -> None:
    """Raise a `ValueError` if the components of a [`FlowMatchPipeline`] do not fit together."""
    check_one_network(unet, transformer)
    network = unwrap_module(transformer if unet is None else unet)
    is_own = is_registered(network)
    if not is_own and unet is not None and not isinstance(network, UNet2DModel):
        raise ValueError(f"`unet` must be a UNet2DModel, got {network.__class__.__name__}; {OR_OWN}.")
    if not is_own and unet is None and not isinstance(network, (DiTTransformer2DModel, SD3Transformer2DModel)):
        raise ValueError(
            "`transformer` must be a DiTTransformer2DModel or an SD3Transformer2DModel, got"
            f" {network.__class__.__name__}; {OR_OWN}."
        )
    config = network.config

    if is_own:
        classes = _classes_of_own(network, class_embedder)
    elif isinstance(network, SD3Transformer2DModel):
        if class_embedder is None or not isinstance(unwrap_module(class_embedder), ClassEmbedder):
            raise ValueError(
                "An SD3Transformer2DModel needs a ClassEmbedder as `class_embedder` (one with `num_classes=0` for an"
                f" unconditional model), got {class_embedder.__class__.__name__}."
            )
        for name in ("joint_attention_dim", "pooled_projection_dim"):
            if class_embedder.config[name] != config[name]:
                raise ValueError(
                    f"The class embedder's `{name}` {class_embedder.config[name]} must equal the transformer's"
                    f" {config[name]}."
                )
        classes = {class_embedder.config.num_classes}
    elif class_embedder is not None:
        raise ValueError(f"A {network.__class__.__name__} takes labels by itself: `class_embedder` must be None.")
    elif isinstance(network, DiTTransformer2DModel):
        classes = {config.num_embeds_ada_norm}
    elif config.class_embed_type is not None:
        raise ValueError(f"A `unet` with `class_embed_type` {config.class_embed_type!r} is not supported: use None.")
    elif config.num_class_embeds is None:
        classes = {0}
    else:
        classes = {config.num_class_embeds, config.num_class_embeds - 1}
    if num_classes is not None and num_classes not in classes:
        accepted = " or ".join(str(value) for value in sorted(classes))
        raise ValueError(f"`num_classes` must be {accepted} for this network, got {num_classes}.")


def _classes_of_own(network: ModelMixin, class_embedder: ClassEmbedder | None) -> set[int]:
    """Numbers of classes that a registered network can have."""
    names, rows = argument_names(network), network.config.get("num_class_embeds")
    if ("encoder_hidden_states" in names) != (class_embedder is not None):
        raise ValueError(
            f"{network.__class__.__name__} takes {names}: a `class_embedder` belongs to a network with"
            " `encoder_hidden_states`, and to no other."
        )
    if rows is not None and "class_labels" not in names:
        raise ValueError(
            f"{network.__class__.__name__} has `num_class_embeds` {rows} and no argument `class_labels`, but {names}."
        )
    if class_embedder is not None:
        return {unwrap_module(class_embedder).config.num_classes}
    return {0} if rows is None else {rows, rows - 1}


def check_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
    """Raise a `ValueError` if a network gives other channels than it takes, or other ones than the autoencoder has."""
    config = unwrap_module(network).config
    out_channels = config.get("out_channels") or config.in_channels
    if out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"The network's `out_channels` must equal its `in_channels` {config.in_channels}, or be twice as many with"
            f" a learned variance, got {out_channels}."
        )
    if vae is not None and vae.config.latent_channels != config.in_channels:
        raise ValueError(
            f"The autoencoder has {vae.config.latent_channels} latent channels, the network {config.in_channels}."
        )


def check_upscale_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
    """Raise a `ValueError` if a network does not take the low-resolution image beside x_t."""
    config = unwrap_module(network).config
    channels = config.in_channels if config.out_channels is None else config.out_channels
    if config.in_channels not in (2 * channels, 2 * channels + 1):
        raise ValueError(
            "An upscaling network takes x_t, the low-resolution image and perhaps a channel for its noise level: with"
            f" `out_channels` {channels} its `in_channels` must be {2 * channels} or {2 * channels + 1}, got"
            f" {config.in_channels}."
        )
    if vae is not None and vae.config.latent_channels != channels:
        raise ValueError(f"The autoencoder has {vae.config.latent_channels} latent channels, the network {channels}.")


class FlowMatchComponents(KeepDtypeMixin, PushMixin, DiffusionPipeline):
    """
    Components of a pipeline with its classes, its sizes and the call of its network; see [`FlowMatchPipeline`].

    A pipeline has its own `predict(sample, timestep, ..., class_labels=None)`: after the timestep come tensors with a
    row for each sample, labels last. Tuples `args` in here are those.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    # Small ones that are read at every call of the network: not worth moving back and forth.
    _exclude_from_cpu_offload = ["class_embedder", "interval_embedding"]
    _optional_components = [
        *("unet", "transformer", "vae", "class_embedder", "interval_embedding", "guider", "guiding_network")
    ]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | ModelMixin | None = None,
        transformer: DiTTransformer2DModel | SD3Transformer2DModel | ModelMixin | None = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        class_embedder: ClassEmbedder | None = None,
        num_classes: int | None = None,
        id2label: dict | None = None,
        interval_embedding: IntervalEmbedding | None = None,
        guider: BaseGuidance | None = None,
        guiding_network: ModelMixin | None = None,
        guidance_space: str | None = None,
        guidance_interval: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_components(unet, transformer, vae, class_embedder, num_classes)
        self._check_channels(unwrap_module(transformer if unet is None else unet), vae)
        check_guidance_settings(guider, guiding_network, guidance_space, guidance_interval)
        is_ours = isinstance(scheduler, FlowMatchScheduler)
        self.register_modules(
            scheduler=scheduler if is_ours else FlowMatchScheduler.from_stock(scheduler),
            unet=unet,
            transformer=transformer,
            vae=vae,
            class_embedder=class_embedder,
            interval_embedding=interval_embedding,
            guider=guider,
            guiding_network=guiding_network,
        )
        self.register_to_config(num_classes=num_classes, id2label=id2label)
        if guider is not None:
            interval = None if guidance_interval is None else list(guidance_interval)
            self.register_to_config(guidance_space=guidance_space, guidance_interval=interval)
        self.vae_scale_factor = 1 if vae is None else spatial_scale_factor(vae)
        # Images keep their own size, and no number of channels marks latents.
        self.image_processor = VaeImageProcessor(
            do_resize=False, vae_scale_factor=self.vae_scale_factor, vae_latent_channels=0
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transformer" and value is not None:
            keep_labels(value)
        leaves = name == "guider" and value is None and self.__dict__.get("guider") is not None
        super().__setattr__(name, value)
        if leaves:
            # They mean nothing without a guider, and are refused when the pipeline is loaded or shared.
            self.guiding_network = None
            self.register_to_config(**dict.fromkeys(GUIDANCE_SETTINGS))

    @staticmethod
    def _check_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
        check_channels(network, vae)

    @classmethod
    def from_pretrained(
        cls: type[PipelineT], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> PipelineT:
        """
        Load a trained pipeline from a folder or the Hub, see [`~diffusers.DiffusionPipeline.from_pretrained`].

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A pipeline folder, or the id of a repository on the Hub.
            kwargs (*optional*):
                Arguments of diffusers' method, components included. Weights in pickles, which may run code when they
                are read, are loaded with `use_safetensors=False` only.

        Returns:
            The pipeline, its models in evaluation mode.

        Raises:
            ValueError: If the folder is that of an untrained pipeline, or does not hold exactly one network.
            OSError: If the Hub does not give the pipeline, or there are no safetensors.
        """
        kwargs = without_guidance(kwargs)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir() and (folder.is_absolute() or len(folder.parts) > 2):
            raise ValueError(f"{str(folder)!r} is neither a folder nor the id of a repository on the Hub.")
        if (folder / cls.config_name).is_file():
            index = json.loads((folder / cls.config_name).read_text(encoding="utf-8"))
            declared = [name for name in cls._optional_components if index.get(name, [None])[0] is not None]
            networks = {name: kwargs.get(name, name in declared or None) for name in ("unet", "transformer")}
            check_one_network(**networks)
            models = [name for name in declared if name not in ("guider", *kwargs)]
            missing = [name for name in models if not has_weights(folder / name)]
            for name in models:
                if index[name][0] not in sys.modules:
                    raise ValueError(NOT_IMPORTED.format(str(folder), index[name][1], index[name][0]))
            if missing:
                raise ValueError(
                    f"The folder {str(folder)!r} holds no weights for {' and '.join(missing)}; build an untrained"
                    f" pipeline from its configs with `diffusers_fm.init_pipeline({str(folder)!r})`."
                )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        except ValueError as error:
            # diffusers' way to say that model_index.json names a module that it does not know.
            module = re.match(r"\w+/([\w.]+)\.py as defined in", str(error))
            if module is None:
                raise
            raise ValueError(
                NOT_IMPORTED.format(pretrained_model_name_or_path, "network of its own", module[1])
            ) from error
        except OSError as error:
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if folder.exists() or cause is None:
                raise
            name = str(pretrained_model_name_or_path)
            raise OSError(
                f"{name!r} is no folder here and cannot be loaded from the Hub: {hub_reason(cause)}."
            ) from error

    def card_content(
        self, repo_id: str, num_inference_steps: int | None = None, guidance_scale: float = 1.0
    ) -> CardContent:
        """Content of a model card, with the settings of its example; `dataclasses.replace` adds to it."""
        return pipeline_content(
            self.denoiser,
            self.scheduler,
            self.sample_shape,
            self.num_classes,
            repo_id,
            num_inference_steps or default_steps(self.scheduler),
            guidance_scale,
            latent=self.vae is not None,
            scale_factor=self.config.get("scale_factor"),
        )

    def build_model_card(self, repo_id: str) -> ModelCard:
        """The card that `push_to_hub` writes where the repository has none."""
        return model_card(self.card_content(repo_id))

    @property
    def denoiser(self) -> ModelMixin:
        """The network: the `unet` or the `transformer`."""
        return self.transformer if self.unet is None else self.unet

    @property
    def _network_of_call(self) -> ModelMixin:
        """Network to call; in sampling it may be the one to be guided away from."""
        return self.denoiser

    @property
    def num_classes(self) -> int:
        """Number of classes, the null class not counted; 0 for an unconditional model."""
        network = unwrap_module(self.denoiser)
        if self.class_embedder is not None:
            return self.class_embedder.config.num_classes
        if isinstance(network, DiTTransformer2DModel):
            return network.config.num_embeds_ada_norm
        if self.config.num_classes is not None:
            return self.config.num_classes
        return network.config.get("num_class_embeds") or 0

    @property
    def null_class(self) -> int | None:
        """Label of the null class of classifier-free guidance, or `None` where the network has none."""
        network = unwrap_module(self.denoiser)
        has_null = self.class_embedder is not None or isinstance(network, DiTTransformer2DModel)
        return self.num_classes if has_null or network.config.get("num_class_embeds") == self.num_classes + 1 else None

    @property
    def data_channels(self) -> int:
        """Channels of x_t: those of the images, or of the latents."""
        return unwrap_module(self.denoiser).config.in_channels

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.data_channels if self.vae is None else self.vae.config.in_channels

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """
        Shape `(channels, height, width)` of what the network was configured for: pixels, or latents. A registered
        network may have other dimensions after the channels.
        """
        size = unwrap_module(self.denoiser).config.sample_size
        if size is None:
            raise ValueError("The unet's config has no `sample_size`: `height` and `width` must be given.")
        return self.data_channels, *((size, size) if isinstance(size, int) else size)

    @property
    def makes_pictures(self) -> bool:
        """True if samples are pictures: of two dimensions, and of 1, 3 or 4 channels."""
        return self._num_dims == 3 and self.image_channels in (1, 3, 4)

    @property
    def _num_dims(self) -> int:
        """Number of dimensions of a sample, channels included, which a network of any size has too."""
        size = unwrap_module(self.denoiser).config.sample_size
        return 3 if size is None or isinstance(size, int) else 1 + len(size)

    @property
    def size_multiple(self) -> int:
        """Number of pixels that height and width of an image must be multiples of."""
        network = unwrap_module(self.denoiser)
        is_unet = isinstance(network, UNet2DModel)
        patch = 2 ** (len(network.config.block_out_channels) - 1) if is_unet else network.config.get("patch_size", 1)
        return patch * self.vae_scale_factor

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Labels of class names, or of single synonyms, as the config's `id2label` has them."""
        if self.config.id2label is None:
            raise ValueError(f"The class name {label!r} was given, but this pipeline has no `id2label`: use integers.")
        ids: dict[str, list[int]] = {}
        for key, value in self.config.id2label.items():
            for name in {str(value), *(part.strip() for part in str(value).split(","))}:
                ids.setdefault(name, []).append(int(key))
        labels = []
        for name in [label] if isinstance(label, str) else label:
            if name not in ids:
                raise ValueError(
                    f"Unknown class name {name!r}; the names are the values of `pipeline.config.id2label`."
                )
            if len(ids[name]) > 1:
                raise ValueError(
                    f"The class name {name!r} stands for the labels {ids[name]}: use one of the integers."
                )
            labels += ids[name]
        return labels

    def prepare_class_labels(
        self,
        class_labels: Labels,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        allow_null: bool = False,
    ) -> torch.Tensor | None:
        """
        Checks labels and brings them to the form that [`predict`] takes.

        Args:
            class_labels (`int`, `str`, `list` of them, or `torch.Tensor` of shape `(batch_size,)`, *optional*):
                Labels in `0 .. num_classes - 1`, or class names. A single one serves the whole batch.
            batch_size (`int`, *optional*):
                Number of images; defaults to the number of labels.
            device (`torch.device` or `str`, *optional*, defaults to `"cpu"`):
                Where the labels are wanted.
            allow_null (`bool`, *optional*, defaults to `False`):
                Whether [`null_class`] counts as a label.

        Returns:
            `torch.Tensor` of shape `(batch_size,)`, int64, or `None` for an unconditional model.

        Raises:
            ValueError: if labels are missing, superfluous, out of range, or not `batch_size` many.
        """
        if batch_size is not None and not is_whole(batch_size, 0):
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size!r}.")
        if self.num_classes == 0:
            if class_labels is not None:
                raise ValueError(f"`class_labels` {class_labels!r} was given, but this pipeline has no classes.")
            return None
        if class_labels is None:
            raise ValueError(f"`class_labels` must be given: this pipeline has {self.num_classes} classes.")
        labels = class_labels.tolist() if isinstance(class_labels, (torch.Tensor, np.ndarray)) else class_labels
        if not isinstance(labels, (list, tuple)):
            labels = [labels] * (1 if batch_size is None else batch_size)
        labels = [self.get_label_ids(label)[0] if isinstance(label, str) else label for label in labels]
        for label in labels:
            if not isinstance(label, (int, np.integer)) or isinstance(label, bool):
                raise ValueError(f"A class label must be an integer or a class name, got {label!r}.")
            if not 0 <= label < self.num_classes and not (allow_null and label == self.null_class):
                raise ValueError(f"Class label {label} is out of range: labels are 0 to {self.num_classes - 1}.")
        if batch_size is not None and len(labels) != batch_size:
            raise ValueError(f"{len(labels)} class labels were given for a batch of {batch_size}.")
        return torch.tensor(labels, dtype=torch.int64, device=device)

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor | float, *args: Any) -> torch.Tensor:
        """One call of the network at x_t; see the pipelines."""
        raise NotImplementedError

    def predict_guided(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        args: tuple[torch.Tensor, ...] = (),
        guidance_scale: float = 1.0,
    ) -> torch.Tensor:
        """
        [`predict`] with classifier-free guidance (arXiv 2207.12598): one call of twice the batch.

        The answer is `null + guidance_scale * (class - null)`, of the scheduler's `prediction_type`; a scale of 1 is
        off. `args` are what [`predict`] takes after the timestep, labels last.
        """
        if guidance_scale == 1.0 or not args:
            return self.predict(sample, timestep, *args)
        *conditions, labels = args
        sample, *conditions = [torch.cat([tensor, tensor]) for tensor in (sample, *conditions)]
        if timestep.ndim:
            timestep = torch.cat([timestep, timestep])
        labels = torch.cat([torch.full_like(labels, self.null_class), labels])
        null_output, class_output = self.predict(sample, timestep, *conditions, labels).float().chunk(2)
        return null_output + guidance_scale * (class_output - null_output)

    def _call_network(
        self, model_input: torch.Tensor, timestep: torch.Tensor | float, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        network = unwrap_module(self._network_of_call)
        batch_size, device = model_input.shape[0], model_input.device
        dtype = _input_dtype(network)
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=device).expand(batch_size)
        if isinstance(network, UNet2DModel) and network.config.time_embedding_type == "fourier":
            # It takes the logarithm of the timestep, and divides by it.
            timestep = timestep.clamp(min=MARGIN * self.scheduler.timestep_scale)
        if class_labels is not None:
            class_labels = class_labels.to(device)
        elif self.num_classes > 0:
            raise ValueError(f"`class_labels` must be given: this pipeline has {self.num_classes} classes.")
        elif self.null_class is not None:
            class_labels = torch.full((batch_size,), self.null_class, dtype=torch.int64, device=device)

        conditions: dict[str, torch.Tensor | None] = {"class_labels": class_labels}
        if self.class_embedder is not None:
            tokens, pooled = self.class_embedder(class_labels)
            conditions = {"encoder_hidden_states": tokens.to(dtype), "pooled_projections": pooled.to(dtype)}
        conditions["timestep"], model_input = timestep, model_input.to(dtype)
        if type(network) in STOCK_NETWORKS:
            model_output = self._network_of_call(model_input, return_dict=False, **conditions)[0]
        else:
            model_output = call_network(self._network_of_call, model_input, **conditions)
        return model_output[:, : self.data_channels]

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Shape of x_t for images of a size in pixels, by default the network's; a `ValueError` for a wrong size."""
        network = unwrap_module(self.denoiser)
        config = network.config
        if height is None and width is None and self._num_dims != 3:
            return self.sample_shape
        if height is None or width is None:
            _, default_height, default_width = self.sample_shape
            height = default_height * self.vae_scale_factor if height is None else height
            width = default_width * self.vae_scale_factor if width is None else width
        multiple = self.size_multiple
        if not all(is_whole(side) and side % multiple == 0 for side in (height, width)):
            raise ValueError(
                f"`height` and `width` must be positive multiples of {multiple} for this pipeline, got"
                f" {height} x {width}."
            )
        if isinstance(network, DiTTransformer2DModel) and height != width:
            raise ValueError(f"DiTTransformer2DModel makes square images only, got {height} x {width}.")
        if isinstance(network, SD3Transformer2DModel) and max(height, width) > config.pos_embed_max_size * multiple:
            raise ValueError(
                f"`height` and `width` must not exceed {config.pos_embed_max_size * multiple}, the reach of the"
                f" transformer's position embeddings, got {height} x {width}."
            )
        return self.data_channels, height // self.vae_scale_factor, width // self.vae_scale_factor


def _input_dtype(network: ModelMixin) -> torch.dtype:
    """Dtype in which a network takes its input. `network.dtype` looks at every module, at every call."""
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    # Weights stored in 8 bits are cast to another dtype layer by layer.
    return network.dtype if dtype.itemsize == 1 else dtype
