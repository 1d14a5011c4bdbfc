# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "pillow", "numpy", "scikit-learn"]
# ///
"""Write the two parquet files of this folder from the digits that scikit-learn bundles, or a restyled copy of them.

    python data/digits/make_digits.py
    python data/digits/make_digits.py --style inverted --output_dir runs/inverted-digits

The images have 17 grey levels (0 to 16). They are stored as 8-bit PNG files, level `v` as `round(255 v / 16)`, so
`round(16 p / 255)` gives every original value back. The split is stratified by class and seeded.

Captions are made from the labels, some for each image, drawn by seed. The two splits have different wordings, so that
a text-to-image model can be judged by wordings that it was not trained on.
"""

import argparse
import io
import itertools
import random
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


NUM_TEST = 297
SEED = 0
NUM_WORDINGS = 160
CAPTIONS_OF_IMAGE = 8

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Wordings of the training split are openings with nouns and closings, drawn by seed. Those of the test split are other
# sentences: the first half in words of training, the second half with words that are in no training caption.
OPENINGS = ("", "a picture of ", "a photo of ", "somebody wrote ", "here is ", "show me ") + (
    "look at ",
    "she drew ",
    "can you read ",
    "this must be ",
    "my teacher gave us ",
    "there was ",
)
NOUNS = (
    "{}",
    "{a} {}",
    "the digit {}",
    "the number {}",
    "a handwritten {}",
    "the figure {}",
    "another {}",
    "a small {}",
)
CLOSINGS = ("", ", written by hand", " in grey", " on paper", " at school", " for you") + (
    ", a little crooked",
    " from a letter",
    " in pencil",
    "?",
)
WORDINGS = {
    "train": tuple(
        random.Random(SEED).sample([*map("".join, itertools.product(OPENINGS, NOUNS, CLOSINGS))], k=NUM_WORDINGS)
    ),
    "test": (
        "the handwritten number {}",
        "here on paper is the picture of {a} {}",
        "written by hand in grey, {a} {}",
        "show me the number {} somebody wrote",
        "an image of the digit {}",
        "please draw the number {}",
        "scan of a page with {a} {} on it",
        "I want to see {a} {}!",
    ),
}
STYLES = ("original", "inverted", "slanted")


def captions(label: int, split: str) -> list[str]:
    """Every wording of a split for a digit, with its name and with its numeral."""
    article = "an" if NAMES[label] == "eight" else "a"
    return [wording.format(name, a=article) for wording in WORDINGS[split] for name in (NAMES[label], str(label))]


def restyle(levels: np.ndarray, style: str) -> np.ndarray:
    """Images `(num_images, 8, 8)` with values 0 to 16: dark on light, or every second row moved on to the right."""
    if style == "inverted":
        return 16 - levels
    if style == "slanted":
        return np.stack([np.roll(levels[:, row], (7 - row) // 2 - 2, axis=1) for row in range(8)], axis=1)
    return levels


def to_png(levels: np.ndarray) -> bytes:
    """The PNG file of one `(8, 8)` image with values 0 to 16."""
    pixels = np.round(levels * (255 / 16)).astype(np.uint8)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def main(output_dir: Path, style: str) -> None:
    digits = load_digits()
    images = restyle(digits.images, style)
    features = Features(
        {
            "image": Image(),
            "label": ClassLabel(names=[str(digit) for digit in range(10)]),
            "text": List(Value("string")),
        }
    )
    rows = np.arange(len(digits.target))
    train, test = train_test_split(rows, test_size=NUM_TEST, random_state=SEED, stratify=digits.target)
    output_dir.mkdir(parents=True, exist_ok=True)
    for split, indices in (("train", train), ("test", test)):
        labels = digits.target[indices].tolist()
        generator = np.random.default_rng(SEED)
        columns = {
            "image": [{"bytes": to_png(images[row]), "path": None} for row in indices],
            "label": labels,
            "text": [
                generator.choice(captions(label, split), CAPTIONS_OF_IMAGE, replace=False).tolist() for label in labels
            ],
        }
        Dataset.from_dict(columns, features=features).to_parquet(output_dir / f"{split}-00000-of-00001.parquet")
        print(f"{split}: {len(indices)} images")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--style", choices=STYLES, default="original", help="What is done to the images.")
    main(**vars(parser.parse_args()))
