# SPDX-License-Identifier: Apache-2.0
"""Arguments of the text-to-image scripts: captions, sizes, prompts and adapters."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ..arguments import (
    Arguments,
    Count,
    Fixed,
    Fraction,
    Free,
    Needs,
    NotNegative,
    Positive,
    Range,
    Size,
    install,
    option,
)
from ..data.arguments import LatentArguments
from ..data.buckets import parse_buckets
from ..training.arguments import TrainingArguments


MAX_SEQUENCE_LENGTH = 512
MAX_TEXT_ENCODERS = 4

# Arguments that sounds have no use for.
IMAGES_ALONE = (
    *("resolution", "random_flip", "num_frames", "use_aspect_ratio_buckets", "aspect_ratio_buckets"),
    *("shift_base_resolution", "shift_base_dimension", "class_prompt", "call_columns"),
)


def parse_call(words: Sequence[str]) -> dict[str, Any]:
    """Arguments of a pipeline's call from the command line, such as `num_frames=1`."""
    call = {}
    for word in words:
        name, equals, value = word.partition("=")
        try:
            call[name] = json.loads(value)
        except ValueError as error:
            raise ValueError(f"--call must read like num_frames=1 or guidance_scale=3.5, got {word!r}.") from error
        if not (equals and name.isidentifier()):
            raise ValueError(f"--call must read like num_frames=1 or guidance_scale=3.5, got {word!r}.")
    return call


def parse_columns(words: Sequence[str]) -> dict[str, str]:
    """Arguments of a pipeline's call and their columns from the command line, such as `control_image=depth`."""
    columns: dict[str, str] = {}
    for word in words:
        name, _, column = word.partition("=")
        if not (name.isidentifier() and column) or name in columns:
            raise ValueError(
                f"--call_columns must read like control_image=depth, each argument once, got {' '.join(words)!r}."
            )
        columns[name] = column
    return columns


