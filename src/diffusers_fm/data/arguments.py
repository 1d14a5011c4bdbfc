# SPDX-License-Identifier: Apache-2.0
"""Arguments of the data: where the images are, and how they are prepared."""

from dataclasses import dataclass
from typing import Annotated, Any

import PIL.ImageColor

from ..arguments import Arguments, Count, Fixed, Fraction, Free, Needs, Range, Size, option


def rgb(background: str) -> tuple[int, int, int]:
    """Red, green and blue of `--background`."""
    try:
        red, green, blue = PIL.ImageColor.getrgb(background)[:3]
    except ValueError as error:
        raise ValueError(f"--background must be a colour's name or #rrggbb, got {background!r}.") from error
    return red, green, blue


@dataclass(frozen=True, kw_only=True)
class DataArguments(Arguments):
    """Data set, columns and image transforms."""

    _argument_group_name = "data"

    dataset_name: str | None = option(
        None, "Hub id, or a local folder of parquet, arrow or image files or of save_to_disk."
    )
    dataset_config_name: str | None = option(None, "Configuration of the data set.")
    train_data_dir: str | None = option(None, "Folder of images instead, classes in subfolders.")
    image_folders: Free[list[str]] = option(
        [], "Other folders in which rows of a local --dataset_name may name image files."
    )
    train_split: str = option("train", "Split to train on.")
    validation_split: str | None = option(
        None, "Split held out; by default `validation`, else `test`, where there is one."
    )
    validation_fraction: Annotated[float, Range(0, 1, open_low=True, open_high=True)] | None = option(
        None, "Hold out such a part of the split to train on; the same part whatever the seed."
    )
    image_column: str = option(
        "image", "Column of the images, or of the sounds of a pipeline for them.", source="diffusers' examples"
    )
    max_train_samples: Count | None = option(None, "Train on so many samples, chosen at random.")
    max_unreadable_images: Size = option(100, "Go on if so many images cannot be read, at most.")
    max_validation_samples: Count = option(2048, "Hold out so many samples at most.")
    streaming: Fixed[bool] = option(False, "Read the data as it comes, without a download beforehand.")
    shuffle_buffer_size: Annotated[Count, Needs("streaming", True)] = option(
        1000, "Of a stream: files among which a worker shuffles."
    )
    allow_changed_data: Free[bool] = option(False, "Resume although rows or images have changed.")
    cache_dir: Free[str | None] = option(None, "Where downloaded and prepared data is kept.")
    resolution: Count | None = option(None, "Side of the images; by default what the pipeline is configured for.")
    center_crop: bool = option(False, "Crop at the centre, not anywhere.")
    random_flip: bool = option(False, "Mirror half of the images.")
    background: str = option("white", "Colour behind transparent images: a name, or #rrggbb.")
    dataloader_num_workers: Free[Size] = option(
        0, "Processes that decode images; results do not change.", source="diffusers' examples"
    )

    def check(self) -> None:
        if (self.dataset_name is None) == (self.train_data_dir is None):
            given = "neither" if self.dataset_name is None else "both"
            raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")
        rgb(self.background)
        for name in ("validation_split", "streaming"):
            if self.validation_fraction is not None and getattr(self, name):
                raise ValueError(f"--validation_fraction does not go with --{name}.")
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                f"--max_train_samples {self.max_train_samples} does not go with --streaming: streams are read whole."
            )


@dataclass(frozen=True, kw_only=True)
class LabelArguments(Arguments):
    """Class labels."""

    _argument_group_name = "labels"

    label_column: str = option("label", "Column of the labels, read if the model has classes.")
    label_dropout: Fraction | None = option(
        None, "Part of the labels dropped for guidance; 0.1 if there is a null class."
    )


@dataclass(frozen=True, kw_only=True)
class LatentArguments(Arguments):
    """Latents kept on disk."""

    _argument_group_name = "latents"

    cache_latents: bool = option(False, "Encode images once, to disk; needs --center_crop.")
    precomputed_dir: Free[str | None] = option(
        None, "Folder of the kept latents; by default `precomputed` in the output folder."
    )

    def check(self) -> None:
        if not (isinstance(self, DataArguments) and self.cache_latents):
            return
        if not self.center_crop:
            raise ValueError("Latents can be cached only of images that are always cropped alike: give --center_crop.")
        if self.streaming:
            raise ValueError(
                "--cache_latents does not go with --streaming: it needs to know all of the data beforehand."
            )


@dataclass(frozen=True, kw_only=True)
class PairArguments(Arguments):
    """Pairs of noise and sample in the place of images, for reflow."""

    _argument_group_name = "pairs"

    noise_column: str | None = option(
        None, "Column of noise that goes with --image_column, as draw_pairs.py writes both; for reflow."
    )

    def check(self) -> None:
        if self.noise_column is None:
            return
        refused = ("train_data_dir", "validation_split", "streaming", "max_train_samples", "random_flip", "resolution")
        given: dict[str, Any] = {name: getattr(self, name, None) for name in (*refused, "cache_latents")}
        if getattr(self, "coupling", "independent") != "independent":
            given["coupling"] = self.coupling
        for name, value in given.items():
            if value:
                raise ValueError(f"--{name} {value} does not go with --noise_column: pairs are used as they are.")


@dataclass(frozen=True, kw_only=True)
class ArrayArguments(Arguments):
    """Arrays in place of images."""

    _argument_group_name = "arrays"

    array_column: str | None = option(
        None, "Column of arrays in place of images, of the shape that the network takes, as they are."
    )

    def check(self) -> None:
        if not (isinstance(self, DataArguments) and self.array_column is not None):
            return
        for name in ("resolution", "center_crop", "random_flip", "streaming"):
            if getattr(self, name):
                raise ValueError(f"--{name} does not go with --array_column {self.array_column}.")
