# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train an image upscaler by flow matching (arXiv 2210.02747, section 6.3).

The network sees x_t and, joined to it by channels, the low-resolution image enlarged to the same size. Low-resolution
images are made of the data's images by antialiased bicubic resampling (Pillow's), or come from a column of their own.

Handwritten digits, 4x4 to 8x8, about two minutes on two CPU cores:

    accelerate launch training_scripts/train_upscale.py \
      --config pipelines/upscale-digits/training.json --output_dir runs/upscale-digits

Images of your own, 64x64 to 256x256, with the network of the paper, on eight GPUs:

    accelerate launch --multi_gpu --num_processes 8 training_scripts/train_upscale.py \
      --config pipelines/upscale-64-256/training.json --train_data_dir /data/imagenet/train \
      --output_dir runs/upscale-64-256

Pairs of images, such as photographs by two lenses:

    accelerate launch training_scripts/train_upscale.py \
      --pretrained_model_name_or_path pipelines/upscale-64-256 --dataset_name me/pairs --image_column sharp \
      --conditioning_image_column blurred --output_dir runs/lenses

Go on after an interruption:

    accelerate launch training_scripts/train_upscale.py --config runs/upscale-digits/training_args.json \
      --resume_from_checkpoint latest
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusers_fm import FlowMatchUpscalePipeline
from diffusers_fm.arguments import Arguments, Fraction, Free, Size, option, run_script
from diffusers_fm.data.arguments import LabelArguments
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.latents import normalize
from diffusers_fm.data.loading import load_images
from diffusers_fm.data.streams import StreamData
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.models import encode_latents
from diffusers_fm.objectives.flow_matching import (
    TrainableModel,
    choose_label_dropout,
    choose_resolution,
    choose_shift,
    draw_times,
)
from diffusers_fm.objectives.upscaling import PairedImageData, low_resolution, upscaling_report
from diffusers_fm.training.arguments import SamplingArguments, TrainingArguments
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.publishing import model_card
from diffusers_fm.training.run import TrainingRun
from diffusers_fm.training.sampler import choose_sampler, measure_sigma_data, num_searched
from diffusers_fm.training.validation import held_out_loss


@dataclass(frozen=True, kw_only=True)
class UpscaleArguments(Arguments):
    """Low-resolution condition."""

    _argument_group_name = "upscaling"

    conditioning_image_column: str | None = option(
        None, "Column of low-resolution images; by default they are made of the images."
    )
    max_noise_level: Fraction = option(0.0, "Add noise to the condition, of a level from 0 to this.")
    noise_level: Fraction = option(0.0, "Noise level of the condition in validation.")
    num_measured_images: Size = option(256, "Held-out images for PSNR and SSIM; 0 for none.")


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(TrainingArguments, SamplingArguments, LabelArguments, UpscaleArguments):
    """Arguments of this script."""

    tracker_project_name: Free[str] = option("train_upscale", "Name of the run in the trackers.")

    def check(self) -> None:
        if self.streaming and self.conditioning_image_column is not None:
            raise ValueError(
                f"--conditioning_image_column {self.conditioning_image_column} does not go with --streaming, which"
                " reads single images."
            )


