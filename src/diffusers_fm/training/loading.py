# SPDX-License-Identifier: Apache-2.0
"""The images that a script's arguments name: those to train on, and those held out."""

import argparse
from collections.abc import Callable

from ..pipelines.base import FlowMatchPipelineBase
from .data import ImageData
from .data_sources import choose_split, class_names, held_out_split_name, load_splits
from .image_transforms import ImageTransform


def load_images(
    args: argparse.Namespace,
    pipeline: FlowMatchPipelineBase,
    resolution: int,
    make_data: Callable[..., ImageData] = ImageData,
    multiple: int = 1,
) -> tuple[ImageData, ImageData | None]:
    """
    Images and labels for a pipeline, which takes over the names of the classes if it has none.

    Args:
        args (`argparse.Namespace`):
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
        `tuple[ImageData, ImageData | None]`: the images to train on, and those held out, if there is a split of them.

    Raises:
        ValueError: if there is no such data, or it does not fit the pipeline.
    """
    splits = load_splits(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
    columns = {
        "image_column": args.image_column,
        "max_unreadable": args.max_unreadable_images,
        "label_column": args.label_column if pipeline.num_classes else None,
        "num_classes": pipeline.num_classes,
    }
    train_split = choose_split(splits, args.train_split)
    transform = ImageTransform(
        resolution, pipeline.image_channels, args.center_crop, args.random_flip, multiple=multiple
    )
    train_data = make_data(train_split, transform, seed=args.seed, max_samples=args.max_train_samples, **columns)
    if pipeline.num_classes and pipeline.config.id2label is None:
        pipeline.register_to_config(id2label=class_names(train_split, args.label_column))
    name = args.validation_split or held_out_split_name(splits, args.train_split)
    if name is None:
        return train_data, None
    # The same images are held out whatever the run's seed, so that losses of runs compare.
    transform = ImageTransform(resolution, pipeline.image_channels, center_crop=True, multiple=multiple)
    return train_data, make_data(
        choose_split(splits, name), transform, seed=0, max_samples=args.max_validation_samples, **columns
    )
