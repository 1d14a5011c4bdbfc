# SPDX-License-Identifier: Apache-2.0
"""Velocity field of a text-to-image pipeline in training: captions, sizes, data and shifts by the pipeline itself."""

import contextlib
import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import offload_models
from torch import nn

from ..data.latents import normalize
from ..data.randomness import BatchSlice
from ..models import encode_moments
from ..models.costs import OneNetwork
from ..pipelines.decode_map import DecodeMap
from ..pipelines.findings import find_times
from ..pipelines.one_step import map_tensors, straight_scheduler
from ..pipelines.pipeline_calls import PROBES, NetworkReached
from ..pipelines.velocity_field import VelocityField
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from .images import CallImages
from .sounds import Sounds, check_seconds, find_sounds, seconds_argument
from .text import TextEncoders


Size = tuple[int, int]

# Side of the image that tells an autoencoder's factor, the largest in use.
PROBE_SIDE = 64
# Frames of the video that tells its factor in time: one more than a multiple of all factors in use.
ASKED_FRAMES = 25


class TrainedField(OneNetwork):
    """
    Network of a text-to-image pipeline as it is trained: a call runs the pipeline up to its first step.

    The pipeline's scheduler decides path, prediction type and shift. The network's answer is its prediction for that
    path; on the OT path of stock schedulers it is the velocity noise - data.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            Pipeline whose network is trained in place.
        network (`str`):
            Name of the component that is trained.
        call (`dict[str, Any]`):
            Arguments of every call, such as `max_sequence_length`.
        text_encoders (`Sequence[nn.Module]`, *optional*):
            Text encoders of the pipeline that are trained too.
        call_columns (`Mapping[str, str]`, *optional*):
            Arguments of the call that are images of each sample, and the columns that they come from.

    Attributes:
        images ([`CallImages`], *optional*):
            Images of each sample beside its caption.
        square (`tuple[int, int]`, *optional*):
            Size at which the pipeline is asked what does not depend on it; by default the pipeline's own.
        sounds ([`Sounds`], *optional*):
            What a pipeline of sounds makes. A sound's size is a height of 1 and a width of its samples.

    Raises:
        ValueError: if the pipeline cannot be verified to be a velocity field.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        network: str,
        call: dict[str, Any],
        text_encoders: Sequence[nn.Module] = (),
        call_columns: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        straight = copy.copy(pipeline)
        vars(straight)["scheduler"] = straight_scheduler(pipeline.scheduler)
        self.field = VelocityField(straight, network, **call)
        self.images = CallImages(self.field, call_columns) if call_columns else None
        # In a tuple, which hides them from the module: what is not trained has no part in its state.
        self._hidden = (pipeline, call)
        self._config: Any = pipeline.scheduler.config
        self._known: dict[Size | None, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.square: Size | None = None
        self.sounds: Sounds | None = None
        self._maps: dict[Size | None, DecodeMap] = {}
        self._shifts: dict[Size, float] = {}
        self.text_encoders = nn.ModuleList(text_encoders)
        self.text = TextEncoders(pipeline, text_encoders)
        self.field.encode_prompt = self.text

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainedField":
        """A copy of what is trained, in a pipeline of its own that shares the rest."""
        pipeline, call = self._hidden
        pipeline = copy.copy(pipeline)
        vars(pipeline)[self.field.name] = copy.deepcopy(self.field.network, memo)
        copied = type(self)(pipeline, self.field.name, call)
        if self.images is not None:
            copied.images = CallImages(copied.field, self.images.columns)
            copied.images.together = self.images.together
        copied.text = copied.field.encode_prompt = self.text
        # What was found holds for the copy, which may be in shards that are not to be asked.
        copied._config, copied.field._found = self._config, self.field._found
        copied.sounds = self.sounds
        return copied

    def set_scheduler(self, scheduler: FlowMatchScheduler) -> None:
        """Train for another scheduler, which decides shift and scale of the times from now on."""
        self._config = scheduler.config
        self._shifts.clear()
        self.field.set_scheduler(straight_scheduler(scheduler))

    @property
    def pipeline(self) -> DiffusionPipeline:
        """The pipeline."""
        return self._hidden[0]

    @property
    def main_network(self) -> nn.Module:
        """The network that is trained."""
        return self.field.network

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of every call."""
        return self._hidden[1]

    @torch.no_grad()
    def network_call(
        self, sample: torch.Tensor, timestep: torch.Tensor, captions: Sequence[str], size: Size, *_: Any
    ) -> tuple[nn.Module, dict[str, Any]]:
        """The network and the arguments that it gets in a call."""
        together = self.images is None or self.images.together
        arguments = self._network_arguments(0.5, captions if together else captions[:1], size)
        network = self.field.network
        device = next(network.parameters()).device

        def prepared(tensor: torch.Tensor) -> torch.Tensor:
            # Samples that have calls of their own count as those of one.
            alone = not together and tensor.ndim > 0 and len(tensor) == 1
            return (tensor.expand(len(captions), *tensor.shape[1:]) if alone else tensor).to(device)

        return network, map_tensors(prepared, arguments)

    @torch.no_grad()
    def _network_arguments(self, t: float, captions: Sequence[str], size: Size | None) -> dict[str, Any]:
        calls = self.field.calls(stop=True)
        with self.field.quiet(None), contextlib.suppress(NetworkReached):
            self.field.run(t, self._condition(captions, size), calls)
        return calls.seen[-1]

    def describe(self) -> str:
        """Findings on a step, in words; of a dry run, where nothing can be verified, time arguments and shapes."""
        described = self.field.describe()
        if described:
            return _words(**described[0]) + self._described_images()
        runs = [self._network_arguments(t, [""], self.square) for t in PROBES[0]]
        numbers = [
            {
                name: value
                for name, value in seen.items()
                # The state of a pipeline that begins from an image depends on the time, too.
                if isinstance(value, torch.Tensor) and not value.is_meta and name != self.field.state
            }
            for seen in runs
        ]
        times, _ = find_times(numbers, PROBES[0], self.field.state)
        return _words(times, (1, *self._shapes(self.square)[0])) + self._described_images()

    def _described_images(self) -> str:
        return "" if self.images is None else f", {self.images.describe()}"

    @cached_property
    def factor(self) -> int:
        """Pixels per latent along height and width."""
        vae: Any = self.pipeline.components["vae"]
        channels = vae.config.get("in_channels", 3)
        with torch.no_grad():
            probe = torch.zeros(1, channels, PROBE_SIDE, PROBE_SIDE, device=vae.device)
            return PROBE_SIDE // encode_moments(vae, probe).shape[-1]

    @cached_property
    def multiple(self) -> int:
        """Divisor of the sides of images: pixels of a token."""
        state, latents = self._shapes(self.square)
        patch = self.field.network.config.get("patch_size", 1)  # pyright: ignore[reportCallIssue]
        patch = patch if isinstance(patch, int) else patch[-1]
        # Where the state is a sequence of tokens, several latents are packed into one.
        packed = math.isqrt(state[-1] // latents[0]) if len(state) == 2 else 1
        return self.factor * patch * packed

    @cached_property
    def default_size(self) -> Size:
        """Height and width of the images that the pipeline makes by default."""
        height, width = self._shapes(None)[1][-2:]
        return self.factor * height, self.factor * width

    def state_shape(self, size: Size | None) -> tuple[int, ...]:
        """Shape of the state of a sample."""
        return self._shapes(size)[0]

    @property
    def is_empty(self) -> bool:
        """True if the models have no contents: those of a dry run."""
        vae: Any = self.pipeline.components["vae"]
        return next(vae.parameters()).is_meta

    def _shapes(self, size: Size | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the state and of the latents of a sample."""
        if not self.is_empty:
            found = self.decode_map(size).map
            return found.x_shape, found.y_shape
        if size in self._known:
            return self._known[size]
        config: Any = self.pipeline.components["vae"].config
        channels = config.get("latent_channels", config.get("z_dim"))
        state: Any = self.field.state_shape(**self._condition([""], size))[1:]
        side = 0 if len(state) > 2 else math.isqrt(state[0]) * math.isqrt(state[1] // channels)
        sides = (side, side) if size is None else (size[0] // self.factor, size[1] // self.factor)
        self._known[size] = state, (channels, *(state[-2:] if len(state) > 2 else sides))
        return self._known[size]

    @torch.no_grad()
    def set_frames(self, name: str, num_frames: int, size: Size) -> None:
        """
        Ask the pipeline for videos of a number of frames from now on.

        Args:
            name (`str`):
                Argument of the call that says how many.
            num_frames (`int`):
                Frames of the videos that are trained on.
            size (`tuple[int, int]`):
                Height and width in pixels.

        Raises:
            ValueError: if the autoencoder or the pipeline does not make so many.
        """
        model, kind = type(self.pipeline).__name__, type(self.pipeline.components["vae"]).__name__
        factor = (ASKED_FRAMES - 1) / max(1, self._latent_frames(ASKED_FRAMES) - 1)
        if (num_frames - 1) % factor:
            nearest = max(1, round((num_frames - 1) / factor)) * factor + 1
            raise ValueError(
                f"--num_frames must be {factor:g} k + 1 for the {kind} of {model}, such as {nearest:g}, got"
                f" {num_frames}."
            )
        # A pipeline whose autoencoder keeps every frame may make one more than it is asked for.
        for asked in (num_frames, num_frames - 1):
            self.call[name] = self.field.call[name] = asked
            self._maps.clear()
            if self.is_empty or self.decode_map(size).map.y_shape[1] == self._latent_frames(num_frames):
                if asked != num_frames:
                    # It warns of that at each call.
                    logging.getLogger(type(self.pipeline).__module__).setLevel(logging.ERROR)
                return
        raise ValueError(f"{model} makes no videos of {num_frames} frames.")

    @torch.no_grad()
    def set_seconds(self, seconds: float) -> Size:
        """
        Ask the pipeline for sounds of a length from now on.

        Args:
            seconds (`float`):
                Their length.

        Returns:
            `tuple[int, int]`: the size of a sound, 1 and its samples.

        Raises:
            ValueError: if the pipeline makes no sounds of that length, or its autoencoder cannot be verified.
        """
        check_seconds(self.pipeline, seconds)
        name = str(seconds_argument(self.pipeline))
        self.call[name] = self.field.call[name] = seconds
        model = type(self.pipeline).__name__
        if self.is_empty:
            raise ValueError(f"--dry_run does not work for {model}: the length of its sounds is found with weights.")
        try:
            found = self.decode_map(None).map
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{model} makes no sounds of {seconds:g} s: {error}") from error
        self.sounds = find_sounds(self.pipeline, found.y_shape, seconds)
        self.square = size = (1, self.sounds.num_samples)
        self._maps[size] = self._maps[None]
        x_t = torch.zeros(2, *found.x_shape, device=next(self.field.network.parameters()).device)
        for count in (1, 2):
            self.field.ask(x_t[:count], **self._condition([""] * count, size))
        return size

    def _latent_frames(self, num_frames: int) -> int:
        """Frames of the latents of a video."""
        vae: Any = self.pipeline.components["vae"]
        channels = vae.config.get("in_channels", 3)
        probe = torch.zeros(1, channels, num_frames, PROBE_SIDE, PROBE_SIDE, device=vae.device)
        return encode_moments(vae, probe).shape[2]

    def check_size(self, size: Size) -> None:
        """
        Ask the pipeline for a size, for one sample and for a batch.

        Raises:
            ValueError: if it does not take images of that size.
        """
        if self.is_empty:
            try:
                self._shapes(size)
            except RuntimeError as error:
                raise ValueError(
                    f"--dry_run does not work for {type(self.pipeline).__name__}, whose call looks at values: {error}"
                ) from error
            return
        name = type(self.pipeline).__name__
        try:
            state = self.decode_map(size)
            shape = tuple(self.factor * side for side in state.map.y_shape[-2:])
            if shape != size:
                raise ValueError(f"it makes images of {shape[0]} x {shape[1]} then")
            x_t = torch.zeros(2, *state.map.x_shape, device=next(self.field.network.parameters()).device)
            if self.images is not None:
                self.images.verify(x_t[:1], self._captions([""], size), size)
            for count in (1, 2) if self.images is None or self.images.together else (1,):
                self.field.ask(x_t[:count], **self._condition([""] * count, size))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{name} takes no images of {size[0]} x {size[1]} pixels: {error}") from error

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        captions: Sequence[str],
        size: Size,
        dropped: torch.Tensor | None = None,
        images: Mapping[str, list[Any]] | None = None,
    ) -> torch.Tensor:
        """
        Prediction of the network, of the scheduler's `prediction_type`.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, ...)`):
                x_t, float32, as the pipeline's loop holds it.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                `timestep_scale * t`, continuous; t = 0 is data, 1 is noise.
            captions (`Sequence[str]`):
                Caption of each sample.
            size (`tuple[int, int]`):
                Height and width in pixels.
            dropped (`torch.Tensor` of shape `(batch_size, num_encoders)`, *optional*):
                Booleans: text encoders that are taken for zeros.
            images (`Mapping[str, list]`, *optional*):
                Images of each sample, of [`~TrainedField.call_images`].

        Returns:
            `torch.Tensor` of the shape of `sample`.
        """
        if self.images is not None and not self.images.together and len(sample) > 1:
            return torch.cat(
                [
                    self.forward(sample[row], timestep[row], captions[row], size, drop, one)
                    for row, drop, one in self._rows(len(sample), dropped, images)
                ]
            )
        t = timestep / self._config.num_train_timesteps
        self.choose_encoder()
        with self.text.dropping(dropped):
            return self.field(sample, t, **self._condition(captions, size, images))

    def _rows(
        self, count: int, dropped: torch.Tensor | None, images: Mapping[str, list[Any]] | None
    ) -> Iterator[tuple[slice, torch.Tensor | None, dict[str, list[Any]] | None]]:
        """Single samples of a batch."""
        for row in (slice(number, number + 1) for number in range(count)):
            one = None if images is None else {name: values[row] for name, values in images.items()}
            yield row, None if dropped is None else dropped[row], one

    def choose_encoder(self) -> None:
        """Kept captions of different lengths are compared with the encoders' own by the field."""
        memo = self.text.memo
        self.field.encode_prompt = self.text if memo is None or self.text.separable else memo

    def _captions(self, captions: Sequence[str], size: Size | None) -> dict[str, Any]:
        return {**self.field.prompt_arguments(captions), **self.size_arguments(size)}

    def size_arguments(self, size: Size | None) -> dict[str, Any]:
        """Arguments of a call that are a size; none for sounds, whose length is that of every call."""
        return {} if size is None or self.sounds is not None else {"height": size[0], "width": size[1]}

    def describe_sizes(self, sizes: Sequence[Size]) -> str:
        """Sizes in words, for the log."""
        if self.sounds is not None:
            return str(self.sounds)
        return f"{len(sizes)} sizes of about {sizes[0][0]} x {sizes[0][1]}"

    def _condition(
        self, captions: Sequence[str], size: Size | None, images: Mapping[str, list[Any]] | None = None
    ) -> dict[str, Any]:
        """Arguments of a call; where they have to have images and none are given, with some that stand in."""
        own = self._captions(captions, size)
        if self.images is None:
            return own
        return {**own, **self.images.given(images or self.images.probes(len(captions), size), own)}

    def call_images(self, batch: Mapping[str, Any], part: BatchSlice | None = None) -> dict[str, list[Any]] | None:
        """
        Images of a batch as arguments of the call, if there are any.

        Args:
            batch (`Mapping[str, Any]`):
                With `conditions`, as [`~data.images.ImageData`] gives them.
            part ([`BatchSlice`], *optional*):
                Whose random numbers the autoencoder's posterior of the images is drawn with; without it fixed ones.
        """
        return None if self.images is None else self.images.of_batch(batch, part)

    def encode_captions(self, captions: Sequence[str]) -> None:
        """Run the pipeline for captions up to its network, for the sake of what it asks its text encoders."""
        self.field.mu(**self._condition(captions, self.square))

    @torch.no_grad()
    def compare_captions(self, captions: Sequence[str]) -> None:
        """Predict for captions once; kept ones of different lengths are compared with the encoders' own on the way."""
        shape = (len(captions), *self.decode_map(self.square).map.x_shape)
        device = next(self.field.network.parameters()).device
        times = torch.full((len(captions),), 0.5 * self._config.num_train_timesteps, device=device)
        with self.field.quiet(None):
            self(torch.zeros(shape, device=device), times, captions, self.square or self.default_size)

    def decode_map(self, size: Size | None) -> DecodeMap:
        """Map between the encoder's latents and the states of the pipeline's loop, by default at its own size."""
        if size not in self._maps:
            try:
                self._maps[size] = DecodeMap(self.field, **self._condition([""], size))
            except ValueError as error:
                if self.images is None:
                    raise
                words = " ".join(f"{name}={column}" for name, column in self.images.columns.items())
                raise ValueError(f"--call_columns {words} cannot be trained: {error}") from error
        return self._maps[size]

    def shift(self, size: Size) -> float:
        """Shift of the times at a size: the scheduler's own, or by the `mu` that the pipeline passes to it."""
        if size not in self._shifts:
            self._shifts[size] = self.field.shift(**self._condition([""], size))
        return self._shifts[size]

    def has_own_grid(self, size: Size) -> bool:
        """Return whether the pipeline gives its scheduler other sigmas than those of equal steps."""
        sigmas = self.field.timesteps(4, **self._condition([""], size)).get("sigmas")
        return sigmas is not None and not np.allclose(sigmas, (1, 0.75, 0.5, 0.25), rtol=0, atol=1e-4)

    def size_of(self, batch: dict[str, Any]) -> Size:
        """Height and width in pixels of the images of a batch."""
        if self.sounds is not None:
            return 1, self.sounds.num_samples
        if "images" in batch:
            height, width = batch["images"].shape[-2:]
            return height, width
        height, width = batch["moments"].shape[-2:]
        return self.factor * height, self.factor * width

    @torch.no_grad()
    def encode(self, batch: dict[str, Any], device: torch.device, part: BatchSlice | None = None) -> torch.Tensor:
        """
        Clean states of a batch.

        Args:
            batch (`dict[str, Any]`):
                With `images`, uint8, or `moments`, as [`~data.latents.cache_latents`] keeps them.
            device (`torch.device`):
                Device of the states.
            part ([`BatchSlice`], *optional*):
                Whose random numbers the posterior is drawn with; without it its mode is taken.

        Returns:
            `torch.Tensor` of shape `(batch_size, ...)`, float32.
        """
        vae: Any = self.pipeline.components["vae"]
        moments = batch.get("moments")
        if moments is None:
            with offload_models(vae, device=device, offload=self.text.offload):
                moments = encode_moments(vae, normalize(batch["images"].to(device, non_blocking=True)))
        moments = moments.to(device, non_blocking=True)
        if self.is_empty:
            return torch.empty(len(moments), *self.state_shape(self.size_of(batch)), device=device)
        found = self.decode_map(self.size_of(batch))
        latents = moments
        if moments.shape[1] == 2 * found.map.y_shape[0]:
            posterior = DiagonalGaussianDistribution(moments)
            generators = None if part is None else part.sample_generators("posterior", device)
            latents = posterior.mode() if part is None else posterior.sample(generators)
        return found.map.inverse(latents.float())


def _words(time: Mapping[str, Any], shape: Sequence[int], sign: str | None = None, **_: Any) -> str:
    """Findings on a pipeline's step, by the names of [`VelocityField.describe`], in words."""
    times = ", ".join(f"`{name}` is {line}" for name, line in time.items())
    output = "" if sign is None else f" output {sign} (noise - data),"
    return f"{times} at noise level t,{output} x_t of shape {tuple(shape[1:])}"
