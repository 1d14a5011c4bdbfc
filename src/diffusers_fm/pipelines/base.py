# SPDX-License-Identifier: Apache-2.0
"""Base of the pipelines: components, classes, guidance, and the way from noise to data."""

import copy
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import PIL.Image
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
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor, unwrap_module
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError

from ..coordinates import Coordinates
from ..hub.cards import CardContent, model_card
from ..hub.push import PushMixin, hub_reason
from ..models.autoencoding import decode_latents, spatial_scale_factor
from ..models.class_embedder import ClassEmbedder
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..solvers import Solution
from ..transport import transport
from .cards import pipeline_content
from .checks import Generators, Labels, check_finite, check_noise, check_output, is_whole
from .components import KeepDtypeMixin, check_channels, check_components, check_one_network, has_weights, keep_labels
from .sampling import SamplingCall, SamplingOptions, begin_call, call_in_progress


# How far from an end the flow begins where the network's answer leaves the velocity without a limit there, and the
# least t that a network of the logarithm of time is given.
MARGIN = 1e-4

GuidedPredict = Callable[[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...], float], torch.Tensor]

PipelineT = TypeVar("PipelineT", bound="FlowMatchPipelineBase")


@dataclass
class FlowMatchPipelineOutput(BaseOutput):
    """
    Output of [`FlowMatchPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`):
            PIL images; an array of shape `(batch_size, height, width, channels)` or a tensor of shape
            `(batch_size, channels, height, width)` with values in [0, 1]; or latents.
        nfe (`int`):
            Number of calls of the network. A guided call evaluates twice the batch and counts once.
    """

    images: list[PIL.Image.Image] | np.ndarray | torch.Tensor
    nfe: int


def flow_end(scheduler: FlowMatchScheduler, t: float) -> float:
    """A time in [0, 1], or a time near it for an end where the network's answer determines no velocity."""
    at = torch.tensor(t, dtype=torch.float64)
    derivative = Coordinates(scheduler.path, "ot").derivative(at)
    if bool(scheduler.path.determines(at, scheduler.config.prediction_type, derivative)):
        return t
    return MARGIN if t == 0.0 else 1 - MARGIN


class NetworkField:
    """The network of a pipeline as a field of the path's time, with the guidance that sampling would use."""

    def __init__(
        self, pipeline: "FlowMatchPipelineBase", guidance_scale: float = 1.0, predict: GuidedPredict | None = None
    ) -> None:
        self.scheduler, self.guidance_scale = pipeline.scheduler, guidance_scale
        self.predict = pipeline.predict_guided if predict is None else predict

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, *args: torch.Tensor) -> torch.Tensor:
        inverted = self.scheduler.config.invert_sigmas
        timestep = self.scheduler.timestep_scale * (1 - t if inverted else t)
        output = self.predict(x_t, timestep, args, self.guidance_scale).to(x_t.dtype)
        return -output if inverted else output


