# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy", "pillow", "scikit-image", "scikit-learn"]
# ///
"""Write a folder of small photographs, a subfolder for each class: crops of what scikit-image and scikit-learn ship.

    python tests/benchmarks/photo_crops.py --output_dir runs/photos

It stands for a folder of your own. Each photograph is a class, of which squares of different places and sizes are
reduced to one side. The photographs are in the public domain, CC0 or, those of scikit-learn, CC BY 2.0 (their
licences are in the two packages). Without scikit-image there are two of the seven.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


PHOTOGRAPHS = {
    "flower": lambda: load_sample_image("flower.jpg"),
    "temple": lambda: load_sample_image("china.jpg"),
}
try:
    from skimage import data  # pyright: ignore[reportMissingImports]
except ImportError:
    print("Two photographs of scikit-learn; five more come with scikit-image: pip install scikit-image")
else:
    PHOTOGRAPHS |= {"astronaut": data.astronaut, "cat": data.chelsea, "coffee": data.coffee}
    PHOTOGRAPHS |= {"galaxies": data.hubble_deep_field, "rocket": data.rocket}
SEED = 0
# Sides of the squares, in sides of what they are reduced to.
SMALLEST, LARGEST = 3.0, 6.0


def crops(photograph: np.ndarray, count: int, side: int, generator: np.random.Generator) -> list[Image.Image]:
    """Squares of a photograph, `(height, width, 3)` in uint8."""
    whole = Image.fromarray(photograph)
    squares = []
    for scale in generator.uniform(SMALLEST, LARGEST, count):
        size = min(round(scale * side), *whole.size)
        left, upper = (int(generator.integers(length - size + 1)) for length in whole.size)
        box = (left, upper, left + size, upper + size)
        squares.append(whole.resize((side, side), Image.Resampling.LANCZOS, box=box))
    return squares


def main(args: argparse.Namespace) -> None:
    generator = np.random.default_rng(SEED)
    for name, read in PHOTOGRAPHS.items():
        folder = args.output_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, square in enumerate(crops(np.asarray(read()), args.num_crops, args.side, generator)):
            square.save(folder / f"{number:04d}.png")
        print(f"{name}: {args.num_crops} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_crops", type=int, default=100, help="Of each photograph.")
    parser.add_argument("--side", type=int, default=32)
    main(parser.parse_args())
