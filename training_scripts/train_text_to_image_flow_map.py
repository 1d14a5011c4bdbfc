# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train a text-to-image pipeline of diffusers to draw in 1 to 4 calls: the flow map of a trained flow.

A trained pipeline folder goes in and one of the same class comes out. The last blocks of its network get the end of
each step; a loaded pipeline needs `diffusers_fm.with_flow_map`. Networks whose blocks take no time are refused.

Captioned handwritten digits, with guidance of scale 3 learned:

    accelerate launch training_scripts/train_text_to_image_flow_map.py \
      --config pipelines/sd3-tiny/training.json --pretrained_model_name_or_path runs/sd3-tiny \
      --output_dir runs/sd3-tiny-few --num_inference_steps 4 --guidance_scale 1 --learned_guidance_scale 3 \
      --learning_rate 5e-4 --max_train_steps 1500
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module

from diffusers_fm.arguments import Count, Free, NotNegative, option, run_script
from diffusers_fm.data.images import drop_captions
from diffusers_fm.flow_maps import AverageVelocity, average_velocity
from diffusers_fm.objectives.flow_maps import (
    FlowMapArguments,
    draw_guidance,
    draw_intervals,
    flow_map_facts,
    interval_losses,
    learned_velocity,
    set_flow_map,
)
from diffusers_fm.text_to_image.arguments import TextToImageArguments
from diffusers_fm.text_to_image.cards import text_to_image_card
from diffusers_fm.text_to_image.flow_map import IntervalField
from diffusers_fm.text_to_image.setup import (
    ask_all,
    call_arguments,
    choose_network,
    choose_scheduler,
    choose_sizes,
    freeze,
    images_of,
    open_pipeline,
    prepare_data,
    save_pipeline,
    validate_field,
)
from diffusers_fm.text_to_image.text import choose_encoder_dropout, draw_encoder_dropout, weigh_prior
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.run import TrainingRun


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(TextToImageArguments, FlowMapArguments):
    """Arguments of this script."""

    num_inference_steps: Count = option(4, "Calls that the pipeline draws best in; also of the pictures.")
    guidance_scale: NotNegative = option(1.0, "Guidance of the pictures; 1 is off.")
    tracker_project_name: Free[str] = option("train_text_to_image_flow_map", "Name of the run in the trackers.")

    def check(self) -> None:
        if self.call_columns:
            raise ValueError("--call_columns is not for flow maps: train the flow with train_text_to_image.py.")
        if self.save_stock:
            raise ValueError("--save_stock does not go with a flow map, which needs diffusers-fm's scheduler.")
        if self.class_prompt is not None and self.class_data_dir is not None:
            count = len(images_of(self.class_data_dir))
            if count < self.num_class_images:
                raise ValueError(
                    f"--class_prompt needs --num_class_images {self.num_class_images} images in --class_data_dir"
                    f" {self.class_data_dir!r}, got {count}: an untrained map draws none; train_text_to_image.py and"
                    " train_text_to_image_lora.py draw them."
                )
        if self.learned_guidance_max is not None and any(word.startswith("guidance_scale=") for word in self.call):
            raise ValueError("--call guidance_scale does not go with --learned_guidance_max, which draws the scales.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device

    # 1. Pipeline
    pipeline = open_pipeline(run, args)
    network = choose_network(pipeline, args.network)
    freeze(run.accelerator, pipeline, args.network)
    model = IntervalField(pipeline, args.network, call_arguments(pipeline, args))
    sizes = choose_sizes(model, args)
    scheduler = set_flow_map(args, unwrap_module(network), choose_scheduler(model, args, sizes))
    pipeline.scheduler = scheduler
    model.set_scheduler(scheduler)
    ask_all(run.accelerator, model, sizes)
    path, prediction_type = scheduler.path, scheduler.config.prediction_type
    encoder_dropout = choose_encoder_dropout(model.text, args.text_encoder_dropout)

    # 2. Data, and caches of what the frozen models compute
    train_data, held_out_data = prepare_data(run, args, model, sizes)

    # 3. Model
    frozen = copy.deepcopy(model).requires_grad_(False).eval() if args.flow_teacher else None
    network.requires_grad_(True).train()
    if args.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss and pictures of the model as it would be saved."""
        return validate_field(run, pipeline, model, scheduler, held_out_data, sizes[0], step, grid_name)

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The trained pipeline and its card."""
        save_pipeline(pipeline, folder)
        figures = {**figures, **flow_map_facts(args, args.objective)}
        card = text_to_image_card(pipeline, run.args, run.repo_id, run.global_batch_size, figures, folder, model)
        card.save(folder / "README.md")

    wrapped = run.begin(
        model,
        train_data,
        validate,
        export,
        f"Flow map by {args.objective} of a {type(pipeline).__name__}, {type(network).__name__},"
        f" {scheduler.config.path} path, {prediction_type};"
        f" {train_data.description} in {model.describe_sizes(sizes)},"
        f" {len(held_out_data or [])} held out. {model.describe()}.",
    )

    def velocity_of(
        trained: Callable[..., torch.Tensor],
        captions: Sequence[str],
        dropped: torch.Tensor | None,
        guidance: torch.Tensor | None,
    ) -> AverageVelocity:
        """Average velocity in the straight coordinates for captions, of which each call names rows."""

        def predict(x_t: torch.Tensor, r: torch.Tensor, t: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            part_dropped = None if dropped is None else dropped[rows]
            part_guidance = None if guidance is None else guidance[rows]
            return trained(x_t, t, [captions[row] for row in rows.tolist()], size, part_dropped, r, part_guidance)

        return average_velocity(predict, path, prediction_type, scheduler.timestep_scale)

    def averaged(*arguments: torch.Tensor) -> torch.Tensor:
        """The map by the averaged weights, for targets."""
        with run.averaged_weights():
            return u(*arguments)

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

                    noise = run.draw_noise(part, data)
                    start, r, t = draw_intervals(args, path, part, model.shift(size), step)
                    x, _ = path.to_straight(path.sample(data, noise, start), start)

                    rows = torch.arange(len(x))
                    guidance = draw_guidance(args, part)
                    u = velocity_of(wrapped, captions, dropped, guidance)
                    # A teacher was trained without guidance to be given.
                    flow, given = (wrapped, guidance) if frozen is None else (frozen, None)
                    conditional = partial(velocity_of(flow, captions, dropped, given), x, t, t, rows)
                    unconditional = partial(velocity_of(flow, [""] * len(x), None, given), x, t, t, rows)
                    velocity = learned_velocity(args, noise - data, conditional, unconditional, guidance)
                    losses = interval_losses(args, path, part, u, x, r, t, velocity, averaged, (rows,))
                    run.backward(start, weigh_prior(args, batch["captions"], losses))
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
