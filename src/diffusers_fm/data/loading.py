# SPDX-License-Identifier: Apache-2.0
"""The images that a script's arguments name: those to train on, and those held out."""

from collections.abc import Callable
from typing import Any

import datasets

from ..pipelines.base import FlowMatchPipelineBase
from .arguments import DataArguments
from .images import ImageData
from .sources import AnyDataset, choose_split, class_names, first_rows, held_out_split_name, load_splits, stream_splits
from .streams import StreamData
from .transforms import ImageTransform


def open_splits(args: DataArguments) -> tuple[AnyDataset, datasets.Dataset | None]:
    """
    The split to train on, and the one held out. With `--streaming` the first is a stream, and of the second the first
    rows are held out.

    Args:
        args ([`DataArguments`]):
            With the arguments of `add_data_arguments`.

    Returns:
        `tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset | None]`: both; `None` if no split is held
        out.

    Raises:
        ValueError: if there is no such data.
    """
    source = (args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
    if not args.streaming:
        splits = load_splits(*source)
        name = args.validation_split or held_out_split_name(splits, args.train_split)
        return choose_split(splits, args.train_split), None if name is None else choose_split(splits, name)
    streams = stream_splits(*source)
    train_split = choose_split(streams, args.train_split)
    name = args.validation_split or held_out_split_name(streams, args.train_split)
    if name is None:
        return train_split, None
    return train_split, first_rows(choose_split(streams, name), args.image_column, args.max_validation_samples)


def make_train_data(
    args: DataArguments,
    split: AnyDataset,
    transform: ImageTransform,
    make_data: Callable[..., ImageData] = ImageData,
    **columns: Any,
) -> ImageData | StreamData:
    """
    The images to train on.

    Args:
        args ([`DataArguments`]):
            With the arguments of `add_data_arguments`, and `seed`.
        split (`datasets.Dataset` or `datasets.IterableDataset`):
            As [`open_splits`] gives it.
        transform (`ImageTransform`):
            What is done to each image.
        make_data (`Callable`, *optional*, defaults to [`ImageData`]):
            Makes data of a split that is no stream, with the arguments of [`ImageData`].
        columns:
            Further arguments of [`ImageData`] and [`StreamData`].

    Returns:
        [`ImageData`] or [`StreamData`]: the images.

    Raises:
        ValueError: if they do not fit.
    """
    if isinstance(split, datasets.IterableDataset):
        return StreamData(split, transform, seed=args.seed, buffer_size=args.shuffle_buffer_size, **columns)
    return make_data(split, transform, seed=args.seed, max_samples=args.max_train_samples, **columns)


def load_images(
    args: DataArguments,
    pipeline: FlowMatchPipelineBase,
    resolution: int,
    make_data: Callable[..., ImageData] = ImageData,
    multiple: int = 1,
) -> tuple[ImageData | StreamData, ImageData | None]:
    """
    Images and labels for a pipeline, which takes over the names of the classes if it has none.

    Args:
        args ([`DataArguments`]):
            With the arguments of `add_data_arguments`, `label_column` and `seed`.
        pipeline ([`FlowMatchPipelineBase`]):
            Which channels and classes it has.
        resolution (`int`):
            Side of the images.
        make_data (`Callable`, *optional*, defaults to [`ImageData`]):
            Makes data of a split and a transform, with the arguments of [`ImageData`].
        multiple (`int`, *optional*, defaults to 1):
            Crops begin at multiples of so many pixels.

    Returns:
        `tuple[ImageData | StreamData, ImageData | None]`: the images to train on, and those held out, if there is a
        split of them.

    Raises:
        ValueError: if there is no such data, or it does not fit the pipeline.
    """
    train_split, held_out_split = open_splits(args)
    columns = {
        "image_column": args.image_column,
        "max_unreadable": args.max_unreadable_images,
        "label_column": args.label_column if pipeline.num_classes else None,
        "num_classes": pipeline.num_classes,
    }
    transform = ImageTransform(
        resolution, pipeline.image_channels, args.center_crop, args.random_flip, multiple=multiple
    )
    train_data = make_train_data(args, train_split, transform, make_data, **columns)
    if pipeline.num_classes and pipeline.config.id2label is None:
        pipeline.register_to_config(id2label=class_names(train_split, args.label_column))
    if held_out_split is None:
        return train_data, None
    # The same images are held out whatever the run's seed, so that losses of runs compare.
    transform = ImageTransform(resolution, pipeline.image_channels, center_crop=True, multiple=multiple)
    return train_data, make_data(held_out_split, transform, seed=0, max_samples=args.max_validation_samples, **columns)
