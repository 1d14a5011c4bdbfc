# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train a text-to-image pipeline of diffusers by flow matching, whatever its family.

A pipeline folder goes in, untrained (configurations alone) or trained, and a trained pipeline of the same class comes
out, which diffusers reads without this package. The network is trained; text encoders and autoencoder are not. A
training step runs the pipeline's own call up to its first step, so that training cannot disagree with sampling.

Captioned handwritten digits, a few minutes on two CPU cores:

    accelerate launch training_scripts/train_text_to_image.py \
      --config pipelines/flux-tiny/training.json --output_dir runs/flux-tiny

Fine-tune Stable Diffusion 3.5 on a folder of images whose captions are in its metadata.jsonl:

    accelerate launch --mixed_precision bf16 training_scripts/train_text_to_image.py \
      --pretrained_model_name_or_path stabilityai/stable-diffusion-3.5-medium --train_data_dir /data/paintings \
      --output_dir runs/paintings --resolution 1024 --use_aspect_ratio_buckets --center_crop \
      --cache_latents --cache_text_embeddings --train_batch_size 4 --gradient_checkpointing --use_ema \
      --learning_rate 1e-5 --max_train_steps 5000 --validation_prompts "a lighthouse at night, oil on canvas"

From scratch, on the sizes of Stable Diffusion 3, with the text encoders and the autoencoder of a trained one:

    accelerate launch --multi_gpu --num_processes 8 --mixed_precision bf16 \
      training_scripts/train_text_to_image.py --pretrained_model_name_or_path pipelines/sd3-medium \
      --text_encoders_name_or_path stabilityai/stable-diffusion-3.5-medium --vae_name_or_path /models/sd3-vae \
      --dataset_name /data/webdataset --image_column jpg --caption_column txt --output_dir runs/sd3-medium \
      --resolution 256 --text_encoder_dropout 0.46 --shift_base_resolution 256

Go on after an interruption:

    accelerate launch training_scripts/train_text_to_image.py --config runs/flux-tiny/training_args.json \
      --resume_from_checkpoint latest
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusers_fm.arguments import Free, option, run_script
from diffusers_fm.data.images import drop_captions
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.objectives.auxiliary import (
    LearningArguments,
    StepInputs,
    begin_auxiliaries,
    learning_facts,
    loss_settings,
)
from diffusers_fm.objectives.flow_matching import draw_point, draw_times
from diffusers_fm.text_to_image.arguments import TextToImageArguments, parse_columns
from diffusers_fm.text_to_image.cards import text_to_image_card
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.setup import (
    as_saved,
    ask_all,
    call_arguments,
    choose_network,
    choose_prompt_sampler,
    choose_scheduler,
    choose_sizes,
    freeze,
    open_pipeline,
    prepare_data,
    save_pipeline,
    validate_field,
)
from diffusers_fm.text_to_image.text import choose_encoder_dropout, draw_encoder_dropout, weigh_prior
from diffusers_fm.training.arguments import SamplingArguments
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.run import TrainingRun
from diffusers_fm.training.sampler import measure_sigma_data


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(TextToImageArguments, SamplingArguments, LearningArguments):
    """Arguments of this script."""

    tracker_project_name: Free[str] = option("train_text_to_image", "Name of the run in the trackers.")

    def check(self) -> None:
        for name in ("solver", "calibrate_steps"):
            if self.save_stock and getattr(self, name):
                raise ValueError(f"--{name} needs this package's scheduler: leave out --save_stock.")
            if self.call_columns and getattr(self, name):
                raise ValueError(f"--{name} does not go with --call_columns: it is found by captions alone.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device

    # 1. Pipeline
    pipeline = open_pipeline(run, args)
    network = choose_network(pipeline, args.network)
    freeze(run.accelerator, pipeline, args.network)
    columns = parse_columns(args.call_columns)
    model = TrainedField(pipeline, args.network, call_arguments(pipeline, args), call_columns=columns)
    sizes = choose_sizes(model, args)
    scheduler = choose_scheduler(model, args, sizes, args.shift_base_dimension)
    ask_all(run.accelerator, model, sizes)
    path, timestep_scale, prediction_type = scheduler.path, scheduler.timestep_scale, scheduler.config.prediction_type
    settings = loss_settings(args, prediction_type)
    encoder_dropout = choose_encoder_dropout(model.text, args.text_encoder_dropout)

    # 2. Data, and caches of what the frozen models compute
    train_data, held_out_data = prepare_data(run, args, model, sizes)
    measure_sigma_data(run, pipeline, train_data, lambda batch: model.encode(batch, device))

    # 3. Model, and auxiliary losses if there are any
    network.requires_grad_(True).train()
    auxiliaries = begin_auxiliaries(run, model, network, scheduler, train_data)
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss and pictures of the model as it would be saved."""
        sampling: dict[str, float] = {}
        if grid_name is not None and run.accelerator.is_main_process:
            sampling = choose_prompt_sampler(run, pipeline, model, sizes[0])
        saved = as_saved(pipeline)
        return validate_field(run, saved, model, scheduler, held_out_data, sizes[0], step, grid_name) | sampling

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The trained pipeline and its card."""
        saved = as_saved(pipeline)
        save_pipeline(saved, folder)
        auxiliaries.save(folder)
        figures = {**figures, **learning_facts(args)}
        card = text_to_image_card(saved, run.args, run.repo_id, run.global_batch_size, figures, folder, model)
        card.save(folder / "README.md")

    wrapped = run.begin(
        model,
        train_data,
        validate,
        export,
        f"{type(pipeline).__name__}, {type(network).__name__}, {scheduler.config.path} path, {prediction_type};"
        f" {train_data.description} in {model.describe_sizes(sizes)},"
        f" {len(held_out_data or [])} held out. {model.describe()}.",
    )

    def call(conditions: Sequence[Any], x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Prediction of the model."""
        return wrapped(x_t, (timestep_scale * t).float().to(device), *conditions)

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
                    x_t = draw_point(args, path, part, data, noise, t)

                    predict = partial(call, (captions, size, dropped, images))
                    loss = partial(flow_matching_loss, path, data=data, noise=noise, t=t, **settings)
                    losses = loss(predict(x_t, t))
                    if auxiliaries:
                        inputs = StepInputs(step, part, batch, data, noise, x_t, t, predict, loss)
                        losses = losses + auxiliaries.losses(inputs)
                    run.backward(t, weigh_prior(args, batch["captions"], losses))
        auxiliaries.remove()
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
