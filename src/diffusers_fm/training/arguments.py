# SPDX-License-Identifier: Apache-2.0
"""Arguments that every training script has, by the names of diffusers' examples where those have them."""

import logging
from dataclasses import MISSING, dataclass
from typing import Annotated

from diffusers.optimization import SchedulerType

from ..arguments import (
    Arguments,
    Count,
    Fixed,
    Fraction,
    Free,
    ModuleArguments,
    Needs,
    NotNegative,
    Number,
    Positive,
    Range,
    Size,
    option,
)
from ..couplings import COUPLINGS
from ..data.arguments import DataArguments
from ..hub.publisher import HubArguments
from ..losses import WEIGHTINGS
from ..schedulers.recommendation import SOLVERS
from ..timesteps import DENSITIES
from .distributed import check_tracker
from .ema import MAX_SIGMA_REL
from .optimizers import OPTIMIZERS, check_optimizer


logger = logging.getLogger(__name__)

EXAMPLES = "diffusers' examples"
SD3_PAPER = "arXiv 2403.03206"

# `piecewise_constant` needs rules that no argument gives.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
# Trackers that record no more than they are given; others record the command line, and with it a token.
DISCREET_TRACKERS = (None, "none", "tensorboard")

Decay = Annotated[float, Range(0, 1, open_high=True)]


