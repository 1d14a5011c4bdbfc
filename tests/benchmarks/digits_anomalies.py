# SPDX-License-Identifier: Apache-2.0
"""Anomaly detection by a digits pipeline: by the likelihood of images, and by the noise that they come from.

    python tests/benchmarks/digits_anomalies.py runs/unet-digits

Prints the area under the ROC curve (0.5 = chance, 1 = told apart always) of held-out digits against the same digits
damaged, and against images that are no digits, for three scores: minus the log-likelihood, the test of the encoded
noise, and the larger of both after ranking each among the held-out digits of one half, which judge the other half.
"""

import argparse
import json

import datasets
import numpy as np
import torch
from digits_judge import DIGITS
from sklearn.metrics import roc_auc_score

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.applications.anomaly import noise_test


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


def score(pipeline: FlowMatchPipeline, images: torch.Tensor, num_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Minus the log-likelihood without a class, and the score of the noise test."""
    null = [pipeline.null_class] * len(images) if pipeline.num_classes else None
    generator = torch.Generator().manual_seed(0)
    result = pipeline.log_likelihood(images, null, num_steps=num_steps, batch_size=512, generator=generator)
    test = noise_test(result.noise / pipeline.scheduler.init_noise_sigma)
    return -result.log_prob.numpy(), test.score.numpy()


def measure(folder: str, num_images: int = 148, num_steps: int = 32) -> dict[str, dict[str, float]]:
    """
    Areas under the ROC curve.

    Args:
        folder (`str`):
            The trained pipeline, of pixels.
        num_images (`int`, *optional*, defaults to 148):
            Held-out digits in each of two halves: one is the reference of ranks, the other is judged.
        num_steps (`int`, *optional*, defaults to 32):
            Steps of the likelihood.

    Returns:
        `dict[str, dict[str, float]]`: areas by kind of damage and score.
    """
    split = datasets.load_dataset(str(DIGITS), split="test")
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in split["image"]]) / 255).float()[:, None]
    reference, judged = pixels[:num_images], pixels[num_images : 2 * num_images]
    pipeline = FlowMatchPipeline.from_pretrained(folder)
    levels = [np.sort(values) for values in score(pipeline, reference, num_steps)]

    def scores(images: torch.Tensor) -> dict[str, np.ndarray]:
        likelihood, noise = score(pipeline, images, num_steps)
        ranks = [np.searchsorted(level, values) / len(level) for level, values in zip(levels, (likelihood, noise))]
        return {"likelihood": likelihood, "noise test": noise, "larger rank": np.maximum(*ranks)}

    normal = scores(judged)
    areas = {}
    for kind, images in damaged(judged, torch.Generator().manual_seed(1)).items():
        strange = scores(images)
        truth = np.repeat([0, 1], [len(judged), len(images)])
        areas[kind] = {
            name: float(roc_auc_score(truth, np.concatenate([normal[name], strange[name]]))) for name in normal
        }
    return areas


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_images", type=int, default=148)
    parser.add_argument("--num_steps", type=int, default=32)
    areas = measure(**vars(parser.parse_args()))
    print(json.dumps({kind: {k: round(v, 3) for k, v in values.items()} for kind, values in areas.items()}, indent=2))
