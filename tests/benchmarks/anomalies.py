# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection by a trained pipeline: by the likelihood of samples, and by the noise that they come from.

    python tests/benchmarks/anomalies.py runs/unet-digits
    python tests/benchmarks/anomalies.py runs/unet-emoji --data emoji
    python tests/benchmarks/anomalies.py runs/unet-spoken-digits --data spoken-digits

Held-out samples of one half set the thresholds. Those of the other half are judged, and with them the same ones
damaged and samples of other kinds. Prints, for three scores, the area under the ROC curve (0.5 = chance, 1 = told
apart always) and the part of the samples that raise an alarm at a rate of false alarms of 5 %. The scores are minus
the log-likelihood, the test of the encoded noise, and the larger deviation of both, for which every second sample of
the first half sets the scale. Of emoji, those of the validation split without a skin tone are taken, of which no
variant was trained on.
"""

import argparse
import json
from collections.abc import Callable

import datasets
import numpy as np
import PIL.Image
import torch
from digits_judge import DIGITS
from scipy import stats
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score
from spoken_digits_quality import RATE as SAMPLING_RATE
from spoken_digits_quality import load_split as load_clips

from diffusers_fm import FlowMatchAudioPipeline, FlowMatchPipeline
from diffusers_fm.applications.anomaly import alarm_threshold, larger_deviation
from diffusers_fm.data.sounds import SoundTransform
from diffusers_fm.spectrograms import LogMel


RATE = 0.05


def damaged(images: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images that are none of the kind, each kind of the shape of `images`, values in [0, 1]."""
    side = images.shape[-1]
    noise = torch.randn(images.shape, generator=generator)
    order = torch.randperm(side * side, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    erased = images.clone()
    middle = slice(side // 4, 3 * side // 4)
    erased[:, :, middle, middle] = images[:, :, :1, :1]
    return {
        "with noise of 0.2": (images + 0.2 * noise).clamp(0, 1),
        "blurred": blurred,
        "centre erased": erased,
        "upside down": images.flip(2),
        "turned by 90 degrees": images.rot90(1, (2, 3)),
        "inverted": 1 - images,
        "pixels in another order": images.flatten(2)[:, :, order].reshape(images.shape),
        "flat": images.mean((2, 3), keepdim=True).expand(images.shape).contiguous(),
        "black": torch.zeros_like(images),
        "uniform noise": torch.rand(images.shape, generator=generator),
    }


def damaged_clips(clips: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Sounds that are no spoken digits, each kind of the shape of `clips`, `(num_clips, num_samples)` in [-1, 1]."""
    count, length = clips.shape
    noise = torch.randn(clips.shape, generator=generator)
    seconds = torch.arange(length) / SAMPLING_RATE
    pitches = 200 + 1800 * torch.rand(count, 1, generator=generator)
    erased = clips.clone()
    erased[:, length // 3 : 2 * length // 3] = 0
    others = clips[torch.randperm(count, generator=generator)]
    return {
        "with noise of 0.02": (clips + 0.02 * noise).clamp(-1, 1),
        "backwards": clips.flip(1),
        "middle erased": erased,
        "twice as fast, twice": clips[:, ::2].repeat(1, 2)[:, :length],
        "two at once": ((clips + others) / 2).contiguous(),
        "pure tones": 0.5 * torch.sin(2 * torch.pi * pitches * seconds),
        "white noise": (0.1 * noise).clamp(-1, 1),
    }


def emoji(count: int, split: str = "validation") -> list[PIL.Image.Image]:
    """Emoji without a skin tone, in an order by a seed: those of the split are in groups."""
    rows = datasets.load_dataset(str(DIGITS.parent / "emoji"), split=split)
    rows = rows.filter(lambda tone: tone == "none", input_columns="tone").shuffle(seed=0)
    return rows[:count]["image"]


def photographs(count: int) -> list[PIL.Image.Image]:
    """Squares of two photographs, a temple and a flower, that scikit-learn ships (CC BY)."""
    generator = np.random.default_rng(0)
    images = [PIL.Image.fromarray(image) for image in load_sample_images().images]
    squares = []
    for number in range(count):
        left, top = generator.integers(0, 640 - 96), generator.integers(0, 427 - 96)
        squares.append(images[number % 2].crop((left, top, left + 96, top + 96)))
    return squares


def spectrograms(count: int, side: int) -> list[PIL.Image.Image]:
    """Spectrograms of spoken digits, loud in white."""
    spoken = datasets.load_dataset(str(DIGITS.parent / "spoken-digits"), split="test")
    hop = 4096 // side
    transform = SoundTransform(side, 1, log_mel=LogMel(SAMPLING_RATE, side, min(1024, 4 * hop), hop))
    sounds = [transform.decode(spoken[i]["audio"], (side, side))[0, :, :side] for i in range(count)]
    return [PIL.Image.fromarray(sound) for sound in sounds]


def foreign(data: str, count: int, channels: int, side: int) -> dict[str, torch.Tensor]:
    """Pictures of other kinds at the size of the pipeline's, values in [0, 1]; digits and spectrograms inverted."""

    def pixels(images: list[PIL.Image.Image], inverted: bool) -> torch.Tensor:
        mode = "L" if channels == 1 else "RGB"
        small = np.stack([np.atleast_3d(np.asarray(image.convert(mode).resize((side, side)))) for image in images])
        values = torch.from_numpy(small).permute(0, 3, 1, 2).float() / 255
        return 1 - values if inverted else values

    # Digits are light on dark, emoji dark on light.
    light = data == "digits"
    digits = datasets.load_dataset(str(DIGITS), split="test")[:count]["image"]
    kinds: dict[str, Callable[[], torch.Tensor]] = {
        "emoji": lambda: pixels(emoji(count), light),
        "digits": lambda: pixels(digits, not light),
        "spectrograms of spoken digits": lambda: pixels(spectrograms(count, side), not light),
        "squares of photographs": lambda: pixels(photographs(count), False),
    }
    return {name: kind() for name, kind in kinds.items() if name != data}


def held_out(data: str, count: int) -> torch.Tensor:
    """Up to `2 * count` held-out samples of a data set, as the pipeline takes them."""
    if data == "spoken-digits":
        clips, _ = load_clips("test")
        return torch.from_numpy(clips[np.random.default_rng(0).permutation(len(clips))[: 2 * count]])
    if data == "emoji":
        images = emoji(2 * count)
    else:
        images = datasets.load_dataset(str(DIGITS), split="test")[: 2 * count]["image"]
    pixels = np.stack([np.atleast_3d(np.asarray(image)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def measure(
    folder: str, data: str = "digits", num_images: int | None = None, num_steps: int = 32, batch_size: int = 512
) -> dict[str, dict[str, list[float]]]:
    """
    Areas under the ROC curve, and alarms.

    Args:
        folder (`str`):
            The trained pipeline, of pixels or of sounds.
        data (`str`, *optional*, defaults to `"digits"`):
            What it was trained on: `"digits"`, `"emoji"` or `"spoken-digits"`.
        num_images (`int`, *optional*):
            Held-out samples in each of two halves, by default as many as there are: one is the reference, the other
            is judged.
        num_steps (`int`, *optional*, defaults to 32):
            Steps of the likelihood.
        batch_size (`int`, *optional*, defaults to 512):
            Samples at once.

    Returns:
        `dict[str, dict[str, list[float]]]`: area and part of the samples that raise an alarm, by kind and score.
    """
    audio = data == "spoken-digits"
    pipeline = (FlowMatchAudioPipeline if audio else FlowMatchPipeline).from_pretrained(folder)
    samples = held_out(data, num_images or 10_000)
    half = len(samples) // 2
    reference, judged = samples[:half], samples[half : 2 * half]

    def table(images: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline.anomaly_score(images, num_steps=num_steps, batch_size=batch_size, generator=generator).table

    known = table(reference)
    scale, rest = known[::2], known[1::2]

    def scores(found: torch.Tensor) -> dict[str, torch.Tensor]:
        names = ("likelihood", "noise test", "larger deviation")
        return dict(zip(names, (*found.T, larger_deviation(found, scale))))

    kept = scores(known) | {"larger deviation": larger_deviation(rest, scale)}
    thresholds = {name: alarm_threshold(values, RATE) for name, values in kept.items()}
    normal = scores(table(judged))
    figures = {f"held-out {data}": {name: [0.5, _alarms(normal[name], thresholds[name])] for name in normal}}
    generator = torch.Generator().manual_seed(1)
    if audio:
        kinds = damaged_clips(judged, generator)
    else:
        kinds = damaged(judged, generator) | foreign(data, half, *judged.shape[1:3])
    for kind, images in kinds.items():
        strange = scores(table(images))
        truth = np.repeat([0, 1], [len(judged), len(images)])
        figures[kind] = {
            name: [
                float(roc_auc_score(truth, torch.cat([normal[name], strange[name]]).numpy())),
                _alarms(strange[name], thresholds[name]),
            ]
            for name in normal
        }
    for count in (half, len(rest)):
        print(f"expected alarms of {half} held-out samples, with {count} others:", expected_alarms(count, half))
    return figures


def _alarms(scores: torch.Tensor, threshold: float) -> float:
    return (scores > threshold).double().mean().item()


def expected_alarms(num_reference: int, num_judged: int) -> list[float]:
    """The 2.5 % and 97.5 % quantiles of the part of the judged samples that raise an alarm, if all are alike."""
    above = int(RATE * (num_reference + 1) + 1e-9)
    law = stats.betabinom(num_judged, above, num_reference + 1 - above)
    return [float(law.ppf(level)) / num_judged for level in (0.025, 0.975)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data", choices=["digits", "emoji", "spoken-digits"], default="digits")
    parser.add_argument("--num_images", type=int)
    parser.add_argument("--num_steps", type=int, default=32)
    parser.add_argument("--batch_size", type=int, default=512)
    for kind, values in measure(**vars(parser.parse_args())).items():
        print(f"{kind}:", json.dumps({name: [round(value, 3) for value in pair] for name, pair in values.items()}))
