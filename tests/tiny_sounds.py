# SPDX-License-Identifier: Apache-2.0
"""Tiny pipelines of sounds with all their parts, and clips with captions."""

import dataclasses
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import soundfile
import torch
from tiny_encoders import VOCABULARY, letters
from tiny_families import Family, awake
from tiny_families_2 import ace_step, longcat_audio, stable_audio_3
from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig


def t5gemma(width: int = 16) -> T5GemmaEncoderModel:
    """T5Gemma's encoder."""
    torch.manual_seed(11)
    part = T5GemmaModuleConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
    )
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False)).eval()


def _stable_audio_3() -> Family:
    family = stable_audio_3()
    parts = {**family.pipeline.components, "text_encoder": t5gemma(16), "tokenizer": letters()}
    awake(parts["vae"])
    return dataclasses.replace(family, pipeline=type(family.pipeline)(**parts), prompts=True)


def _longcat_audio() -> Family:
    """The recipe, at a rate at which a sound of some seconds is short, and with the factor that its layers have."""
    family = longcat_audio()
    parts = family.pipeline.components
    vae = type(parts["vae"]).from_config({**parts["vae"].config, "sample_rate": 16, "downsampling_ratio": 4}).eval()
    pipeline = type(family.pipeline)(**{**parts, "vae": vae, "scheduler": family.pipeline.scheduler})
    return dataclasses.replace(family, pipeline=pipeline)


SOUNDS = {recipe.__name__.strip("_"): cache(recipe) for recipe in (_stable_audio_3, _longcat_audio, ace_step)}


def save_sounds(folder: Path, num_train: int = 8, num_test: int = 4) -> Path:
    """Tones of two heights, in files of two rates, lengths and numbers of channels, with captions of equal lengths."""
    generator = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", num_test)):
        rows = {"audio": [], "text": []}
        for row in range(count):
            pitch, rate, seconds, channels = row % 2, (32, 64)[row // 2 % 2], (1.4, 3.0)[row // 4 % 2], 1 + row % 2
            time = np.arange(int(rate * seconds)) / rate
            tone = 0.5 * np.sin(2 * np.pi * (2 + 2 * pitch) * time + generator.uniform(0, 6))
            path = folder / "files" / f"{split}-{row}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.stack([tone, 0.5 * tone][:channels], 1), rate)
            rows["audio"].append({"bytes": path.read_bytes(), "path": None})
            rows["text"].append(("a low tone!", "a high tone")[pitch])
        data = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio())
        data.to_parquet(folder / "rows" / f"{split}-00000-of-00001.parquet")
    return folder / "rows"
