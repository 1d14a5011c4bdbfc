# SPDX-License-Identifier: Apache-2.0
"""Tiny Stable Diffusion 3 pipelines with everything in them, and captioned images, for the tests of text to image."""

import io
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from training_runs import run_script
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
COLOURS = {"red": (250, 20, 20), "green": (20, 250, 20), "blue": (20, 20, 250)}


@cache
def clip_tokenizer() -> CLIPTokenizer:
    """A token for each letter; 16 tokens at most."""
    pieces = [letter + end for end in ("", "</w>") for letter in LETTERS] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=16)


@cache
def t5_tokenizer() -> T5TokenizerFast:
    """A token for each letter."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *LETTERS]
    return T5TokenizerFast(vocab=[(piece, 0.0 if i < 3 else -1.0) for i, piece in enumerate(pieces)], extra_ids=0)


def _clip(hidden_size: int, seed: int) -> CLIPTextModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=clip_tokenizer().bos_token_id,
        eos_token_id=clip_tokenizer().eos_token_id,
        pad_token_id=clip_tokenizer().pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5(width: int) -> T5EncoderModel:
    torch.manual_seed(7)
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    return T5EncoderModel(config).eval()


def tiny_stable_diffusion_3(
    t5: bool = True, scheduler: SchedulerMixin | None = None, **transformer: Any
) -> StableDiffusion3Pipeline:
    """8 x 8 latents of 16 x 16 pixels, transformers up to 24 x 24; every weight is random, none is 0."""
    torch.manual_seed(0)
    defaults = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "caption_projection_dim": 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
    }
    model = SD3Transformer2DModel(**{**defaults, **transformer}).eval()
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()
    return StableDiffusion3Pipeline(
        transformer=model,
        scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=_clip(8, 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_clip(12, 3),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_t5(24) if t5 else None,
        tokenizer_3=t5_tokenizer() if t5 else None,
    )


def colours(num_rows: int, sizes: tuple[tuple[int, int], ...] = ((16, 16),), seed: int = 0) -> datasets.Dataset:
    """Noisy squares of one colour, captioned by it in two wordings, in the given heights and widths in turn."""
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for row in range(num_rows):
        name = list(COLOURS)[row % 3]
        height, width = sizes[row % len(sizes)]
        pixels = (np.array(COLOURS[name]) * rng.uniform(0.6, 1, (height, width, 1))).astype(np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, format="PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
        captions.append([name, f"a {name} square"])
    dataset = datasets.Dataset.from_dict({"image": images, "text": captions})
    return dataset.cast_column("image", datasets.Image())


def save_colours(folder: Path, num_train: int = 20, num_test: int = 7, **options: Any) -> Path:
    """The same as a folder of parquet files."""
    for split, num_rows in (("train", num_train), ("test", num_test)):
        colours(num_rows, seed=len(split), **options).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def train_text_to_image(
    script: ModuleType, model: Path, data: Path, output_dir: Path, *words: str, **options: object
) -> Path:
    """A short run of a text-to-image script in this process; returns the output folder."""
    values = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "output_dir": output_dir,
        "resolution": 16,
        "max_sequence_length": 16,
        "seed": 0,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_inference_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    line = [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]
    run_script(script, [*words, *line])
    return output_dir


def sample(pipeline: StableDiffusion3Pipeline, **options: Any) -> np.ndarray:
    """A picture, in a few steps from fixed noise."""
    pipeline.set_progress_bar_config(disable=True)
    images: Any = pipeline(
        "a red square",
        height=16,
        width=16,
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **options,
    ).images
    return images
