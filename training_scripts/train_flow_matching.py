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

A data set on the Hub that is larger than the disk, read as it comes:

    accelerate launch --multi_gpu --num_processes 2 training_scripts/train_flow_matching.py \
      --pretrained_model_name_or_path pipelines/dit-imagenet256 --vae_name_or_path stabilityai/sd-vae-ft-mse \
      --dataset_name ILSVRC/imagenet-1k --streaming --max_train_steps 400000 --dataloader_num_workers 8 \
      --output_dir runs/dit-imagenet256

Straighter trajectories, on the pairs that draw_pairs.py has drawn from a trained pipeline (reflow, arXiv 2209.03003):

    accelerate launch training_scripts/train_flow_matching.py \
      --pretrained_model_name_or_path runs/dit-digits --dataset_name runs/dit-digits-pairs --noise_column noise \
      --image_column sample --timestep_density u_shaped --output_dir runs/dit-digits-reflow \
      --train_batch_size 64 --max_train_steps 2000 --learning_rate 1e-3 --lr_scheduler cosine --lr_warmup_steps 100 \
      --use_ema --seed 0

A network of your own, on arrays such as time series (see docs/your_own_network.md):

    accelerate launch training_scripts/train_flow_matching.py --import_modules my_network \
      --pretrained_model_name_or_path my-pipeline --dataset_name data/waves --array_column wave --output_dir runs/waves

Go on after an interruption:

    accelerate launch training_scripts/train_flow_matching.py --config runs/unet-digits/training_args.json \
      --resume_from_checkpoint latest
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.arguments import Free, option, run_script
from diffusers_fm.data.arguments import ArrayArguments, LabelArguments, LatentArguments, PairArguments
from diffusers_fm.data.latents import latents_of_batch
from diffusers_fm.data.loading import load_data
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.objectives.auxiliary import (
    LearningArguments,
    StepInputs,
    begin_auxiliaries,
    learning_facts,
    loss_settings,
)
from diffusers_fm.objectives.flow_matching import (
    TrainableModel,
    choose_label_dropout,
    choose_resolution,
    choose_shift,
    draw_point,
    draw_times,
)
from diffusers_fm.objectives.semidiscrete import SemidiscreteArguments, couple_to_all
from diffusers_fm.training.arguments import SamplingArguments, TrainingArguments
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.publishing import model_card
from diffusers_fm.training.run import TrainingRun
from diffusers_fm.training.sampler import choose_sampler, measure_sigma_data, num_searched
from diffusers_fm.training.validation import validate_pipeline


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(
    TrainingArguments,
    SamplingArguments,
    LearningArguments,
    SemidiscreteArguments,
    LatentArguments,
    LabelArguments,
    PairArguments,
    ArrayArguments,
):
    """Arguments of this script."""

    tracker_project_name: Free[str] = option("train_flow_matching", "Name of the run in the trackers.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device

    # 1. Pipeline
    pipeline = run.init_pipeline(FlowMatchPipeline)
    label_dropout = choose_label_dropout(pipeline, args.label_dropout)
    arrays = args.array_column or args.noise_column
    resolution = 0 if arrays else choose_resolution(pipeline, args.resolution)
    shift = choose_shift(pipeline, args.shift, args.shift_base_dimension)
    path, timestep_scale = pipeline.scheduler.path, pipeline.scheduler.timestep_scale
    prediction_type = pipeline.scheduler.config.prediction_type
    settings = loss_settings(args, prediction_type)
    if pipeline.vae is not None:
        pipeline.vae.to(device).requires_grad_(False).eval()
    elif args.cache_latents:
        raise ValueError(f"--cache_latents needs an autoencoder, and {args.pretrained_model_name_or_path!r} has none.")

    # 2. Data
    train_data, held_out_data = load_data(run.accelerator, args, pipeline, resolution, run.output_dir)
    size = f" of side {resolution}" if resolution else ""

    def encode(batch: dict[str, Any]) -> torch.Tensor:
        """Data of a batch as the flow sees it."""
        return latents_of_batch(pipeline, batch, device)

    measure_sigma_data(run, pipeline, train_data, encode)
    coupling = couple_to_all(run, train_data, encode, pipeline.null_class)

    # 3. Model, and auxiliary losses if there are any
    model = TrainableModel(pipeline)
    model.requires_grad_(True).train()
    auxiliaries = begin_auxiliaries(run, model, pipeline.denoiser, pipeline.scheduler, train_data)
    if args.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss and picture grid of what would be saved now."""
        sampling: dict[str, float] = {}
        if grid_name is not None and run.accelerator.is_main_process:
            count, classes = num_searched(pipeline.sample_shape, args.eval_batch_size), pipeline.num_classes
            labels = [number % classes for number in range(count)] if classes else None
            sampling = choose_sampler(run, pipeline, count, class_labels=labels, batch_size=count)
        figures = validate_pipeline(run, pipeline, held_out_data, step, grid_name) | sampling
        return figures if coupling is None else figures | coupling.figures()

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The trained pipeline and its card."""
        pipeline.save_pretrained(folder)
        auxiliaries.save(folder)
        card = model_card(
            pipeline, run.args, run.repo_id, run.global_batch_size, {**figures, **learning_facts(args)}, folder
        )
        card.save(folder / "README.md")

    model = run.begin(
        model,
        train_data,
        validate,
        export,
        f"{type(pipeline.denoiser).__name__}, {pipeline.scheduler.config.path} path, {prediction_type};"
        f" {train_data.description}{size}, {len(held_out_data or [])} held out.",
    )

    def call(labels: torch.Tensor | None, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Prediction of the model."""
        return model(x_t, (timestep_scale * t).float().to(device), labels)

    # 5. Loop. Logs, validation, checkpoints and signals come between the steps
    with run:
        for step in run.steps():
            # Noise, times and dropped labels are drawn for the whole global batch; a part of it is at hand.
            for part, batch in run.parts(step):
                with run.accelerator.accumulate(model):
                    data = latents_of_batch(pipeline, batch, device, part)
                    labels = batch.get("labels")
                    if labels is not None:
                        dropped = part.uniform("label_dropout") < label_dropout
                        labels = torch.where(dropped, pipeline.null_class or 0, labels).to(device)

                    noise = batch["noise"].to(device) if "noise" in batch else run.draw_noise(part, data, labels)
                    if coupling is not None:
                        data = coupling.pair(noise, labels)
                    t = draw_times(args, path, part, shift)
                    x_t = draw_point(args, path, part, data, noise, t)

                    predict = partial(call, labels)
                    loss = partial(flow_matching_loss, path, data=data, noise=noise, t=t, **settings)
                    losses = loss(predict(x_t, t))
                    if auxiliaries:
                        inputs = StepInputs(step, part, batch, data, noise, x_t, t, predict, loss)
                        losses = losses + auxiliaries.losses(inputs)
                    run.backward(t, losses)
        auxiliaries.remove()
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
