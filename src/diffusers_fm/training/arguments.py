# SPDX-License-Identifier: Apache-2.0
"""Arguments: those that the scripts share, from the command line over those of a file, written beside the weights."""

import argparse
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from diffusers.optimization import SchedulerType

from ..couplings import COUPLINGS
from ..losses import WEIGHTINGS
from ..timesteps import DENSITIES
from .ema import MAX_SIGMA_REL
from .optimizers import OPTIMIZERS, check_optimizer


logger = logging.getLogger(__name__)

# `piecewise_constant` needs rules that no argument gives.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]

# When a run uploads. With `newest_checkpoint` one that waits for the upload of another is dropped for a newer one.
HUB_STRATEGIES = ("end", "checkpoint", "newest_checkpoint")

# Trackers that write down no more than they are given; others record the command line, and with it a token.
DISCREET_TRACKERS = (None, "none", "tensorboard")

# Not written to files: a secret, and where the other arguments came from.
UNSAVED = ("hub_token", "config")


def weighting_scheme(name: str) -> str:
    """
    The value of `--weighting_scheme`. diffusers' scripts mean the density of the timesteps by some of its names.

    Args:
        name (`str`):
            What was given.

    Returns:
        `str`: the same, one of `WEIGHTINGS`.

    Raises:
        argparse.ArgumentTypeError: if it is no weighting.
    """
    if name not in WEIGHTINGS and name in DENSITIES:
        raise argparse.ArgumentTypeError(
            f"{name!r} is a density of the training times, not a weight of the loss: use --timestep_density {name}."
        )
    if name not in WEIGHTINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(WEIGHTINGS)}.")
    return name


def script_parser(
    description: str | None, required: str = "Pipeline folder, trained or not, or a Hub id."
) -> argparse.ArgumentParser:
    """
    A parser with what all scripts are told of files and of the pipeline.

    Args:
        description (`str`, *optional*):
            The script's docstring.
        required (`str`, *optional*):
            What its pipeline must be.

    Returns:
        `argparse.ArgumentParser`: to add to; names are not to be shortened.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", help="JSON file of arguments, such as the training_args.json of a run; the command line wins.")
    add("--pretrained_model_name_or_path", required=True, help=required)
    add("--revision", help="Branch, tag or commit of the pipeline on the Hub.")
    add("--variant", help="Variant of the weights to load, such as fp16; what is trained is in float32 all the same.")
    add("--vae_name_or_path", help="Trained autoencoder in place of the pipeline's; latent pipelines only.")
    return parser


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the images are, and what is done to them. Names and defaults are those of diffusers' own examples."""
    add = parser.add_argument_group("data").add_argument
    add("--dataset_name", help="Hub id, or a local folder of parquet, arrow or image files or of save_to_disk.")
    add("--dataset_config_name", help="Configuration of the data set.")
    add("--train_data_dir", help="Folder of images instead, classes in subfolders.")
    add("--train_split", default="train", help="Split to train on.")
    add("--validation_split", help="Split held out; by default `validation`, else `test`, where there is one.")
    add("--image_column", default="image", help="Column of the images.")
    add("--max_train_samples", type=int, help="Train on so many samples, chosen at random.")
    add("--max_unreadable_images", type=int, default=100, help="Go on if so many images cannot be read, at most.")
    add("--max_validation_samples", type=int, default=2048, help="Hold out so many samples at most.")
    add("--streaming", action="store_true", help="Read the data as it comes, without a download beforehand.")
    add("--shuffle_buffer_size", type=int, default=1000, help="Of a stream: files among which a worker shuffles.")
    add("--cache_dir", help="Where downloaded and prepared data is kept.")
    add("--resolution", type=int, help="Side of the images; by default what the pipeline is configured for.")
    add("--center_crop", action="store_true", help="Crop at the centre, not anywhere.")
    add("--random_flip", action="store_true", help="Mirror half of the images.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that decode images; results do not change.")


def add_latent_arguments(parser: argparse.ArgumentParser) -> None:
    """What an autoencoder says of the images, kept for the run and for others."""
    add = parser.add_argument_group("latents").add_argument
    add("--cache_latents", action="store_true", help="Encode images once, to disk; needs --center_crop.")
    add("--precomputed_dir", help="Where what is kept is; by default `precomputed` in the output folder.")


