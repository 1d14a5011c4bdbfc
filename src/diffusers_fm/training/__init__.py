# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: everything that is dull and tested, so that a script shows its loop."""

from .arguments import (
    add_average_arguments,
    add_data_arguments,
    add_objective_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    add_validation_arguments,
    check_shared_arguments,
    compare_arguments,
    parse_arguments,
    saved_arguments,
    weighting_scheme,
)
from .buckets import assign_buckets, make_buckets, parse_buckets
from .captions import CaptionColumn, choose_caption, drop_captions
from .checkpoints import find_checkpoint, handle_model_files, load_checkpoint, read_manifest, save_checkpoint
from .data import (
    ImageData,
    ImageTransform,
    choose_split,
    class_names,
    held_out_split_name,
    load_splits,
    make_loader,
)
from .ema import EMA, ConstantDecay, PowerFunction
from .evaluation import data_and_labels, held_out_loss, make_grid, normalize, sample_grid
from .launch import StopSignal, make_accelerator
from .logs import LossMeter, RunLog
from .objective import draw_times
from .optimisation import TrainableModel, make_optimizer
from .options import choose_label_dropout, choose_resolution, choose_shift
from .publishing import create_repo, model_card, save_arguments, upload
from .randomness import BatchSlice, derive_seed, epoch_order, make_generator, seed_layers
from .run import TrainingRun
from .samplers import BucketSampler, StreamSampler


__all__ = [
    "EMA",
    "BatchSlice",
    "BucketSampler",
    "CaptionColumn",
    "ConstantDecay",
    "ImageData",
    "ImageTransform",
    "LossMeter",
    "PowerFunction",
    "RunLog",
    "StopSignal",
    "StreamSampler",
    "TrainableModel",
    "TrainingRun",
    "add_average_arguments",
    "add_data_arguments",
    "add_objective_arguments",
    "add_optimisation_arguments",
    "add_run_arguments",
    "add_validation_arguments",
    "assign_buckets",
    "check_shared_arguments",
    "choose_caption",
    "choose_label_dropout",
    "choose_resolution",
    "choose_shift",
    "choose_split",
    "class_names",
    "compare_arguments",
    "create_repo",
    "data_and_labels",
    "derive_seed",
    "draw_times",
    "drop_captions",
    "epoch_order",
    "find_checkpoint",
    "handle_model_files",
    "held_out_loss",
    "held_out_split_name",
    "load_checkpoint",
    "load_splits",
    "make_accelerator",
    "make_buckets",
    "make_generator",
    "make_grid",
    "make_loader",
    "make_optimizer",
    "model_card",
    "normalize",
    "parse_arguments",
    "parse_buckets",
    "read_manifest",
    "sample_grid",
    "save_arguments",
    "save_checkpoint",
    "saved_arguments",
    "seed_layers",
    "upload",
    "weighting_scheme",
]
