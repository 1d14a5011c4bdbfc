# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Train an image generator of 1 to 4 calls: the flow map of a trained flow, or of data alone (arXiv 2505.18825).

A pipeline folder goes in, best a trained one, and a pipeline of the same kind comes out. The end of each step enters
the last blocks of a transformer, or a UNet through a second time embedding; the flow stays within the map.

Handwritten digits, from the pipeline that train_flow_matching.py makes:

    accelerate launch training_scripts/train_flow_map.py \
      --pretrained_model_name_or_path runs/dit-digits --dataset_name data/digits --output_dir runs/dit-digits-few \
      --train_batch_size 64 --max_train_steps 3800 --learning_rate 2e-3 --lr_warmup_steps 100 --use_ema --seed 0 \
      --lr_scheduler cosine --flow_teacher --flow_steps 2400 --num_trajectories 8192 --matching_steps 140 \
      --equal_share 0.15 --noise_share 0.75 --data_share 0.75 --interval_warmup_steps 0 --first_block 1

With guidance of scale 2 learned, so that a call takes half of the work:

    accelerate launch training_scripts/train_flow_map.py \
      --pretrained_model_name_or_path runs/dit-digits --dataset_name data/digits --output_dir runs/dit-digits-guided \
      --train_batch_size 64 --max_train_steps 3500 --learning_rate 1e-3 --use_ema --learned_guidance_scale 2
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.arguments import Count, Free, option, run_script
from diffusers_fm.data.arguments import ArrayArguments, LabelArguments, LatentArguments, PairArguments
from diffusers_fm.data.latents import latents_of_batch
from diffusers_fm.data.loading import load_data
from diffusers_fm.flow_maps import AverageVelocity, average_velocity
from diffusers_fm.objectives.flow_maps import (
    CallArguments,
    FlowMapArguments,
    IntervalModel,
    TrajectoryArguments,
    choose_flow_map,
    draw_intervals,
    draw_trajectories,
    flow_map_facts,
    interval_losses,
    learned_velocity,
)
from diffusers_fm.objectives.flow_matching import choose_label_dropout, choose_resolution, choose_shift
from diffusers_fm.objectives.moment_matching import MomentMatchingArguments, begin_moment_matching, restarts
from diffusers_fm.precision import to_float64
from diffusers_fm.training.arguments import TrainingArguments
from diffusers_fm.training.distributed import SHARDING
from diffusers_fm.training.planning import DryRun
from diffusers_fm.training.publishing import model_card
from diffusers_fm.training.run import TrainingRun
from diffusers_fm.training.validation import validate_pipeline


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(
    TrainingArguments,
    FlowMapArguments,
    CallArguments,
    TrajectoryArguments,
    MomentMatchingArguments,
    LatentArguments,
    LabelArguments,
    PairArguments,
    ArrayArguments,
):
    """Arguments of this script."""

    num_inference_steps: Count = option(4, "Calls in which the pipeline samples by default; also of the pictures.")
    tracker_project_name: Free[str] = option("train_flow_map", "Name of the run in the trackers.")