def load_data(
    args: ScriptArguments, pipeline: FlowMatchUpscalePipeline, resolution: int
) -> tuple[ImageData | StreamData, ImageData | None]:
    """The images to train on, and those held out, with low-resolution ones of their own if there is a column."""
    factor = pipeline.config.scale_factor
    if resolution % factor:
        raise ValueError(
            f"The resolution must be a multiple of the pipeline's `scale_factor` {factor}, got {resolution}."
        )
    column = args.conditioning_image_column
    if column is None:
        return load_images(args, pipeline, resolution)
    paired = partial(PairedImageData, conditioning_image_column=column, scale_factor=factor)
    return load_images(args, pipeline, resolution, paired, multiple=factor)


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device

    # 1. Pipeline
    pipeline = run.init_pipeline(FlowMatchUpscalePipeline)
    shift = choose_shift(pipeline, args.shift)
    label_dropout = choose_label_dropout(pipeline, args.label_dropout)
    resolution = choose_resolution(pipeline, args.resolution)
    size, scale_factor = (resolution, resolution), pipeline.config.scale_factor
    path, timestep_scale = pipeline.scheduler.path, pipeline.scheduler.timestep_scale
    prediction_type = pipeline.scheduler.config.prediction_type
    if pipeline.vae is not None:
        pipeline.vae.to(device).requires_grad_(False).eval()

    # 2. Data
    with run.accelerator.main_process_first():
        train_data, held_out_data = load_data(args, pipeline, resolution)

    # 3. Model
    model = TrainableModel(pipeline)
    model.requires_grad_(True).train()
    if args.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()

    def prepare(batch: dict[str, Any]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
        """Data, condition without noise, and labels of held-out images."""
        data = normalize(batch["images"].to(device))
        if pipeline.vae is not None:
            data = encode_latents(pipeline.vae, data, sample=False)
        small = normalize(low_resolution(batch, scale_factor).to(device))
        condition = pipeline.augment_condition(pipeline.encode_condition(small, size), torch.zeros(len(small)))
        labels = batch.get("labels")
        return data, (condition, None if labels is None else labels.to(device))

    measure_sigma_data(run, pipeline, train_data, lambda batch: prepare(batch)[0])

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss, PSNR and SSIM, and picture grid of what would be saved now."""
        figures: dict[str, Any] = {}
        if held_out_data is not None:
            figures = held_out_loss(
                run.accelerator, run.model, pipeline.scheduler, held_out_data, args.eval_batch_size, prepare
            )
        if grid_name is not None and run.accelerator.is_main_process:
            count = num_searched(pipeline.sample_shape, args.eval_batch_size)
            batch = next(train_data.spread_batches(count, count))
            small = low_resolution(batch, scale_factor).float() / 255
            figures |= choose_sampler(run, pipeline, len(small), image=small, class_labels=batch.get("labels"))
        shown = train_data if held_out_data is None else held_out_data
        if run.accelerator.is_main_process and not isinstance(shown, StreamData):
            report, grid = upscaling_report(
                pipeline,
                shown,
                0 if held_out_data is None else args.num_measured_images,
                args.num_validation_images,
                args.num_inference_steps,
                args.guidance_scale,
                args.noise_level,
                args.eval_batch_size,
            )
            figures |= report
            if grid is not None:
                run.log.write_grid(step, grid, grid_name)
        return figures

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The trained pipeline and its card."""
        pipeline.save_pretrained(folder)
        rows = {
            name: value for name, value in figures.items() if name.startswith("validation_loss") or "error" in name
        }
        if "psnr" in figures:
            rows["PSNR of a sample, of bicubic"] = f"{figures['psnr']:.2f} dB, {figures['bicubic_psnr']:.2f} dB"
            rows["SSIM of a sample, of bicubic"] = f"{figures['ssim']:.3f}, {figures['bicubic_ssim']:.3f}"
        card = model_card(pipeline, run.args, run.repo_id, run.global_batch_size, rows, folder)
        card.save(folder / "README.md")

    model = run.begin(
        model,
        train_data,
        validate,
        export,
        f"{type(pipeline.denoiser).__name__}, {pipeline.scheduler.config.path} path, {prediction_type};"
        f" {train_data.description} of side {resolution}, from {resolution // scale_factor},"
        f" {len(held_out_data or [])} held out.",
    )

    # 5. Loop. Logs, validation, checkpoints and signals come between the steps
    with run:
        for step in run.steps():
            # Noise, times and dropped labels are drawn for the whole global batch; a part of it is at hand.
            for part, batch in run.parts(step):
                with run.accelerator.accumulate(model):
                    data = normalize(batch["images"].to(device, non_blocking=True))
                    small = normalize(low_resolution(batch, scale_factor).to(device, non_blocking=True))
                    with torch.no_grad():
                        condition = pipeline.encode_condition(small, size)
                        if pipeline.vae is not None:
                            data = encode_latents(pipeline.vae, data, part.sample_generators("posterior", device))
                    noise_level = args.max_noise_level * part.uniform("noise_level")
                    condition_noise = None
                    if args.max_noise_level > 0:
                        condition_noise = part.normal("condition_noise", tuple(condition.shape[1:]), device)
                    condition = pipeline.augment_condition(condition, noise_level, condition_noise)
                    labels = batch.get("labels")
                    if labels is not None:
                        dropped = part.uniform("label_dropout") < label_dropout
                        labels = torch.where(dropped, pipeline.null_class or 0, labels).to(device)

                    noise = run.draw_noise(part, data)
                    t = draw_times(args, path, part, shift)
                    x_t = path.sample(data, noise, t)

                    prediction = model(x_t, (timestep_scale * t).float().to(device), condition, labels)
                    losses = flow_matching_loss(
                        path, prediction, data, noise, t, prediction_type, args.weighting_scheme, args.snr_gamma
                    )
                    run.backward(t, losses)
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
