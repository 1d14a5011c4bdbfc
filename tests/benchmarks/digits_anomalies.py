# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection by a digits pipeline: by the likelihood of images, and by the noise that they come from.

    python tests/benchmarks/digits_anomalies.py runs/unet-digits

Held-out digits of one half set the thresholds. Those of the other half are judged, and with them the same digits
damaged and pictures that are no digits. Prints, for three scores, the area under the ROC curve (0.5 = chance, 1 = told
apart always) and the part of the images that raise an alarm at a rate of false alarms of 5 %. The scores are minus the
log-likelihood, the test of the encoded noise, and the larger deviation of both, for which every second digit of the
first half sets the scale.
"""

import argparse
import json

import datasets
import numpy as np
import torch
from digits_judge import DIGITS
from scipy import stats
from sklearn.metrics import roc_auc_score

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.applications.anomaly import alarm_threshold, larger_deviation
from diffusers_fm.data.sounds import SoundTransform
from diffusers_fm.spectrograms import LogMel


RATE = 0.05


def damaged(images: torch.Tensor, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Images that are no digits, each kind of the shape of `images`, values in [0, 1]."""
    noise = torch.randn(images.shape, generator=generator)
    order = torch.randperm(64, generator=generator)
    blurred = torch.nn.functional.avg_pool2d(torch.nn.functional.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    erased = images.clone()
    erased[:, :, 2:6, 2:6] = 0
    return {
        "with noise of 0.2": (images + 0.2 * noise).clamp(0, 1),
        "blurred": blurred,
        "centre erased": erased,
        "upside down": images.flip(2),
        "turned by 90 degrees": images.rot90(1, (2, 3)),
        "inverted": 1 - images,
        "pixels in another order": images.flatten(2)[:, :, order].reshape(images.shape),
        "flat grey": images.mean((2, 3), keepdim=True).expand(images.shape).contiguous(),
        "black": torch.zeros_like(images),
        "uniform noise": torch.rand(images.shape, generator=generator),
    }


def foreign(num_images: int) -> dict[str, torch.Tensor]:
    """Pictures of other kinds at the size of the digits, `(num_images, 1, 8, 8)`, values in [0, 1]."""
    emoji = datasets.load_dataset(str(DIGITS.parent / "emoji"), split="validation")
    pictures = [emoji[i]["image"].convert("L").resize((8, 8)) for i in range(num_images)]
    # Light on dark, as the digits are.
    found = {"emoji": 1 - torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])) / 255}
    spoken = datasets.load_dataset(str(DIGITS.parent / "spoken-digits"), split="test")
    transform = SoundTransform(8, 1, log_mel=LogMel(8000, 8, 1024, 512))
    sounds = [transform.decode(spoken[i]["audio"], (8, 8))[:, :, :8] for i in range(num_images)]
    found["spectrograms of spoken digits"] = torch.from_numpy(np.concatenate(sounds)) / 255
    return {name: images.float()[:, None] for name, images in found.items()}


def measure(folder: str, num_images: int = 148, num_steps: int = 32) -> dict[str, dict[str, list[float]]]:
    """
    Areas under the ROC curve, and alarms.

    Args:
        folder (`str`):
            The trained pipeline, of pixels.
        num_images (`int`, *optional*, defaults to 148):
            Held-out digits in each of two halves: one is the reference, the other is judged.
        num_steps (`int`, *optional*, defaults to 32):
            Steps of the likelihood.

    Returns:
        `dict[str, dict[str, list[float]]]`: area and part of the images that raise an alarm, by kind and score.
    """
    split = datasets.load_dataset(str(DIGITS), split="test")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in split["image"]]) / 255).float()[:, None]
    reference, judged = pixels[:num_images], pixels[num_images : 2 * num_images]
    pipeline = FlowMatchPipeline.from_pretrained(folder)

    def table(images: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline.anomaly_score(images, num_steps=num_steps, batch_size=512, generator=generator).table

    known = table(reference)
    scale, rest = known[::2], known[1::2]

    def scores(found: torch.Tensor) -> dict[str, torch.Tensor]:
        names = ("likelihood", "noise test", "larger deviation")
        return dict(zip(names, (*found.T, larger_deviation(found, scale))))

    held_out = scores(known) | {"larger deviation": larger_deviation(rest, scale)}
    thresholds = {name: alarm_threshold(values, RATE) for name, values in held_out.items()}
    normal = scores(table(judged))
    figures = {"held-out digits": {name: [0.5, _alarms(normal[name], thresholds[name])] for name in normal}}
    for kind, images in (damaged(judged, torch.Generator().manual_seed(1)) | foreign(num_images)).items():
        strange = scores(table(images))
        truth = np.repeat([0, 1], [len(judged), len(images)])
        figures[kind] = {
            name: [
                float(roc_auc_score(truth, torch.cat([normal[name], strange[name]]).numpy())),
                _alarms(strange[name], thresholds[name]),
            ]
            for name in normal
        }
    return figures


def _alarms(scores: torch.Tensor, threshold: float) -> float:
    return (scores > threshold).double().mean().item()


def expected_alarms(num_reference: int, num_judged: int) -> list[float]:
    """The 2.5 % and 97.5 % quantiles of the part of the judged digits that raise an alarm, if all are alike."""
    above = int(RATE * (num_reference + 1) + 1e-9)
    law = stats.betabinom(num_judged, above, num_reference + 1 - above)
    return [float(law.ppf(level)) / num_judged for level in (0.025, 0.975)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_images", type=int, default=148)
    parser.add_argument("--num_steps", type=int, default=32)
    arguments = parser.parse_args()
    for kind, values in measure(**vars(arguments)).items():
        print(f"{kind}:", json.dumps({name: [round(value, 3) for value in pair] for name, pair in values.items()}))
    for count in (arguments.num_images, arguments.num_images // 2):
        print(f"expected alarms of judged digits, with {count} others:", expected_alarms(count, arguments.num_images))
