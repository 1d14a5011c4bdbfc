# SPDX-License-Identifier: Apache-2.0
"""Sounds in text-to-image training: their length, their data, and the files of the validation prompts."""

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline

from ..data.images import ImageData
from ..data.loading import make_datasets, refuse_column
from ..data.sounds import WaveformTransform
from ..data.streams import StreamData
from ..files import written_for_run
from ..models import encode_moments
from ..spectrograms import LogMel
from ..training.validation import make_grid
from .arguments import TextToImageArguments


logger = logging.getLogger(__name__)

# Arguments of pipelines' calls that are a sound's length in seconds.
SECONDS = ("audio_end_in_s", "audio_length_in_s", "audio_duration_s", "audio_duration", "duration")

# Width and height of the picture of a sound.
PICTURE = (256, 64)


@dataclass(frozen=True)
class Sounds:
    """
    Sounds of one length, as a pipeline makes them.

    Args:
        sampling_rate (`int`), channels (`int`), num_samples (`int`):
            Samples a second, channels, and samples of a channel.
    """

    sampling_rate: int
    channels: int
    num_samples: int

    def __str__(self) -> str:
        return f"{self.num_samples} samples, {self.num_samples / self.sampling_rate:g} s"


def seconds_argument(pipeline: DiffusionPipeline) -> str | None:
    """Argument of a pipeline's call for the length of a sound in seconds, where it makes sounds."""
    names = inspect.signature(inspect.unwrap(type(pipeline).__call__)).parameters
    return next((name for name in SECONDS if name in names), None)


def check_seconds(pipeline: DiffusionPipeline, seconds: float | None) -> None:
    """Refuse a length where a pipeline makes no sounds, and none where it does."""
    argument = seconds_argument(pipeline)
    if seconds is not None and argument is None:
        raise ValueError(f"{type(pipeline).__name__} makes no sounds: leave out --audio_seconds.")
    if seconds is None and argument is not None:
        raise ValueError(f"{type(pipeline).__name__} makes sounds: give their length by --audio_seconds.")


@torch.no_grad()
def find_sounds(pipeline: DiffusionPipeline, latents: Sequence[int], seconds: float) -> Sounds:
    """
    Sounds that a pipeline's autoencoder makes of latents, and takes.

    Args:
        pipeline ([`~diffusers.DiffusionPipeline`]):
            With the component `vae`.
        latents (`Sequence[int]`):
            Channels and length of the latents of a sound, as the pipeline hands them to its autoencoder.
        seconds (`float`):
            Length that the pipeline was asked for.

    Returns:
        [`Sounds`]: what they are.

    Raises:
        ValueError: if they have another length, or what the autoencoder encodes is not what it decodes.
    """
    name, vae = type(pipeline).__name__, pipeline.components["vae"]
    rate = vae.config.get("sampling_rate", vae.config.get("sample_rate"))
    if rate is None:
        raise ValueError(f"The {type(vae).__name__} of {name} does not say its sampling rate.")
    decoded = vae.decode(torch.zeros(1, *latents, device=vae.device, dtype=vae.dtype)).sample
    channels, num_samples = decoded.shape[1:]
    # Pipelines make whole latents.
    if abs(num_samples - seconds * rate) > 1.001 * num_samples / latents[-1]:
        raise ValueError(f"{name} makes sounds of {num_samples / rate:g} s, not of --audio_seconds {seconds:g}.")
    if not decoded.is_meta:
        generator = torch.Generator().manual_seed(0)
        waveforms = torch.rand(1, channels, num_samples, generator=generator).to(decoded) * 2 - 1
        try:
            expected = vae(waveforms).sample
            error = (vae.decode(encode_moments(vae, waveforms)[:, : latents[0]]).sample - expected).abs().max()
        except RuntimeError as reason:
            raise ValueError(
                f"The {type(vae).__name__} of {name} does not decode what it encodes: {reason}"
            ) from reason
        if not error <= 1e-4 * expected.abs().max():
            raise ValueError(
                f"The {type(vae).__name__} of {name} does not decode what it encodes: that is off by {error:.1e}."
            )
    return Sounds(rate, channels, num_samples)


def load_captioned_sounds(
    args: TextToImageArguments, sounds: Sounds
) -> tuple[ImageData | StreamData, ImageData | None]:
    """Captioned sounds to train on, and those held out."""
    return make_datasets(
        args,
        sounds.channels,
        sounds.num_samples,
        check=partial(refuse_column, column=args.image_column, refused=datasets.Image, wanted=datasets.Audio),
        caption_column=args.caption_column,
        caption=args.instance_prompt,
        make_transform=partial(WaveformTransform, sampling_rate=sounds.sampling_rate),
        kind="sounds",
    )


def write_sounds(rows: Sequence[Sequence[Any]], sounds: Sounds, output_dir: Path, name: str) -> PIL.Image.Image:
    """
    Write sounds as WAV files of 16 bits; one that cannot be written is said in the log.

    Args:
        rows (`Sequence[Sequence[Any]]`):
            Sounds of each prompt, tensors or arrays of shape `(channels, num_samples)`.
        sounds ([`Sounds`]):
            Their sampling rate.
        output_dir (`Path`):
            Folder of the run.
        name (`str`):
            Path of the files in it, up to `_PROMPT_NUMBER.wav`.

    Returns:
        `PIL.Image.Image`: their spectrograms in a grid, a row for each prompt.
    """
    import soundfile

    pictures = []
    for prompt, row in enumerate(rows):
        pictures.append([])
        for number, sound in enumerate(row):
            waveform = torch.as_tensor(sound).float().cpu().nan_to_num().clamp(-1, 1)
            file = f"{name}_{prompt}_{number}.wav"
            try:
                (output_dir / file).parent.mkdir(parents=True, exist_ok=True)
                with written_for_run(output_dir, file) as aside:
                    soundfile.write(aside, waveform.T.numpy(), sounds.sampling_rate, "PCM_16", format="WAV")
            except (OSError, soundfile.SoundFileError) as error:
                logger.error("%s could not be written: %s.", output_dir / file, error)
            pictures[-1].append(spectrogram(waveform, sounds.sampling_rate))
    return make_grid(pictures)


def spectrogram(waveform: torch.Tensor, sampling_rate: int) -> PIL.Image.Image:
    """Picture of a sound of shape `(channels, num_samples)`: low frequencies at the bottom, light is loud."""
    log_mel = LogMel(sampling_rate, num_bands=64, window_length=2048, hop_length=512)
    mono = waveform.mean(0, keepdim=True)
    missing = -mono.shape[1] % log_mel.hop_length
    levels = log_mel.encode(torch.nn.functional.pad(mono, (0, missing)))[0, 0].flip(0)
    pixels = ((levels + 1) * 127.5).round().numpy().astype(np.uint8)
    return PIL.Image.fromarray(pixels).resize(PICTURE, PIL.Image.Resampling.BILINEAR)
