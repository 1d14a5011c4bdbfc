# SPDX-License-Identifier: Apache-2.0
"""Images that a pipeline is given beside its captions, one of each argument for each sample."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..data.conditions import is_mask
from ..data.images import ImageData
from ..data.randomness import BatchSlice, make_generator
from ..pipelines.findings import tolerance
from ..pipelines.one_step import leaves
from ..pipelines.pipeline_calls import HALF, NetworkReached
from ..pipelines.prompt_memo import find_axes, merge
from ..pipelines.velocity_field import VelocityField
from ..training.validation import EVALUATION_SEED
from .arguments import TextToImageArguments


# Frames of a video in a picture grid at most.
SHOWN_FRAMES = 8


# Arguments that a run gives itself.
OWN = ("self", "prompt", "height", "width", "generator", "output_type", "num_frames")

# Side of images that stand in where no size is known yet.
UNKNOWN_SIDE = 64


class CallImages:
    """
    Images of a pipeline's call, and how it takes those of a batch: as lists, or of one sample a call alone.

    Args:
        field ([`VelocityField`]):
            The pipeline.
        columns (`Mapping[str, str]`):
            Arguments of its call, and the columns that their images come from.

    Attributes:
        together (`bool`, *optional*):
            Whether a call takes those of a batch; `None` until it was asked.

    Raises:
        ValueError: if the call has no such argument.
    """

    def __init__(self, field: VelocityField, columns: Mapping[str, str]) -> None:
        self.field, self.columns = field, dict(columns)
        self.together: bool | None = None
        self._takes_generator = "generator" in field.arguments
        self._name = type(field.pipeline).__name__
        for name in columns:
            others = [other for other in field.arguments if "image" in other and other not in OWN]
            if name not in field.arguments or name in OWN or name in field.call:
                raise ValueError(
                    f"--call_columns {name}={columns[name]}: the call of {self._name} takes"
                    f" {', '.join(others) or 'no images'}."
                )

    def probes(self, count: int, size: tuple[int, int] | None, first: int = 0) -> dict[str, list[Any]]:
        """Random images for samples that have none, those of sample `first` and after it."""
        height, width = size or (UNKNOWN_SIDE, UNKNOWN_SIDE)
        found: dict[str, list[Any]] = {}
        for name in self.columns:
            found[name] = []
            for number in range(first, first + count):
                random = np.random.default_rng([number, *name.encode()])
                if is_mask(name):
                    # Halves in patches: a mask of single pixels would be the same everywhere once it is packed.
                    pixels = np.kron(random.integers(0, 2, (4, 4)), np.ones((-(-height // 4), -(-width // 4))))
                    pixels = (255 * pixels[:height, :width]).astype(np.uint8)
                else:
                    colours = self.field.pipeline.components["vae"].config.get("in_channels", 3)
                    pixels = random.integers(0, 256, (height, width, colours), dtype=np.uint8).squeeze()
                found[name].append(PIL.Image.fromarray(pixels))
        return {**found, **self._generators([make_generator(EVALUATION_SEED, "probe") for _ in range(count)])}

    def of_batch(self, batch: Mapping[str, Any], part: BatchSlice | None) -> dict[str, list[Any]]:
        """
        Arguments of the call for the images of a batch, a list each.

        Args:
            batch (`Mapping[str, Any]`):
                With `conditions`, as [`~data.images.ImageData`] gives them.
            part ([`BatchSlice`], *optional*):
                Whose random numbers the autoencoder's posterior of the images is drawn with; without it fixed ones.
        """
        found: dict[str, list[Any]] = {name: pictures(each) for name, each in batch["conditions"].items()}
        count = len(next(iter(found.values())))
        # The same numbers for each sample, so that they do not depend on its place in a batch.
        generators = [make_generator(EVALUATION_SEED, "condition") for _ in range(count)]
        if part is not None:
            generators = part.sample_generators("condition")
        return {**found, **self._generators(generators)}

    def _generators(self, generators: list[torch.Generator]) -> dict[str, list[Any]]:
        return {"generator": generators} if self._takes_generator else {}

    def given(self, images: Mapping[str, list[Any]], captions: dict[str, Any]) -> dict[str, Any]:
        """Arguments of one call, as the pipeline takes them."""
        if self.together is None:
            self._choose_form(images, captions)
        return dict(images) if self.together else {name: each for name, (each,) in images.items()}

    def _choose_form(self, images: Mapping[str, list[Any]], captions: dict[str, Any]) -> None:
        """Ask whether a call takes images of two samples, each its own."""
        size = next(each for name, each in images.items() if name in self.columns)[0].size[::-1]
        errors: list[str] = []
        for count, together in ((2, True), (1, False)):
            self.together = together
            try:
                self._run({**captions, "prompt": [""] * count, **self.given(self.probes(count, size), {})})
            except (ValueError, RuntimeError, TypeError, AttributeError, IndexError, AssertionError) as error:
                errors.append(str(error))
            else:
                return
        self.together = None
        words = ", ".join(f"`{name}`" for name in self.columns)
        raise ValueError(f"{self._name} takes no images as {words}: {errors[-1]}")

    @torch.no_grad()
    def _run(self, call: dict[str, Any]) -> None:
        with self.field.quiet(None), contextlib.suppress(NetworkReached):
            self.field.run(self.field.probes(call)[1], call, self.field.calls(stop=True))

    @torch.no_grad()
    def verify(self, x_t: torch.Tensor, captions: dict[str, Any], size: tuple[int, int]) -> None:
        """
        Compare what the network is given for two samples in one call and each in its own. Where those differ, samples
        have calls of their own from now on.

        Args:
            x_t (`torch.Tensor` of shape `(1, ...)`):
                A state.
            captions (`dict[str, Any]`):
                Further arguments of the call, for one sample.
            size (`tuple[int, int]`):
                Height and width in pixels.

        Raises:
            ValueError: if an image does not matter to the network.
        """

        def seen(*numbers: int, **other: list[Any]) -> list[dict[str, Any]]:
            """Arguments of the networks for samples with the images of those numbers."""
            each = [self.probes(1, size, number) for number in numbers]
            images = {name: [value for one in each for value in one[name]] for name in each[0]} | other
            call = {**captions, "prompt": captions["prompt"] * len(numbers), **self.given(images, captions)}
            states = x_t.repeat(len(numbers), *[1] * (x_t.ndim - 1))
            found = self.field.ask(states, **call)
            calls = self.field.calls(found.skipped + found.outputs)
            with self.field.quiet(x_t):
                torch.manual_seed(0)
                self.field.run(self.field.probes(call)[1], call, calls, states, found.entry)
            return [calls.seen[-1], *(arguments for side in calls.sides.values() for arguments in side.seen[-1:])]

        first = seen(0)
        for name in self.columns:
            if _distance(first, seen(0, **{name: self.probes(1, size, 1)[name]})) == 0:
                raise ValueError(f"the network of {self._name} does not depend on `{name}`: leave out --call_columns")
        if not self.together:
            return
        try:
            second, twice, both = seen(1), seen(0, 0), seen(0, 1)
            merged = [merge(list(each), find_axes(each[0], two)) for *each, two in zip(first, second, twice)]
            models = [each for each in self.field.pipeline.components.values() if isinstance(each, nn.Module)]
            half = any(next(model.parameters()).dtype in HALF for model in models)
            self.together = _distance(merged, both) <= (5e-2 if half else tolerance(self.field, x_t))
        except (ValueError, RuntimeError):
            self.together = False

    def describe(self) -> str:
        """Arguments and columns, in words."""
        words = ", ".join(f"`{name}` from the column {column!r}" for name, column in self.columns.items())
        return words if self.together else f"{words}, each sample in a call of its own"


def held_out_rows(
    draw: Callable[..., Any],
    pipeline: DiffusionPipeline,
    images: CallImages,
    args: TextToImageArguments,
    data: ImageData,
    size: tuple[int, int],
) -> list[list[Any]]:
    """
    Held-out samples for a picture grid: the images that the pipeline is given, what it draws of them, and the target.

    Args:
        draw (`Callable`):
            Of [`~setup.prompt_sampler`].
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With the scheduler to draw with.
        images ([`CallImages`]):
            Images of the call.
        args ([`TextToImageArguments`]):
            With number of pictures and steps.
        data ([`ImageData`]):
            The held-out samples.
        size (`tuple[int, int]`):
            Height and width of those that are shown.

    Returns:
        `list[list]`: Images, and videos as lists of frames, a row for each sample.
    """
    numbers = [number for number in range(len(data)) if data.size(number) == size and number not in data.unreadable]
    chosen = np.unique(np.linspace(0, len(numbers) - 1, args.num_validation_images).astype(int)) if numbers else []
    rows = []
    for number in (numbers[place] for place in chosen):
        keys = np.array([[0, number]])
        batch = data[keys]
        if number in data.unreadable:
            # Another one has taken its place.
            continue
        call = images.given(images.of_batch(batch, None), {})
        # The sampler's own serves the noise and the images, as it does for users.
        call.pop("generator", None)
        scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)  # pyright: ignore
        generators = [make_generator(EVALUATION_SEED, "grid", number)]
        drawn = draw(scheduler, args.num_inference_steps, batch["captions"], generators, **call)[0]
        target = data.transform.as_batch(data.pixels(keys))
        frames = target[0].transpose(0, 1) if target.ndim == 5 else target
        given = [image.convert("RGB") for each in batch["conditions"].values() for image in pictures(each)]
        shown = [image.convert("RGB") for image in pictures(frames)]
        if isinstance(drawn, PIL.Image.Image):
            rows.append([*given, drawn.convert("RGB"), *shown])
        else:
            # A condition stands still for as long as the video.
            rows.append([*([image] * len(shown) for image in given), list(drawn), shown])
    return rows


def pictures(images: torch.Tensor) -> list[PIL.Image.Image]:
    """Pictures of uint8 pixels of shape `(batch_size, channels, height, width)`, as users hand them to pipelines."""
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return [PIL.Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays]


def _distance(one: list[Any], other: list[Any]) -> float:
    """Largest difference of tensors, in units of the largest number of each."""
    most = 0.0
    for a, b in zip(leaves(one), leaves(other), strict=True):
        if a.shape != b.shape:
            return float("inf")
        a, b = a.float(), b.float()
        most = max(most, ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item())
    return most


def picture(image: Any) -> PIL.Image.Image:
    """Picture of an image or of a video, whose frames, PIL images or arrays in [0, 1], stand side by side."""
    if isinstance(image, PIL.Image.Image):
        return image
    frames = [np.asarray(frame) / 255 if isinstance(frame, PIL.Image.Image) else frame for frame in image]
    shown = [frames[number] for number in np.linspace(0, len(frames) - 1, min(len(frames), SHOWN_FRAMES)).astype(int)]
    return PIL.Image.fromarray(np.round(np.concatenate(shown, axis=1) * 255).astype(np.uint8))