class FlowMatchPipelineBase(KeepDtypeMixin, PushMixin, DiffusionPipeline):
    """
    Components, classes, guidance and integration of the pipelines of this package.

    A pipeline has its own `predict(sample, timestep, ..., class_labels=None)`: after the timestep come tensors with a
    row for each sample, labels last. Tuples `args` in here are those. The components are those of
    [`FlowMatchPipeline`].

    All state of a call is its own, so calls of one pipeline may overlap, in threads or in a callback. In a call,
    `scheduler` is the call's copy, with its loop laid out.

    Raises:
        ValueError: If the components do not fit together.
    """

    model_cpu_offload_seq = "unet->transformer->vae"
    # A small table that is read at every call of the network: not worth moving back and forth.
    _exclude_from_cpu_offload = ["class_embedder"]
    _optional_components = ["unet", "transformer", "vae", "class_embedder"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        scheduler: SchedulerMixin,
        unet: UNet2DModel | None = None,
        transformer: DiTTransformer2DModel | SD3Transformer2DModel | None = None,
        vae: AutoencoderKL | AutoencoderTiny | AutoencoderDC | None = None,
        class_embedder: ClassEmbedder | None = None,
        num_classes: int | None = None,
        id2label: dict | None = None,
    ) -> None:
        super().__init__()
        check_components(unet, transformer, vae, class_embedder, num_classes)
        self._check_channels(unwrap_module(transformer if unet is None else unet), vae)
        is_ours = isinstance(scheduler, FlowMatchScheduler)
        self.register_modules(
            scheduler=scheduler if is_ours else FlowMatchScheduler.from_stock(scheduler),
            unet=unet,
            transformer=transformer,
            vae=vae,
            class_embedder=class_embedder,
        )
        self.register_to_config(num_classes=num_classes, id2label=id2label)
        self.vae_scale_factor = 1 if vae is None else spatial_scale_factor(vae)
        # Images keep their own size, and no number of channels marks latents.
        self.image_processor = VaeImageProcessor(
            do_resize=False, vae_scale_factor=self.vae_scale_factor, vae_latent_channels=0
        )
        self._last_call = SamplingCall(self.scheduler)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "transformer" and value is not None:
            keep_labels(value)
        super().__setattr__(name, value)

    @staticmethod
    def _check_channels(network: ModelMixin, vae: ModelMixin | None) -> None:
        check_channels(network, vae)

    @classmethod
    def from_pretrained(
        cls: type[PipelineT], pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> PipelineT:
        """
        Loads a trained pipeline from a folder or the Hub, see [`~diffusers.DiffusionPipeline.from_pretrained`].

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                A pipeline folder, or the id of a repository on the Hub.
            kwargs (*optional*):
                What [`~diffusers.DiffusionPipeline.from_pretrained`] takes, components included. Weights in pickles,
                which may run code when they are read, are loaded with `use_safetensors=False` only.

        Returns:
            The pipeline, its models in evaluation mode.

        Raises:
            ValueError: if the folder is that of an untrained pipeline, or does not hold exactly one network.
            OSError: if the Hub does not give the pipeline, or there are no safetensors.
        """
        folder = Path(pretrained_model_name_or_path)
        if (folder / cls.config_name).is_file():
            index = json.loads((folder / cls.config_name).read_text(encoding="utf-8"))
            declared = [name for name in cls._optional_components if index.get(name, [None])[0] is not None]
            networks = {name: kwargs.get(name, name in declared or None) for name in ("unet", "transformer")}
            check_one_network(**networks)
            missing = [name for name in declared if name not in kwargs and not has_weights(folder / name)]
            if missing:
                raise ValueError(
                    f"The folder {str(folder)!r} holds no weights for {' and '.join(missing)}; build an untrained"
                    f" pipeline from its configs with `diffusers_fm.init_pipeline({str(folder)!r})`."
                )
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **{"use_safetensors": True, **kwargs})
        except OSError as error:
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
            if folder.exists() or cause is None:
                raise
            name = str(pretrained_model_name_or_path)
            raise OSError(f"{name!r} cannot be loaded from the Hub: {hub_reason(cause)}.") from error

    def card_content(self, repo_id: str, num_inference_steps: int = 50, guidance_scale: float = 1.0) -> CardContent:
        """Content of a model card, with the settings of its example; `dataclasses.replace` adds to it."""
        return pipeline_content(
            self.denoiser,
            self.scheduler,
            self.sample_shape,
            self.num_classes,
            repo_id,
            num_inference_steps,
            guidance_scale,
            latent=self.vae is not None,
            scale_factor=self.config.get("scale_factor"),
        )

    def build_model_card(self, repo_id: str) -> ModelCard:
        """The card that `push_to_hub` writes where the repository has none."""
        return model_card(self.card_content(repo_id))

    @property
    def scheduler(self) -> FlowMatchScheduler:
        """The scheduler; in a call, the call's own copy of it."""
        call = call_in_progress(self)
        return self.__dict__["scheduler"] if call is None else call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: FlowMatchScheduler) -> None:
        self.__dict__["scheduler"] = scheduler

    @property
    def denoiser(self) -> ModelMixin:
        """The network: the `unet` or the `transformer`."""
        return self.transformer if self.unet is None else self.unet

    @property
    def num_classes(self) -> int:
        """Number of classes, the null class not counted; 0 for an unconditional model."""
        network = unwrap_module(self.denoiser)
        if isinstance(network, SD3Transformer2DModel):
            return self.class_embedder.config.num_classes
        if isinstance(network, DiTTransformer2DModel):
            return network.config.num_embeds_ada_norm
        if self.config.num_classes is not None:
            return self.config.num_classes
        return network.config.num_class_embeds or 0

    @property
    def null_class(self) -> int | None:
        """Label of the null class of classifier-free guidance, or `None` where the network has none."""
        network = unwrap_module(self.denoiser)
        if isinstance(network, UNet2DModel) and network.config.num_class_embeds != self.num_classes + 1:
            return None
        return self.num_classes

    @property
    def data_channels(self) -> int:
        """Channels of x_t: those of the images, or of the latents."""
        return unwrap_module(self.denoiser).config.in_channels

    @property
    def image_channels(self) -> int:
        """Channels of the images."""
        return self.data_channels if self.vae is None else self.vae.config.in_channels

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape `(channels, height, width)` of what the network was configured for: pixels, or latents."""
        config = unwrap_module(self.denoiser).config
        if config.sample_size is None:
            raise ValueError("The unet's config has no `sample_size`: `height` and `width` must be given.")
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.data_channels, height, width

    @property
    def size_multiple(self) -> int:
        """What height and width of an image are multiples of, in pixels."""
        network = unwrap_module(self.denoiser)
        is_unet = isinstance(network, UNet2DModel)
        patch = 2 ** (len(network.config.block_out_channels) - 1) if is_unet else network.config.patch_size
        return patch * self.vae_scale_factor

    @property
    def _call(self) -> SamplingCall:
        """The call in progress in this thread; elsewhere the one that began last, so that any thread can stop it."""
        return call_in_progress(self) or self._last_call

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance of the call in progress; 1 is off."""
        return self._call.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the call in progress evaluates the null class beside the wanted one."""
        return self.guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of times at which the call in progress evaluates the network."""
        return self._call.num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked to stop, by setting `_interrupt`."""
        return self._call.interrupt

    # diffusers' names of what a callback sets.

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, guidance_scale: float) -> None:
        self._call.guidance_scale = guidance_scale

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupt

    @_interrupt.setter
    def _interrupt(self, interrupt: bool) -> None:
        self._call.interrupt = interrupt

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """
        Labels of class names.

        Args:
            label (`str` or `list[str]`):
                Names, or single synonyms, as they stand in the config's `id2label`.

        Returns:
            `list[int]`: one label for each name.

        Raises:
            ValueError: if the pipeline has no names, or a name is unknown or stands for several classes.
        """
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

    def prepare_latents(
        self,
        shape: tuple[int, ...],
        device: torch.device | str,
        generator: Generators = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The start of the integration: standard normal noise, scaled to the prior of the path at t = 1.

        Args:
            shape (`tuple[int, ...]`):
                `(batch_size, channels, height, width)`.
            device (`torch.device` or `str`):
                Where the latents are wanted.
            generator (`torch.Generator` or `list[torch.Generator]`, *optional*):
                One generator, or one for each image.
            latents (`torch.Tensor`, *optional*):
                Standard normal noise to use instead of a fresh draw.

        Returns:
            `torch.Tensor` of shape `shape`, float32.
        """
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        return latents.to(device=device, dtype=torch.float32) * self.scheduler.init_noise_sigma

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

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t, pixels or latents.
            timestep (`torch.Tensor` of shape `()` or `(batch_size,)`):
                `num_train_timesteps * t`.
            args (`tuple[torch.Tensor, ...]`, *optional*):
                What [`predict`] takes after the timestep, labels last.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale w of `null + w * (class - null)`; 1 is off.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, height, width)`: of the scheduler's `prediction_type`.
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
        network = unwrap_module(self.denoiser)
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

        if self.class_embedder is not None:
            tokens, pooled = self.class_embedder(class_labels)
            model_output = self.denoiser(
                hidden_states=model_input.to(dtype),
                timestep=timestep,
                encoder_hidden_states=tokens.to(dtype),
                pooled_projections=pooled.to(dtype),
                return_dict=False,
            )[0]
        else:
            model_output = self.denoiser(
                model_input.to(dtype), timestep, class_labels=class_labels, return_dict=False
            )[0]
        return model_output[:, : self.data_channels]

    def check_inputs(self, batch_size: int, latent_shape: tuple[int, int, int], options: SamplingOptions) -> None:
        """Raise a `ValueError` for arguments of a call that cannot work, before any work."""
        if not is_whole(batch_size):
            raise ValueError(f"`batch_size` must be 1 or more, got {batch_size!r}.")
        check_output(batch_size, options.output_type, options.generator)
        if options.output_type == "pil" and self.image_channels not in (1, 3, 4):
            raise ValueError(
                f"An image of {self.image_channels} channels cannot be a PIL image: use `output_type` np, pt or"
                " latent."
            )
        scale, latents = options.guidance_scale, options.latents
        if scale != 1.0 and self.num_classes == 0:
            raise ValueError(f"`guidance_scale` {scale} needs classes, and this pipeline has none: use 1.")
        if scale != 1.0 and self.null_class is None:
            raise ValueError(
                f"`guidance_scale` {scale} needs a null class, and this network has none: use 1, or train one"
                " with `num_class_embeds == num_classes + 1`."
            )
        if latents is not None and tuple(latents.shape) != (batch_size, *latent_shape):
            raise ValueError(
                f"`latents` must have the shape {(batch_size, *latent_shape)}, got {tuple(latents.shape)}."
            )
        if latents is not None:
            check_noise("latents", latents)
        unknown = [name for name in options.tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` must be among {self._callback_tensor_inputs}, got {unknown}."
            )
        if not isinstance(self.scheduler, FlowMatchScheduler):
            raise ValueError(
                f"The scheduler must be a FlowMatchScheduler, got {self.scheduler.__class__.__name__}: convert it with"
                " `FlowMatchScheduler.from_config(scheduler.config)`."
            )

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """
        Shape of the network's input for an image size, checked against what the network can do.

        Args:
            height (`int`, *optional*):
                Height of the image in pixels; defaults to the size that the network was configured for.
            width (`int`, *optional*):
                Width of the image in pixels, likewise.

        Returns:
            `tuple[int, int, int]`: `(channels, height, width)`.

        Raises:
            ValueError: if the network or the autoencoder cannot make images of this size.
        """
        network = unwrap_module(self.denoiser)
        config = network.config
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

    def integrate(
        self,
        latents: torch.Tensor,
        args: tuple[torch.Tensor, ...],
        options: SamplingOptions,
        predict: GuidedPredict | None = None,
    ) -> tuple[torch.Tensor, int]:
        """
        Integrate from noise to data, by the scheduler's solver or that of the call.

        Args:
            latents (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t at t = 1, as [`prepare_latents`] gives it.
            args (`tuple[torch.Tensor, ...]`):
                What [`predict`] takes after the timestep, labels last.
            options ([`SamplingOptions`]):
                Arguments of the call.
            predict (`Callable`, *optional*):
                In place of [`predict_guided`].

        Returns:
            `tuple[torch.Tensor, int]`: x_t at t = 0, in float32, and the number of calls of the network.

        Raises:
            ValueError: If the solver and the scheduler do not go together, or the network gives NaN.
        """
        if options.is_adaptive:
            # Each sample takes its own steps.
            steps = {"num_steps": None, "rtol": options.rtol, "atol": options.atol, "step_control": "per_sample"}
            with self._begin(SamplingCall(self.scheduler, options.guidance_scale)):
                field = NetworkField(self, options.guidance_scale, predict)
                solution = self._transport(field, latents, 1.0, 0.0, args, method=options.solver, **steps)
            return solution.x.float(), int(solution.evaluations.max())

        scheduler = self.scheduler
        scheduler = copy.copy(scheduler) if options.solver is None else scheduler.with_settings(solver=options.solver)
        self._lay_out(scheduler, latents, options)
        answer = self.predict_guided if predict is None else predict
        with self._begin(SamplingCall(scheduler, options.guidance_scale, len(scheduler.timesteps))) as call:
            return self._sample(
                scheduler,
                lambda x_t, i: answer(x_t, scheduler.timesteps[i], args, call.guidance_scale).float(),
                latents,
                options,
            )

    def _begin(self, call: SamplingCall) -> AbstractContextManager[SamplingCall]:
        self._last_call = call
        return begin_call(self, call)

    def _lay_out(self, scheduler: FlowMatchScheduler, latents: torch.Tensor, options: SamplingOptions) -> None:
        shape = tuple(latents.shape[1:])
        mu = self._default_mu(scheduler, shape) if scheduler.config.use_dynamic_shifting else None
        options.set_timesteps(scheduler, latents.device, mu)

    def _sample(
        self,
        scheduler: FlowMatchScheduler,
        answer: Callable[[torch.Tensor, int], torch.Tensor],
        latents: torch.Tensor,
        options: SamplingOptions,
    ) -> tuple[torch.Tensor, int]:
        """The sampling loop: `answer` is what the scheduler's step takes, at x_t and the index of the time."""
        nfe = 0
        order, last = scheduler.order, len(scheduler.timesteps) - 1
        with self.progress_bar(total=scheduler.num_inference_steps) as progress_bar:  # pyright: ignore[reportCallIssue]
            for i, timestep in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                output = answer(latents, i)
                nfe += 1
                latents = scheduler.step(output, timestep, latents, generator=options.generator, return_dict=False)[0]

                # Every step has `order` stages, except the last, which is a single one where the path asks for it.
                if (i + 1) % order == 0 or i == last:
                    if options.callback_on_step_end is not None:
                        begin = scheduler.timesteps[i // order * order]
                        tensors = {"latents": latents} if "latents" in options.tensor_inputs else {}
                        outputs = options.callback_on_step_end(self, i // order, begin, tensors)
                        latents = outputs.pop("latents", latents)
                    progress_bar.update()
        check_finite(unwrap_module(self.denoiser), latents)
        return latents, nfe

    def _default_mu(self, scheduler: FlowMatchScheduler, shape: tuple[int, int, int]) -> float:
        patch_size = unwrap_module(self.denoiser).config.get("patch_size", 1)
        return calculate_shift(
            (shape[1] // patch_size) * (shape[2] // patch_size),
            scheduler.config.base_image_seq_len,
            scheduler.config.max_image_seq_len,
            scheduler.config.base_shift,
            scheduler.config.max_shift,
        )

    @torch.no_grad()
    def to_images(self, data: torch.Tensor, output_type: str = "pil", size: tuple[int, int] | None = None) -> Any:
        """
        What the flow ends in, as images: the way back of [`to_data`].

        Args:
            data (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Pixels in about [-1, 1], or latents.
            output_type (`str`, *optional*, defaults to `"pil"`):
                `"pil"`, `"np"`, `"pt"`, or `"latent"` for `data` itself.
            size (`tuple[int, int]`, *optional*):
                Height and width of the images, where they are cut from something larger at the bottom and the right.

        Returns:
            PIL images; an array `(batch_size, height, width, channels)` or a tensor
            `(batch_size, channels, height, width)` with values in [0, 1]; or `data`.
        """
        if output_type == "latent":
            return data
        pixels = data if self.vae is None else decode_latents(self.vae, data)
        check_finite(self.denoiser if self.vae is None else self.vae, pixels)
        if size is not None:
            pixels = pixels[..., : size[0], : size[1]]
        return self.image_processor.postprocess(pixels, output_type=output_type)

    @torch.no_grad()
    def transport(
        self,
        x_t: torch.Tensor,
        start: float,
        end: float,
        args: tuple[torch.Tensor, ...] = (),
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Solution:
        """
        Carry points of the path from one time to another, in either direction (arXiv 2210.02747, equation 1).

        Args:
            x_t (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                Points of the path at `start`: data at t = 0; at t = 1, standard normal noise times the scheduler's
                `init_noise_sigma`.
            start (`float`):
                The time of `x_t`, in [0, 1], 0 = data, 1 = noise.
            end (`float`):
                The time to go to, in [0, 1].
            args (`tuple[torch.Tensor, ...]`, *optional*):
                What [`predict`] takes after the timestep, labels last.
            guidance_scale (`float`, *optional*, defaults to 1.0):
                Scale of classifier-free guidance, 1 is off.
            options:
                Arguments of [`~transport.transport`]: `method`, `num_steps`, `rtol`, `step_control`, ...

        Returns:
            [`~solvers.Solution`]: The points at `end`, and the calls of the network for each sample.

        Raises:
            ValueError: If an argument is out of range.
        """
        return self._transport(NetworkField(self, guidance_scale), x_t, start, end, args, **options)

    def _transport(
        self,
        field: Callable[..., torch.Tensor],
        x_t: torch.Tensor,
        start: float,
        end: float,
        args: tuple[torch.Tensor, ...],
        **options: Any,
    ) -> Solution:
        solution = transport(
            field,
            x_t,
            self.scheduler.path,
            start=flow_end(self.scheduler, start),
            end=flow_end(self.scheduler, end),
            prediction_type=self.scheduler.config.prediction_type,
            args=args,
            **options,
        )
        check_finite(unwrap_module(self.denoiser), solution.x)
        return solution


def _input_dtype(network: ModelMixin) -> torch.dtype:
    """Dtype in which a network takes its input. `network.dtype` looks at every module, at every call."""
    dtype = next(parameter.dtype for parameter in network.parameters() if parameter.is_floating_point())
    # Weights stored in 8 bits are cast to another dtype layer by layer.
    return network.dtype if dtype.itemsize == 1 else dtype