@dataclass(frozen=True, kw_only=True)
class CaptionArguments(Arguments):
    """Captions, sizes of images, and models kept off the device."""

    _argument_group_name = "text and images"

    text_encoders_name_or_path: str | None = option(
        None, "Pipeline whose text encoders take the place of the pipeline's own."
    )
    caption_column: str = option("text", "Column of captions, or of lists of which each visit takes one.")
    instance_prompt: str | None = option(
        None, 'One caption for all images, such as "a photo of sks dog", in place of a column.'
    )
    class_prompt: str | None = option(
        None, 'Caption of images of the class of the --instance_prompt, such as "a photo of a dog", learned beside it.'
    )
    class_data_dir: str | None = option(None, "Folder of the images of the --class_prompt.")
    num_class_images: Size = option(
        100,
        "Images of the --class_prompt; the pipeline draws those that are missing, but for a flow map.",
        source="diffusers' examples",
    )
    prior_loss_weight: NotNegative = option(
        1.0, "Weight of the loss of the images of the --class_prompt.", source="diffusers' examples"
    )
    caption_dropout: Fraction = option(0.1, "Part of the captions made empty, for guidance.")
    text_encoder_dropout: list[Fraction] = option(
        [0.0], "Part of the captions for which a text encoder gives zeros: one number, or one for each encoder."
    )
    max_sequence_length: int | None = option(None, "Tokens of a caption; by default the pipeline's own number.")
    network: Fixed[str] = option("transformer", "Component of the pipeline that is trained.")
    call: Fixed[list[str]] = option(
        [], "Further arguments of the pipeline's call in training and in the pictures, name=value, the value as JSON."
    )
    call_columns: Fixed[list[str]] = option(
        [], "Arguments of the pipeline's call that are images of each sample, argument=column: control_image=depth."
    )
    num_frames: Fixed[Count] = option(1, "Frames of the videos of the image column; 1 is for images.")
    frame_stride: Count = option(1, "Of the videos, every so many frames one is taken.")
    audio_seconds: Fixed[Positive | None] = option(
        None, "Length of the sounds of the image column, for a pipeline that makes sounds."
    )
    use_aspect_ratio_buckets: bool = option(False, "Keep images near their shape, not square.")
    aspect_ratio_buckets: str | None = option(
        None, 'The sizes themselves, height,width: "1024,1024;832,1216;1216,832".'
    )
    max_aspect_ratio: Annotated[Annotated[float, Range(1)], Needs("use_aspect_ratio_buckets", True)] = option(
        2.0, "Longer to shorter side of a bucket at most."
    )
    shift_base_resolution: Count | None = option(
        None, "Shift times by sqrt(pixels of an image / pixels of this square)."
    )
    cache_text_embeddings: bool = option(False, "Encode captions once, to disk.")
    save_stock: bool = option(False, "Sample on stock's grid, so that the result needs no diffusers-fm.")
    offload: Free[bool] = option(False, "Keep frozen models on the CPU but for the moments they are used.")
    validation_prompts: list[str] = option([], "Prompts of the picture grids, a row each.")

    def check(self) -> None:
        if self.use_aspect_ratio_buckets and self.aspect_ratio_buckets is not None:
            raise ValueError("Of --use_aspect_ratio_buckets and --aspect_ratio_buckets one may be given.")
        if self.aspect_ratio_buckets is not None:
            parse_buckets(self.aspect_ratio_buckets)
        parse_call(self.call)
        parse_columns(self.call_columns)
        for name, unset in (("class_prompt", None), ("offload", False), ("validation_prompts", [])):
            if self.call_columns and getattr(self, name) != unset:
                reason = {
                    "class_prompt": "images of the class have no such columns",
                    "offload": "the autoencoder reads them at each step",
                    "validation_prompts": "the pictures are of held-out rows, with their captions and images",
                }[name]
                raise ValueError(f"--{name} does not go with --call_columns: {reason}.")
        if self.frame_stride > 1 and self.num_frames == 1:
            raise ValueError(f"--frame_stride {self.frame_stride} has no effect without --num_frames.")
        if self.audio_seconds is not None:
            for name in IMAGES_ALONE:
                value = getattr(self, name, None)
                if value and (name, value) != ("num_frames", 1):
                    raise ValueError(f"--{name} {value} does not go with --audio_seconds: it is for images.")
        if self.class_prompt is None and self.class_data_dir is not None:
            raise ValueError(f"--class_data_dir {self.class_data_dir!r} has no effect without --class_prompt.")
        if self.class_prompt is not None and self.class_data_dir is None:
            raise ValueError(
                "--class_prompt needs --class_data_dir, the folder that its images are in or are drawn to."
            )
        if self.class_prompt is not None and self.instance_prompt in (None, self.class_prompt):
            raise ValueError(
                f"--class_prompt {self.class_prompt!r} needs another --instance_prompt, got {self.instance_prompt!r}."
            )
        if self.class_prompt is not None and self.num_frames > 1:
            raise ValueError("--class_prompt is for images: leave it out with --num_frames.")
        if self.max_sequence_length is not None and not 0 <= self.max_sequence_length <= MAX_SEQUENCE_LENGTH:
            raise ValueError(
                f"--max_sequence_length must be from 0 to {MAX_SEQUENCE_LENGTH}, got {self.max_sequence_length}."
            )
        if not 1 <= len(self.text_encoder_dropout) <= MAX_TEXT_ENCODERS:
            raise ValueError(
                f"--text_encoder_dropout must be one number in [0, 1], or one for each of up to {MAX_TEXT_ENCODERS}"
                f" text encoders, got {self.text_encoder_dropout}."
            )


@dataclass(frozen=True, kw_only=True)
class TextToImageArguments(TrainingArguments, LatentArguments, CaptionArguments):
    """All arguments of a text-to-image script, with the sampling defaults of `StableDiffusion3Pipeline`."""

    num_inference_steps: Count = option(28, "Solver steps of the pictures.")
    guidance_scale: NotNegative = option(7.0, "Guidance of the pictures; 1 is off.")

    def check(self) -> None:
        if self.validation_prompts and not self.num_validation_images:
            raise ValueError("--validation_prompts has no effect with --num_validation_images 0.")
        if self.call_columns and self.streaming:
            raise ValueError("--call_columns does not go with --streaming, which reads one image of a row.")
        if self.class_prompt is not None and self.streaming:
            raise ValueError("--class_prompt does not go with --streaming, which does not know all of the data.")
        if self.shift is not None and self.shift_base_resolution is not None:
            raise ValueError(
                f"--shift {self.shift} is the same for all sizes and --shift_base_resolution"
                f" {self.shift_base_resolution} depends on them: give one."
            )
        if self.coupling != "independent":
            raise ValueError(
                f"--coupling {self.coupling!r} is not 'independent', the only coupling here: noise may be exchanged"
                " among samples of one condition alone, and each sample has its own."
            )
        if self.cache_text_embeddings and self.streaming:
            raise ValueError(
                "--cache_text_embeddings does not go with --streaming, which does not know all of the data."
            )