def add_text_to_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Captions, sizes of images, what is computed once and kept, and prompts to look at."""
    add_latent_arguments(parser)
    add = parser.add_argument_group("text and images").add_argument
    add("--caption_column", default="text", help="Column of captions, or of lists of which each visit takes one.")
    add("--caption_dropout", type=float, default=0.1, help="Part of the captions made empty, for guidance.")
    add(
        "--text_encoder_dropout",
        type=float,
        nargs="+",
        default=[0.0],
        help="Part of the captions for which a text encoder gives zeros: one number, or one for each encoder.",
    )
    add("--max_sequence_length", type=int, default=256, help="Tokens of the T5; that of sampling is 256 by default.")
    add("--use_aspect_ratio_buckets", action="store_true", help="Keep images near their shape, not square.")
    add("--aspect_ratio_buckets", help='The sizes themselves, height,width: "1024,1024;832,1216;1216,832".')
    add("--max_aspect_ratio", type=float, default=2.0, help="Longer to shorter side of a bucket at most.")
    add("--shift_base_resolution", type=int, help="Shift times by sqrt(pixels of an image / pixels of this square).")
    add("--cache_text_embeddings", action="store_true", help="Encode captions once, to disk.")
    add("--save_stock", action="store_true", help="Sample on stock's grid, so that the result needs no diffusers-fm.")
    add("--offload", action="store_true", help="Keep frozen models on the CPU but for the moments they are used.")
    add("--validation_prompts", nargs="+", default=[], help="Prompts of the picture grids, a row each.")


def independent_coupling(name: str) -> str:
    """
    The value of `--coupling` of a script whose conditions are all different, such as captions.

    Args:
        name (`str`):
            What was given.

    Returns:
        `str`: `"independent"`.

    Raises:
        argparse.ArgumentTypeError: if it is another one.
    """
    if name != "independent":
        raise argparse.ArgumentTypeError(
            f"{name!r} is not 'independent', the only coupling here: noise may be exchanged among samples of one"
            " condition alone, and each sample has its own."
        )
    return name


def add_objective_arguments(parser: argparse.ArgumentParser, has_classes: bool = False) -> None:
    """
    The density of the training times, the weight of the loss, and the coupling of data and noise.

    Args:
        parser (`argparse.ArgumentParser`):
            Takes the arguments.
        has_classes (`bool`, *optional*, defaults to `False`):
            Whether samples have a label or no condition at all, so that noise may be exchanged among them.
    """
    add = parser.add_argument_group("objective").add_argument
    add("--timestep_density", choices=list(DENSITIES), default="logit_normal", help="Density of the training times.")
    add("--logit_mean", type=float, default=0.0, help="Of logit_normal; above 0 is towards the noise.")
    add("--logit_std", type=float, default=1.0, help="Of logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Of mode.")
    add("--density_alpha", type=float, default=1.0, help="First parameter of beta, which weighs the noise.")
    add("--density_beta", type=float, default=1.0, help="Second parameter of beta, which weighs the data.")
    add("--shift", type=float, help="Shift of the times; saved in the scheduler. By default the scheduler's own.")
    add("--weighting_scheme", type=weighting_scheme, default="none", help="Weight of the loss: diffusers_fm.losses.")
    add("--snr_gamma", type=float, default=5.0, help="Of the weighting min_snr.")
    kind = {"choices": COUPLINGS} if has_classes else {"type": independent_coupling}
    add("--coupling", **kind, default="independent", help=f"Pairing of data and noise: {', '.join(COUPLINGS)}.")
    add("--coupling_scope", choices=["global", "process"], default="global", help="Of minibatch_ot: what is paired.")


def add_optimisation_arguments(parser: argparse.ArgumentParser) -> None:
    """Seed, batches, length, optimizer, schedule and precision."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--seed", type=int, help="Seed of everything; drawn and saved if not given.")
    add("--train_batch_size", type=int, default=16, help="Samples of a process in an accumulation step.")
    add("--gradient_accumulation_steps", type=int, default=1, help="Accumulation steps to an optimizer step.")
    add("--num_train_epochs", type=int, default=100, help="Length of the run, without --max_train_steps.")
    add("--max_train_steps", type=int, help="Length of the run in optimizer steps.")
    add("--learning_rate", type=float, default=1e-4)
    add("--scale_lr", action="store_true", help="Multiply the learning rate by the samples in an optimizer step.")
    add("--lr_scheduler", choices=LR_SCHEDULERS, default="constant")
    add("--lr_warmup_steps", type=int, help="Optimizer steps; 500 by default, for schedules that warm up.")
    add("--lr_num_cycles", type=int, default=1, help="Restarts of cosine_with_restarts.")
    add("--lr_power", type=float, default=1.0, help="Power of polynomial.")
    add(
        "--optimizer",
        type=str.lower,
        choices=list(OPTIMIZERS),
        default="adamw",
        help="adamw8bit, prodigy (learning rate 1) and schedule_free need the extras 8bit, prodigy and schedule_free.",
    )
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="Clip gradients to this norm; inf for no clipping.")
    add("--nan_policy", choices=["skip", "stop"], default="skip", help="What to do at a gradient that is not finite.")
    add("--max_skipped_steps", type=int, default=10, help="Skip so many steps in a row at most, then stop.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default what accelerate is configured for.")
    add("--allow_tf32", action="store_true", help="Faster float32 matrix products on Ampere GPUs and later.")
    add("--torch_compile", action="store_true", help="Compile the model: minutes at the start, less time a step.")
    add("--channels_last", action="store_true", help="Keep images channels-last in memory; for convolutions.")
    add("--use_cpu", action="store_true", help="Use the CPU although there is an accelerator.")