@dataclass(frozen=True, kw_only=True)
class PipelineArguments(Arguments):
    """Pipeline to train."""

    _argument_group_name = "pipeline"

    pretrained_model_name_or_path: str = option(MISSING, "Pipeline folder, trained or not, or a Hub id.")
    revision: str | None = option(None, "Branch, tag or commit of the pipeline on the Hub.")
    variant: str | None = option(
        None, "Variant of the weights to load, such as fp16; what is trained is in float32 all the same."
    )
    vae_name_or_path: str | None = option(
        None, "Trained autoencoder in place of the pipeline's; latent pipelines only."
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveArguments(Arguments):
    """Density of the training times, weight of the loss, coupling of data and noise."""

    _argument_group_name = "objective"

    timestep_density: str = option(
        "logit_normal",
        f"Density of the training times: {', '.join(DENSITIES)}, or one that --import_modules registers.",
        source=SD3_PAPER,
    )
    logit_mean: Annotated[Number, Needs("timestep_density", "logit_normal")] = option(
        0.0, "Of logit_normal; above 0 is towards the noise.", source=SD3_PAPER
    )
    logit_std: Annotated[Positive, Needs("timestep_density", "logit_normal")] = option(
        1.0, "Of logit_normal.", source=SD3_PAPER
    )
    mode_scale: Annotated[Number, Needs("timestep_density", "mode")] = option(1.29, "Of mode.", source=SD3_PAPER)
    density_alpha: Annotated[Positive, Needs("timestep_density", "beta")] = option(
        1.0, "First parameter of beta, which weighs the noise."
    )
    density_beta: Annotated[Positive, Needs("timestep_density", "beta")] = option(
        1.0, "Second parameter of beta, which weighs the data."
    )
    density_steepness: Annotated[float, Range(0, 100, open_low=True), Needs("timestep_density", "u_shaped")] = option(
        4.0, "Of u_shaped, which weighs both ends; for reflow.", source="arXiv 2405.20320"
    )
    shift: Positive | None = option(
        None, "Shift of the times; saved in the scheduler. By default the scheduler's own."
    )
    weighting_scheme: str = option("none", f"Weight of the loss: {', '.join(WEIGHTINGS)}.")
    snr_gamma: Annotated[Positive, Needs("weighting_scheme", "min_snr")] = option(
        5.0, "Of the weighting min_snr.", source="arXiv 2303.09556"
    )
    coupling: str = option("independent", "Pairing of data and noise.", list(COUPLINGS))
    coupling_scope: Annotated[str, Needs("coupling", "minibatch_ot")] = option(
        "global", "Of minibatch_ot: what is paired.", ["global", "process"]
    )

    def check(self) -> None:
        if self.timestep_density not in DENSITIES:
            raise ValueError(
                f"--timestep_density must be one of {', '.join(DENSITIES)}, got {self.timestep_density!r}."
            )
        name = self.weighting_scheme
        if name not in WEIGHTINGS and name in DENSITIES:
            raise ValueError(
                f"--weighting_scheme {name!r} is a density of the training times, not a weight of the loss: use"
                f" --timestep_density {name}."
            )
        if name not in WEIGHTINGS:
            raise ValueError(f"--weighting_scheme {name!r} is not one of {', '.join(WEIGHTINGS)}.")


@dataclass(frozen=True, kw_only=True)
class OptimizationArguments(Arguments):
    """Seed, batches, length, optimizer, schedule and precision."""

    _argument_group_name = "optimization"

    seed: Size | None = option(None, "Seed of everything; drawn and saved if not given.")
    train_batch_size: Count = option(16, "Samples of a process in an accumulation step.", source=EXAMPLES)
    gradient_accumulation_steps: Count = option(1, "Accumulation steps to an optimizer step.")
    num_train_epochs: Free[Count] = option(100, "Length of the run, without --max_train_steps.", source=EXAMPLES)
    max_train_steps: Free[Count | None] = option(None, "Length of the run in optimizer steps.")
    learning_rate: Positive = option(1e-4, "Peak learning rate.", source=EXAMPLES)
    scale_lr: bool = option(False, "Multiply the learning rate by the samples in an optimizer step.")
    lr_scheduler: str = option("constant", "Schedule of the learning rate.", LR_SCHEDULERS, EXAMPLES)
    lr_warmup_steps: Size | None = option(None, "Optimizer steps; 500 by default, for schedules that warm up.")
    lr_num_cycles: Annotated[Count, Needs("lr_scheduler", "cosine_with_restarts")] = option(
        1, "Restarts of cosine_with_restarts."
    )
    lr_power: Annotated[Positive, Needs("lr_scheduler", "polynomial")] = option(1.0, "Power of polynomial.")
    optimizer: Fixed[str] = option(
        "adamw",
        "adamw8bit, prodigy (learning rate 1) and schedule_free need the extras 8bit, prodigy and schedule_free.",
        list(OPTIMIZERS),
    )
    adam_beta1: Decay = option(0.9, "Decay of the average of gradients.", source=EXAMPLES)
    adam_beta2: Decay = option(0.999, "Decay of the average of squared gradients.", source=EXAMPLES)
    adam_weight_decay: NotNegative = option(1e-2, "Decoupled weight decay.", source=EXAMPLES)
    adam_epsilon: Positive = option(1e-8, "Added to the denominator.", source=EXAMPLES)
    max_grad_norm: float = option(1.0, "Clip gradients to this norm; inf for no clipping.", source=EXAMPLES)
    nan_policy: str = option("skip", "Answer to a gradient that is not finite.", ["skip", "stop"])
    max_skipped_steps: Annotated[Free[Count], Needs("nan_policy", "skip")] = option(
        10, "Skip so many steps in a row at most, then stop."
    )
    gradient_checkpointing: bool = option(False, "Less memory, more time.")
    mixed_precision: str | None = option(None, "By default what accelerate is configured for.", ["no", "fp16", "bf16"])
    allow_tf32: bool = option(False, "Faster float32 matrix products on Ampere GPUs and later.")
    torch_compile: bool = option(False, "Compile the model: minutes at the start, less time a step.")
    channels_last: bool = option(False, "Keep images channels-last in memory; for convolutions.")
    use_cpu: bool = option(False, "Use the CPU although there is an accelerator.")

    def check(self) -> None:
        if not self.max_grad_norm > 0:
            raise ValueError(f"--max_grad_norm must be above 0, got {self.max_grad_norm}.")
        check_optimizer(self.optimizer)
        if self.optimizer == "schedule_free" and self.lr_scheduler not in ("constant", "constant_with_warmup"):
            raise ValueError(
                "--optimizer schedule_free takes the place of a schedule: --lr_scheduler must be constant or"
                f" constant_with_warmup, got {self.lr_scheduler}."
            )
        if self.lr_warmup_steps is not None and self.lr_scheduler == "constant":
            raise ValueError(
                f"--lr_warmup_steps {self.lr_warmup_steps} needs a schedule with a warm-up: use --lr_scheduler"
                " constant_with_warmup."
            )


@dataclass(frozen=True, kw_only=True)
class EMAArguments(Arguments):
    """Exponential moving average of the weights."""

    _argument_group_name = "average of the weights"

    use_ema: Fixed[bool] = option(False, "Validate and save an exponential moving average of the weights.")
    ema_profile: Fixed[str] = option("constant", "Constant decay, or power functions.", ["constant", "power"])
    ema_inv_gamma: Annotated[Positive, Needs("use_ema", True)] = option(
        1.0, "Of constant: decay at step n 1 - (1 + n / inv_gamma)^-power.", source=EXAMPLES
    )
    ema_power: Annotated[Positive, Needs("use_ema", True)] = option(0.75, "Of constant.", source=EXAMPLES)
    ema_max_decay: Annotated[Fraction, Needs("use_ema", True)] = option(0.9999, "Of constant.", source=EXAMPLES)
    ema_sigma_rel: Annotated[Fixed[list[float]], Needs("use_ema", True)] = option(
        [0.05, 0.1], "Of power: relative widths to track.", source="arXiv 2312.02696"
    )
    ema_snapshot_steps: Annotated[Free[Count | None], Needs("use_ema", True)] = option(
        None, "Of power: steps between snapshots; by default 32 in the whole run."
    )
    offload_ema: Annotated[Free[bool], Needs("use_ema", True)] = option(False, "Keep the average on the CPU.")

    def check(self) -> None:
        for sigma_rel in self.ema_sigma_rel:
            if not 0 < sigma_rel < MAX_SIGMA_REL:
                raise ValueError(f"--ema_sigma_rel must be in (0, {MAX_SIGMA_REL:.4f}), got {sigma_rel}.")
        if len(set(self.ema_sigma_rel)) < len(self.ema_sigma_rel):
            raise ValueError(f"--ema_sigma_rel must not name a width twice, got {self.ema_sigma_rel}.")
        if self.ema_profile == "power" and not self.use_ema:
            raise ValueError("--ema_profile power needs --use_ema.")


@dataclass(frozen=True, kw_only=True)
class ValidationArguments(Arguments):
    """Held-out losses and pictures during training."""

    _argument_group_name = "validation"

    validation_steps: Count = option(500, "Steps between held-out losses and picture grids.")
    num_validation_images: Size = option(4, "Pictures in a grid, for each class; 0 for no grids.", source=EXAMPLES)
    num_inference_steps: Count | None = option(
        None, "Solver steps of the pictures and, if the scheduler is ours, of the saved pipeline by default."
    )
    guidance_scale: NotNegative = option(1.0, "Guidance of the pictures; 1 is off.")
    eval_batch_size: Count = option(64, "Samples at once in validation.")


@dataclass(frozen=True, kw_only=True)
class SamplingArguments(Arguments):
    """Sampling of the saved pipeline."""

    _argument_group_name = "sampling"

    solver: str | None = option(
        None,
        "Solver of the saved pipeline. Without it and --num_inference_steps, a search at the end of training finds"
        " both, where the scheduler is ours and says nothing else.",
        list(SOLVERS),
    )
    calibrate_steps: list[Count] = option([], "Numbers of steps to fit at the end of training; saved.")

    def check(self) -> None:
        if self.solver is not None and self.calibrate_steps:
            raise ValueError(f"--calibrate_steps fits a solver of its own: leave out --solver {self.solver}.")


@dataclass(frozen=True, kw_only=True)
class RunArguments(Arguments):
    """Output folder, checkpoints and logs."""

    _argument_group_name = "run"

    output_dir: Free[str] = option("flow-matching-model", "Folder of the trained pipeline, checkpoints and logs.")
    checkpointing_steps: Free[Count] = option(500, "Steps between checkpoints.", source=EXAMPLES)
    checkpoints_total_limit: Free[Count | None] = option(None, "Checkpoints to keep.")
    resume_from_checkpoint: Free[str | None] = option(None, "Folder of a checkpoint, or `latest`.")
    logging_dir: Free[str] = option("logs", "Folder of the trackers in the output folder.", source=EXAMPLES)
    logging_steps: Free[Count] = option(50, "Steps between lines of the log.")
    report_to: Free[str | None] = option(
        None, "Tracker: tensorboard, wandb, all, ... or none; by default TensorBoard if installed."
    )
    tracker_project_name: Free[str] = option("diffusers-fm", "Name of the run in the trackers.")
    dry_run: Free[bool] = option(False, "Print the memory, disk and time that the run needs, and stop.")


@dataclass(frozen=True, kw_only=True)
class TrainingArguments(
    ModuleArguments,
    PipelineArguments,
    DataArguments,
    ObjectiveArguments,
    OptimizationArguments,
    EMAArguments,
    ValidationArguments,
    RunArguments,
    HubArguments,
):
    """All arguments that every training script has."""

    def check(self) -> None:
        if self.optimizer == "schedule_free" and self.use_ema:
            raise ValueError("--optimizer schedule_free averages the weights itself: leave out --use_ema.")
        if self.hub_token is not None and self.report_to not in DISCREET_TRACKERS:
            raise ValueError(
                f"--hub_token does not go with --report_to {self.report_to}, which may record the command line: log in"
                " with `hf auth login`, or set HF_TOKEN."
            )
        check_tracker(self.report_to)
        if not self.push_to_hub and not self.push_dry_run:
            for name in ("hub_model_id", "hub_private_repo", "hub_revision", "hub_license"):
                if getattr(self, name):
                    raise ValueError(f"--{name} {getattr(self, name)} needs --push_to_hub.")


# Steps of an epoch below which the batch is much of the data.
FEW_STEPS = 4


def warmup(args: OptimizationArguments) -> int:
    """Steps of the warm-up, 500 by default."""
    return 500 if args.lr_warmup_steps is None else args.lr_warmup_steps


def warn_of_settings(
    args: OptimizationArguments, num_steps: int, num_samples: int | None, samples_per_step: int
) -> None:
    """Log settings that can be meant and rarely are: of the schedule, and of the batch on few samples."""
    if args.lr_scheduler != "constant" and warmup(args) >= num_steps:
        logger.warning(
            "The warm-up of %d steps is not over when the run ends after %d: the learning rate stays below %g. Give a"
            " smaller --lr_warmup_steps.",
            warmup(args),
            num_steps,
            args.learning_rate,
        )
    averages = args.optimizer == "schedule_free" or (isinstance(args, EMAArguments) and args.use_ema)
    if args.lr_scheduler.startswith("constant") and not averages:
        logger.warning(
            "The learning rate does not fall with --lr_scheduler %s, and there is no --use_ema: the noise of the last"
            " steps stays in the weights.",
            args.lr_scheduler,
        )
    if num_samples is not None and num_samples < FEW_STEPS * samples_per_step:
        logger.warning(
            "An epoch has %.3g steps: %d samples, %d in a step. --num_train_epochs counts such epochs;"
            " --max_train_steps is the length of the run itself.",
            num_samples / samples_per_step,
            num_samples,
            samples_per_step,
        )
