# SPDX-License-Identifier: Apache-2.0
"""Does a digits pipeline draw the digits that it is asked for, and does it draw new ones?

    python tests/benchmarks/digits_quality.py runs/unet-digits

A plain classifier (a support vector machine, trained on the real training split and its one-pixel shifts) reads 500
guidance-free samples, 50 of each class. Distances are Euclidean between images with values in [0, 1], from each image
to the nearest one of the training split: samples that were copies would lie nearer to it than held-out images do.
"""

import argparse
import json
import time

import numpy as np
import torch
from digits_judge import load_split, train_classifier
from sklearn.neighbors import NearestNeighbors

from diffusers_fm import FlowMatchPipeline


def measure(
    folder: str,
    num_images: int = 500,
    num_inference_steps: int | None = None,
    seed: int = 0,
    guidance_scale: float = 1.0,
    solver: str | None = None,
) -> dict[str, float]:
    """
    Accuracy of the judge and distances to the training split.

    Args:
        folder (`str`):
            The trained pipeline.
        num_images (`int`, *optional*, defaults to 500):
            Samples, equally many of each class.
        num_inference_steps (`int`, *optional*):
            Steps of the solver, by default the pipeline's own number.
        seed (`int`, *optional*, defaults to 0):
            Seed of the samples.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Scale of classifier-free guidance, 1 is off.
        solver (`str`, *optional*):
            Solver in place of the pipeline's.

    Returns:
        `dict[str, float]`: the figures by name.
    """
    images, labels = load_split("train")
    held_out, held_out_labels = load_split("test")
    judge = train_classifier(images, labels)

    pipeline = FlowMatchPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    wanted = np.arange(num_images) % 10
    start = time.perf_counter()
    output = pipeline(
        class_labels=wanted,
        num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale,
        solver=solver,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
    )
    seconds = time.perf_counter() - start
    samples = output.images[..., 0]

    neighbours = NearestNeighbors(n_neighbors=1).fit(images.reshape(len(images), -1))
    real, drawn = (neighbours.kneighbors(x.reshape(len(x), -1))[0][:, 0] for x in (held_out, samples))
    return {
        "judge_on_held_out": judge.score(held_out.reshape(len(held_out), -1), held_out_labels),
        "judge_on_samples": judge.score(samples.reshape(len(samples), -1), wanted),
        "distance_of_held_out_5%": float(np.quantile(real, 0.05)),
        "distance_of_samples_5%": float(np.quantile(drawn, 0.05)),
        "distance_of_held_out_median": float(np.median(real)),
        "distance_of_samples_median": float(np.median(drawn)),
        "distance_of_held_out_95%": float(np.quantile(real, 0.95)),
        "distance_of_samples_95%": float(np.quantile(drawn, 0.95)),
        "nfe": output.nfe,
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_images", type=int, default=500)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--solver")
    figures = measure(**vars(parser.parse_args()))
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2))
