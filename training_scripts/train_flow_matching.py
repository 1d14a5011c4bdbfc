# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train an unconditional or class-conditional image generator by flow matching (arXiv 2210.02747).

A pipeline folder goes in, untrained (configs alone) or trained, and a trained pipeline folder comes out. The path is
the scheduler's: there is no argument for it.

Handwritten digits, about two minutes on two CPU cores:

    accelerate launch training_scripts/train_flow_matching.py \
      --config pipelines/unet-digits/training.json --output_dir runs/unet-digits

The same with every choice on the command line:

    accelerate launch training_scripts/train_flow_matching.py \
      --pretrained_model_name_or_path pipelines/unet-digits --dataset_name data/digits --output_dir runs/unet-digits \
      --train_batch_size 64 --max_train_steps 2000 --learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 100 \
      --timestep_density logit_normal --use_ema --seed 0

A folder of images, classes in subfolders, on two GPUs:

    accelerate launch --multi_gpu --num_processes 2 --mixed_precision bf16 training_scripts/train_flow_matching.py \
      --pretrained_model_name_or_path pipelines/unet-imagenet64 --train_data_dir /data/imagenet/train \
      --output_dir runs/unet-imagenet64 --random_flip --dataloader_num_workers 8

Go on after an interruption:

    accelerate launch training_scripts/train_flow_matching.py --config runs/unet-digits/training_args.json \
      --resume_from_checkpoint latest
