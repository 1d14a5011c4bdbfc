# SPDX-License-Identifier: Apache-2.0
"""Arguments of the text-to-image scripts: captions, sizes, prompts and adapters."""

import importlib.util
from dataclasses import dataclass
from typing import Annotated

from ..arguments import Arguments, Count, Fixed, Fraction, Free, Positive, Range, option
from ..data.arguments import LatentArguments
from ..training.arguments import TrainingArguments


# That of diffusers' own scripts.
TEXT_ENCODER_LEARNING_RATE = 5e-6


@dataclass(frozen=True, kw_only=True)
class CaptionArguments(Arguments):
    """Captions, sizes of images, and models kept off the device."""

    _argument_group_name = "text and images"

    text_encoders_name_or_path: str | None = option(
        None, "Pipeline whose text encoders take the place of the pipeline's own."
    )
    caption_column: str = option("text", "Column of captions, or of lists of which each visit takes one.")
    caption_dropout: Fraction = option(0.1, "Part of the captions made empty, for guidance.")
    text_encoder_dropout: list[Fraction] = option(
        [0.0], "Part of the captions for which a text encoder gives zeros: one number, or one for each encoder."
    )
    max_sequence_length: Annotated[int, Range(0, 512)] = option(
        256, "Tokens of the T5.", source="StableDiffusion3Pipeline"
    )
    use_aspect_ratio_buckets: bool = option(False, "Keep images near their shape, not square.")
    aspect_ratio_buckets: str | None = option(
        None, 'The sizes themselves, height,width: "1024,1024;832,1216;1216,832".'
    )
    max_aspect_ratio: Annotated[float, Range(1)] = option(2.0, "Longer to shorter side of a bucket at most.")
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


@dataclass(frozen=True, kw_only=True)
class TextToImageArguments(TrainingArguments, LatentArguments, CaptionArguments):
    """All arguments of a text-to-image script, with the sampling defaults of `StableDiffusion3Pipeline`."""

    num_inference_steps: Count = option(28, "Solver steps of the pictures.")
    guidance_scale: Annotated[float, Range(0)] = option(7.0, "Guidance of the pictures; 1 is off.")

    def check(self) -> None:
        if self.coupling != "independent":
            raise ValueError(
                f"--coupling {self.coupling!r} is not 'independent', the only coupling here: noise may be exchanged"
                " among samples of one condition alone, and each sample has its own."
            )
        if self.cache_text_embeddings and self.streaming:
            raise ValueError(
                "--cache_text_embeddings does not go with --streaming, which does not know all of the data."
            )


@dataclass(frozen=True, kw_only=True)
class LoraArguments(Arguments):
    """Adapters, by the names of diffusers' examples."""

    _argument_group_name = "adapters"

    rank: Fixed[Count] = option(4, "Rank of the adapters.", source="diffusers' examples")
    lora_alpha: Fixed[Positive | None] = option(
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

    @property
    def alpha(self) -> float:
        """Scale of the adapters, times the rank."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def block_numbers(self) -> list[int] | None:
        """Numbers of the transformer blocks that are adapted, `None` for all."""
        if self.lora_blocks is None:
            return None
        try:
            return [int(number) for number in self.lora_blocks.split(",")]
        except ValueError:
            raise ValueError(f'--lora_blocks must read like "0,1,12", got {self.lora_blocks!r}.') from None

    def check(self) -> None:
        if importlib.util.find_spec("peft") is None:
            raise ValueError('PEFT is not installed: adapters need `pip install "diffusers-fm[lora]"`.')
        if self.use_dora and self.train_text_encoder:
            raise ValueError(
                "--use_dora does not go with --train_text_encoder: diffusers cannot read DoRA of a text encoder back."
            )
        _ = self.block_numbers


@dataclass(frozen=True, kw_only=True)
class LoraTrainingArguments(TextToImageArguments, LoraArguments):
    """All arguments of the LoRA script."""

    train_batch_size: Count = option(4, "Samples of a process in an accumulation step.", source="diffusers' examples")

    @property
    def text_encoder_learning_rate(self) -> float:
        """Learning rate of the CLIPs' adapters."""
        if self.text_encoder_lr is not None:
            return self.text_encoder_lr
        return self.learning_rate if self.optimizer == "prodigy" else TEXT_ENCODER_LEARNING_RATE

    def check(self) -> None:
        if self.optimizer == "prodigy" and self.text_encoder_learning_rate != self.learning_rate:
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
