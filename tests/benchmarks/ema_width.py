# SPDX-License-Identifier: Apache-2.0
r"""The quality of a digits pipeline over the width of its average, as a picture, from one run's snapshots.

    accelerate launch training_scripts/train_flow_matching.py --config pipelines/unet-digits/training.json \
      --output_dir runs/unet-digits-power --use_ema --ema_profile power --ema_sigma_rel 0.05 0.1 0.15
    python tests/benchmarks/ema_width.py runs/unet-digits-power --picture docs/images/ema_width.png

For each width the average is made from the snapshots of 0.05 and 0.1. Its loss on the held-out digits is the one that
training logs (fixed noise, evenly spread times); where the run tracked the width too, the two averages are compared.
"""

import argparse
import json
import math
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import torch
from accelerate import Accelerator
from digits_judge import DIGITS
from safetensors.torch import load_file

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.training import (
    ImageData,
    ImageTransform,
    TrainableModel,
    choose_split,
    data_and_labels,
    held_out_loss,
    load_splits,
)
from diffusers_fm.training.posthoc_ema import find_snapshots, posthoc_ema


TRACKED = (0.05, 0.1)
WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25)


def norm(weights: dict[str, torch.Tensor]) -> float:
    """Of all weights together."""
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in weights.values()))


def draw(rows: list[dict[str, float]], file: Path) -> None:
    """The loss over the width, both axes marked; the width is logarithmic."""
    width, height, left, bottom = 720, 400, 90, 60
    losses = [row["held_out_loss"] for row in rows]
    low, high = min(losses), max(losses)
    low, high = low - 0.08 * (high - low), high + 0.08 * (high - low)
    first, last = math.log(rows[0]["sigma_rel"]), math.log(rows[-1]["sigma_rel"])

    def place(sigma_rel: float, loss: float) -> tuple[float, float]:
        x = left + (width - left - 30) * (math.log(sigma_rel) - first) / (last - first)
        return x, 20 + (height - bottom - 20) * (high - loss) / (high - low)

    picture = PIL.Image.new("RGB", (width, height), "white")
    pen = PIL.ImageDraw.Draw(picture)
    pen.line([(left - 10, 20), (left - 10, height - bottom), (width - 20, height - bottom)], fill="black")
    for row in rows:
        x, _ = place(row["sigma_rel"], low)
        pen.line([(x, height - bottom), (x, height - bottom + 5)], fill="black")
        pen.text((x, height - bottom + 8), f"{row['sigma_rel']:g}", fill="black", anchor="ma")
    for number in range(6):
        loss = low + (high - low) * number / 5
        _, y = place(rows[0]["sigma_rel"], loss)
        pen.line([(left - 15, y), (left - 10, y)], fill="black")
        pen.text((left - 20, y), f"{loss:.4f}", fill="black", anchor="rm")
    pen.text(((left + width) / 2, height - 20), "relative width of the average, sigma_rel", fill="black", anchor="mm")
    pen.text((left, 8), "held-out loss", fill="black", anchor="lm")
    points = [place(row["sigma_rel"], row["held_out_loss"]) for row in rows]
    pen.line(points, fill="#1f77b4", width=2)
    for x, y in points:
        pen.ellipse([x - 4, y - 4, x + 4, y + 4], fill="#1f77b4")
    picture.save(file)


def main(run: Path, picture: Path) -> None:
    """Prints a row for each width, and draws them."""
    accelerator = Accelerator(cpu=True)
    snapshots = find_snapshots(run)
    tracked = [snapshot for snapshot in snapshots if snapshot.sigma_rel in TRACKED]
    pipeline = FlowMatchPipeline.from_pretrained(run)
    model = TrainableModel(pipeline)
    channels, side, _ = pipeline.sample_shape
    split = choose_split(load_splits(str(DIGITS)), "test")
    data = ImageData(split, ImageTransform(side, channels), label_column="label", num_classes=pipeline.num_classes)
    rows = []
    for sigma_rel in WIDTHS:
        weights, profile_error = posthoc_ema(tracked, sigma_rel)
        model.load_state_dict(weights, strict=False)
        loss = held_out_loss(
            accelerator,
            model,
            pipeline.scheduler,
            data,
            99,
            lambda batch: data_and_labels(pipeline, batch, accelerator.device),
        )
        row = {"sigma_rel": sigma_rel, "held_out_loss": loss["validation_loss"], "profile_error": profile_error}
        direct = [snapshot for snapshot in snapshots if snapshot.sigma_rel == sigma_rel]
        if direct:
            own = load_file(direct[-1].file)
            difference = {name: weights[name] - own[name] for name in own}
            row["relative_error_to_the_tracked"] = norm(difference) / norm(own)
        print(json.dumps(row), flush=True)
        rows.append(row)
    draw(rows, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--picture", type=Path, default=Path("ema_width.png"))
    main(**vars(parser.parse_args()))
