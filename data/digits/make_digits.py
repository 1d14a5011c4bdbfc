# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "pillow", "numpy", "scikit-learn"]
# ///
"""Write the two parquet files of this folder from the digits that scikit-learn bundles.

    python data/digits/make_digits.py

The images have 17 grey levels (0 to 16). They are stored as 8-bit PNG files, level `v` as `round(255 v / 16)`, so
`round(16 p / 255)` gives every original value back. The split is stratified by class and seeded.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


NUM_TEST = 297
SEED = 0


def to_png(levels: np.ndarray) -> bytes:
    """The PNG file of one `(8, 8)` image with values 0 to 16."""
    pixels = np.round(levels * (255 / 16)).astype(np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def main(output_dir: Path) -> None:
    digits = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=NUM_TEST, random_state=SEED, stratify=digits.target)
    for split, indices in (("train", train), ("test", test)):
        columns = {
            "image": [{"bytes": to_png(digits.images[row]), "path": None} for row in indices],
            "label": digits.target[indices].tolist(),
        }
        Dataset.from_dict(columns, features=features).to_parquet(output_dir / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(indices)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    main(parser.parse_args().output_dir)
