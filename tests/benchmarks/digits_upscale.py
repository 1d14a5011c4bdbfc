# SPDX-License-Identifier: Apache-2.0
"""Quality of the digits that a pipeline makes of 4x4 pixels.

    python tests/benchmarks/digits_upscale.py runs/upscale-digits

All 297 held-out digits are made small (antialiased bicubic, 8 bits) and upscaled, ten samples each, by default with 20
steps. PSNR and SSIM (Gaussian window of 7 pixels: the standard one is larger than the images) are means over images,
for single samples, for the mean of ten samples, and for bicubic enlargement. The classifier is that of
`digits_judge.py`, trained on the real 8x8 training digits. The Frechet distance is that of the raw 64 pixels, with
values in [0, 1], of held-out digits and of what was made of them: only the originals reach 0.
"""

import argparse
import json

import numpy as np
import torch
from digits_judge import frechet_distance, load_split, train_classifier

from diffusers_fm import FlowMatchUpscalePipeline
from diffusers_fm.applications.image_quality import psnr, ssim
from diffusers_fm.pipelines.resampling import downscale, resize_bicubic


SSIM_WINDOW = 7


def measure(
    folder: str, num_samples: int = 10, num_inference_steps: int = 20, seed: int = 0, solver: str | None = None
) -> dict[str, float]:
    """
    Figures of a digits upscaler on the held-out digits.

    Args:
        folder (`str`):
            The trained pipeline.
        num_samples (`int`, *optional*, defaults to 10):
            Samples for each digit.
        num_inference_steps (`int`, *optional*, defaults to 20):
            Steps of the solver.
        seed (`int`, *optional*, defaults to 0):
            Seed of the samples.
        solver (`str`, *optional*):
            Solver in place of the pipeline's.

    Returns:
        `dict[str, float]`: the figures by name.
    """
    judge = train_classifier(*load_split("train"))
    held_out, labels = load_split("test")
    originals = torch.from_numpy(held_out)[:, None]
    pipeline = FlowMatchUpscalePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    small = downscale((originals * 255).round().to(torch.uint8), pipeline.config.scale_factor)
    output = pipeline(
        small / 255,
        num_images_per_prompt=num_samples,
        num_inference_steps=num_inference_steps,
        solver=solver,
        generator=torch.Generator().manual_seed(seed),
        output_type="pt",
    )
    samples = output.images.double().unflatten(0, (len(originals), num_samples))
    bicubic = (resize_bicubic(small, tuple(originals.shape[-2:])).double() / 255).clamp(0, 1)

    figures: dict[str, float] = {"nfe": output.nfe}
    singles = [samples[:, number] for number in range(num_samples)]
    for name, made in {"sample": singles, "mean": [samples.mean(1)], "bicubic": [bicubic]}.items():
        flat = [images.flatten(1).numpy() for images in made]
        figures |= {
            f"{name}_psnr": float(np.mean([psnr(images, originals).mean() for images in made])),
            f"{name}_ssim": float(np.mean([ssim(images, originals, SSIM_WINDOW).mean() for images in made])),
            f"{name}_accuracy": float(np.mean([judge.score(images, labels) for images in flat])),
            f"{name}_frechet": float(
                np.mean([frechet_distance(images, held_out.reshape(297, -1)) for images in flat])
            ),
        }
    figures["original_accuracy"] = judge.score(held_out.reshape(len(held_out), -1), labels)
    # How far samples of one digit are from one another, and made small again, from what they were made of.
    pairs = (samples[:, 1:] - samples[:, :-1]).square().mean((2, 3, 4)).sqrt()
    figures["between_samples_rms"], figures["least_between_samples_rms"] = pairs.mean().item(), pairs.min().item()
    again = resize_bicubic(samples.flatten(0, 1), tuple(small.shape[-2:])).unflatten(0, (len(originals), num_samples))
    figures["sample_consistency_rms"] = (again - small[:, None] / 255).square().mean().sqrt().item()
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_samples", type=int, default=10)
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--solver")
    figures = measure(**vars(parser.parse_args()))
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))
