# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train,lora]"]
# ///
r"""Fine-tune Stable Diffusion 3 by flow matching with adapters of low rank (LoRA, arXiv 2106.09685).

A trained `StableDiffusion3Pipeline` goes in and stays as it is; `pytorch_lora_weights.safetensors` comes out, which
`load_lora_weights` of diffusers reads without this package.

Stable Diffusion 3.5 on a folder of images whose captions are in its metadata.jsonl:

    accelerate launch --mixed_precision bf16 training_scripts/train_text_to_image_lora_sd3.py \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --train_data_dir /data/paintings \
      --output_dir runs/paintings-lora --rank 16 --resolution 1024 --center_crop --cache_latents \
      --cache_text_embeddings --train_batch_size 4 --gradient_checkpointing --max_train_steps 1000 \
      --validation_prompts "a lighthouse at night, oil on canvas"

Another style for the digits that train_text_to_image_sd3.py has learned to draw, some minutes on two CPU cores:

    accelerate launch training_scripts/train_text_to_image_lora_sd3.py \
      --config pipelines/sd3-tiny/lora.json --output_dir runs/sd3-tiny-lora

Use what was learned:

    pipeline = StableDiffusion3Pipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
    pipeline.load_lora_weights("runs/paintings-lora")

Go on after an interruption:

    accelerate launch training_scripts/train_text_to_image_lora_sd3.py \
      --config runs/paintings-lora/training_args.json --resume_from_checkpoint latest
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from diffusers_fm.arguments import Free, option, run_script
from diffusers_fm.data.captions import drop_captions
from diffusers_fm.data.latents import latents_of_batch
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.text_to_image.arguments import LoraTrainingArguments
from diffusers_fm.text_to_image.cards import lora_card
from diffusers_fm.text_to_image.lora import (
    adapted_text_encoders,
    add_adapters,
    check_adaptable,
    check_engine,
    parameter_groups,
    save_lora,
    text_encoder_learning_rate,
)
from diffusers_fm.text_to_image.prompts import PromptEncoder, TrainedPrompts
from diffusers_fm.text_to_image.setup import (
    TextToImageModel,
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
class ScriptArguments(LoraTrainingArguments):
    """Arguments of this script."""

    tracker_project_name: Free[str] = option("train_text_to_image_lora_sd3", "Name of the run in the trackers.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device
    precomputed_dir = Path(args.precomputed_dir or run.output_dir / "precomputed")
    check_engine(run.accelerator, args)

    # 1. Pipeline
    pipeline = run.init_pipeline(StableDiffusion3Pipeline, args.text_encoders_name_or_path)
    check_adaptable(pipeline, args)
    resolution = choose_resolution(pipeline, args.resolution)
    sizes = choose_sizes(pipeline, args, resolution)
    # Adapters carry no scheduler: what is sampled with them is sampled with the base model's own.
    sampling_scheduler = pipeline.scheduler
    scheduler = choose_scheduler(pipeline, args, sizes)
    pipeline.scheduler = sampling_scheduler
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    freeze(pipeline, run.accelerator.mixed_precision, transformer=True)
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

    # 3. Adapters and model
    add_adapters(pipeline, args)
    text_encoders = adapted_text_encoders(pipeline)
    if text_encoders:
        prompts = TrainedPrompts(pipeline, prompts, args.max_sequence_length, device)
    model = TextToImageModel(pipeline, text_encoders).train()
    if args.gradient_checkpointing:
        pipeline.transformer.enable_gradient_checkpointing()
        for text_encoder in text_encoders:
            text_encoder.gradient_checkpointing_enable({"use_reentrant": False})

    # 4. Validation and export
    @torch.no_grad()
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
                    pipeline,
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
        """The adapters and their card."""
        save_lora(pipeline, folder)
        card = lora_card(pipeline, run.args, run.repo_id, run.global_batch_size, figures, folder)
        card.save(folder / "README.md")

    model = run.begin(
        model,
        train_data,
        validate,
        export,
        f"Adapters of rank {args.rank} of {type(pipeline.transformer).__name__}"
        f"{' and of both CLIPs' if text_encoders else ''}, {scheduler.config.path} path, {prediction_type};"
        f" {train_data.description} in {len(sizes)} sizes of about {resolution} x {resolution},"
        f" {len(held_out_data or [])} held out.",
        parameter_groups(model, text_encoder_learning_rate(args)),
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