def main(args: ScriptArguments) -> None:
    """Train."""
    run = DryRun(args) if args.dry_run else TrainingRun(args)
    args = run.args
    device = run.accelerator.device

    # 1. Pipeline
    pipeline = run.init_pipeline(FlowMatchPipeline)
    shift = choose_shift(pipeline, args.shift)
    label_dropout = choose_label_dropout(pipeline, args.label_dropout)
    arrays = args.array_column or args.noise_column
    resolution = 0 if arrays else choose_resolution(pipeline, args.resolution)
    path, timestep_scale = pipeline.scheduler.path, pipeline.scheduler.timestep_scale
    prediction_type = pipeline.scheduler.config.prediction_type
    if pipeline.vae is not None:
        pipeline.vae.to(device).requires_grad_(False).eval()
    elif args.cache_latents:
        raise ValueError(f"--cache_latents needs an autoencoder, and {args.pretrained_model_name_or_path!r} has none.")
    guidance = args.learned_guidance_scale
    if guidance != 1.0 and pipeline.null_class is None:
        raise ValueError(f"--learned_guidance_scale {guidance:g} needs a model with classes and a null class.")
    choose_flow_map(pipeline, args, run.seed, shift)

    # 2. Data
    train_data, held_out_data = load_data(run.accelerator, args, pipeline, resolution, run.output_dir)
    size = f" of side {resolution}" if resolution else ""

    # 3. Model
    model = IntervalModel(pipeline)
    frozen = None
    if args.flow_teacher or args.matching_steps:
        frozen = copy.deepcopy(model).requires_grad_(False).eval().to(device)
    method = "trajectories" if args.num_trajectories else args.objective
    stages = restarts(args)
    if frozen is not None and stages and not args.dry_run:
        if run.accelerator.distributed_type in SHARDING:
            raise ValueError(
                f"--flow_steps {args.flow_steps} and --matching_steps {args.matching_steps} need whole weights in each"
                " process: launch without sharding."
            )
        run.accelerator.register_for_checkpointing(frozen)
    model.requires_grad_(True).train()
    if args.gradient_checkpointing:
        pipeline.denoiser.enable_gradient_checkpointing()

    # 4. Validation and export
    def validate(step: int, grid_name: str | None) -> dict[str, Any]:
        """Held-out loss of the flow, and a picture grid of the map as it would be saved now."""
        return validate_pipeline(run, pipeline, held_out_data, step, grid_name)

    def export(folder: Path, figures: dict[str, Any]) -> None:
        """The trained pipeline and its card."""
        pipeline.save_pretrained(folder)
        figures = {**figures, **flow_map_facts(args, method)}
        card = model_card(pipeline, run.args, run.repo_id, run.global_batch_size, figures, folder)
        card.save(folder / "README.md")

    model = run.begin(
        model,
        train_data,
        validate,
        export,
        f"Flow map by {method} of a {type(pipeline.denoiser).__name__}, {pipeline.scheduler.config.path} path,"
        f" {prediction_type}; {train_data.description}{size}, {len(held_out_data or [])} held out.",
        restarts=stages,
    )

    def velocity_of(network: Callable[..., torch.Tensor]) -> AverageVelocity:
        """Average velocity of a network in the straight coordinates, in which all of the loss is."""

        def predict(
            x_t: torch.Tensor, r: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None = None
        ) -> torch.Tensor:
            return network(x_t, t, labels, r)

        return average_velocity(predict, path, prediction_type, timestep_scale)

    u = velocity_of(model)
    local = u if args.dry_run else velocity_of(run.accelerator.unwrap_model(model))
    flow = velocity_of(frozen) if frozen is not None and args.flow_teacher else u

    def averaged(*arguments: torch.Tensor) -> torch.Tensor:
        """The map by the averaged weights, for targets."""
        with run.averaged_weights():
            return u(*arguments)

    def taught(args: ScriptArguments, x: torch.Tensor, t: torch.Tensor, labels: Any, v: torch.Tensor) -> torch.Tensor:
        """Velocity to learn where r = t, in place of v = noise - data."""
        unconditional = None
        if labels:
            null = torch.full_like(labels[0], pipeline.null_class or 0)
            unconditional = partial(flow, x, t, t, null)
        return learned_velocity(args, v, partial(flow, x, t, t, *labels), unconditional)

    def field(t: torch.Tensor, x: torch.Tensor, *labels: torch.Tensor) -> torch.Tensor:
        """Velocity of the teacher along trajectories."""
        return taught(args, x, to_float64(t), labels, x)

    def encode(batch: dict[str, Any]) -> torch.Tensor:
        """Data of a batch, all of which moment matching keeps."""
        return latents_of_batch(pipeline, batch, device)

    flow_alone = dataclasses.replace(args, flow_teacher=False, learned_guidance_scale=1.0)
    trajectories = matching = None

    # 5. Loop. Logs, validation, checkpoints and signals come between the steps
    with run:
        for step in run.steps():
            map_step = step - args.flow_steps
            if frozen is not None and step in stages and not args.dry_run:
                frozen.load_state_dict(run.accelerator.unwrap_model(model, keep_torch_compile=False).state_dict())
            if not args.dry_run and frozen is not None and step >= run.max_train_steps - args.matching_steps:
                matching = matching or begin_moment_matching(
                    args,
                    frozen,
                    velocity_of,
                    pipeline.scheduler,
                    train_data,
                    encode,
                    pipeline.null_class,
                    label_dropout,
                    device,
                )
            elif not args.dry_run and map_step >= 0 and args.num_trajectories and trajectories is None:
                trajectories = draw_trajectories(args, pipeline, path, field, label_dropout, device)
            # Noise, intervals and dropped labels are drawn for the whole global batch; a part of it is at hand.
            for part, batch in run.parts(step):
                with run.accelerator.accumulate(model):
                    if matching is not None:
                        run.backward(*matching.losses(part, u, local))
                        continue
                    data = latents_of_batch(pipeline, batch, device, part)
                    labels = batch.get("labels")
                    if labels is not None:
                        dropped = part.uniform("label_dropout") < label_dropout
                        labels = torch.where(dropped, pipeline.null_class or 0, labels).to(device)
                    conditions = () if labels is None else (labels,)

                    noise = batch["noise"].to(device) if "noise" in batch else run.draw_noise(part, data, labels)
                    start, r, t = draw_intervals(args, path, part, shift, map_step)
                    x, _ = path.to_straight(path.sample(data, noise, start), start)

                    if trajectories is None:
                        velocity = taught(args if map_step >= 0 else flow_alone, x, t, conditions, noise - data)
                        losses = interval_losses(args, path, part, u, x, r, t, velocity, averaged, conditions)
                    else:
                        losses = trajectories.losses(part, u, x, r, t, conditions, args.huber_width)
                    run.backward(start, losses)
        run.finish()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
