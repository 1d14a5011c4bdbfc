# SPDX-License-Identifier: Apache-2.0
"""Sound files to waveforms, and to log-mel spectrograms of whole levels, the images of a sound model."""

import importlib.util
import io
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

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
        _check_sounds(self)

    @property
    def settings(self) -> tuple[Any, ...]:
        return (*super().settings, self.log_mel)

    def decode(self, value: dict[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
        """Spectrogram of a cell of a sound column, uint8 of shape `(1, num_bands, num_frames)`."""
        waveform = read_sound(image_file(value, self.folders), self.log_mel.sampling_rate)[0]
        num_frames = max(size[1], math.ceil(len(waveform) / self.log_mel.hop_length))
        waveform = np.pad(waveform, (0, self.log_mel.num_samples(num_frames) - len(waveform)))
        spectrogram = self.log_mel.encode(torch.from_numpy(waveform)[None])[0]
        return ((spectrogram + 1) * 127.5).round().to(torch.uint8).numpy()


@dataclass(frozen=True)
class WaveformTransform(ImageTransform):
    """
    What is done to each sound of an autoencoder of sounds: it is resampled, brought to the autoencoder's channels, and
    cut, anywhere or at its centre, or followed by silence, to one length.

    On its way a sound is a float32 image of one row; [`as_batch`] makes a waveform of it.

    Args:
        resolution (`int`):
            Samples of a waveform.
        channels (`int`):
            1 (mono), 2 (stereo), or as many as every file has.
        center_crop, random_flip, folders:
            As of [`ImageTransform`].
        sampling_rate (`int`):
            Samples a second.

    Raises:
        ValueError: If sounds are to be mirrored, or `soundfile` is not installed.
    """

    sampling_rate: int = field(kw_only=True)
    is_image: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_sounds(self)

    @property
    def size(self) -> tuple[int, int]:
        """One row of samples."""
        return 1, self.resolution

    @property
    def least_bytes(self) -> int:
        """Bytes of a sound that is not longer than its size."""
        return 4 * self.channels * self.resolution

    @property
    def settings(self) -> tuple[Any, ...]:
        return (self.channels, self.sampling_rate)

    def decode(self, value: dict[str, Any] | None, size: tuple[int, int]) -> np.ndarray:
        """Samples of a cell of a sound column, float32 of shape `(channels, 1, num_samples)`, covering a size."""
        waveform = read_sound(image_file(value, self.folders), self.sampling_rate, self.channels)
        return np.pad(waveform, ((0, 0), (0, max(0, size[1] - waveform.shape[1]))))[:, None]

    def as_batch(self, images: torch.Tensor) -> torch.Tensor:
        """Waveforms of shape `(batch_size, channels, num_samples)`."""
        return images.squeeze(2)


def _check_sounds(transform: ImageTransform) -> None:
    """Refuse sounds that run backwards, and sounds where nothing reads them."""
    if transform.random_flip:
        raise ValueError("--random_flip mirrors images: sounds would run backwards.")
    if importlib.util.find_spec("soundfile") is None:
        raise ValueError(f"soundfile is not installed: sounds need {install('audio')}.")


def read_sound(file: bytes | str, sampling_rate: int, channels: int = 1) -> np.ndarray:
    """
    Samples of a sound file, resampled; a mean of its channels is one, and one channel is any number of them.

    Args:
        file (`bytes` or `str`):
            Contents or path of a file of a format that libsndfile reads: WAV, FLAC, Ogg, MP3.
        sampling_rate (`int`):
            Samples a second that are wanted.
        channels (`int`, *optional*, defaults to 1):
            Channels that are wanted.

    Returns:
        `np.ndarray` of shape `(channels, num_samples)`: float32 in [-1, 1].

    Raises:
        ValueError: If there is no sample in it, or its channels are too many or too few.
    """
    import soundfile

    opened = io.BytesIO(file) if isinstance(file, bytes) else file
    samples, rate = soundfile.read(opened, dtype="float32", always_2d=True)
    if not len(samples):
        raise ValueError("it is empty")
    samples = samples.T
    if channels == 1:
        samples = samples.mean(0, keepdims=True)
    elif len(samples) == 1:
        samples = samples.repeat(channels, 0)
    elif len(samples) != channels:
        raise ValueError(f"it has {len(samples)} channels, of which {channels} are wanted")
    if rate != sampling_rate:
        common = math.gcd(rate, sampling_rate)
        samples = resample_poly(samples, sampling_rate // common, rate // common, axis=1)
    return samples.clip(-1, 1)
