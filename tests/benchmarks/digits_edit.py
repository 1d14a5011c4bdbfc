# SPDX-License-Identifier: Apache-2.0
"""Held-out digits turned into other digits, inverted and back, and mixed, by a trained pipeline.

    python tests/benchmarks/digits_edit.py runs/unet-digits --output_dir runs/edit

For each way of editing: how often the plain classifier of `digits_judge.py` reads the wanted digit, and the root
mean square of what has changed, for images in [0, 1]. For inversion: the error of the way to noise and back, for
pixels in [-1, 1]. `edits.png` has a row for each digit: the original, and what it becomes as each of the ten;
`interpolation.png` goes from the digit of each row to the next one.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from digits_judge import load_split, train_classifier
from labelled import labelled

from diffusers_fm import FlowMatchEditPipeline


DIGITS = [str(digit) for digit in range(10)]


def edits(num_steps: int) -> list[dict[str, Any]]:
    """Options of the ways of editing that are compared."""
    return [
        *({"strength": strength} for strength in (0.5, 0.75, 1.0)),
        *({"strength": strength, "guidance_scale": 2.0} for strength in (0.5, 0.6, 0.75)),
        {"strength": 0.6, "guidance_scale": 2.0, "num_averages": 4},
        {"strength": 0.6, "guidance_scale": 2.0, "num_free_steps": num_steps // 5},
        {"strength": 0.75, "method": "inversion"},
        {"strength": 0.75, "method": "inversion", "guidance_scale": 2.0},
    ]


def save_grid(rows: torch.Tensor, path: Path, columns: list[str], names: list[str]) -> None:
    """Saves images `(rows, columns, 8, 8)` with values in [0, 1], magnified, with the names of columns and rows."""
    padded = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=1.0)
    height, width = padded.shape[0] * padded.shape[2], padded.shape[1] * padded.shape[3]
    levels = (padded.permute(0, 2, 1, 3).reshape(height, width) * 255).round().byte().numpy()
    picture = PIL.Image.fromarray(levels)
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled(picture, columns, names, scale=5).save(path)


def main(folder: str, output_dir: Path, num_images: int | None, num_steps: int, interpolation_steps: int) -> None:
    """Prints the figures and draws the pictures."""
    judge = train_classifier(*load_split("train"))
    held_out, labels = (part[:num_images] for part in load_split("test"))
    images = torch.from_numpy(held_out)[:, None].float()
    pipeline = FlowMatchEditPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    same = pipeline(images, labels, labels, output_type="pt").images
    print("the same class, bit for bit:", torch.equal(same, images))
    wanted = (labels + np.random.default_rng(0).integers(1, 10, len(labels))) % 10
    for options in edits(num_steps):
        generator = torch.Generator().manual_seed(0)
        output = pipeline(
            images, labels, wanted, num_inference_steps=num_steps, generator=generator, output_type="pt", **options
        )
        score = judge.score(output.images.flatten(1).numpy(), wanted)
        change = (output.images - images).square().mean().sqrt().item()
        print(f"read as wanted {score:6.1%}  changed {change:.3f}  {output.nfe:3} calls  {options}", flush=True)
    for solver, steps in (("ab2", num_steps), ("heun", num_steps // 2), ("midpoint", num_steps), ("abm3", num_steps)):
        inverted = pipeline.invert(images, labels, steps, solver)
        print(
            f"there and back, {inverted.nfe} calls each way of {solver}: root mean square"
            f" {inverted.round_trip_error.square().mean().sqrt():.1e}, of the worst image"
            f" {inverted.round_trip_error.max():.1e}, of the worst pixel {inverted.round_trip_max.max():.1e}",
            flush=True,
        )

    chosen = torch.stack([images[int((labels == digit).argmax())] for digit in range(10)])
    options = {"strength": 0.6, "guidance_scale": 2.0, "num_inference_steps": num_steps, "output_type": "pt"}
    columns = [
        pipeline(chosen, list(range(10)), digit, generator=torch.Generator().manual_seed(1), **options).images
        for digit in range(10)
    ]
    rows = torch.stack([chosen, *columns], 1)[:, :, 0]
    save_grid(rows, output_dir / "edits.png", ["original", *(f"to {digit}" for digit in DIGITS)], DIGITS)
    between = [
        pipeline.interpolate(
            chosen[digit : digit + 1],
            chosen[(digit + 1) % 10][None],
            num_images=9,
            class_labels=[digit, (digit + 1) % 10],
            num_inference_steps=interpolation_steps,
            output_type="pt",
        )
        for digit in range(10)
    ]
    rows = torch.stack(between)[:, :, 0].clamp(0, 1)
    ends = [f"{digit} to {(digit + 1) % 10}" for digit in range(10)]
    save_grid(rows, output_dir / "interpolation.png", ["from", *[""] * 7, "to"], ends)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/edit"))
    parser.add_argument("--num_images", type=int, help="Held-out digits that are edited; by default all.")
    parser.add_argument("--num_steps", type=int, default=50, help="Steps of an edit and of each way of an inversion.")
    parser.add_argument("--interpolation_steps", type=int, default=64, help="Steps of each way of an interpolation.")
    main(**vars(parser.parse_args()))
