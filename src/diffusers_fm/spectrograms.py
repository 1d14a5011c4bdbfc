# SPDX-License-Identifier: Apache-2.0
"""Log-mel spectrograms: sounds as pictures of their loudness by time and frequency, and sounds from such pictures."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional


# Largest share of the last change that a step of Griffin and Lim's algorithm repeats (Perraudin et al., WASPAA 2013).
MOMENTUM = 0.99
FIT_STEPS = 100
TINY = 1e-10


@dataclass(frozen=True)
class LogMel:
    """
    Log-mel spectrograms of one size of window, band and step.

    A value is the level of a band in decibels of a sine at full scale, from `-range_db` and below at -1 to 0 at 1.

    Args:
        sampling_rate (`int`):
            Samples a second.
        num_bands (`int`):
            Bands between 0 Hz and half the sampling rate: triangles, evenly spread in mel (2595 log10(1 + f / 700)).
        window_length (`int`, *optional*, defaults to 512):
            Samples of a Hann window.
        hop_length (`int`, *optional*, defaults to 128):
            Samples from one frame to the next; at most half a window, to which it is even or odd alike.
        range_db (`float`, *optional*, defaults to 60.0):
            Level below full scale that counts as silence.

    Raises:
        ValueError: If a value is out of range, or a band holds no frequency of the window.
    """

    sampling_rate: int
    num_bands: int
    window_length: int = 512
    hop_length: int = 128
    range_db: float = 60.0

    def __post_init__(self) -> None:
        for name in ("sampling_rate", "num_bands", "window_length", "hop_length"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value > 0):
                raise ValueError(f"`{name}` must be a whole number above 0, got {value!r}.")
        if 2 * self.hop_length > self.window_length or (self.window_length - self.hop_length) % 2:
            raise ValueError(
                f"`hop_length` must be at most half of `window_length` {self.window_length}, and both even or both"
                f" odd, got {self.hop_length}."
            )
        if not (math.isfinite(self.range_db) and self.range_db > 0):
            raise ValueError(f"`range_db` must be above 0, got {self.range_db!r}.")
        if bool((self.filters.sum(1) == 0).any()):
            raise ValueError(
                f"`num_bands` {self.num_bands} is too many for a window of {self.window_length} samples at"
                f" {self.sampling_rate} Hz: a band holds no frequency."
            )

    @cached_property
    def window(self) -> torch.Tensor:
        """Hann window, `(window_length,)`."""
        return torch.hann_window(self.window_length)

    @cached_property
    def filters(self) -> torch.Tensor:
        """Weights of the frequencies in each band, `(num_bands, window_length // 2 + 1)`, each row of sum 1."""
        frequencies = torch.fft.rfftfreq(self.window_length, 1 / self.sampling_rate)
        top = 2595 * math.log10(1 + self.sampling_rate / 2 / 700)
        corners = 700 * (10 ** (torch.linspace(0, top, self.num_bands + 2) / 2595) - 1)
        low, centre, high = (corners[i : i + self.num_bands, None] for i in range(3))
        up, down = (frequencies - low) / (centre - low), (high - frequencies) / (high - centre)
        weights = torch.minimum(up, down).clamp(min=0)
        return weights / weights.sum(1, keepdim=True).clamp(min=TINY)

    def num_samples(self, num_frames: int) -> int:
        """Samples of so many frames."""
        return num_frames * self.hop_length

    def encode(self, waveforms: torch.Tensor) -> torch.Tensor:
        """
        Spectrograms of sounds.

        Args:
            waveforms (`torch.Tensor` of shape `(batch_size, num_samples)`):
                Floating-point samples in [-1, 1], a whole number of hops.

        Returns:
            `torch.Tensor` of shape `(batch_size, 1, num_bands, num_frames)`: Values in [-1, 1], low bands first.

        Raises:
            ValueError: For another shape or values out of range.
        """
        if waveforms.ndim != 2 or waveforms.shape[1] == 0 or waveforms.shape[1] % self.hop_length:
            raise ValueError(
                f"Waveforms must have the shape (batch_size, num_samples) with a multiple of {self.hop_length}"
                f" samples, got {tuple(waveforms.shape)}."
            )
        # A NaN is no number that is at most 1.
        if not (waveforms.is_floating_point() and bool((waveforms.abs() <= 1).all())):
            raise ValueError(f"Waveforms must be floating-point with values in [-1, 1], got {waveforms.dtype}.")
        levels = self._stft(waveforms.float()).abs().transpose(1, 2) @ self.filters.to(waveforms.device).T
        decibels = 20 * levels.clamp(min=TINY).log10()
        return (1 + 2 * decibels / self.range_db).clamp(-1, 1).transpose(1, 2)[:, None]

    def decode(self, spectrograms: torch.Tensor, num_iterations: int = 64) -> torch.Tensor:
        """
        Sounds with given spectrograms, about: bands are spread over frequencies by non-negative least squares (Lee and
        Seung, 2001), and phases are found by Griffin and Lim's algorithm (1984) with momentum.

        Args:
            spectrograms (`torch.Tensor` of shape `(batch_size, 1, num_bands, num_frames)`):
                As [`encode`] gives them; values outside [-1, 1] are clipped.
            num_iterations (`int`, *optional*, defaults to 64):
                Steps of the search for phases. It starts the same way each time.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_samples)`: Samples in [-1, 1], float32.

        Raises:
            ValueError: For another shape.
        """
        if spectrograms.ndim != 4 or tuple(spectrograms.shape[1:3]) != (1, self.num_bands):
            raise ValueError(
                f"Spectrograms must have the shape (batch_size, 1, {self.num_bands}, num_frames), got"
                f" {tuple(spectrograms.shape)}."
            )
        data = spectrograms[:, 0].float().clamp(-1, 1)
        levels = 10 ** ((data - 1) / 2 * self.range_db / 20) * (data > -1)
        filters = self.filters.to(data.device)
        amplitudes = filters.T @ levels
        for _ in range(FIT_STEPS):
            amplitudes = amplitudes * (filters.T @ levels) / (filters.T @ (filters @ amplitudes)).clamp(min=TINY)
        generator = torch.Generator().manual_seed(0)
        angles = 2 * math.pi * torch.rand(amplitudes.shape[1:], generator=generator).to(data.device)
        phases = torch.polar(torch.ones_like(angles), angles)
        last = torch.zeros_like(phases)
        for _ in range(num_iterations):
            found = self._stft(self._istft(amplitudes * phases))
            moved = found + MOMENTUM * (found - last)
            phases = moved / moved.abs().clamp(min=TINY)
            last = found
        return self._istft(amplitudes * phases).clamp(-1, 1)

    def _stft(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Frames' amplitudes and phases, `(batch_size, window_length // 2 + 1, num_frames)`, 1 for a full sine."""
        side = (self.window_length - self.hop_length) // 2
        frames = functional.pad(waveforms, (side, side)).unfold(1, self.window_length, self.hop_length)
        window = self.window.to(waveforms.device)
        return (2 / window.sum() * torch.fft.rfft(frames * window)).transpose(1, 2)

    def _istft(self, spectra: torch.Tensor) -> torch.Tensor:
        """Sounds whose frames are nearest to given ones in the sense of least squares, `(batch_size, num_samples)`."""
        window = self.window.to(spectra.device)
        frames = torch.fft.irfft(spectra.transpose(1, 2), n=self.window_length) * window.sum() / 2
        num_frames = frames.shape[1]
        total = (num_frames - 1) * self.hop_length + self.window_length

        def overlap_add(frames: torch.Tensor) -> torch.Tensor:
            settings = {"kernel_size": (1, self.window_length), "stride": (1, self.hop_length)}
            return functional.fold(frames.transpose(1, 2), (1, total), **settings)[:, 0, 0]

        weights = overlap_add(window.square().expand(1, num_frames, -1))
        side = (self.window_length - self.hop_length) // 2
        return (overlap_add(frames * window) / weights.clamp(min=TINY))[:, side : total - side]
