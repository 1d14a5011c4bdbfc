# SPDX-License-Identifier: Apache-2.0
"""Few calls of a digits pipeline: distance to the data, readability and novelty by the number of calls.

    python tests/benchmarks/digits_flow_map.py runs/dit-digits runs/dit-digits-few --picture calls.png

Each folder is a row for each number of calls; `folder:solver` samples by another solver, so a few-step folder with
`:euler` is the flow within its map, and a flow by Euler whatever its default. `:abm3` is in the angle, on the graded
grid, and `:calibrated` fits each number of steps first.
FD is the Frechet distance of 2,000 guidance-free samples to the training split by
the features of a small classifier. `read` is the share that another classifier reads as asked, `near` the median
distance to the nearest training image. Accuracy alone cannot judge few calls: one Euler call of a flow draws class
means.
"""

import argparse
import copy
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from digits_judge import load_split, train_classifier
from labelled import labelled
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.evaluation.distances import frechet_distance
from diffusers_fm.evaluation.features import SmallClassifier
from diffusers_fm.schedulers.calibration import calibrate


SCALE = 6
# Samples by which steps are calibrated.
NUM_FITTED = 200


def feature_network(images: np.ndarray, labels: np.ndarray, num_steps: int = 1500) -> SmallClassifier:
    """Classifier of the digits, moved by up to a pixel."""
    torch.manual_seed(0)
    network = SmallClassifier(1, 10)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    data, classes = 2 * torch.from_numpy(images).float()[:, None] - 1, torch.from_numpy(labels)
    for _ in range(num_steps):
        rows = torch.randint(len(data), (64,))
        down, across = torch.randint(-1, 2, (2,)).tolist()
        loss = functional.cross_entropy(network(data[rows].roll((down, across), (-2, -1)))[1], classes[rows])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return network.eval()


def set_solver(pipeline: FlowMatchPipeline, solver: str, calls: int) -> None:
    """Sample by a solver as it is recommended."""
    path, spacing = ("angle", "graded") if solver == "abm3" else ("ot", "trailing")
    if solver != "calibrated":
        pipeline.scheduler = pipeline.scheduler.with_settings(
            solver=solver, sampling_path=path, timestep_spacing=spacing
        )
        return

    def run(scheduler: FlowMatchScheduler, num_inference_steps: int, seed: int) -> None:
        fitted = copy.copy(pipeline)
        fitted.scheduler = scheduler
        generator = torch.Generator().manual_seed(1000 + seed)
        labels = np.arange(NUM_FITTED) % 10
        fitted(labels, num_inference_steps=num_inference_steps, generator=generator, output_type="latent")

    pipeline.scheduler = calibrate(run, pipeline.scheduler, calls).scheduler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--calls", type=int, nargs="+", default=[1, 2, 4, 50])
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", help="File of a picture: a row of digits for each folder and number of calls.")
    args = parser.parse_args()

    images, labels = load_split("train")
    judge, network = train_classifier(images, labels), feature_network(images, labels)
    neighbours = NearestNeighbors(n_neighbors=1).fit(images.reshape(len(images), -1))

    @torch.no_grad()
    def features(pixels: np.ndarray) -> np.ndarray:
        return network(2 * torch.from_numpy(pixels).float()[:, None] - 1)[0].numpy()

    reference = features(images)
    wanted = np.arange(args.num_images) % 10
    rows, names = [], []
    print("| pipeline | calls | FD | read | near |\n|---|---|---|---|---|")
    for name in args.folders:
        folder, _, solver = name.partition(":")
        for calls in args.calls:
            pipeline = FlowMatchPipeline.from_pretrained(folder)
            pipeline.set_progress_bar_config(disable=True)
            if solver:
                set_solver(pipeline, solver, calls)
            drawn = np.concatenate(
                [
                    pipeline(
                        class_labels=wanted[start : start + 500],
                        num_inference_steps=calls,
                        generator=torch.Generator().manual_seed(args.seed + start),
                        output_type="np",
                    ).images[..., 0]
                    for start in range(0, args.num_images, 500)
                ]
            )
            flat = drawn.reshape(len(drawn), -1)
            distance, read = frechet_distance(features(drawn), reference), judge.score(flat, wanted)
            near = float(np.median(neighbours.kneighbors(flat)[0]))
            shown = Path(folder).name + (f":{solver}" if solver else "")
            print(f"| {shown} | {calls} | {distance:.2f} | {read:.3f} | {near:.3f} |", flush=True)
            names.append(f"{shown}, {calls}")
            rows.append(np.concatenate(list(np.pad(drawn[:20], ((0, 0), (1, 1), (1, 1)))), axis=1))
    if args.picture:
        pixels = (255 * np.concatenate(rows).clip(0, 1)).round().astype(np.uint8)
        labelled(PIL.Image.fromarray(pixels), [*"01234567890123456789"], names, SCALE).save(args.picture)


if __name__ == "__main__":
    main()
