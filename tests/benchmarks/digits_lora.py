# SPDX-License-Identifier: Apache-2.0
"""Does an adapter change the style of a text-to-image pipeline, and leave alone what it draws?

    python tests/benchmarks/digits_lora.py runs/sd3-tiny --picture runs/lora.png

Trains an adapter with `--recipe` on restyled digits, if the output folder has none yet, and loads it into the stock
pipeline in this process, which does not import this package. Half of the prompts are in wordings that were held out
of all training. Figures of each strength of the adapter:

* `restyled`: how many images have the new style (inverted: a bright ground; slanted: a moment that leans),
* `read`: how many a classifier of real digits reads as the digit of the prompt, the style undone where it is there.

The picture has a row for each strength, digits from 0 to 9.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline
from digits_judge import load_split, train_classifier
from digits_prompts import captions_by_digit, draw
from labelled import labelled


ROOT = Path(__file__).parents[2]
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)
TILE = 40


def train(pipeline: Path, recipe: Path, style: str, output_dir: Path) -> None:
    """An adapter for a style, by the commands that a user would type."""
    data = output_dir.parent / f"{style}-digits"
    make = [str(ROOT / "data" / "digits" / "make_digits.py"), "--style", style, "--output_dir", str(data)]
    subprocess.run([sys.executable, *make], check=True)
    script = ROOT / "training_scripts" / "train_text_to_image_lora.py"
    line = ["--config", str(recipe), "--dataset_name", str(data)]
    line += ["--pretrained_model_name_or_path", str(pipeline), "--output_dir", str(output_dir)]
    subprocess.run([sys.executable, "-m", "accelerate.commands.launch", str(script), *line], check=True)


def is_restyled(images: np.ndarray, style: str) -> np.ndarray:
    """Return whether images `(num_images, 8, 8)` with values in [0, 1] have the style."""
    if style == "inverted":
        return images.mean((1, 2)) > 0.5
    return slants(images) < BORDER


def slants(images: np.ndarray) -> np.ndarray:
    """Slant of an image, the way to the right of its ink from one row to the next: mu_11 / mu_02 of its moments."""
    rows, columns = np.mgrid[:8, :8] - 3.5
    weight = images / images.sum((1, 2), keepdims=True)
    x, y = ((weight * axis).sum((1, 2))[:, None, None] for axis in (columns, rows))
    return (weight * (columns - x) * (rows - y)).sum((1, 2)) / (weight * (rows - y) ** 2).sum((1, 2))


# Halfway between the means of the two training splits, 0.04 and -0.42: 3 % of each are on the other side.
BORDER = -0.19


def undo(images: np.ndarray, style: str) -> np.ndarray:
    """The images as they would be without the style."""
    if style == "inverted":
        return 1 - images
    return np.stack([np.roll(images[:, row], 2 - (7 - row) // 2, axis=1) for row in range(8)], axis=1)


def main(args: argparse.Namespace) -> None:
    """Prints the table and draws the picture."""
    output_dir = args.output_dir or args.folder.with_name(f"{args.folder.name}-{args.style}")
    if not (output_dir / "pytorch_lora_weights.safetensors").exists():
        train(args.folder, args.recipe, args.style, output_dir)
    judge = train_classifier(*load_split("train"))
    wanted = np.arange(args.num_images) % 10
    generator = np.random.default_rng(args.seed)
    captions = [captions_by_digit(split) for split in ("train", "test")]
    prompts = [str(generator.choice(captions[i // 10 % 2][digit])) for i, digit in enumerate(wanted)]
    options = (args.num_inference_steps, args.guidance_scale, args.max_sequence_length, args.seed)

    pipeline = DiffusionPipeline.from_pretrained(args.folder)
    pipeline.set_progress_bar_config(disable=True)
    base = draw(pipeline, prompts, *options)
    pipeline.load_lora_weights(output_dir)
    sheet = PIL.Image.new("L", (10 * (TILE + 2) + 2, len(SCALES) * (TILE + 2) + 2), 255)
    print(f"{'strength':>8}{'restyled':>10}{'read':>8}   {args.num_images} images, {args.style}")
    for row, scale in enumerate(SCALES):
        pipeline.set_adapters(pipeline.get_active_adapters(), scale)
        images = draw(pipeline, prompts, *options)
        restyled = is_restyled(images, args.style)
        plain = np.where(restyled[:, None, None], undo(images, args.style), images)
        read = judge.predict(plain.reshape(len(plain), -1)) == wanted
        print(f"{scale:>8}{restyled.mean():>10.1%}{read.mean():>8.1%}", flush=True)
        if scale == 0:
            print(f"bit for bit the images of the base: {np.array_equal(images, base)}")
        for digit in range(10):
            tile = PIL.Image.fromarray((images[10 + digit] * 255).round().astype(np.uint8))
            tile = tile.resize((TILE, TILE), PIL.Image.Resampling.NEAREST)
            sheet.paste(tile, (2 + digit * (TILE + 2), 2 + row * (TILE + 2)))
    if any(name.startswith("diffusers_fm") for name in sys.modules):
        raise RuntimeError("This package was imported: stock diffusers has not been shown to read the adapter.")
    if args.picture is not None:
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        labelled(sheet, [*"0123456789"], [f"strength {SCALES[0]}", *map(str, SCALES[1:])]).save(args.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="A trained sd3-tiny or flux-tiny.")
    parser.add_argument("--recipe", type=Path, default=ROOT / "pipelines" / "sd3-tiny" / "lora.json")
    parser.add_argument("--style", choices=["inverted", "slanted"], default="inverted")
    parser.add_argument("--output_dir", type=Path, help="Of the adapter; by default beside the pipeline.")
    parser.add_argument("--num_images", type=int, default=200)
    parser.add_argument("--num_inference_steps", type=int, default=14)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--max_sequence_length", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path)
    with torch.no_grad():
        main(parser.parse_args())
