# SPDX-License-Identifier: Apache-2.0
"""Training and held-out images of a script's arguments."""

import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator

from ..pipelines import FlowMatchAudioPipeline
from ..pipelines.base import FlowMatchPipelineBase
from .arguments import DataArguments, rgb
from .arrays import ArrayData
from .cache import DryAccelerator
from .clips import check_first
from .images import ImageData
from .latents import cache_all_latents, precomputed_folder
from .sounds import SoundTransform
from .sources import (
    AnyDataset,
    DatasetT,
    choose_split,
    class_names,
    data_folders,
    first_rows,
    held_out_split_name,
    image_files,
    load_splits,
    stream_splits,
    undecoded,
)
from .streams import StreamData
from .transforms import ImageTransform


logger = logging.getLogger(__name__)

TrainingData = ImageData | StreamData | ArrayData

# Values of samples that are kept in memory together.
MAX_VALUES = 2**29

# Column of the caption that is that of all images.
CAPTION = "instance_prompt"


def num_in_memory(data: TrainingData, encode: Callable[[dict[str, Any]], torch.Tensor]) -> int:
    """Samples that `MAX_VALUES` holds; `encode(batch)` are those of a batch as the flow sees them."""
    return MAX_VALUES // encode(next(iter(data.spread_batches(1, 1)))).numel()


