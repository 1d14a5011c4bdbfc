# SPDX-License-Identifier: Apache-2.0
"""What a script's arguments leave open and the pipeline decides."""

from ..pipelines.base import FlowMatchPipelineBase


def choose_shift(pipeline: FlowMatchPipelineBase, shift: float | None) -> float:
    """
    The shift of the training times. If one is given, the pipeline's scheduler takes it over, to sample with it too.

    Args:
        pipeline ([`FlowMatchPipelineBase`]):
            The pipeline that is trained.
        shift (`float`, *optional*):
            What was asked for; by default the scheduler's own.

    Returns:
        `float`: the shift.

    Raises:
        ValueError: if the scheduler's shift depends on the image, or its time runs from noise to data.
    """
    config = pipeline.scheduler.config
    if config.invert_sigmas:
        raise ValueError("A scheduler with `invert_sigmas` cannot be trained here: its time runs from noise to data.")
    if shift is None:
        if config.use_dynamic_shifting:
            raise ValueError("The scheduler shifts times by image size (`use_dynamic_shifting`): give one --shift.")
        return config.shift
    pipeline.scheduler = pipeline.scheduler.with_settings(shift=shift, use_dynamic_shifting=False)
    return shift


def choose_label_dropout(pipeline: FlowMatchPipelineBase, label_dropout: float | None) -> float:
    """
    The part of the labels to replace by the null class.

    Args:
        pipeline ([`FlowMatchPipelineBase`]):
            The pipeline that is trained.
        label_dropout (`float`, *optional*):
            What was asked for; by default 0.1 if there is a null class.

    Returns:
        `float`: a number in [0, 1].

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
    The side of the images. A UNet takes any that its levels divide, and its config then says so.

    Args:
        pipeline ([`FlowMatchPipelineBase`]):
            The pipeline that is trained.
        resolution (`int`, *optional*):
            What was asked for; by default what the pipeline is configured for.

    Returns:
        `int`: the side in pixels.

    Raises:
        ValueError: if the model does not take such images.
    """
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