def add_average_arguments(parser: argparse.ArgumentParser) -> None:
    """The running average of the weights."""
    add = parser.add_argument_group("average of the weights").add_argument
    add("--use_ema", action="store_true", help="Validate and save an exponential moving average of the weights.")
    add("--ema_profile", choices=["constant", "power"], default="constant", help="Constant decay, or power functions.")
    add(
        "--ema_inv_gamma", type=float, default=1.0, help="Of constant: decay at step n 1 - (1 + n / inv_gamma)^-power."
    )
    add("--ema_power", type=float, default=0.75, help="Of constant.")
    add("--ema_max_decay", type=float, default=0.9999, help="Of constant.")
    add("--ema_sigma_rel", type=float, nargs="+", default=[0.05, 0.1], help="Of power: relative widths to track.")
    add("--ema_snapshot_steps", type=int, help="Of power: steps between snapshots; by default 32 in the whole run.")
    add("--offload_ema", action="store_true", help="Keep the average on the CPU.")


def add_validation_arguments(parser: argparse.ArgumentParser) -> None:
    """Held-out losses and pictures on the way."""
    add = parser.add_argument_group("validation").add_argument
    add("--validation_steps", type=int, default=500, help="Steps between held-out losses and picture grids.")
    add("--num_validation_images", type=int, default=4, help="Pictures in a grid, for each class; 0 for no grids.")
    add("--num_inference_steps", type=int, default=50, help="Solver steps of the pictures.")
    add("--guidance_scale", type=float, default=1.0, help="Guidance of the pictures; 1 is off.")
    add("--eval_batch_size", type=int, default=64, help="Samples at once in validation.")


def add_run_arguments(parser: argparse.ArgumentParser, project_name: str) -> None:
    """The output folder, checkpoints, logs (in trackers under `project_name`) and the Hub."""
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", default="flow-matching-model", help="The trained pipeline, checkpoints and logs.")
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", help="Folder of a checkpoint, or `latest`.")
    add("--logging_dir", default="logs", help="Folder of the trackers in the output folder.")
    add("--logging_steps", type=int, default=50, help="Steps between lines of the log.")
    add("--report_to", help="Tracker: tensorboard, wandb, all, ... or none; by default TensorBoard if installed.")
    add("--tracker_project_name", default=project_name, help="Name of the run in the trackers.")
    add("--push_to_hub", action="store_true", help="Upload the trained pipeline.")
    add("--hub_strategy", choices=HUB_STRATEGIES, default="end", help="Upload at the end, or at checkpoints too.")
    add("--hub_license", help="Licence of the model, by the Hub's identifier, such as apache-2.0; for its card.")
    add_hub_arguments(parser)