def read_samples(
    data: TrainingData, encode: Callable[[dict[str, Any]], torch.Tensor], num_samples: int, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """At most so many samples, evenly spread over all, as `encode` gives those of a batch, and their labels if any."""
    samples, labels = [], []
    for batch in data.spread_batches(num_samples, batch_size):
        samples.append(encode(batch))
        labels += [batch["labels"]] if "labels" in batch else []
    return torch.cat(samples), torch.cat(labels) if labels else None


def rows_by_label(
    samples: torch.Tensor, labels: torch.Tensor | None, null_class: int | None
) -> dict[int | None, torch.Tensor]:
    """Rows of the samples of each label, and all for the `null_class`; without labels all, for `None`."""
    rows = torch.arange(len(samples), device=samples.device)
    if labels is None:
        return {None: rows}
    labels = labels.to(samples.device)
    members: dict[int | None, torch.Tensor] = {label: rows[labels == label] for label in labels.unique().tolist()}
    return members if null_class is None else {**members, null_class: rows}


def open_splits(args: DataArguments, kind: str = "images") -> tuple[AnyDataset, datasets.Dataset | None]:
    """
    The split to train on, and the one held out, if there is one. With `--streaming` the first is a stream, and of the
    second the first rows are held out.
    """
    source = (args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir, kind)
    if not args.streaming:
        splits = load_splits(*source)
        train_split = choose_split(splits, args.train_split)
        if args.validation_fraction is not None:
            return hold_out(train_split, args.validation_fraction)
        name = args.validation_split or held_out_split_name(splits, args.train_split)
        return train_split, None if name is None else choose_split(splits, name)
    streams = stream_splits(*source)
    train_split = choose_split(streams, args.train_split)
    name = args.validation_split or held_out_split_name(streams, args.train_split)
    if name is None:
        return train_split, None
    folders = data_folders(args.dataset_name, args.train_data_dir, args.cache_dir, args.image_folders)
    rows = first_rows(choose_split(streams, name), args.image_column, args.max_validation_samples, folders)
    return train_split, rows


def hold_out(split: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A split without a part that is held out, and that part: the same whatever the run's seed."""
    count = round(fraction * len(split))
    if not 0 < count < len(split):
        raise ValueError(f"--validation_fraction {fraction} of {len(split)} samples would hold out {count} of them.")
    parts = split.train_test_split(count, seed=0)
    return parts["train"], parts["test"]


def with_caption(split: DatasetT, caption: str, image_column: str) -> DatasetT:
    """The split with one caption for all of its images."""
    if isinstance(split, datasets.Dataset):
        return split.add_column(CAPTION, [caption] * len(split))  # pyright: ignore
    split = undecoded(split, image_column)
    features = datasets.Features({**(split.features or {}), CAPTION: datasets.Value("string")})
    return split.map(lambda row: {CAPTION: caption}, features=features)


def with_class_images(split: datasets.Dataset, folder: str, caption: str, image_column: str) -> datasets.Dataset:
    """
    The split and a folder of images under one caption, the smaller of both repeated to the length of the other: images
    of a class that hold a network to what it knows of it (arXiv 2208.12242, section 3.2).
    """
    images = next(iter(load_splits(train_data_dir=folder).values()))
    images = images.select_columns(["image"])
    images = images if image_column == "image" else images.rename_column("image", image_column)
    parts = [split.select_columns([image_column, CAPTION]), with_caption(images, caption, image_column)]
    longest = max(map(len, parts))
    parts = [part.cast(parts[0].features).select(np.resize(np.arange(len(part)), longest)) for part in parts]
    return datasets.concatenate_datasets(parts)


def make_datasets(
    args: DataArguments,
    channels: int,
    resolution: int,
    make: Callable[..., ImageData] = ImageData,
    buckets: Sequence[tuple[int, int]] = (),
    multiple: int = 1,
    check: Callable[[Any], Any] = lambda split: split,
    caption: str | None = None,
    class_images: tuple[str, str] | None = None,
    make_transform: Callable[..., ImageTransform] = ImageTransform,
    kind: str = "images",
    **columns: Any,
) -> tuple[ImageData | StreamData, ImageData | None]:
    """
    Images to train on, and those held out, if there is a split of them.

    Args:
        args ([`DataArguments`]):
            With `seed`.
        channels (`int`):
            1 (grey) or 3 (RGB).
        resolution (`int`):
            Side of the images.
        make (`Callable`, *optional*, defaults to [`ImageData`]):
            Makes data of a split that is no stream, with the arguments of [`ImageData`].
        buckets (`Sequence[tuple[int, int]]`, *optional*):
            Heights and widths that take the square's place.
        multiple (`int`, *optional*, defaults to 1):
            Crops begin at multiples of so many pixels.
        check (`Callable`, *optional*):
            Called with each split, before any image is read: returns the split to use.
        caption (`str`, *optional*):
            Caption of all images, in place of a column.
        class_images (`tuple[str, str]`, *optional*):
            Folder and caption of images that take turns with those of the split to train on.
        make_transform (`Callable`, *optional*, defaults to [`ImageTransform`]):
            Makes what is done to each image, with the arguments of [`ImageTransform`].
        kind (`str`, *optional*, defaults to `"images"`):
            What a local folder holds: `"images"`, `"videos"` or `"sounds"`.
        columns:
            Further arguments of [`ImageData`] and [`StreamData`].

    Returns:
        `tuple[ImageData | StreamData, ImageData | None]`: both.

    Raises:
        ValueError: if there is no such data, or it does not fit.
    """
    train_split, held_out_split = open_splits(args, kind)
    if caption is not None:
        train_split = with_caption(train_split, caption, args.image_column)
        held_out_split = None if held_out_split is None else with_caption(held_out_split, caption, args.image_column)
        columns["caption_column"] = CAPTION
    if class_images is not None and isinstance(train_split, datasets.Dataset):
        train_split = with_class_images(train_split, *class_images, args.image_column)
    train_split = check(train_split)
    held_out_split = None if held_out_split is None else check(held_out_split)
    columns |= {"image_column": args.image_column, "max_unreadable": args.max_unreadable_images}
    common: dict[str, Any] = {
        "buckets": tuple(buckets),
        "multiple": multiple,
        "background": rgb(args.background),
        "folders": data_folders(args.dataset_name, args.train_data_dir, args.cache_dir, args.image_folders),
    }
    if class_images is not None and common["folders"] is not None:
        common["folders"] = (*common["folders"], Path(class_images[0]).expanduser())
    transform = make_transform(resolution, channels, args.center_crop, args.random_flip, **common)
    if kind == "videos" and isinstance(train_split, datasets.Dataset) and len(train_split):
        check_first(image_files(train_split, args.image_column)[0][args.image_column], common["folders"])
    folder = Path(args.cache_dir or datasets.config.HF_DATASETS_CACHE) / "decoded_images"
    if isinstance(train_split, datasets.IterableDataset):
        train_data: Any = StreamData(
            train_split, transform, seed=args.seed, buffer_size=args.shuffle_buffer_size, **columns
        )
    else:
        train_data = make(
            train_split, transform, seed=args.seed, max_samples=args.max_train_samples, folder=folder, **columns
        )
    if held_out_split is None:
        return train_data, None
    # The same images are held out whatever the run's seed, so that losses of runs compare.
    transform = make_transform(resolution, channels, center_crop=True, **common)
    held_out = make(
        held_out_split, transform, seed=0, max_samples=args.max_validation_samples, folder=folder, **columns
    )
    return train_data, held_out


def refuse_column(split: DatasetT, column: str, refused: type, wanted: type) -> DatasetT:
    """The split; a `ValueError` if a column holds a kind of data that the pipeline does not learn from."""
    feature = (split.features or {}).get(column)
    # The held-out rows of a stream are files of images by now, whatever they hold.
    if isinstance(feature, refused) and feature.decode:  # pyright: ignore
        raise ValueError(
            f"The column {column!r} holds {refused.__name__}, and the pipeline learns from {wanted.__name__}."
        )
    return split


def load_images(
    args: Any,
    pipeline: FlowMatchPipelineBase,
    resolution: int,
    make_data: Callable[..., ImageData] = ImageData,
    multiple: int = 1,
) -> tuple[ImageData | StreamData, ImageData | None]:
    """
    Images and labels for a pipeline, which takes over the names of their classes; sounds, as spectrograms, for a
    [`FlowMatchAudioPipeline`]. Arguments and errors are those of [`make_datasets`].
    """
    make_transform: Callable[..., ImageTransform] = ImageTransform
    wanted, other, kind = datasets.Image, datasets.Audio, "images"
    if isinstance(pipeline, FlowMatchAudioPipeline):
        make_transform = functools.partial(SoundTransform, log_mel=pipeline.log_mel)
        wanted, other, kind = other, wanted, "sounds"
    label_column = args.label_column if pipeline.num_classes else None

    def check(split: Any) -> Any:
        refuse_column(split, args.image_column, other, wanted)
        return with_labels_of_model(pipeline, split, args.label_column)

    columns: dict[str, Any] = {"label_column": label_column, "num_classes": pipeline.num_classes}
    columns |= {"make_transform": make_transform, "kind": kind}
    return make_datasets(args, pipeline.image_channels, resolution, make_data, (), multiple, check, **columns)


def load_data(
    accelerator: Accelerator | DryAccelerator,
    args: Any,
    pipeline: FlowMatchPipelineBase,
    resolution: int,
    output_dir: Path,
) -> tuple[ImageData | StreamData | ArrayData, ImageData | ArrayData | None]:
    """
    Data of a training script, by its arguments: what [`load_arrays`] or [`load_images`] gives, the main process first,
    and the latents of all images where they are cached.
    """
    data_sets: Any
    with accelerator.main_process_first():
        if args.array_column or args.noise_column:
            data_sets = load_arrays(args, pipeline)
        else:
            data_sets = load_images(args, pipeline, resolution)
    if args.cache_latents:
        folder = precomputed_folder(args, output_dir)
        cache_all_latents(accelerator, data_sets, pipeline.vae, folder, args.train_batch_size)
    return data_sets


def load_arrays(args: Any, pipeline: FlowMatchPipelineBase) -> tuple[ArrayData, ArrayData | None]:
    """
    Arrays and labels to train on, and those held out, if there is a split of them; with `noise_column`, pairs of noise
    and sample, none of which is held out.

    Args:
        args ([`DataArguments`], [`ArrayArguments`], [`PairArguments`] and [`LabelArguments`]):
            With `seed`.
        pipeline ([`FlowMatchPipelineBase`]):
            Takes over the names of the classes.

    Returns:
        `tuple[ArrayData, ArrayData | None]`: both.

    Raises:
        ValueError: if there is no such data, or it does not fit the network.
    """
    train, held_out_split = (
        None if split is None else with_labels_of_model(pipeline, split, args.label_column)
        for split in open_splits(args)
    )
    label_column = args.label_column if pipeline.num_classes else None
    common = (args.array_column or args.image_column, pipeline.sample_shape, label_column, pipeline.num_classes)
    train_data = ArrayData(train, *common, args.seed, args.max_train_samples, args.noise_column)
    if held_out_split is None or args.noise_column is not None:
        return train_data, None
    return train_data, ArrayData(held_out_split, *common, 0, args.max_validation_samples)


def with_labels_of_model(pipeline: FlowMatchPipelineBase, split: DatasetT, label_column: str) -> DatasetT:
    """
    A split whose labels are those of a pipeline, which takes over the names of its classes: names that are the same in
    another order keep the pipeline's labels. Labels that a pipeline without classes does not read are logged.
    """
    if label_column not in (split.features or {}):
        return split
    names = class_names(split, label_column)
    if not pipeline.num_classes:
        if names is not None and len(names) > 1:
            logger.warning(
                "The %d classes of the data are not used, for the model has none: `python -m"
                " diffusers_fm.adapt_pipeline` makes an untrained one that has them.",
                len(names),
            )
        return split
    matched = matched_by_name(pipeline, split, label_column)
    if matched is split:
        adopt_class_names(pipeline, names)
    return matched


def matched_by_name(pipeline: FlowMatchPipelineBase, split: DatasetT, label_column: str) -> DatasetT:
    """A split whose labels are those that a pipeline has for the same names of classes; otherwise as it is."""
    names = class_names(split, label_column) if label_column in (split.features or {}) else None
    known = {name: int(label) for label, name in (pipeline.config.id2label or {}).items()}
    same = names is not None and set(known) == set(names.values()) and len(known) == len(names)
    if same and names != {label: name for name, label in known.items()} and isinstance(split, datasets.Dataset):
        logger.info("Labels of the data are matched by name with those of the model.")
        return split.align_labels_with_mapping(known, label_column)
    return split


def adopt_class_names(pipeline: FlowMatchPipelineBase, names: dict[int, str] | None) -> None:
    """Give a pipeline the class names of its data; a warning says what becomes of other names."""
    # JSON has keys that are strings.
    known = {int(label): name for label, name in (pipeline.config.id2label or {}).items()}
    if names == known or (names is None and not known):
        return
    if known:
        common = [name for label, name in (names or {}).items() if name in known.values() and known.get(label) != name]
        logger.warning(
            "The class names of the model, %s, are replaced by those of the data, %s.%s",
            list(known.values()),
            "which has none" if names is None else list(names.values()),
            f" {common} are in both with other labels: cast the column to the model's `ClassLabel` to keep them."
            if common
            else "",
        )
    pipeline.register_to_config(id2label=names)
