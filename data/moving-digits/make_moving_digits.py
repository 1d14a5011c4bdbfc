# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["datasets", "pillow", "numpy"]
# ///
"""Write videos of moving digits, five frames of 16x16 pixels, from the digits of `data/digits`.

    python data/moving-digits/make_moving_digits.py --output_dir runs/moving-digits

Each digit moves by two pixels a frame to the left, to the right, up or down, from one side to the other. A video
is an animated PNG in the column `video`; three captions name digit and direction.
"""

import argparse
import io
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, List, Value, load_dataset
from PIL import Image


SIDE, FRAMES, SPEED = 16, 5, 2
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# Ways across and down.
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
WAYS = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}
WORDINGS = ("the digit {} {}", "{} {}", "a small {} on its way {}")


def frames(digit: np.ndarray, direction: str, start: int) -> list[np.ndarray]:
    """Pictures of a digit of 8x8 pixels on its way; `start` is where it stands across the way."""
    step, room = SPEED * np.array(DIRECTIONS[direction]), SIDE - len(digit)
    place = np.where(step == 0, start, np.where(step < 0, room, 0))
    pictures = []
    for _ in range(FRAMES):
        picture = np.zeros((SIDE, SIDE), np.uint8)
        across, down = place
        picture[down : down + len(digit), across : across + len(digit)] = digit
        pictures.append(picture)
        place = place + step
    return pictures


def animated_png(pictures: list[np.ndarray]) -> bytes:
    """Contents of a file that has these grey pictures as its frames."""
    first, *others = map(Image.fromarray, pictures)
    file = io.BytesIO()
    first.save(file, "PNG", save_all=True, append_images=others, duration=200, default_image=False)
    return file.getvalue()


def main(output_dir: Path, videos_per_digit: int) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    features = Features({"video": Value("binary"), "label": Value("int64"), "text": List(Value("string"))})
    for split in ("train", "test"):
        rows = load_dataset(str(Path(__file__).parents[1] / "digits"), split=split)
        draw = np.random.default_rng(0)
        videos = []
        for row in rows:
            digit = np.asarray(row["image"].convert("L"))
            for direction in draw.permutation(list(DIRECTIONS))[:videos_per_digit]:
                name, way = NAMES[row["label"]], WAYS[direction]
                pictures = frames(digit, direction, int(draw.integers(SIDE - len(digit) + 1)))
                captions = [wording.format(name, way) for wording in WORDINGS]
                videos.append({"video": animated_png(pictures), "label": row["label"], "text": captions})
        path = output_dir / f"{split}-00000-of-00001.parquet"
        Dataset.from_list(videos, features=features).to_parquet(path)
        print(f"{path}: {len(videos)} videos")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/moving-digits"))
    parser.add_argument("--videos_per_digit", type=int, default=4, help="Directions in which each digit moves.")
    args = parser.parse_args()
    main(args.output_dir, args.videos_per_digit)
