# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a trained text-to-image pipeline of emoji can do besides drawing: complete, edit, go between.

    python tests/benchmarks/emoji_uses.py runs/sd3-emoji --picture runs/emoji_uses.png

Completions are of real held-out emoji, their lower half drawn anew under their caption. Edits are of real ones by two
captions. Between two images is the way from the noise of one to that of the other, on the sphere; the caption changes
in its middle, and both ends were encoded by the flow.
"""

import argparse
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import StableDiffusion3Pipeline
from labelled import labelled

from diffusers_fm import StockFlow


EMOJI = Path(__file__).parents[2] / "data" / "emoji"
SIDE = 32
EDITS = (
    ("man: red hair, light skin tone", "man: red hair, dark skin tone"),
    ("woman: white hair, medium skin tone", "woman: red hair, medium skin tone"),
    ("man cook, light skin tone", "woman cook, light skin tone"),
    ("man firefighter, medium skin tone", "man pilot, medium skin tone"),
)
BETWEEN = (
    ("woman: red hair, light skin tone", "woman vampire, dark skin tone"),
    ("man firefighter, medium-light skin tone", "man mage, dark skin tone"),
)
COLUMNS = 8


def real(caption: str, splits: datasets.DatasetDict) -> PIL.Image.Image:
    """The real emoji whose first caption it is."""
    places = (
        (split, number) for split in splits.values() for number, text in enumerate(split["text"]) if text[0] == caption
    )
    split, number = next(places)
    return split[number]["image"]


def on_sphere(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Point of the great circle through two tensors of noise, by its share of the way."""
    angle = torch.acos(torch.cosine_similarity(first.flatten(), second.flatten(), dim=0))
    return (torch.sin((1 - share) * angle) * first + torch.sin(share * angle) * second) / torch.sin(angle)


def main(args: argparse.Namespace) -> None:
    """Draw the picture, a row for each image."""
    splits = datasets.load_dataset(str(EMOJI))
    pipeline = StableDiffusion3Pipeline.from_pretrained(args.folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    flow, size = StockFlow(pipeline), {"height": SIDE, "width": SIDE}
    call = {"max_sequence_length": 0}
    tiles: list[list[PIL.Image.Image]] = []
    names: list[str] = []
    white = PIL.Image.new("RGB", (SIDE, SIDE), "white")

    # Lower half
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    mask[SIDE // 2 :] = 255
    held_out = [row for row in splits["test"] if row["tone"] != "none"]
    for number in np.random.default_rng(args.seed).permutation(len(held_out))[: args.num_rows]:
        row = held_out[int(number)]
        grey = np.where(mask[..., None] > 0, 200, np.asarray(row["image"])).astype(np.uint8)
        drawn = flow.restore(
            image=[row["image"]] * (COLUMNS - 2),
            mask_image=PIL.Image.fromarray(mask),
            prompt=row["text"][0],
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in range(COLUMNS - 2)],
            **call,
        ).images
        tiles.append([row["image"], PIL.Image.fromarray(grey), *drawn])
        names.append(row["text"][0])

    for source, wanted in EDITS[: args.num_rows]:
        image = real(source, splits)
        drawn = flow.edit(
            [image] * (COLUMNS - 2),
            source,
            wanted,
            strength=args.strength,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in range(COLUMNS - 2)],
            **call,
        ).images
        tiles.append([image, white, *drawn])
        names.append(f"to {wanted}")

    for first, second in BETWEEN[: args.num_rows]:
        noise = [
            flow.encode(real(caption, splits), caption, args.num_inference_steps, **call)
            for caption in (first, second)
        ]
        shares = np.linspace(0, 1, COLUMNS)
        points = torch.cat([on_sphere(*noise, float(share)) for share in shares])
        captions = [first if share < 0.5 else second for share in shares]
        tiles.append(flow.decode(points, captions, size, args.num_inference_steps, **call))
        names.append(f"to {second}")

    pixels = np.concatenate([np.concatenate([np.asarray(tile) for tile in row], axis=1) for row in tiles])
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    labelled(PIL.Image.fromarray(pixels), rows=names, scale=2).save(args.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_rows", type=int, default=4, help="At most, of each kind.")
    parser.add_argument("--num_inference_steps", type=int, default=24)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--strength", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, required=True)
    main(parser.parse_args())
