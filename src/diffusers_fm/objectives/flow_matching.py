# SPDX-License-Identifier: Apache-2.0
"""Trained model of a pipeline, training times, and the settings that the pipeline decides."""

import copy
import math
from typing import Any

import torch
from torch import nn

from ..data.randomness import BatchSlice
from ..losses import slowed_sample
from ..paths import ConditionalPath
from ..pipelines.base import FlowMatchPipelineBase
from ..timesteps import dimension_shift, sample_timesteps, shift_time
from ..training.arguments import ObjectiveArguments


class TrainableModel(nn.Module):
    """
    All trainable models of a pipeline as one, for `accelerator.prepare`: the network and, where there is one, the
    class embedder. A call is the pipeline's own `predict`.

    Args:
        pipeline ([`FlowMatchPipelineBase`]):
            Whose models are trained in place.
    """

    def __init__(self, pipeline: FlowMatchPipelineBase) -> None:
        super().__init__()
        self.denoiser = pipeline.denoiser
        self.class_embedder = pipeline.class_embedder
        # In a tuple, which hides it from the module: the pipeline's autoencoder is not trained.
        self._predict = (pipeline.predict,)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TrainableModel":
        """A copy of what is trained, in a pipeline of its own that shares the rest."""
        pipeline = copy.copy(self._predict[0].__self__)
        for name, component in pipeline.components.items():
            if component is self.denoiser or component is self.class_embedder:
                setattr(pipeline, name, copy.deepcopy(component, memo))
        return TrainableModel(pipeline)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
        """Network output at x_t, for continuous timesteps `timestep_scale * t` of shape `(batch_size,)`."""
        return self._predict[0](sample, timestep, *conditions)


def choose_shift(pipeline: FlowMatchPipelineBase, shift: float | None, base_dimension: int | None = None) -> float:
    """
    Shift of the training times: the one given, or by [`~timesteps.dimension_shift`], which the pipeline's scheduler
    takes over; or the scheduler's own, of a flow map that of its flow. Steps that were fitted to the network before
    this training are dropped: they have a grid that is not shifted.

    Raises:
        ValueError: if the scheduler's shift depends on the image, or its time runs from noise to data.
    """
    if base_dimension is not None:
        shift = dimension_shift(math.prod(pipeline.sample_shape), base_dimension)
    if pipeline.scheduler.config.solver == "calibrated":
        pipeline.scheduler = pipeline.scheduler.with_settings(solver="euler")
    config = pipeline.scheduler.config
    if config.invert_sigmas:
        raise ValueError("A scheduler with `invert_sigmas` cannot be trained here: its time runs from noise to data.")
    flow_map = (config.solver == "flow_map" and config.flow_map) or {}
    if shift is None:
        if config.use_dynamic_shifting:
            raise ValueError("The scheduler shifts times by image size (`use_dynamic_shifting`): give one --shift.")
        return flow_map.get("flow_shift", config.shift)
    # A flow map's own shift is that of its calls.
    settings: dict[str, Any] = {"flow_map": {**flow_map, "flow_shift": shift}} if flow_map else {"shift": shift}
    pipeline.scheduler = pipeline.scheduler.with_settings(**settings, use_dynamic_shifting=False)
    return shift


def choose_label_dropout(pipeline: FlowMatchPipelineBase, label_dropout: float | None) -> float:
    """
    Part of the labels to replace by the null class; by default 0.1 if there is one.

    Raises:
        ValueError: if labels are to be dropped that the model does not have.
    """
    if pipeline.num_classes == 0 or pipeline.null_class is None:
        if label_dropout:
            what = "no classes" if pipeline.num_classes == 0 else "no null class"
            raise ValueError(f"--label_dropout {label_dropout} was given, but the model has {what}.")
        return 0.0
    return 0.1 if label_dropout is None else label_dropout


def choose_resolution(pipeline: FlowMatchPipelineBase, resolution: int | None) -> int:
    """
    Side of the images, by default the pipeline's. A UNet takes any that its levels divide, which its config then says.

    Raises:
        ValueError: if the model does not take such images.
    """
    if len(pipeline.sample_shape) != 3:
        raise ValueError(
            f"The network takes samples of shape {pipeline.sample_shape}, which are no images: give --array_column."
        )
    _, height, width = pipeline.sample_shape
    if height != width:
        raise ValueError(f"Training is on square images, but the model is configured for {height} x {width}.")
    factor = pipeline.vae_scale_factor
    if resolution is None or resolution == height * factor:
        return height * factor
    if pipeline.unet is None:
        raise ValueError(
            f"--resolution must be {height * factor}, for which the transformer is made, got {resolution}."
        )
    multiple = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % multiple:
        raise ValueError(f"--resolution must be a multiple of {multiple} for this model, got {resolution}.")
    pipeline.unet.register_to_config(sample_size=resolution // factor)
    return resolution


def density_settings(args: ObjectiveArguments, part: BatchSlice) -> dict[str, Any]:
    """Density, size and random numbers of the times of a part of a batch, stratified over the global batch."""
    return {
        "density": args.timestep_density,
        "batch_size": part.size,
        "generator": part.generator("times"),
        "offset": part.offset,
        "total": part.total,
        "logit_mean": args.logit_mean,
        "logit_std": args.logit_std,
        "mode_scale": args.mode_scale,
        "alpha": args.density_alpha,
        "beta": args.density_beta,
        "steepness": args.density_steepness,
    }


def draw_times(args: ObjectiveArguments, path: ConditionalPath, part: BatchSlice, shift: float) -> torch.Tensor:
    """
    Times of a part of a batch, stratified over the global batch: `(batch_size,)` in (0, 1), 0 = data, 1 = noise,
    float64 on the CPU. The shift (arXiv 2403.03206, equation 23; 1 is none) acts in the straight coordinates.
    """
    t = sample_timesteps(**density_settings(args, part))
    # The sampler shifts the times of the straight coordinates; on the OT path these are t itself.
    return t if shift == 1 else path.time_at(shift_time(path.ratio(t), shift))


def draw_point(
    args: Any, path: ConditionalPath, part: BatchSlice, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> torch.Tensor:
    """x_t of a part of a batch, with `--mixflow_slowing` at a random later time; of the shape of `data`."""
    if not args.mixflow_slowing:
        return path.sample(data, noise, t)
    return slowed_sample(path, data, noise, t, args.mixflow_slowing * part.uniform("mixflow"))
