# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train adapters (LoRA, arXiv 2106.09685) of a text-to-image pipeline of diffusers by flow matching.

A trained pipeline goes in and stays as it is; out come weights that its own `load_lora_weights` reads. As
train_text_to_image.py, the script knows no family: a training step runs the pipeline's call up to its first step.

A style on top of `runs/sd3-tiny`, minutes on two CPU cores:

    python data/digits/make_digits.py --style inverted --output_dir runs/inverted-digits
    accelerate launch training_scripts/train_text_to_image_lora.py \
      --config pipelines/sd3-tiny/lora.json --output_dir runs/sd3-tiny-inverted

Stable Diffusion 3.5 or FLUX on a folder of images whose captions are in its metadata.jsonl:

    accelerate launch --mixed_precision bf16 training_scripts/train_text_to_image_lora.py \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --train_data_dir /data/paintings \
      --output_dir runs/paintings-lora --resolution 1024 --center_crop --cache_latents --cache_text_embeddings \
      --rank 16 --learning_rate 1e-4 --max_train_steps 2000 --gradient_checkpointing \
      --validation_prompts "a lighthouse at night, oil on canvas"

Go on after an interruption:

    accelerate launch training_scripts/train_text_to_image_lora.py \
      --config runs/paintings-lora/training_args.json --resume_from_checkpoint latest
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers_fm.arguments import Free, option, run_script
from diffusers_fm.data.images import drop_captions
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.objectives.flow_matching import draw_times
from diffusers_fm.text_to_image.arguments import LoraTrainingArguments, parse_columns
from diffusers_fm.text_to_image.cards import lora_card
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.lora import (
    add_adapters,
    check_adaptable,
    check_engine,
    parameter_groups,
    save_lora,
    text_encoder_learning_rate,
)
from diffusers_fm.text_to_image.setup import (
    ask_all,
    call_arguments,
    choose_network,
    choose_scheduler,
    choose_sizes,
    freeze,
    open_pipeline,
    prepare_data,
    validate_field,
)
from diffusers_fm.text_to_image.text import choose_encoder_dropout, draw_encoder_dropout, weigh_prior
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(LoraTrainingArguments):
    """Arguments of this script."""

    tracker_project_name: Free[str] = option("train_text_to_image_lora", "Name of the run in the trackers.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device
    check_engine(run.accelerator, args)

    # 1. Pipeline
    pipeline = open_pipeline(run, args)
    network = choose_network(pipeline, args.network)
    check_adaptable(pipeline, network, args)
    freeze(run.accelerator, pipeline, args.network, adapters=True)
    encoders = add_adapters(pipeline, args)
    columns = parse_columns(args.call_columns)
    model = TrainedField(pipeline, args.network, call_arguments(pipeline, args), encoders, columns)
    sizes = choose_sizes(model, args)
    # Adapters carry no scheduler: what is sampled with them is sampled with the base model's own.
    sampling_scheduler = pipeline.scheduler
    scheduler = choose_scheduler(model, args, sizes)
    pipeline.scheduler = sampling_scheduler
    ask_all(run.accelerator, model, sizes)
    path, timestep_scale, prediction_type = scheduler.path, scheduler.timestep_scale, scheduler.config.prediction_type
    encoder_dropout = choose_encoder_dropout(model.text, args.text_encoder_dropout)

    # 2. Data, and caches of what the frozen models compute
    train_data, held_out_data = prepare_data(run, args, model, sizes)

    # 3. Model
    model.train()
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()
        for encoder in encoders:
            encoder.gradient_checkpointing_enable({"use_reentrant": False})

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss and pictures of the model as it would be saved."""
        return validate_field(run, pipeline, model, scheduler, held_out_data, sizes[0], step, grid_name)

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The adapters and their card."""
        save_lora(pipeline, folder)
        facts = (figures, folder, args.instance_prompt, model)
        card = lora_card(pipeline, run.args, run.repo_id, run.global_batch_size, *facts)
        card.save(folder / "README.md")

    wrapped = run.begin(
        model,
        train_data,
        validate,
        export,
        f"Adapters of rank {args.rank} of {type(pipeline).__name__}, {type(network).__name__}"
        f"{' and its CLIPs' if encoders else ''}, {scheduler.config.path} path, {prediction_type};"
        f" {train_data.description} in {model.describe_sizes(sizes)},"
        f" {len(held_out_data or [])} held out. {model.describe()}.",
        parameter_groups(model, text_encoder_learning_rate(args)),
    )

    # 5. Loop. Logs, validation, checkpoints and signals come between the steps
    with run:
        for step in run.steps():
            # Noise, times and dropout are drawn for the whole global batch, of which `part` is this process's share.
            for part, batch in run.parts(step):
                with run.accelerator.accumulate(wrapped):
                    size = model.size_of(batch)
                    data = model.encode(batch, device, part)
                    captions = drop_captions(batch["captions"], part.uniform("caption_dropout") < args.caption_dropout)
                    dropped = draw_encoder_dropout(part, encoder_dropout)
                    images = model.call_images(batch, part)

                    noise = run.draw_noise(part, data)
                    t = draw_times(args, path, part, model.shift(size))
                    x_t = path.sample(data, noise, t)

                    timesteps = (timestep_scale * t).float().to(device)
                    prediction = wrapped(x_t, timesteps, captions, size, dropped, images)
                    losses = flow_matching_loss(
                        path, prediction, data, noise, t, prediction_type, args.weighting_scheme, args.snr_gamma
                    )
                    run.backward(t, weigh_prior(args, batch["captions"], losses))
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