def check_peft() -> None:
    """Refuse adapters where PEFT is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise ValueError(f"PEFT is not installed: adapters need {install('lora')}.")


def parse_layers(text: str) -> list[str]:
    """Names of layers from the command line, such as `"to_k,to_q"`."""
    layers = [name.strip() for name in text.split(",")]
    if not all(layers):
        raise ValueError(f'--lora_layers must read like "to_k,to_q", got {text!r}.')
    return layers


def parse_blocks(text: str) -> list[int]:
    """Numbers of transformer blocks from the command line, such as `"0,1,12"`."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(map(str.isdecimal, numbers)):
        raise ValueError(f'--lora_blocks must read like "0,1,12", got {text!r}.')
    return [int(number) for number in numbers]


@dataclass(frozen=True, kw_only=True)
class LoraArguments(Arguments):
    """Adapters, by the names of diffusers' examples."""

    _argument_group_name = "adapters"

    rank: Fixed[Count] = option(4, "Rank of the adapters.", source="diffusers' examples")
    lora_alpha: Fixed[Positive] = option(
        None, "Scale of the adapters, times the rank: W + alpha / rank B A. By default the rank."
    )
    lora_dropout: Annotated[float, Range(0, 1, open_high=True)] = option(
        0.0, "Part of the inputs of an adapter that is dropped."
    )
    lora_layers: Fixed[str | None] = option(
        None, 'Layers of the transformer, "to_k,to_q,..."; by default all projections of attention.'
    )
    lora_blocks: Fixed[str | None] = option(
        None, 'Numbers of the transformer blocks that are adapted, "0,1,12"; by default all.'
    )
    use_dora: Fixed[bool] = option(False, "Learn the lengths of the weights' rows as well (arXiv 2402.09353).")
    train_text_encoder: Fixed[bool] = option(False, "Adapt both CLIPs too.")
    text_encoder_lr: Positive | None = option(
        None, "Learning rate of the CLIPs' adapters; 5e-6, with prodigy that of all."
    )

    def __post_init__(self) -> None:
        if self.lora_alpha is None:
            object.__setattr__(self, "lora_alpha", float(self.rank))
        super().__post_init__()

    def check(self) -> None:
        check_peft()
        if self.use_dora and self.train_text_encoder:
            raise ValueError(
                "--use_dora does not go with --train_text_encoder: diffusers cannot read DoRA of a text encoder back."
            )
        if self.lora_layers is not None:
            parse_layers(self.lora_layers)
        if self.lora_blocks is not None:
            parse_blocks(self.lora_blocks)
        if self.text_encoder_lr is not None and not self.train_text_encoder:
            raise ValueError(f"--text_encoder_lr {self.text_encoder_lr} needs --train_text_encoder.")


@dataclass(frozen=True, kw_only=True)
class LoraTrainingArguments(TextToImageArguments, LoraArguments):
    """All arguments of the LoRA script."""

    train_batch_size: Count = option(4, "Samples of a process in an accumulation step.", source="diffusers' examples")

    def check(self) -> None:
        if self.optimizer == "prodigy" and self.text_encoder_lr not in (None, self.learning_rate):
            raise ValueError(
                "--optimizer prodigy has one learning rate for all: leave out --text_encoder_lr"
                f" {self.text_encoder_lr}."
            )
        if self.train_text_encoder and self.offload:
            raise ValueError(
                "--offload keeps text encoders on the CPU, and --train_text_encoder trains them: give one."
            )
        if self.ema_profile == "power":
            raise ValueError(
                "--ema_profile power is for variants of a saved pipeline, and adapters are none: use --ema_profile"
                " constant."
            )
        if self.save_stock:
            raise ValueError("--save_stock is for the scheduler of a saved pipeline, and adapters carry none.")