"""

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_fm import FlowMatchPipeline, init_pipeline
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.models import encode_latents
from diffusers_fm.paths import ConditionalPath
from diffusers_fm.timesteps import DENSITIES, sample_timesteps, shift_time
from diffusers_fm.training import (
    BatchSlice,
    ImageData,
    ImageTransform,
    LossMeter,
    RunLog,
    StopSignal,
    StreamSampler,
    TrainableModel,
    averaged_weights,
    choose_label_dropout,
    choose_resolution,
    choose_shift,
    choose_split,
    class_names,
    compare_arguments,
    create_repo,
    find_checkpoint,
    handle_model_files,
    held_out_loss,
    held_out_split_name,
    load_checkpoint,
    load_splits,
    make_accelerator,
    make_loader,
    make_optimizer,
    model_card,
    normalize,
    parse_arguments,
    read_manifest,
    sample_grid,
    save_arguments,
    save_checkpoint,
    saved_arguments,
    seed_layers,
    upload,
    weighting_scheme,
)


logger = logging.getLogger("train_flow_matching")

# `piecewise_constant` needs rules that no argument gives.
LR_SCHEDULERS = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]

# With --nan_policy skip: so many steps in a row without a finite gradient end the run.
MAX_SKIPPED_IN_A_ROW = 10

# Arguments that may change between the two parts of a resumed run without a word.
FREE_ON_RESUME = (
    "resume_from_checkpoint output_dir max_train_steps checkpointing_steps checkpoints_total_limit logging_steps"
    " logging_dir report_to tracker_project_name dataloader_num_workers push_to_hub hub_model_id hub_private_repo"
    " cache_dir"
).split()


def build_parser() -> argparse.ArgumentParser:
    """The arguments, by the names and with the defaults of diffusers' own examples where those have them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--config", help="JSON file of arguments, such as the training_args.json of a run; the command line wins.")

    # Model
    add("--pretrained_model_name_or_path", required=True, help="Pipeline folder, trained or not, or a Hub id.")
    add("--revision", help="Branch, tag or commit of the pipeline on the Hub.")
    add("--variant", help="Variant of the weights to load, such as fp16; training is in float32 all the same.")
    add("--vae_name_or_path", help="Trained autoencoder in place of the pipeline's; latent pipelines only.")

    # Data
    add("--dataset_name", help="Hub id, or a local folder of parquet, arrow or image files or of save_to_disk.")
    add("--dataset_config_name", help="Configuration of the data set.")
    add("--train_data_dir", help="Folder of images instead, classes in subfolders.")
    add("--train_split", default="train", help="Split to train on.")
    add("--validation_split", help="Split held out; by default `validation`, else `test`, where there is one.")
    add("--image_column", default="image", help="Column of the images.")
    add("--label_column", default="label", help="Column of the labels, read if the model has classes.")
    add("--max_train_samples", type=int, help="Train on so many samples, chosen at random.")
    add("--max_validation_samples", type=int, default=2048, help="Hold out so many samples at most.")
    add("--cache_dir", help="Where downloaded and prepared data is kept.")
    add("--resolution", type=int, help="Side of the images; by default what the pipeline is configured for.")
    add("--center_crop", action="store_true", help="Crop at the centre, not anywhere.")
    add("--random_flip", action="store_true", help="Mirror half of the images.")
    add("--dataloader_num_workers", type=int, default=0, help="Processes that decode images; results do not change.")

    # Objective
    add("--timestep_density", choices=list(DENSITIES), default="logit_normal", help="Density of the training times.")
    add("--logit_mean", type=float, default=0.0, help="Of logit_normal; above 0 is towards the noise.")
    add("--logit_std", type=float, default=1.0, help="Of logit_normal.")
    add("--mode_scale", type=float, default=1.29, help="Of mode.")
    add("--density_alpha", type=float, default=1.0, help="First parameter of beta, which weighs the noise.")
    add("--density_beta", type=float, default=1.0, help="Second parameter of beta, which weighs the data.")
    add("--shift", type=float, help="Shift of the times; saved in the scheduler. By default the scheduler's own.")
    add("--weighting_scheme", type=weighting_scheme, default="none", help="Weight of the loss: diffusers_fm.losses.")
    add("--snr_gamma", type=float, default=5.0, help="Of the weighting min_snr.")
    add("--label_dropout", type=float, help="Part of the labels dropped for guidance; 0.1 if there is a null class.")

    # Optimisation
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
    add("--use_8bit_adam", action="store_true", help='Needs `pip install "diffusers-fm[8bit]"`.')
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0, help="Clip gradients to this norm; inf for no clipping.")
    add("--nan_policy", choices=["stop", "skip"], default="stop", help="What to do at a gradient that is not finite.")
    add("--gradient_checkpointing", action="store_true", help="Less memory, more time.")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="By default what accelerate is configured for.")
    add("--allow_tf32", action="store_true", help="Faster float32 matrix products on Ampere GPUs and later.")
    add("--use_cpu", action="store_true", help="Use the CPU although there is an accelerator.")

    # Average of the weights
    add("--use_ema", action="store_true", help="Validate and save an exponential moving average of the weights.")
    add("--ema_inv_gamma", type=float, default=1.0, help="Decay at step n: 1 - (1 + n / inv_gamma)^-power.")
    add("--ema_power", type=float, default=0.75)
    add("--ema_max_decay", type=float, default=0.9999)

    # Validation
    add("--validation_steps", type=int, default=500, help="Steps between held-out losses and picture grids.")
    add("--num_validation_images", type=int, default=4, help="Pictures in a grid, for each class; 0 for no grids.")
    add("--num_inference_steps", type=int, default=50, help="Solver steps of the pictures.")
    add("--guidance_scale", type=float, default=1.0, help="Guidance of the pictures; 1 is off.")
    add("--eval_batch_size", type=int, default=64, help="Samples at once in validation.")

    # The run
    add("--output_dir", default="flow-matching-model", help="The trained pipeline, checkpoints and logs.")
    add("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    add("--checkpoints_total_limit", type=int, help="Checkpoints to keep.")
    add("--resume_from_checkpoint", help="Folder of a checkpoint, or `latest`.")
    add("--logging_dir", default="logs", help="Folder of the trackers in the output folder.")
    add("--logging_steps", type=int, default=50, help="Steps between lines of the log.")
    add("--report_to", help="Tracker: tensorboard, wandb, all, ... or none; by default TensorBoard if installed.")
    add("--tracker_project_name", default="train_flow_matching", help="Name of the run in the trackers.")
    add("--push_to_hub", action="store_true", help="Upload the trained pipeline.")
    add("--hub_model_id", help="Its repository; by default named like the output folder.")
    add("--hub_token", help="Token of the Hub; by default the one you logged in with.")
    add("--hub_private_repo", action="store_true", help="Make the repository private.")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a `ValueError` for values that can be refused without looking at model or data."""
    for name in (
        "train_batch_size gradient_accumulation_steps num_train_epochs max_train_steps checkpointing_steps"
        " logging_steps validation_steps num_inference_steps eval_batch_size checkpoints_total_limit resolution"
        " max_train_samples max_validation_samples"
    ).split():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    for name in ("learning_rate", "max_grad_norm", "shift", "ema_inv_gamma"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} must be above 0, got {value}.")
    if args.label_dropout is not None and not 0 <= args.label_dropout <= 1:
        raise ValueError(f"--label_dropout must be in [0, 1], got {args.label_dropout}.")
    if args.lr_warmup_steps is not None and args.lr_scheduler == "constant":
        raise ValueError(
            f"--lr_warmup_steps {args.lr_warmup_steps} needs a schedule with a warm-up: use --lr_scheduler"
            " constant_with_warmup."
        )
    if (args.dataset_name is None) == (args.train_data_dir is None):
        given = "neither" if args.dataset_name is None else "both"
        raise ValueError(f"Exactly one of --dataset_name and --train_data_dir must be given, got {given}.")


def load_data(
    args: argparse.Namespace, pipeline: FlowMatchPipeline, resolution: int
) -> tuple[ImageData, ImageData | None]:
    """The images to train on, and those held out."""
    splits = load_splits(args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir)
    channels = pipeline.sample_shape[0] if pipeline.vae is None else pipeline.vae.config.in_channels
    columns = {
        "image_column": args.image_column,
        "label_column": args.label_column if pipeline.num_classes else None,
        "num_classes": pipeline.num_classes,
        "seed": args.seed,
    }
    train_split = choose_split(splits, args.train_split)
    transform = ImageTransform(resolution, channels, args.center_crop, args.random_flip)
    train_data = ImageData(train_split, transform, max_samples=args.max_train_samples, **columns)
    if pipeline.num_classes and pipeline.config.id2label is None:
        pipeline.register_to_config(id2label=class_names(train_split, args.label_column))
    name = args.validation_split or held_out_split_name(splits, args.train_split)
    if name is None:
        return train_data, None
    transform = ImageTransform(resolution, channels, center_crop=True)
    # The same images are held out whatever the seed, so that losses of runs compare.
    columns["seed"] = 0
    return train_data, ImageData(
        choose_split(splits, name), transform, max_samples=args.max_validation_samples, **columns
    )


def draw_times(args: argparse.Namespace, path: ConditionalPath, part: BatchSlice, shift: float) -> torch.Tensor:
    """Times of a batch, stratified over the global batch: `(batch_size,)` in (0, 1), 0 = data, float64 on the CPU."""
    t = sample_timesteps(
        args.timestep_density,
        part.size,
        generator=part.generator("times"),
        offset=part.offset,
        total=part.total,
        logit_mean=args.logit_mean,
        logit_std=args.logit_std,
        mode_scale=args.mode_scale,
        alpha=args.density_alpha,
        beta=args.density_beta,
    )
    # The sampler shifts the times of the straight coordinates; on the OT path these are t itself.
    return t if shift == 1 else path.time_at(shift_time(path.ratio(t), shift))


def main(args: argparse.Namespace) -> None:
    """Train."""
    check_arguments(args)
    output_dir = Path(args.output_dir)
    checkpoint = find_checkpoint(output_dir, args.resume_from_checkpoint)
    manifest: dict[str, Any] = {"step": 0, "samples_seen": 0} if checkpoint is None else read_manifest(checkpoint)
    accelerator = make_accelerator(
        output_dir,
        args.logging_dir,
        args.mixed_precision,
        args.gradient_accumulation_steps,
        args.report_to,
        args.use_cpu,
    )
    logging.basicConfig(level=logging.WARNING if accelerator.is_main_process else logging.ERROR, format="%(message)s")
    for name in (logger.name, "diffusers_fm"):
        logging.getLogger(name).setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    # Everyone has looked at the output folder before anyone writes to it.
    accelerator.wait_for_everyone()
    repo_id = None
    if accelerator.is_main_process:
        if args.push_to_hub:
            repo_id = create_repo(args, output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
    if args.seed is None:
        seeds = [manifest.get("seed", int.from_bytes(os.urandom(4), "little"))]
        args.seed = broadcast_object_list(seeds)[0]
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32

    # 1. Pipeline
    pipeline = init_pipeline(
        args.pretrained_model_name_or_path,
        seed=args.seed,
        vae=args.vae_name_or_path,
        revision=args.revision,
        variant=args.variant,
    )
    shift = choose_shift(pipeline, args.shift)
    label_dropout = choose_label_dropout(pipeline, args.label_dropout)
    resolution = choose_resolution(pipeline, args.resolution)
    path, timestep_scale = pipeline.scheduler.path, pipeline.scheduler.timestep_scale
    prediction_type = pipeline.scheduler.config.prediction_type

    # 2. Data
    with accelerator.main_process_first():
        train_data, held_out_data = load_data(args, pipeline, resolution)
    accumulation_steps = args.gradient_accumulation_steps
    global_batch_size = args.train_batch_size * accelerator.num_processes * accumulation_steps
    if global_batch_size > len(train_data):
        raise ValueError(
            f"An optimizer step of {global_batch_size} samples ({accelerator.num_processes} processes x"
            f" {accumulation_steps} accumulation steps x --train_batch_size {args.train_batch_size}) is larger than"
            f" the data set of {len(train_data)}."
        )
    if args.max_train_steps is None:
        args.max_train_steps = math.ceil(args.num_train_epochs * len(train_data) / global_batch_size)

    # 3. Model, optimizer, schedule, average
    model = TrainableModel(pipeline)
    model.requires_grad_(True).train()
    if args.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()
    optimizer = make_optimizer(
        model.parameters(),
        args.learning_rate * (global_batch_size if args.scale_lr else 1),
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        epsilon=args.adam_epsilon,
        use_8bit_adam=args.use_8bit_adam,
    )
    # Not prepared by accelerate, which would step it once for each process; here a step is an optimizer step.
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=500 if args.lr_warmup_steps is None else args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
        num_cycles=args.lr_num_cycles,
        power=args.lr_power,
    )
    if pipeline.vae is not None:
        pipeline.vae.to(accelerator.device).requires_grad_(False).eval()
    model, optimizer = accelerator.prepare(model, optimizer)
    bare_model = accelerator.unwrap_model(model)
    parameters = list(model.parameters())
    meter = LossMeter()
    accelerator.register_for_checkpointing(lr_scheduler, meter)
    ema = None
    if args.use_ema:
        ema = EMAModel(
            parameters,
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            foreach=True,
        )
        accelerator.register_for_checkpointing(ema)
    handle_model_files(accelerator)
    if checkpoint is not None:
        compare_arguments(args, manifest["arguments"], fixed=("use_ema",), free=FREE_ON_RESUME)
        load_checkpoint(accelerator, checkpoint)
        if ema is not None:
            ema.to(accelerator.device)
    first_step, first_sample = manifest["step"], manifest["samples_seen"]

    # 4. Logs
    log = RunLog(accelerator, output_dir, first_step)
    log.start_trackers(args.tracker_project_name, saved_arguments(args), first_step)
    if accelerator.is_main_process:
        save_arguments(args, output_dir)
    logger.info(
        "%s, %.2f M parameters, %s path, %s; %d images (%s) of side %d, %d held out.",
        pipeline.denoiser.__class__.__name__,
        sum(parameter.numel() for parameter in parameters) / 1e6,
        pipeline.scheduler.config.path,
        prediction_type,
        len(train_data),
        "in memory" if train_data.in_memory else "decoded on the way",
        resolution,
        0 if held_out_data is None else len(held_out_data),
    )
    logger.info(
        "Steps %d to %d, each of %d samples (%d processes x %d accumulation steps x %d), %s, seed %d%s.",
        first_step + 1,
        args.max_train_steps,
        global_batch_size,
        accelerator.num_processes,
        accumulation_steps,
        args.train_batch_size,
        accelerator.mixed_precision if accelerator.mixed_precision != "no" else "float32",
        args.seed,
        "" if checkpoint is None else f", resumed from {checkpoint}",
    )

    def validate(step: int, grid_name: str | None = None) -> dict[str, Any]:
        """Held-out loss and picture grid of what would be saved now."""
        figures: dict[str, Any] = {}
        with averaged_weights(bare_model, ema):
            if held_out_data is not None:
                figures = held_out_loss(accelerator, model, pipeline, held_out_data, args.eval_batch_size)
                log.write(step, figures)
            if args.num_validation_images and accelerator.is_main_process:
                grid = sample_grid(
                    pipeline,
                    args.num_validation_images,
                    args.num_inference_steps,
                    args.guidance_scale,
                    args.eval_batch_size,
                )
                log.write_grid(step, grid, grid_name)
        accelerator.wait_for_everyone()
        return figures

    def save(step: int) -> Path:
        """A checkpoint of everything that the next step needs."""
        meter.reduce(accelerator)
        state = {
            "samples_seen": first_sample + (step - first_step) * global_batch_size,
            "seed": args.seed,
            "num_processes": accelerator.num_processes,
            "arguments": saved_arguments(args),
        }
        return save_checkpoint(accelerator, output_dir, step, state, args.checkpoints_total_limit)

    def refuse_non_finite(step: int) -> None:
        """End the run; nothing that came of this gradient is saved."""
        meter.reduce(accelerator)
        raise ValueError(
            f"The gradient at step {step} is not finite. Losses by time, from data to noise, are"
            f" {meter.report()['loss_by_time']}. The last good checkpoint is {last_checkpoint or 'none'}."
        )

    # 5. The loop
    sampler = StreamSampler(
        len(train_data),
        args.seed,
        args.train_batch_size,
        accumulation_steps,
        accelerator.num_processes,
        accelerator.process_index,
        first_sample,
        max(0, args.max_train_steps - first_step),
    )
    batches = iter(make_loader(train_data, sampler, args.dataloader_num_workers))
    progress_bar = tqdm(
        total=args.max_train_steps,
        initial=first_step,
        desc="Steps",
        disable=not accelerator.is_local_main_process,
    )
    last_checkpoint, skipped, skipped_in_a_row = checkpoint, 0, 0
    window_start, window_step = time.perf_counter(), first_step
    gradient_norm = torch.zeros(())
    with StopSignal(accelerator) as stop:
        for step in range(first_step, args.max_train_steps):
            for micro_step in range(accumulation_steps):
                batch = next(batches)
                # Noise, times and dropped labels are drawn for the whole global batch; this is our part of it.
                offset = (micro_step * accelerator.num_processes + accelerator.process_index) * args.train_batch_size
                part = BatchSlice(args.seed, step, offset, args.train_batch_size, global_batch_size)
                seed_layers(args.seed, step, micro_step, accelerator.process_index, accelerator.device)

                with accelerator.accumulate(model):
                    data = normalize(batch["images"].to(accelerator.device, non_blocking=True))
                    if pipeline.vae is not None:
                        with torch.no_grad():
                            generators = part.sample_generators("posterior", accelerator.device)
                            data = encode_latents(pipeline.vae, data, generators)
                    labels = batch.get("labels")
                    if labels is not None:
                        dropped = part.uniform("label_dropout") < label_dropout
                        labels = torch.where(dropped, pipeline.null_class or 0, labels).to(accelerator.device)

                    noise = part.normal("noise", tuple(data.shape[1:]), accelerator.device)
                    t = draw_times(args, path, part, shift)
                    x_t = path.sample(data, noise, t)

                    timesteps = (timestep_scale * t).float().to(accelerator.device)
                    prediction = model(x_t, timesteps, labels)
                    losses = flow_matching_loss(
                        path, prediction, data, noise, t, prediction_type, args.weighting_scheme, args.snr_gamma
                    )
                    meter.add(t, losses)

                    accelerator.backward(losses.mean())
                    if accelerator.sync_gradients:
                        gradient_norm = accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
                        if args.nan_policy == "skip" and accelerator.scaler is None:
                            finite = bool(torch.isfinite(gradient_norm))
                            skipped, skipped_in_a_row = skipped + (not finite), 0 if finite else skipped_in_a_row + 1
                            if skipped_in_a_row > MAX_SKIPPED_IN_A_ROW:
                                refuse_non_finite(step + 1)
                            if not finite:
                                optimizer.zero_grad()
                    optimizer.step()
                    optimizer.zero_grad()
            learning_rate = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            if ema is not None:
                ema.step(parameters)
            progress_bar.update()
            done = step + 1

            # From here on, what happens at some steps only
            is_last = done == args.max_train_steps
            signum = stop.received()
            checkpoint_is_due = done % args.checkpointing_steps == 0 or (signum and not is_last)
            log_is_due = done % args.logging_steps == 0 or is_last
            if (checkpoint_is_due or log_is_due) and args.nan_policy == "stop":
                if not torch.isfinite(gradient_norm) and not accelerator.optimizer_step_was_skipped:
                    refuse_non_finite(done)
            if log_is_due:
                meter.reduce(accelerator)
                seconds = time.perf_counter() - window_start
                values = {
                    "epoch": (first_sample + (done - first_step) * global_batch_size) / len(train_data),
                    **meter.report(),
                    "learning_rate": learning_rate,
                    "gradient_norm": float(gradient_norm),
                    "images_per_second": round((done - window_step) * global_batch_size / seconds, 1),
                    **({"skipped_steps": skipped} if skipped else {}),
                }
                log.write(done, values)
                progress_bar.set_postfix(
                    loss=values["loss"], lr=values["learning_rate"], images_per_second=values["images_per_second"]
                )
                window_start, window_step = time.perf_counter(), done
            aside = time.perf_counter()
            if done % args.validation_steps == 0 and not is_last:
                validate(done)
            if checkpoint_is_due:
                last_checkpoint = save(done)
            window_start += time.perf_counter() - aside
            if signum and not is_last:
                progress_bar.close()
                logger.warning(
                    "Stopped by signal %d after step %d. %s is saved; go on with --resume_from_checkpoint latest.",
                    signum,
                    done,
                    last_checkpoint,
                )
                accelerator.end_training()
                sys.exit(128 + signum)
        progress_bar.close()

        # 6. The trained pipeline; a signal no longer interrupts
        figures = validate(args.max_train_steps, "grid.png")
        if accelerator.is_main_process:
            with averaged_weights(bare_model, ema):
                pipeline.save_pretrained(output_dir)
            rows = {"held-out loss": f"{figures['validation_loss']:.4f}"} if figures else {}
            model_card(pipeline, args, repo_id or str(output_dir), global_batch_size, rows).save(
                output_dir / "README.md"
            )
            logger.info(
                "The trained pipeline is in %s%s.", output_dir, f"; held-out loss {rows.popitem()[1]}" if rows else ""
            )
    accelerator.end_training()
    if repo_id is not None:
        upload(args, output_dir, repo_id)
        logger.info("Uploaded to %s.", repo_id)


if __name__ == "__main__":
    main(parse_arguments(build_parser()))