def add_hub_arguments(parser: argparse.ArgumentParser) -> None:
    """Where to upload."""
    add = parser.add_argument_group("hub").add_argument
    add("--push_dry_run", action="store_true", help="Only list, at the end, the files that an upload would send.")
    add("--hub_model_id", help="The repository; by default named like the output folder.")
    add("--hub_token", help="Token of the Hub; by default the one you logged in with.")
    add("--hub_private_repo", action="store_true", help="Make the repository private.")
    add("--hub_revision", help="Branch to upload to; it is created if need be. By default main.")


def check_shared_arguments(args: argparse.Namespace) -> None:
    """
    Refuses values of the shared arguments that can be refused without looking at model or data.

    Args:
        args (`argparse.Namespace`):
            With the arguments of all groups above.

    Raises:
        ValueError: naming the argument, its value, and what is accepted.
    """
    for name in (
        "train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps checkpointing_steps"
        " logging_steps validation_steps num_inference_steps eval_batch_size checkpoints_total_limit resolution"
        " max_train_samples max_validation_samples max_skipped_steps ema_snapshot_steps shuffle_buffer_size"
    ).split():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if args.streaming and args.max_train_samples is not None:
        raise ValueError(
            f"--max_train_samples {args.max_train_samples} does not go with --streaming: streams are read whole."
        )
    if args.max_unreadable_images < 0:
        raise ValueError(f"--max_unreadable_images must be at least 0, got {args.max_unreadable_images}.")
    for name in ("learning_rate", "max_grad_norm", "shift", "ema_inv_gamma"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}.")
    check_optimizer(args.optimizer)
    if args.optimizer == "schedule_free" and args.lr_scheduler not in ("constant", "constant_with_warmup"):
        raise ValueError(
            "--optimizer schedule_free takes the place of a schedule: --lr_scheduler must be constant or"
            f" constant_with_warmup, got {args.lr_scheduler}."
        )
    if args.optimizer == "schedule_free" and args.use_ema:
        raise ValueError("--optimizer schedule_free averages the weights itself: leave out --use_ema.")
    if args.lr_warmup_steps is not None and args.lr_scheduler == "constant":
        raise ValueError(
            f"--lr_warmup_steps {args.lr_warmup_steps} needs a schedule with a warm-up: use --lr_scheduler"
            " constant_with_warmup."
        )
    if not 0 <= args.ema_max_decay <= 1:
        raise ValueError(f"--ema_max_decay must be in [0, 1], got {args.ema_max_decay}.")
    for sigma_rel in args.ema_sigma_rel:
        if not 0 < sigma_rel < MAX_SIGMA_REL:
            raise ValueError(f"--ema_sigma_rel must be in (0, {MAX_SIGMA_REL:.4f}), got {sigma_rel}.")
    if len(set(args.ema_sigma_rel)) < len(args.ema_sigma_rel):
        raise ValueError(f"--ema_sigma_rel must not name a width twice, got {args.ema_sigma_rel}.")
    if args.ema_profile == "power" and not args.use_ema:
        raise ValueError("--ema_profile power needs --use_ema.")
    if (args.dataset_name is None) == (args.train_data_dir is None):
        given = "neither" if args.dataset_name is None else "both"
        raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")
    if args.hub_token is not None and args.report_to not in DISCREET_TRACKERS:
        raise ValueError(
            f"--hub_token does not go with --report_to {args.report_to}, which may record the command line: log in"
            " with `hf auth login`, or set HF_TOKEN."
        )
    if not args.push_to_hub and not args.push_dry_run:
        for name in ("hub_model_id", "hub_private_repo", "hub_revision", "hub_license"):
            if getattr(args, name):
                raise ValueError(f"--{name} {getattr(args, name)} needs --push_to_hub.")


def check_latent_arguments(args: argparse.Namespace) -> None:
    """
    Refuses values of the arguments for latents that can be refused without looking at model or data.

    Args:
        args (`argparse.Namespace`):
            With the arguments of `add_latent_arguments` and `add_data_arguments`.

    Raises:
        ValueError: naming the argument, its value, and what is accepted.
    """
    if args.cache_latents and not args.center_crop:
        raise ValueError("Latents can be cached only of images that are always cropped alike: give --center_crop.")
    if args.cache_latents and args.streaming:
        raise ValueError("--cache_latents does not go with --streaming: it needs to know all of the data beforehand.")


