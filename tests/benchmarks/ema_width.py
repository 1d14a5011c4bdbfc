# SPDX-License-Identifier: Apache-2.0
r"""The quality of a digits pipeline over the width of its average, as a picture, from the snapshots of its runs.

    for schedule in constant_with_warmup cosine; do
      accelerate launch training_scripts/train_flow_matching.py --config pipelines/unet-digits/training.json \
        --output_dir runs/ema-$schedule --use_ema --ema_profile power --ema_sigma_rel 0.05 0.1 0.15 \
        --lr_scheduler $schedule --max_train_steps 1000
    done
    python tests/benchmarks/ema_width.py runs/ema-constant_with_warmup runs/ema-cosine \
      --picture docs/images/ema_width.png

For each width the average is made from the snapshots of 0.05 and 0.1. Measured are its loss on the held-out digits,
which is the one that training logs (fixed noise, evenly spread times), how many of its samples the judge of
`digits_quality.py` reads as the digit that was asked for, and their Frechet distance to the training digits, in the
space of their 64 pixels with values in [0, 1]. Samples of all widths begin at the same noise. Where the run tracked
the width too, the two averages are compared.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from digits_judge import DIGITS, load_split, train_classifier
from safetensors.torch import load_file

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.sources import choose_split, load_splits
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation.distances import frechet_distance
from diffusers_fm.evaluation.report import pyplot
from diffusers_fm.objectives.flow_matching import TrainableModel
from diffusers_fm.training.posthoc_ema import find_snapshots, posthoc_ema
from diffusers_fm.training.validation import data_and_labels, held_out_loss


TRACKED = (0.05, 0.1)
WIDTHS = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25)

PANELS = {
    "held_out_loss": "held-out loss",
    "read_as_asked": "samples read as asked, %",
    "frechet_distance": "Fréchet distance of pixels",
}


def norm(weights: dict[str, torch.Tensor]) -> float:
    """Norm of all weights together."""
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in weights.values()))


class Judge:
    """
    Of samples, by those who know the real digits.

    Args:
        num_images (`int`):
            Samples, equally many of each class.
    """

    def __init__(self, num_images: int) -> None:
        images, labels = load_split("train")
        self._real = images.reshape(len(images), -1)
        self._reader = train_classifier(images, labels)
        self._wanted = np.arange(num_images) % 10

    def __call__(self, pipeline: FlowMatchPipeline) -> dict[str, float]:
        """The percentage that is read as asked, and the Frechet distance."""
        output = pipeline(
            class_labels=self._wanted,
            num_inference_steps=20,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        )
        samples = output.images.reshape(len(output.images), -1)
        return {
            "read_as_asked": 100 * float(self._reader.score(samples, self._wanted)),
            "frechet_distance": frechet_distance(samples, self._real),
        }


def measure(run: Path, widths: list[float], judge: Judge, accelerator: Accelerator) -> list[dict[str, Any]]:
    """
    A row of figures for each width.

    Args:
        run (`Path`):
            Output folder of a run.
        widths (`list[float]`):
            Widths of averages.
        judge ([`Judge`]):
            Of its samples.
        accelerator (`Accelerator`):
            For the held-out loss.

    Returns:
        `list[dict[str, Any]]`: by rising width, also printed.
    """
    snapshots = find_snapshots(run)
    tracked = [snapshot for snapshot in snapshots if snapshot.sigma_rel in TRACKED]
    pipeline = FlowMatchPipeline.from_pretrained(run)
    pipeline.set_progress_bar_config(disable=True)
    model = TrainableModel(pipeline)
    channels, side, _ = pipeline.sample_shape
    split = choose_split(load_splits(str(DIGITS)), "test")
    data = ImageData(split, ImageTransform(side, channels), label_column="label", num_classes=pipeline.num_classes)
    rows = []
    for sigma_rel in widths:
        weights, profile_error = posthoc_ema(tracked, sigma_rel)
        model.load_state_dict(weights, strict=False)
        model.eval()
        loss = held_out_loss(
            accelerator,
            model,
            pipeline.scheduler,
            data,
            99,
            lambda batch: data_and_labels(pipeline, batch, accelerator.device),
        )
        row = {"sigma_rel": sigma_rel, "held_out_loss": loss["validation_loss"], **judge(pipeline)}
        row["profile_error"] = profile_error
        direct = [snapshot for snapshot in snapshots if snapshot.sigma_rel == sigma_rel]
        if direct:
            own = load_file(direct[-1].file)
            difference = {name: weights[name] - own[name] for name in own}
            row["relative_error_to_the_tracked"] = norm(difference) / norm(own)
        print(json.dumps({"run": run.name, **row}), flush=True)
        rows.append(row)
    return rows


def draw(runs: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """A panel for each figure, a line for each run."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(PANELS), figsize=(4 * len(PANELS), 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, PANELS.items()):
        for label, rows in runs.items():
            axis.plot([row["sigma_rel"] for row in rows], [row[name] for row in rows], marker="o", label=label)
        axis.set_xscale("log")
        axis.set_xticks([0.01, 0.02, 0.05, 0.1, 0.25], ["0.01", "0.02", "0.05", "0.1", "0.25"])
        axis.minorticks_off()
        axis.set_title(title)
        axis.set_xlabel("relative width of the average")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(runs: list[Path], widths: list[float], picture: Path, num_images: int) -> None:
    """Prints a row for each run and width, and draws them."""
    accelerator, judge = Accelerator(cpu=True), Judge(num_images)
    draw({run.name: measure(run, widths, judge, accelerator) for run in runs}, picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--widths", type=float, nargs="+", default=WIDTHS, help="Relative widths of the averages.")
    parser.add_argument("--picture", type=Path, default=Path("ema_width.png"))
    parser.add_argument("--num_images", type=int, default=1000)
    main(**vars(parser.parse_args()))
