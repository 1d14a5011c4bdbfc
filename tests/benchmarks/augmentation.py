# SPDX-License-Identifier: Apache-2.0
"""Accuracy of a classifier that has few real images, with and without drawn ones.

    python tests/benchmarks/augmentation.py --config pipelines/unet-digits/training.json --output_dir runs/few-digits

For each size and seed, so many images of each class are chosen from the training split. train_flow_matching.py trains
a flow on these alone, and it draws labelled images. A small convolutional classifier (that of evaluate.py, with moves
by up to a pixel) is trained on the real images, and on as many drawn ones beside them in each batch, for the same
number of steps. Figures are means over classes of the held-out split. Of emoji, those without a skin tone are taken,
and classes that have enough of them.
"""

import argparse
import json
import runpy
from pathlib import Path

import datasets
import numpy as np
import torch

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.latents import normalize
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation.features import train_classifier


SCRIPT = Path(__file__).parents[2] / "training_scripts" / "train_flow_matching.py"


def load_split(folder: str, split: str) -> datasets.Dataset:
    """Images and labels; of emoji one image each, without a skin tone."""
    rows = datasets.load_dataset(folder, split=split)
    if "tone" in rows.column_names:
        rows = rows.filter(lambda tone: tone == "none", input_columns="tone")
    return rows.select_columns(["image", "label"])


def choose(rows: datasets.Dataset, classes: list[int], size: int, seed: int) -> datasets.Dataset:
    """So many rows of each class, by a seed."""
    labels, generator = np.array(rows["label"]), np.random.default_rng(seed)
    chosen = [generator.permutation(np.flatnonzero(labels == label))[:size] for label in classes]
    return rows.select(np.sort(np.concatenate(chosen)))


def draw(folder: Path, classes: list[int], count: int, steps: int, guidance_scale: float) -> datasets.Dataset:
    """So many images of each class by a trained pipeline, with labels."""
    pipeline = FlowMatchPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    labels = [label for label in classes for _ in range(count)]
    images = []
    for start in range(0, len(labels), 100):
        output = pipeline(
            class_labels=labels[start : start + 100],
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(start),
        )
        images += output.images
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def image_data(rows: datasets.Dataset, resolution: int) -> ImageData:
    """The data set of the trainer, in grey or in colour as the first image is."""
    channels = 1 if rows[0]["image"].mode == "L" else 3
    num_classes = 1 + max(rows["label"])
    transform = ImageTransform(resolution, channels, center_crop=True)
    return ImageData(rows, transform, label_column="label", num_classes=num_classes)


def accuracy(train: datasets.Dataset, held_out: ImageData, num_classes: int, num_steps: int) -> float:
    """Mean over the classes of the part of held-out images that a classifier reads right."""
    network = train_classifier(image_data(train, held_out.transform.resolution), num_classes, num_steps=num_steps)
    batch = held_out[np.stack([np.zeros(len(held_out), dtype=np.int64), np.arange(len(held_out))], axis=1)]
    with torch.no_grad():
        read = network(normalize(batch["images"]))[1].argmax(1)
    labels = batch["labels"]
    return float(np.mean([(read[labels == label] == label).double().mean().item() for label in labels.unique()]))


def main(args: argparse.Namespace) -> None:
    """Train, draw, and print a line for each size and seed."""
    script = runpy.run_path(str(SCRIPT))
    recipe = json.loads(args.config.read_text())
    rows = load_split(recipe["dataset_name"], "train")
    held_out = load_split(recipe["dataset_name"], args.held_out_split)
    counts = np.bincount(rows["label"])
    classes = np.flatnonzero(counts >= max(args.sizes)).tolist()
    held_out = held_out.filter(lambda label: label in classes, input_columns="label")
    judged = image_data(held_out, args.resolution)
    print(f"{len(classes)} classes, {len(held_out)} held-out images", flush=True)
    for size in args.sizes:
        for seed in args.seeds:
            chosen = choose(rows, classes, size, seed)
            folder = args.output_dir / f"{size}-{seed}"
            # As many real images as drawn ones; a batch of the trainer may be larger than a small set, too.
            repeated = datasets.concatenate_datasets([chosen] * max(1, round(args.num_drawn / size)))
            repeated.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
            words = ["--config", args.config, "--dataset_name", folder / "data", "--output_dir", folder / "run"]
            words += ["--resolution", args.resolution, "--max_train_steps", args.max_train_steps, "--seed", seed]
            words += ["--solver", "abm3", "--num_inference_steps", args.num_inference_steps]
            words += ["--num_validation_images", 0, "--report_to", "none", "--checkpointing_steps", 100_000]
            script["main"](parse_arguments(script["ScriptArguments"], [*map(str, words)]))
            drawn = draw(folder / "run", classes, args.num_drawn, args.num_inference_steps, args.guidance_scale)
            features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
            mixed = datasets.concatenate_datasets([repeated.cast(features), drawn])
            sets = {"real": chosen, "real and drawn": mixed, "drawn": drawn}
            figures = {name: accuracy(each, judged, len(counts), args.classifier_steps) for name, each in sets.items()}
            line = {"size": size, "seed": seed} | {name: round(value, 4) for name, value in figures.items()}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="Recipe of a class-conditional pipeline.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder of the data and the trained flows.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 20, 100], help="Real images of a class.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_train_steps", type=int, default=600, help="Steps of each flow.")
    parser.add_argument("--num_inference_steps", type=int, default=9)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_drawn", type=int, default=100, help="Drawn images of a class.")
    parser.add_argument("--classifier_steps", type=int, default=500)
    parser.add_argument("--resolution", type=int, default=8)
    parser.add_argument("--held_out_split", default="test")
    main(parser.parse_args())