def check_text_to_image_arguments(args: argparse.Namespace) -> None:
    """
    Refuses values of the text-to-image arguments that can be refused without looking at model or data.

    Args:
        args (`argparse.Namespace`):
            With the arguments of `add_text_to_image_arguments`, `add_latent_arguments` and `add_data_arguments`.

    Raises:
        ValueError: naming the argument, its value, and what is accepted.
    """
    rates = {"caption_dropout": [args.caption_dropout], "text_encoder_dropout": args.text_encoder_dropout}
    for name, values in rates.items():
        if not all(0 <= value <= 1 for value in values):
            raise ValueError(f"--{name} must be in [0, 1], got {' '.join(map(str, values))}.")
    if not 0 <= args.max_sequence_length <= 512:
        raise ValueError(f"--max_sequence_length must be from 0 to 512, got {args.max_sequence_length}.")
    if not args.max_aspect_ratio >= 1:
        raise ValueError(f"--max_aspect_ratio must be at least 1, got {args.max_aspect_ratio}.")
    if args.shift_base_resolution is not None and args.shift_base_resolution < 1:
        raise ValueError(f"--shift_base_resolution must be at least 1, got {args.shift_base_resolution}.")
    if args.use_aspect_ratio_buckets and args.aspect_ratio_buckets is not None:
        raise ValueError("Of --use_aspect_ratio_buckets and --aspect_ratio_buckets one may be given.")
    if args.cache_text_embeddings and args.streaming:
        raise ValueError("--cache_text_embeddings does not go with --streaming, which does not know all of the data.")
    check_latent_arguments(args)


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line; `--config FILE` gives the arguments that are not on it.

    Args:
        parser (`argparse.ArgumentParser`):
            With a `--config` argument; a `training_args.json` of an earlier run will do.
        argv (`list[str]`, *optional*):
            The command line; defaults to that of the process.

    Returns:
        `argparse.Namespace`: all arguments.

    Raises:
        ValueError: if the file cannot be read as a JSON object, or holds an unknown argument.
    """
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", default=None)
    found, remaining = only_config.parse_known_args(argv)
    words: list[str] = [] if found.config is None else _words(parser, Path(found.config))
    args = parser.parse_args(words + remaining)
    args.config = found.config
    return args


def _words(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The contents of a file of arguments as a command line, so that types and choices are checked."""
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r} of arguments.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file of arguments {str(file)!r} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The file of arguments {str(file)!r} must hold one JSON object.")
    known = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"The file {str(file)!r} holds arguments that the script does not have: {unknown}.")
    words = []
    for name, value in values.items():
        if known[name].nargs == 0:
            words += [f"--{name}"] if value else []
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}={value}"]
    return words


def saved_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """
    The arguments as they are written to files.

    Args:
        args (`argparse.Namespace`):
            All arguments.

    Returns:
        `dict[str, Any]`: the same by name, sorted, without the Hub's token.
    """
    return {name: value for name, value in sorted(vars(args).items()) if name not in UNSAVED}


def compare_arguments(
    args: argparse.Namespace, saved: dict[str, Any], fixed: Collection[str] = (), free: Collection[str] = ()
) -> None:
    """
    Look at what has changed since the first part of a resumed run; what may matter is told in a warning.

    Args:
        args (`argparse.Namespace`):
            The arguments now.
        saved (`dict[str, Any]`):
            Those of the first part.
        fixed (`Collection[str]`, *optional*):
            Names of those that must not change.
        free (`Collection[str]`, *optional*):
            Names of those that may change without a word.

    Raises:
        ValueError: if a fixed one has changed.
    """
    for name, value in saved_arguments(args).items():
        if name in free or name not in saved or saved[name] == value:
            continue
        if name in fixed:
            raise ValueError(f"--{name} was {saved[name]} in the run that is resumed and cannot be {value} now.")
        logger.warning("--%s was %s in the run that is resumed and is %s now.", name, saved[name], value)
