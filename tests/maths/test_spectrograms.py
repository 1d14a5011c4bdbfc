# SPDX-License-Identifier: Apache-2.0
"""Log-mel spectrograms: levels of sines and silence, and the way back."""

import math

import pytest
import torch

from diffusers_fm.spectrograms import LogMel


MEL = LogMel(8000, 32)


def sine(frequency: float, amplitude: float = 1.0, num_samples: int = 4096) -> torch.Tensor:
    return amplitude * torch.sin(2 * math.pi * frequency * torch.arange(num_samples) / 8000 + 0.3)[None]


def sweep() -> torch.Tensor:
    """A tone from 200 to 1,800 Hz that swells and fades, twice as loud in the second half of the batch."""
    s = torch.arange(4096) / 4096
    tone = torch.sin(2 * math.pi * 0.512 * (200 * s + 800 * s**2)) * torch.sin(math.pi * s) ** 2
    return torch.stack([0.4 * tone, 0.8 * tone])


def test_filters_are_means_over_frequencies() -> None:
    assert MEL.filters.shape == (32, 257)
    torch.testing.assert_close(MEL.filters.sum(1), torch.ones(32))
    # 1,000 mel are 1,000 Hz, by the definition of the scale: to a third of a thousandth.
    assert 2595 * math.log10(1 + 1000 / 700) == pytest.approx(1000, rel=1e-3)
    centres = (MEL.filters * torch.fft.rfftfreq(512, 1 / 8000)).sum(1)
    mel = 2595 * (1 + centres / 700).log10()
    # The centre of gravity of a triangle is not its corner; rows are evenly spread but for that and for whole bins.
    assert (mel.diff() - mel.diff().mean()).abs().max() < 0.25 * mel.diff().mean()


@pytest.mark.parametrize("number", [20, 64, 180])
def test_level_of_a_sine(number: int) -> None:
    # A Hann window shares a sine of a whole number of periods out to three frequencies, as 1/2, 1 and 1/2.
    level = MEL.filters[:, number] + (MEL.filters[:, number - 1] + MEL.filters[:, number + 1]) / 2
    expected = (1 + 2 * 20 * level.clamp(min=1e-10).log10() / 60).clamp(-1, 1)
    middle = MEL.encode(sine(number * 8000 / 512))[0, 0, :, 8:24]
    # 1 % of the scale is 0.3 dB: leakage of a start in mid-period, where there is nearly silence.
    torch.testing.assert_close(middle, expected[:, None].expand_as(middle), atol=0.01, rtol=0)
    assert middle.max() > 0.4


def test_level_is_in_decibels() -> None:
    loud, quiet = (MEL.encode(sine(1000, amplitude))[0, 0, 14:15, 8:24] for amplitude in (0.8, 0.08))
    torch.testing.assert_close(loud - quiet, torch.full_like(loud, 2 * 20 / 60), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("window_length", "hop_length"), [(512, 128), (400, 160), (256, 128)])
def test_frames_determine_the_sound(window_length: int, hop_length: int) -> None:
    mel = LogMel(8000, 16, window_length, hop_length)
    sound = torch.rand(2, 20 * hop_length, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = mel._stft(sound)
    assert frames.shape == (2, window_length // 2 + 1, 20)
    torch.testing.assert_close(mel._istft(frames), sound, atol=2e-4, rtol=0)


def test_way_back() -> None:
    sound = sweep()
    spectrograms = MEL.encode(sound)
    assert spectrograms.shape == (2, 1, 32, 32)
    found = MEL.decode(spectrograms)
    again = MEL.encode(found)
    # 2 dB where there is something to hear; below, the leakage of phases that fit less well.
    audible = spectrograms > spectrograms.amax((2, 3), keepdim=True) - 2 * 40 / 60
    assert (again - spectrograms)[audible].square().mean().sqrt() < 2 * 2 / 60
    torch.testing.assert_close(found.square().mean(1), sound.square().mean(1), rtol=0.1, atol=0)
    assert torch.equal(found, MEL.decode(spectrograms))
    torch.testing.assert_close(MEL.decode(spectrograms[1:]), found[1:], atol=1e-3, rtol=0)


def test_silence_comes_back_as_silence() -> None:
    silence = torch.zeros(1, 4096)
    assert torch.equal(MEL.encode(silence), torch.full((1, 1, 32, 32), -1.0))
    assert torch.equal(MEL.decode(MEL.encode(silence)), silence)
    assert MEL.decode(torch.full((1, 1, 32, 32), 9.0)).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_bands": 0}, "`num_bands` must be a whole number above 0, got 0"),
        ({"num_bands": 200}, "`num_bands` 200 is too many for a window of 512 samples at 8000 Hz"),
        ({"hop_length": 300}, "`hop_length` must be at most half of `window_length` 512, .* got 300"),
        ({"hop_length": 127}, "both even or both odd, got 127"),
        ({"range_db": 0.0}, "`range_db` must be above 0, got 0.0"),
    ],
)
def test_settings_are_checked(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LogMel(**{"sampling_rate": 8000, "num_bands": 32, **settings})


def test_sounds_and_spectrograms_are_checked() -> None:
    for sound, message in (
        (torch.zeros(2, 100), r"with a multiple of 128 samples, got \(2, 100\)"),
        (torch.full((1, 128), 1.5), r"values in \[-1, 1\]"),
        (torch.full((1, 128), math.nan), r"values in \[-1, 1\]"),
        (torch.zeros(1, 128, dtype=torch.int16), r"floating-point .* got torch.int16"),
    ):
        with pytest.raises(ValueError, match=message):
            MEL.encode(sound)
    with pytest.raises(ValueError, match=r"\(batch_size, 1, 32, num_frames\), got \(1, 32, 8\)"):
        MEL.decode(torch.zeros(1, 32, 8))
