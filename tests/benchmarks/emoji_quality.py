# SPDX-License-Identifier: Apache-2.0
"""Quality of the emoji that a pipeline draws by group: read by a classifier, distance from real ones, and copies.

    python tests/benchmarks/emoji_quality.py runs/unet-emoji --picture runs/emoji.png

The classifier is the small one of evaluate.py, trained on the training split with at most 350 images of a group (of
1,847 people most are one person in six skin tones), and kept in --classifier. It judges held-out emoji, of which no
variant was trained on, and drawn ones, as many of each group. Accuracies are means over the groups.

The Frechet distance is on its features, between 38 drawn and 38 real images of each group, and, as the least that can
be asked for, between these and 38 other real ones. Distances to the nearest training image are Euclidean between
images with values in [0, 1]. Bits per dimension are those of the held-out images' files and of zlib, beside which
`evaluate.py --metrics likelihood` puts the pipeline's own.
"""

import argparse
import json
import zlib
from pathlib import Path

import datasets
import numpy as np
import torch
from labelled import labelled

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.data.images import ImageData
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.evaluation.distances import frechet_distance, nearest
from diffusers_fm.evaluation.features import FeatureExtractor, classifier_features
from diffusers_fm.evaluation.report import picture_grid


EMOJI = Path(__file__).parents[2] / "data" / "emoji"
SIDE = 32
LARGEST_GROUP = 350
OF_GROUP = 38
# Five images of hair styles and two of skin tones are no group to draw.
LEFT_OUT = "Component"


def load_split(name: str) -> tuple[datasets.Dataset, np.ndarray, np.ndarray]:
    """Rows, images `(num_images, 3, 32, 32)` in uint8, and labels."""
    rows = datasets.load_dataset(str(EMOJI), split=name)
    rows = rows.filter(lambda label: label != rows.features["label"].str2int(LEFT_OUT), input_columns="label")
    images = np.stack([np.asarray(image) for image in rows["image"]]).transpose(0, 3, 1, 2)
    return rows, np.ascontiguousarray(images), np.array(rows["label"])


def some_of_each(labels: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """Numbers of `count` images of each group, or all that it has, in a random order."""
    generator = np.random.default_rng(seed)
    numbers = [generator.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.concatenate(numbers)


def judge(rows: datasets.Dataset, labels: np.ndarray, file: Path) -> FeatureExtractor:
    """The classifier, from its file or trained now."""
    chosen = rows.select(np.sort(some_of_each(labels, LARGEST_GROUP)))
    num_classes = rows.features["label"].num_classes
    data = ImageData(chosen, ImageTransform(SIDE, 3, center_crop=True), label_column="label", num_classes=num_classes)
    file.parent.mkdir(parents=True, exist_ok=True)
    return classifier_features(file, data, num_classes, torch.device("cpu"))


def draw(
    folder: str | Path,
    labels: np.ndarray,
    guidance_scale: float,
    num_inference_steps: int | None,
    seed: int = 0,
    batch_size: int = 90,
) -> np.ndarray:
    """Images `(num_images, channels, height, width)` in uint8, one of each label."""
    pipeline = FlowMatchPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            class_labels=labels[start : start + batch_size],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=torch.Generator().manual_seed(seed + start),
            output_type="np",
        ).images
        for start in range(0, len(labels), batch_size)
    ]
    return (255 * np.concatenate(images)).round().astype(np.uint8).transpose(0, 3, 1, 2)


def by_group(values: np.ndarray, labels: np.ndarray) -> dict[int, float]:
    """Mean of the values of each group."""
    return {int(label): float(values[labels == label].mean()) for label in np.unique(labels)}


def lossless_bits(rows: datasets.Dataset, images: np.ndarray) -> dict[str, float]:
    """Bits for each of the 3,072 numbers of an image, in the PNG files of the data set and by zlib on the pixels."""
    files = rows.cast_column("image", datasets.Image(decode=False))["image"]
    sizes = {
        "png": sum(len(file["bytes"]) for file in files),
        "zlib": sum(len(zlib.compress(image.transpose(1, 2, 0).tobytes(), 9)) for image in images),
    }
    return {f"{name}_bits_per_dim": round(8 * size / images.size, 3) for name, size in sizes.items()}


