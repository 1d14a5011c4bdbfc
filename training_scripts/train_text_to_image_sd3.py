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

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from diffusers_fm import init_pipeline
from diffusers_fm.data.captions import drop_captions
from diffusers_fm.data.latents import latents_of_batch
from diffusers_fm.hub.portable import clean_settings
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.text_to_image.cards import text_to_image_card
from diffusers_fm.text_to_image.options import (
    choose_encoder_dropout,
    choose_scheduler,
    choose_sizes,
    image_tokens,
    shift_of,
    tell_of_long_captions,
)
from diffusers_fm.text_to_image.plans import text_to_image_plan
from diffusers_fm.text_to_image.prompts import PromptEncoder
from diffusers_fm.text_to_image.setup import (
    TextToImageModel,
    as_saved,
    freeze,
    load_captioned_data,
    prepare_latents,
    prepare_prompts,
    prompt_grid,
)
from diffusers_fm.training.arguments import (
    add_average_arguments,
    add_data_arguments,
    add_objective_arguments,
    add_optimisation_arguments,
    add_run_arguments,
    add_text_to_image_arguments,
    add_validation_arguments,
    check_shared_arguments,
    check_text_to_image_arguments,
    parse_arguments,
    script_parser,
)
from diffusers_fm.training.objective import draw_times
from diffusers_fm.training.planning import add_plan_arguments, is_main_process
from diffusers_fm.training.run import TrainingRun
from diffusers_fm.training.validation import held_out_loss


def build_parser() -> argparse.ArgumentParser:
    """The arguments, by the names and with the defaults of diffusers' own examples where those have them."""
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--text_encoders_name_or_path", help="Pipeline whose text encoders take the place of the pipeline's own.")
    add_data_arguments(parser)
    add_text_to_image_arguments(parser)
    add_objective_arguments(parser)
    add_optimisation_arguments(parser)
    add_average_arguments(parser)
    add_validation_arguments(parser)
    add_run_arguments(parser, "train_text_to_image_sd3")
    add_plan_arguments(parser)
    # Those of StableDiffusion3Pipeline.
    parser.set_defaults(num_inference_steps=28, guidance_scale=7.0)
    return parser


def main(args: argparse.Namespace) -> None:
    """Train."""
    check_shared_arguments(args)
    check_text_to_image_arguments(args)
    if args.dry_run:
        if is_main_process():
            print(text_to_image_plan(args))
        return
    run = TrainingRun(args)
    device = run.accelerator.device
    precomputed_dir = Path(args.precomputed_dir or run.output_dir / "precomputed")

    # 1. Pipeline
    pipeline = init_pipeline(
        args.pretrained_model_name_or_path,
        seed=run.seed,
        vae=args.vae_name_or_path,
        revision=args.revision,
        variant=args.variant,
        pipeline_class=StableDiffusion3Pipeline,
        text_encoders=args.text_encoders_name_or_path,
    )
    sizes = choose_sizes(pipeline, args)
    scheduler = choose_scheduler(pipeline, args, sizes)
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    freeze(pipeline, run.accelerator.mixed_precision)
    encoder = PromptEncoder(pipeline, args.max_sequence_length, device, args.offload)
    encoder_dropout = torch.tensor(choose_encoder_dropout(encoder, args.text_encoder_dropout))

    # 2. Data, and what the frozen models say of it
    with run.accelerator.main_process_first():
        train_data, held_out_data = load_captioned_data(args, pipeline.vae.config.in_channels, sizes)
    if run.accelerator.is_main_process:
        tell_of_long_captions(encoder, train_data.captions)
    prepare_latents(run.accelerator, args, pipeline, (train_data, held_out_data), precomputed_dir)
    prompts = prepare_prompts(
        run.accelerator, args, encoder, (train_data, held_out_data), args.validation_prompts, precomputed_dir
    )

    # 3. Model, optimizer, schedule, average, checkpoint
    model = TextToImageModel(pipeline)
    model.requires_grad_(True).train()
    if args.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
    model = run.prepare(model, train_data.num_samples)
    batches = run.batches(train_data)

    # 4. What is looked at on the way, and what comes out
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss and pictures of what would be saved now."""
        figures: dict[str, Any] = {}
        if held_out_data is not None:
            figures = held_out_loss(
                run.accelerator,
                model,
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
                    (args.resolution, args.resolution),
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
        card = text_to_image_card(saved, args, run.repo_id, run.global_batch_size, figures, folder)
        card.save(folder / "README.md")
        clean_settings(folder)

    run.start(
        validate,
        export,
        f"{pipeline.transformer.__class__.__name__},"
        f" {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters,"
        f" {scheduler.config.path} path, {prediction_type}; {train_data.description} in {len(sizes)} sizes of about"
        f" {args.resolution} x {args.resolution}, {0 if held_out_data is None else len(held_out_data)} held out.",
    )

    # 5. The loop. Logs, validation, checkpoints and signals are dealt with between the steps.
    with run:
        for step in run.steps():
            # Noise, times and what is dropped are drawn for the whole global batch; a part of it is at hand.
            for part in run.parts(step):
                batch = next(batches)
                with run.accelerator.accumulate(model):
                    data = latents_of_batch(pipeline, batch, device, part, args.offload)
                    captions = drop_captions(batch["captions"], part.uniform("caption_dropout") < args.caption_dropout)
                    embeds = prompts(captions)
                    if encoder_dropout.any():
                        numbers = [part.uniform(f"text_encoder_dropout {number}") for number in range(3)]
                        embeds = encoder.drop(embeds, torch.stack(numbers, dim=1) < encoder_dropout)

                    # Batches of one step may differ in size, and their noise must not share numbers.
                    height, width = data.shape[2:]
                    noise = part.normal(f"noise {height} x {width}", tuple(data.shape[1:]), device)
                    t = draw_times(args, path, part, shift_of(scheduler, image_tokens(pipeline, height, width)))
                    x_t = path.sample(data, noise, t)

                    prediction = model(x_t, (scheduler.timestep_scale * t).float().to(device), *embeds)
                    losses = flow_matching_loss(
                        path, prediction, data, noise, t, prediction_type, args.weighting_scheme, args.snr_gamma
                    )
                    run.backward(t, losses)
        run.finish()


if __name__ == "__main__":
    main(parse_arguments(build_parser()))
