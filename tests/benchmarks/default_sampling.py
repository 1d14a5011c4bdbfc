# SPDX-License-Identifier: Apache-2.0
"""Calls of a trained pipeline by default, beside 50 Euler calls: their errors against a fine solution, in one line.

python tests/benchmarks/default_sampling.py runs/unet-digits
"""

import argparse

import torch

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.pipelines.sampling import default_steps
from diffusers_fm.schedulers.recommendation import BASELINE, BASELINE_STEPS, REFERENCE, REFERENCE_STEPS


def compare(folder: str, num_images: int = 200, seed: int = 100) -> tuple[str, int, float, float]:
    """Solver, its calls by default, its relative error and that of 50 Euler calls, from noise of no search."""
    pipeline = FlowMatchPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    own = pipeline.scheduler

    def draw(scheduler: FlowMatchScheduler, steps: int | None = None) -> torch.Tensor:
        pipeline.scheduler = scheduler
        images = pipeline(
            class_labels=[i % pipeline.num_classes for i in range(num_images)] if pipeline.num_classes else None,
            batch_size=num_images,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        assert isinstance(images, torch.Tensor)
        return images.double()

    fine = draw(own.with_settings(**REFERENCE), 2 * REFERENCE_STEPS)
    drawn = (draw(own), draw(own.with_settings(**BASELINE), BASELINE_STEPS))
    error, baseline = (((images - fine).norm() / fine.norm()).item() for images in drawn)
    return own.config.solver, default_steps(own) * own.order, error, baseline


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    solver, calls, error, baseline = compare(folder)
    print(f"{folder}: {calls} calls of {solver} by default, relative error {error:.4f}; 50 of euler, {baseline:.4f}")
