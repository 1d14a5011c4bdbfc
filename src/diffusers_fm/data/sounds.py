# SPDX-License-Identifier: Apache-2.0
"""Sound files to log-mel spectrograms of whole levels, the images of a sound model."""

import importlib.util
import io
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly

from ..arguments import install
from ..spectrograms import LogMel
from .transforms import ImageTransform, image_file


@dataclass(frozen=True)
class SoundTransform(ImageTransform):
    """
    What is done to each sound: its channels are averaged, it is resampled, drawn as a spectrogram, and cut at a frame,
    or followed by silence, to as many frames as the network has columns.

    Args:
        resolution, channels, center_crop, folders:
            As of [`ImageTransform`].
        log_mel ([`~spectrograms.LogMel`]):
            The spectrograms.

    Raises:
        ValueError: If sounds are to be mirrored, or `soundfile` is not installed.
    """

    log_mel: LogMel = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.random_flip:
            raise ValueError("--random_flip mirrors images: sounds would run backwards.")
        if importlib.util.find_spec("soundfile") is None:
            raise ValueError(f"soundfile is not installed: sounds need {install('audio')}.")

    @property
    def settings(self) -> tuple[Any, ...]:
        return (*super().settings, self.log_mel)

    def decode(self, value: dict[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
        """Spectrogram of a cell of a sound column, uint8 of shape `(1, num_bands, num_frames)`."""
        waveform = read_sound(image_file(value, self.folders), self.log_mel.sampling_rate)
        num_frames = max(size[1], math.ceil(len(waveform) / self.log_mel.hop_length))
        waveform = np.pad(waveform, (0, self.log_mel.num_samples(num_frames) - len(waveform)))
        spectrogram = self.log_mel.encode(torch.from_numpy(waveform)[None])[0]
        return ((spectrogram + 1) * 127.5).round().to(torch.uint8).numpy()


def read_sound(file: bytes | str, sampling_rate: int) -> np.ndarray:
    """
    Samples of a sound file, resampled, its channels averaged.

    Args:
        file (`bytes` or `str`):
            Contents or path of a file of a format that libsndfile reads: WAV, FLAC, Ogg, MP3.
        sampling_rate (`int`):
            Samples a second that are wanted.

    Returns:
        `np.ndarray` of shape `(num_samples,)`: float32 in [-1, 1].

    Raises:
        ValueError: If there is no sample in it.
    """
    import soundfile

    samples, rate = soundfile.read(io.BytesIO(file) if isinstance(file, bytes) else file, dtype="float32")
    if not len(samples):
        raise ValueError("it is empty")
    samples = samples if samples.ndim == 1 else samples.mean(1)
    if rate != sampling_rate:
        common = math.gcd(rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // common, rate // common)
    return samples.clip(-1, 1)
