# SPDX-License-Identifier: Apache-2.0
"""Emoji and skin tone that a text-to-image pipeline draws from held-out captions, by stock diffusers alone.

    python tests/benchmarks/emoji_prompts.py runs/sd3-emoji --picture runs/emoji_prompts.png

The test split of data/emoji has pairs of emoji and skin tone. The emoji was trained on in four other tones, and the
tone with other emoji, so the right image is known. Each drawn image is compared with real ones, by Euclidean distance:
with the five tones of its emoji (chance: a fifth), and with all emoji in its tone. The same is asked of captions
of training. The picture has drawn images above the true ones.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from digits_judge import DIGITS
from digits_prompts import draw_colour
from labelled import labelled


EMOJI = DIGITS.parent / "emoji"
COLUMNS, ROWS = 12, 3


def real_images() -> dict[tuple[str, str], np.ndarray]:
    """Images `(32, 32, 3)` with values in [0, 1] of all emoji with one skin tone, by emoji and tone."""
    splits = datasets.load_dataset(str(EMOJI))
    return {
        (row["emoji"], row["tone"]): np.asarray(row["image"], dtype=np.float32) / 255
        for rows in splits.values()
        for row in rows
        if row["tone"] != "none" and " and " not in row["tone"]
    }


def nearest(image: np.ndarray, candidates: dict[str, np.ndarray]) -> str:
    """Name of the candidate that is nearest to an image."""
    return min(candidates, key=lambda name: float(np.square(image - candidates[name]).sum()))


def picture(drawn: np.ndarray, true: np.ndarray) -> PIL.Image.Image:
    """Rows of drawn images, each above a row of the true ones."""
    tiles = np.stack([drawn, true]).reshape(2, ROWS, COLUMNS, *drawn.shape[1:]).transpose(1, 0, 3, 2, 4, 5)
    pixels = (255 * tiles.reshape(2 * ROWS * drawn.shape[1], -1, 3)).round().astype(np.uint8)
    return labelled(PIL.Image.fromarray(pixels), rows=["drawn", "true"] * ROWS, scale=2)


def main(args: argparse.Namespace) -> None:
    """Print the table and draw the picture."""
    real = real_images()
    of_emoji: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    of_tone: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for (emoji, tone), image in real.items():
        of_emoji[emoji][tone] = of_tone[tone][emoji] = image
    # There is no T5; encoders that were kept in bfloat16 in training were saved so.
    absent = {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = DiffusionPipeline.from_pretrained(args.folder, torch_dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    options = (args.num_inference_steps, args.guidance_scale, args.max_sequence_length)
    print(f"{len(of_emoji)} emoji in {len(of_tone)} tones\n")
    print("| captions | images | tone is right | emoji is right |\n|---|---|---|---|")
    for split, name in (("train", "of training"), ("test", "held out")):
        rows = datasets.load_dataset(str(EMOJI), split=split)
        keys = [*zip(rows["emoji"], rows["tone"])]
        known = [number for number, key in enumerate(keys) if key in real]
        chosen = np.random.default_rng(args.seed).permutation(known)[: args.num_images]
        captions = [rows[int(number)]["text"][0] for number in chosen]
        images = draw_colour(pipeline, captions, *options, args.seed + (split == "test"), side=32)
        wanted = [keys[number] for number in chosen]
        tones = np.mean([nearest(image, of_emoji[key[0]]) == key[1] for image, key in zip(images, wanted)])
        emoji = np.mean([nearest(image, of_tone[key[1]]) == key[0] for image, key in zip(images, wanted)])
        print(f"| {name} | {len(images)} | {tones:.1%} | {emoji:.1%} |", flush=True)
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        count = ROWS * COLUMNS
        picture(images[:count], np.stack([real[key] for key in wanted[:count]])).save(args.picture)
    if any(name.partition(".")[0] == "diffusers_fm" for name in sys.modules):
        raise RuntimeError("diffusers_fm was imported, so that this shows nothing of stock diffusers.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_images", type=int, default=200, help="Images for each kind of caption.")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--max_sequence_length", type=int, default=0, help="Tokens of the T5, as in training.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="Where to save a picture.")
    torch.manual_seed(0)
    main(parser.parse_args())