def main(args: argparse.Namespace) -> None:
    """Print the figures, and draw the pictures."""
    rows, images, labels = load_split("train")
    held_out_rows, held_out, held_out_labels = load_split("validation")
    names = rows.features["label"].names
    extractor = judge(rows, labels, args.classifier)

    def read(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, logits = extractor(torch.from_numpy(pixels))
        return features, logits.argmax(1)

    real_right = by_group(read(held_out)[1] == held_out_labels, held_out_labels)
    real = float(np.mean([*real_right.values()]))
    print(f"the judge reads {real:.1%} of held-out real ones", flush=True)
    wanted = np.repeat(np.unique(labels), args.num_images)
    drawn = draw(args.folder, wanted, args.guidance_scale, args.num_inference_steps)
    features, found = read(drawn)
    drawn_right = by_group(found == wanted, wanted)

    known = images.reshape(len(images), -1).astype(np.float32) / 255
    distances, closest = nearest(drawn.reshape(len(drawn), -1).astype(np.float32) / 255, known)
    real_distances, _ = nearest(held_out.reshape(len(held_out), -1).astype(np.float32) / 255, known)
    near, real_near = by_group(distances, wanted), by_group(real_distances, held_out_labels)
    print("| group | held-out ones read | drawn ones read | nearest of held-out | nearest of drawn |")
    print("|---|---|---|---|---|")
    for label in np.unique(labels):
        figures = f"{real_right[label]:.0%} | {drawn_right[label]:.0%} | {real_near[label]:.1f} | {near[label]:.1f}"
        print(f"| {names[label]} | {figures} |")

    two = some_of_each(labels, 2 * OF_GROUP).reshape(-1, 2, OF_GROUP)
    halves = [read(images[two[:, half].ravel()])[0] for half in (0, 1)]
    some = features[some_of_each(wanted, OF_GROUP)]
    least = np.quantile(real_distances, 0.05)
    print(
        json.dumps(
            {
                "judge_on_held_out": round(real, 4),
                "judge_on_drawn": round(float(np.mean([*drawn_right.values()])), 4),
                "classifier_frechet_distance": round(frechet_distance(some, halves[0]), 2),
                "classifier_frechet_distance_of_real": round(frechet_distance(halves[1], halves[0]), 2),
                "nearest_of_held_out": [round(float(q), 2) for q in np.quantile(real_distances, (0.05, 0.5, 0.95))],
                "nearest_of_drawn": [round(float(q), 2) for q in np.quantile(distances, (0.05, 0.5, 0.95))],
                "drawn_nearer_than_5%_of_held_out": round(float((distances < least).mean()), 4),
                **lossless_bits(held_out_rows, held_out),
            },
            indent=2,
        )
    )
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        shown = drawn.reshape(-1, args.num_images, 3, SIDE, SIDE)[:, : args.columns].reshape(-1, 3, SIDE, SIDE)
        groups = [names[label] for label in np.unique(labels)]
        labelled(picture_grid(shown, args.columns), rows=groups).save(args.picture)
        order = np.argsort(distances)[:: max(1, len(distances) // 24)][:24]
        pairs = np.stack([drawn[order], images[closest[order]]], 1).reshape(-1, 3, SIDE, SIDE)
        picture_grid(pairs, 8).save(args.picture.with_stem(f"{args.picture.stem}_nearest"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_images", type=int, default=50, help="Drawn images of a group.")
    parser.add_argument("--columns", type=int, default=10, help="Of the picture.")
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--classifier", type=Path, default=Path("runs/emoji-classifier.safetensors"))
    parser.add_argument(
        "--picture", type=Path, help="Where to save a picture, and one of the nearest training images."
    )
    main(parser.parse_args())
