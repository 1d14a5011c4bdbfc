# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train a text-to-image generator in the style of Stable Diffusion 3 (arXiv 2403.03206) by flow matching.

A pipeline folder goes in, untrained (configs alone) or trained, and a trained `StableDiffusion3Pipeline` comes out,
which diffusers reads without this package. The transformer is trained; text encoders and autoencoder are not.

Captioned handwritten digits, a few minutes on two CPU cores:

    accelerate launch training_scripts/train_text_to_image_sd3.py \
      --config pipelines/sd3-tiny/training.json --output_dir runs/sd3-tiny

Fine-tune Stable Diffusion 3.5 on a folder of images whose captions are in its metadata.jsonl:

    accelerate launch --mixed_precision bf16 training_scripts/train_text_to_image_sd3.py \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --train_data_dir /data/paintings \
      --output_dir runs/paintings --resolution 1024 --use_aspect_ratio_buckets --center_crop \
      --cache_latents --cache_text_embeddings --train_batch_size 4 --gradient_checkpointing --use_ema \
      --learning_rate 1e-5 --max_train_steps 5000 --validation_prompts "a lighthouse at night, oil on canvas"

From scratch, on the sizes of Stable Diffusion 3, with the text encoders and the autoencoder of a trained one:

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \
      training_scripts/train_text_to_image_sd3.py --pretrained_model_name_or_path pipelines/sd3-medium \
      --text_encoders_name_or_path stabilityai/stable-diffusion-3.5-medium --vae_name_or_path /models/sd3-vae \
      --dataset_name /data/webdataset --image_column jpg --caption_column txt --output_dir runs/sd3-medium \
      --resolution 256 --text_encoder_dropout 0.46 --shift_base_resolution 256

Go on after an interruption:

    accelerate launch training_scripts/train_text_to_image_sd3.py --config runs/sd3-tiny/training_args.json \
      --resume_from_checkpoint latest
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from diffusers_fm.arguments import Free, option, run_script
from diffusers_fm.data.captions import drop_captions
from diffusers_fm.data.latents import latents_of_batch
from diffusers_fm.hub.portable import clean_settings
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.text_to_image.arguments import TextToImageArguments
from diffusers_fm.text_to_image.cards import text_to_image_card
from diffusers_fm.text_to_image.prompts import PromptEncoder
from diffusers_fm.text_to_image.setup import (
    TextToImageModel,
    as_saved,
    choose_encoder_dropout,
    choose_resolution,
    choose_scheduler,
    choose_sizes,
    freeze,
    load_captioned_data,
    prepare_latents,
    prepare_prompts,
    prompt_grid,
    shift_of,
    warn_of_long_captions,
)
from diffusers_fm.training.objective import draw_times
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.run import TrainingRun
from diffusers_fm.training.validation import held_out_loss


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(TextToImageArguments):
    """Arguments of this script."""

    tracker_project_name: Free[str] = option("train_text_to_image_sd3", "Name of the run in the trackers.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device
    precomputed_dir = Path(args.precomputed_dir or run.output_dir / "precomputed")

    # 1. Pipeline
    pipeline = run.init_pipeline(StableDiffusion3Pipeline, args.text_encoders_name_or_path)
    resolution = choose_resolution(pipeline, args.resolution)
    sizes = choose_sizes(pipeline, args, resolution)
    scheduler = choose_scheduler(pipeline, args, sizes)
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    freeze(pipeline, run.accelerator.mixed_precision)
    encoder = PromptEncoder(pipeline, args.max_sequence_length, device, args.offload)
    encoder_dropout = torch.tensor(choose_encoder_dropout(encoder, args.text_encoder_dropout))

    # 2. Data, and caches of what the frozen models compute
    with run.accelerator.main_process_first():
        train_data, held_out_data = load_captioned_data(args, pipeline.vae.config.in_channels, resolution, sizes)
    if run.accelerator.is_main_process:
        warn_of_long_captions(encoder, train_data.captions)
    prepare_latents(run.accelerator, args, pipeline, (train_data, held_out_data), precomputed_dir)
    prompts = prepare_prompts(
        run.accelerator, args, encoder, (train_data, held_out_data), args.validation_prompts, precomputed_dir
    )

    # 3. Model
    model = TextToImageModel(pipeline)
    model.requires_grad_(True).train()
    if args.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss and pictures of the model as it would be saved."""
        figures: dict[str, Any] = {}
        if held_out_data is not None:
            figures = held_out_loss(
                run.accelerator,
                run.model,
                scheduler,
                held_out_data,
                args.eval_batch_size,
                lambda batch: (
                    latents_of_batch(pipeline, batch, device, offload=args.offload),
                    prompts(batch["captions"]),
                ),
            )
        if args.validation_prompts and args.num_validation_images and run.accelerator.is_main_process:
            with run.accelerator.autocast():
                grid = prompt_grid(
                    as_saved(pipeline),
                    [prompts([prompt]) for prompt in args.validation_prompts],
                    prompts([""]),
                    (resolution, resolution),
                    args.num_validation_images,
                    args.num_inference_steps,
                    args.guidance_scale,
                    device,
                )
            run.log.write_grid(step, grid, grid_name)
        return figures

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The trained pipeline and its card."""
        saved = as_saved(pipeline)
        saved.save_pretrained(folder)
        card = text_to_image_card(saved, run.args, run.repo_id, run.global_batch_size, figures, folder)
        card.save(folder / "README.md")
        clean_settings(folder)

    model = run.begin(
        model,
        train_data,
        validate,
        export,
        f"{type(pipeline.transformer).__name__}, {scheduler.config.path} path, {prediction_type};"
        f" {train_data.description} in {len(sizes)} sizes of about {resolution} x {resolution},"
        f" {len(held_out_data or [])} held out.",
    )

    # 5. Loop. Logs, validation, checkpoints and signals come between the steps
    with run:
        for step in run.steps():
            # Noise, times and dropout are drawn for the whole global batch, of which `part` is this process's share.
            for part, batch in run.parts(step):
                with run.accelerator.accumulate(model):
                    data = latents_of_batch(pipeline, batch, device, part, args.offload)
                    captions = drop_captions(batch["captions"], part.uniform("caption_dropout") < args.caption_dropout)
                    embeds = prompts(captions)
                    if encoder_dropout.any():
                        numbers = [part.uniform(f"text_encoder_dropout {number}") for number in range(3)]
                        embeds = encoder.drop(embeds, torch.stack(numbers, dim=1) < encoder_dropout)

                    noise = run.draw_noise(part, data)
                    t = draw_times(args, path, part, shift_of(scheduler, data, pipeline.transformer.config.patch_size))
                    x_t = path.sample(data, noise, t)

                    prediction = model(x_t, (scheduler.timestep_scale * t).float().to(device), *embeds)
                    losses = flow_matching_loss(
                        path, prediction, data, noise, t, prediction_type, args.weighting_scheme, args.snr_gamma
                    )
                    run.backward(t, losses)
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
