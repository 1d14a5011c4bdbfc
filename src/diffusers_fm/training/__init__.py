# SPDX-License-Identifier: Apache-2.0
"""What the training scripts share: everything that is dull and tested, so that a script shows its loop."""

from .arguments import (
    add_average_arguments,
    add_data_arguments,
    add_hub_arguments,
    add_latent_arguments,
    add_objective_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    add_text_to_image_arguments,
    add_validation_arguments,
    check_latent_arguments,
    check_shared_arguments,
    check_text_to_image_arguments,
    compare_arguments,
    parse_arguments,
    saved_arguments,
    script_parser,
    weighting_scheme,
)
from .buckets import assign_buckets, make_buckets, parse_buckets
from .captions import CaptionColumn, choose_caption, drop_captions
from .cards import lora_card, model_card, text_to_image_card
from .checkpoints import find_checkpoint, handle_model_files, load_checkpoint, read_manifest, save_checkpoint
from .data import ImageData
from .data_sources import choose_split, class_names, first_rows, held_out_split_name, load_splits, stream_splits
from .ema import EMA, ConstantDecay, PowerFunction
from .evaluation import data_and_labels, held_out_loss, make_grid, quiet_copy, sample_grid
from .image_transforms import ImageTransform
from .latents import latents_of_batch, normalize
from .launch import StopSignal, make_accelerator
from .loader import make_loader
from .loading import load_images
from .logs import LossMeter, RunLog
from .lora import (
    FIXED_LORA_ARGUMENTS,
    adapted_text_encoders,
    add_adapters,
    add_lora,
    add_lora_arguments,
    check_adaptable,
    check_engine,
    check_lora_arguments,
    parameter_groups,
    save_lora,
)
from .objective import draw_noise, draw_times
from .optimisation import TrainableModel, make_optimizer
from .options import choose_label_dropout, choose_resolution, choose_shift
from .plan import Plan, add_plan_arguments, is_main_process
from .plans import flow_matching_plan, text_to_image_plan
from .precompute import cache_latents, cache_prompts
from .prompts import CachedPrompts, PromptEncoder, TrainedPrompts
from .publishing import Publisher, save_arguments
from .randomness import BatchSlice, derive_seed, epoch_order, make_generator, seed_layers
from .run import TrainingRun
from .samplers import BucketSampler, StreamSampler
from .stream_batches import LaneBatches, StreamPosition
from .streaming import StreamData
from .tensor_cache import TensorCache, content_key, model_fingerprint
from .text_to_image import (
    TextToImageModel,
    as_saved,
    freeze,
    load_captioned_data,
    prepare_latents,
    prepare_prompts,
    prompt_grid,
)
from .text_to_image_options import (
    choose_encoder_dropout,
    choose_scheduler,
    choose_sizes,
    image_tokens,
    shift_of,
    tell_of_long_captions,
)
from .throughput import Throughput
from .upscaling import PairedImageData, low_resolution, upscaling_report


__all__ = [
    "EMA",
    "FIXED_LORA_ARGUMENTS",
    "BatchSlice",
    "BucketSampler",
    "CachedPrompts",
    "CaptionColumn",
    "ConstantDecay",
    "ImageData",
    "ImageTransform",
    "LaneBatches",
    "LossMeter",
    "PairedImageData",
    "Plan",
    "PowerFunction",
    "PromptEncoder",
    "Publisher",
    "RunLog",
    "StopSignal",
    "StreamData",
    "StreamPosition",
    "StreamSampler",
    "TensorCache",
    "TextToImageModel",
    "Throughput",
    "TrainableModel",
    "TrainedPrompts",
    "TrainingRun",
    "adapted_text_encoders",
    "add_adapters",
    "add_average_arguments",
    "add_data_arguments",
    "add_hub_arguments",
    "add_latent_arguments",
    "add_lora",
    "add_lora_arguments",
    "add_objective_arguments",
    "add_optimisation_arguments",
    "add_plan_arguments",
    "add_run_arguments",
    "add_text_to_image_arguments",
    "add_validation_arguments",
    "as_saved",
    "assign_buckets",
    "cache_latents",
    "cache_prompts",
    "check_adaptable",
    "check_engine",
    "check_latent_arguments",
    "check_lora_arguments",
    "check_shared_arguments",
    "check_text_to_image_arguments",
    "choose_caption",
    "choose_encoder_dropout",
    "choose_label_dropout",
    "choose_resolution",
    "choose_scheduler",
    "choose_shift",
    "choose_sizes",
    "choose_split",
    "class_names",
    "compare_arguments",
    "content_key",
    "data_and_labels",
    "derive_seed",
    "draw_noise",
    "draw_times",
    "drop_captions",
    "epoch_order",
    "find_checkpoint",
    "first_rows",
    "flow_matching_plan",
    "freeze",
    "handle_model_files",
    "held_out_loss",
    "held_out_split_name",
    "image_tokens",
    "is_main_process",
    "latents_of_batch",
    "load_captioned_data",
    "load_checkpoint",
    "load_images",
    "load_splits",
    "lora_card",
    "low_resolution",
    "make_accelerator",
    "make_buckets",
    "make_generator",
    "make_grid",
    "make_loader",
    "make_optimizer",
    "model_card",
    "model_fingerprint",
    "normalize",
    "parameter_groups",
    "parse_arguments",
    "parse_buckets",
    "prepare_latents",
    "prepare_prompts",
    "prompt_grid",
    "quiet_copy",
    "read_manifest",
    "sample_grid",
    "save_arguments",
    "save_checkpoint",
    "save_lora",
    "saved_arguments",
    "script_parser",
    "seed_layers",
    "shift_of",
    "stream_splits",
    "tell_of_long_captions",
    "text_to_image_card",
    "text_to_image_plan",
    "upscaling_report",
    "weighting_scheme",
]
