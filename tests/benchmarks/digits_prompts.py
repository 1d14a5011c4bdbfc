# SPDX-License-Identifier: Apache-2.0
"""Does a text-to-image pipeline draw the digit that the prompt names, by stock diffusers alone?

    python tests/benchmarks/digits_prompts.py runs/sd3-tiny --picture runs/prompts.png

The stock pipeline of the folder draws; this package is not imported. Prompts are captions of the training
split, and captions of the test split, whose wordings are in no caption of training; as many for each digit. A plain
classifier, trained on real digits, reads the images. Each image has noise of its own seed, whatever the batch.

The Frechet distance is that of the raw 64 pixels, with values in [0, 1], from the training digits: few calls may draw
digits that are read right and look like their means. The picture has a row for each held-out wording, digits from 0 to
9.
"""

import argparse
import inspect
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
import torch
from diffusers import DiffusionPipeline
from digits_judge import DIGITS, frechet_distance, load_split, train_classifier
from labelled import labelled


NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TILE = 40
LABEL_WIDTH = 330


def wording_of(caption: str) -> str:
    """A caption with `{}` in place of the digit."""
    return re.sub(rf"\b({'|'.join(NAMES)}|\d)\b", "{}", caption).replace("an {}", "a {}")


def captions_by_digit(split: str) -> list[list[str]]:
    """The different captions of each digit in a split."""
    rows = datasets.load_dataset(str(DIGITS), split=split)
    found: list[set[str]] = [set() for _ in range(10)]
    for label, captions in zip(rows["label"], rows["text"]):
        found[label].update(captions)
    return [sorted(captions) for captions in found]


def draw_colour(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    num_inference_steps: int,
    guidance_scale: float,
    max_sequence_length: int,
    seed: int,
    batch_size: int = 100,
    side: int = 8,
) -> np.ndarray:
    """Images `(num_images, side, side, 3)` with values in [0, 1], one of each prompt."""
    images = []
    # Without a guidance that the network learned, pipelines of such networks have another name for it.
    names = inspect.signature(type(pipeline).__call__).parameters
    true_cfg = "true_cfg_scale" in names and not pipeline.transformer.config.guidance_embeds
    scale = {"true_cfg_scale" if true_cfg else "guidance_scale": guidance_scale}
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        output = pipeline(
            part,
            height=side,
            width=side,
            num_inference_steps=num_inference_steps,
            negative_prompt=[""] * len(part),
            **scale,
            max_sequence_length=max_sequence_length,
            generator=[torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(part))],
            output_type="np",
        )
        images.append(output.images)
    return np.concatenate(images)


def draw(pipeline: DiffusionPipeline, prompts: list[str], *options: Any) -> np.ndarray:
    """Grey images `(num_images, 8, 8)` with values in [0, 1], one of each prompt, as `draw_colour` does."""
    return draw_colour(pipeline, prompts, *options).mean(-1)


def picture(images: np.ndarray, wordings: list[str]) -> PIL.Image.Image:
    """Images `(num_wordings, 10, 8, 8)`, magnified, with the wording before each row."""
    font = PIL.ImageFont.load_default(14)
    rows, columns = images.shape[:2]
    sheet = PIL.Image.new("L", (LABEL_WIDTH + columns * (TILE + 2), rows * (TILE + 2)), 255)
    pen = PIL.ImageDraw.Draw(sheet)
    for row, wording in enumerate(wordings):
        pen.text((4, row * (TILE + 2) + TILE // 2 - 8), wording, fill=0, font=font)
        for column in range(columns):
            tile = PIL.Image.fromarray((images[row, column] * 255).round().astype(np.uint8))
            tile = tile.resize((TILE, TILE), PIL.Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL_WIDTH + column * (TILE + 2), row * (TILE + 2)))
    return labelled(sheet, [*"0123456789"], left=LABEL_WIDTH)


def main(args: argparse.Namespace) -> None:
    """Prints the table and draws the picture."""
    torch.manual_seed(args.seed)
    real, real_labels = load_split("train")
    judge = train_classifier(real, real_labels)
    held_out, labels = load_split("test")
    print(f"the judge reads {judge.score(held_out.reshape(len(held_out), -1), labels):.1%} of held-out real digits")
    if args.flow_map:
        from diffusers_fm import with_flow_map

        pipeline = with_flow_map(DiffusionPipeline.from_pretrained(args.folder))
    else:
        pipeline = DiffusionPipeline.from_pretrained(args.folder)
    pipeline.set_progress_bar_config(disable=True)
    options = (args.num_inference_steps, args.guidance_scale, args.max_sequence_length)
    known = {wording_of(caption) for captions in captions_by_digit("train") for caption in captions}

    print(f"{'wordings':<12}{'all':>7}  " + "".join(f"{digit:>5}" for digit in range(10)))
    for split, name in (("train", "of training"), ("test", "held out")):
        captions = captions_by_digit(split)
        generator = np.random.default_rng(args.seed)
        wanted = np.arange(args.num_images) % 10
        prompts = [str(generator.choice(captions[digit])) for digit in wanted]
        if split == "test" and not known.isdisjoint(map(wording_of, prompts)):
            raise ValueError("A held-out wording is in a caption of training.")
        start = time.process_time()
        images = draw(pipeline, prompts, *options, args.seed + (split == "test"))
        seconds = time.process_time() - start
        right = judge.predict(images.reshape(len(images), -1)) == wanted
        distance = frechet_distance(images.reshape(len(images), -1), real.reshape(len(real), -1))
        by_digit = "".join(f"{right[wanted == digit].mean():5.0%}" for digit in range(10))
        print(
            f"{name:<12}{right.mean():7.1%}  {by_digit}   Frechet distance of pixels {distance:.2f}"
            f" ({len(images)} images, {seconds:.0f} s of CPU)",
            flush=True,
        )

    # The images of the held-out prompts, by wording.
    by_wording = defaultdict(list)
    for prompt, hit in zip(prompts, right):
        by_wording[wording_of(prompt)].append(hit)
    for wording, hits in sorted(by_wording.items(), key=lambda item: -np.mean(item[1])):
        print(f"  {np.mean(hits):6.1%} of {len(hits):3}  {wording}")
    if args.picture is not None:
        wordings = sorted(by_wording)
        prompts = [
            next(caption for caption in captions[digit] if wording_of(caption) == wording)
            for wording in wordings
            for digit in range(10)
        ]
        images = draw(pipeline, prompts, *options, args.seed + 2).reshape(len(wordings), 10, 8, 8)
        args.picture.parent.mkdir(parents=True, exist_ok=True)
        picture(images, wordings).save(args.picture)
    if not args.flow_map and any(name.partition(".")[0] == "diffusers_fm" for name in sys.modules):
        raise RuntimeError("diffusers_fm was imported, so that this shows nothing of stock diffusers.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--num_images", type=int, default=500, help="Images for each kind of wording.")
    parser.add_argument("--num_inference_steps", type=int, default=20)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--max_sequence_length", type=int, default=16, help="Tokens of the T5, as in training.")
    parser.add_argument(
        "--flow_map", action="store_true", help="Of train_text_to_image_flow_map.py: needs this package."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="Where to save a picture.")
    main(parser.parse_args())
