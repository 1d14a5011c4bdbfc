# SPDX-License-Identifier: Apache-2.0
"""Quality of the 64x64 emoji that an upscaler makes of 32x32 pixels, and a picture of them.

    python tests/benchmarks/emoji_upscale.py runs/upscale-emoji --data runs/emoji-64
    python tests/benchmarks/emoji_upscale.py runs/upscale-emoji --data runs/emoji-64 --words runs/sd3-emoji \
      --picture runs/upscaling_emoji.png

Emoji of the validation split, none of which was trained on in any skin tone, are made small (antialiased bicubic, 8
bits) and upscaled. PSNR and SSIM are means over images, for single samples, for the mean of several, and for bicubic
enlargement. The picture shows small images, what is made of them, and the originals; with `--words` also emoji that a
text-to-image pipeline draws from held-out captions.
"""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from diffusers import StableDiffusion3Pipeline
from labelled import labelled

from diffusers_fm import FlowMatchUpscalePipeline
from diffusers_fm.applications.image_quality import psnr, ssim
from diffusers_fm.pipelines.resampling import downscale, resize_bicubic


def evenly(rows: datasets.Dataset, count: int) -> list[dict]:
    """Rows from all over a data set."""
    return [rows[int(number)] for number in np.linspace(0, len(rows) - 1, min(count, len(rows)))]


def as_pixels(images: list[PIL.Image.Image]) -> torch.Tensor:
    """Images as uint8 pixels of shape `(num_images, 3, height, width)`."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def upscale(pipeline: FlowMatchUpscalePipeline, small: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """Samples `(num_images, num_samples, 3, height, width)` with values in [0, 1], the same whatever the batch."""
    made = []
    for start in range(0, len(small), args.batch_size):
        part = small[start : start + args.batch_size]
        numbers = range(start * args.num_samples, (start + len(part)) * args.num_samples)
        output = pipeline(
            part / 255,
            num_images_per_prompt=args.num_samples,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(args.seed + number) for number in numbers],
            output_type="pt",
        )
        made.append(output.images.unflatten(0, (len(part), args.num_samples)))
    return torch.cat(made).double()


def tiles(pixels: torch.Tensor) -> np.ndarray:
    """A row of images with values in [0, 1], white around each."""
    images = torch.nn.functional.pad(pixels, (2, 2, 2, 2), value=1.0)
    return (255 * torch.cat([*images], -1).permute(1, 2, 0).numpy().clip(0, 1)).round().astype(np.uint8)


def enlarged(small: torch.Tensor) -> torch.Tensor:
    """Each pixel as four of them."""
    return small.repeat_interleave(2, -1).repeat_interleave(2, -2).double() / 255


def main(args: argparse.Namespace) -> None:
    """Print the figures as JSON, and draw the picture."""
    originals = as_pixels(
        [row["image"] for row in evenly(datasets.load_dataset(str(args.data), split="validation"), args.num_images)]
    )
    pipeline = FlowMatchUpscalePipeline.from_pretrained(args.folder)
    pipeline.set_progress_bar_config(disable=True)
    small, truth = downscale(originals, pipeline.config.scale_factor), originals.double() / 255
    samples = upscale(pipeline, small, args)
    bicubic = (resize_bicubic(small, tuple(originals.shape[-2:])).double() / 255).clamp(0, 1)
    figures = {}
    for name, made in {"sample": [*samples.unbind(1)], "mean": [samples.mean(1)], "bicubic": [bicubic]}.items():
        for figure, measure in (("psnr", psnr), ("ssim", ssim)):
            figures[f"{name}_{figure}"] = round(float(np.mean([measure(each, truth).mean() for each in made])), 4)
    again = resize_bicubic(samples.flatten(0, 1), tuple(small.shape[-2:])).unflatten(0, samples.shape[:2])
    figures["sample_consistency_rms"] = round((again - small[:, None] / 255).square().mean().sqrt().item(), 4)
    print(json.dumps(figures, indent=2))
    if args.picture is None:
        return

    shown = np.linspace(0, len(small) - 1, args.columns).astype(int)
    rows = {
        "32x32": enlarged(small[shown]),
        "bicubic": bicubic[shown],
        "sample": samples[shown, 0],
        "original": truth[shown],
    }
    if args.words is not None:
        captions = [
            row["text"][0] for row in evenly(datasets.load_dataset(str(args.data), split="test"), args.columns)
        ]
        words = StableDiffusion3Pipeline.from_pretrained(args.words, text_encoder_3=None, tokenizer_3=None)
        words.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(args.seed + number) for number in range(len(captions))]
        call = {"height": 32, "width": 32, "max_sequence_length": 0, "guidance_scale": 3.0, "generator": generators}
        drawn = as_pixels(words(captions, num_inference_steps=20, **call).images)
        rows |= {"drawn": enlarged(drawn), "and upscaled": upscale(pipeline, drawn, args)[:, 0]}
    grid = PIL.Image.fromarray(np.concatenate([tiles(row) for row in rows.values()]))
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    labelled(grid, rows=list(rows), scale=1).save(args.picture)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--data", type=Path, required=True, help="Folder of make_emoji.py --size 64.")
    parser.add_argument("--num_images", type=int, default=365)
    parser.add_argument("--num_samples", type=int, default=2)
    parser.add_argument("--num_inference_steps", type=int, help="By default the pipeline's.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--columns", type=int, default=10)
    parser.add_argument("--words", help="Folder of a trained sd3-emoji.")
    parser.add_argument("--picture", type=Path)
    main(parser.parse_args())
