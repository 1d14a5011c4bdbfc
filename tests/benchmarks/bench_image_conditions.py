# SPDX-License-Identifier: Apache-2.0
"""Overfit tiny networks on two targets with one caption, told apart by an image alone, and sample stock pipelines.

    python tests/benchmarks/bench_image_conditions.py [names] [--steps 400]

The network is trained as the scripts do it with `--call_columns`; a second process that imports nothing of this
package samples the saved pipeline in 30 steps of its stock scheduler, from each image. Printed are the relative errors
of the final latents from the target of the image, and from that of the other image.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


TESTS = Path(__file__).parents[1]
COLUMNS = {
    "flux_kontext": {"image": "source"},
    "flux_fill": {"image": "image", "mask_image": "mask"},
    "flux_control": {"control_image": "source"},
    "sd3_controlnet": {"control_image": "source"},
}
# Networks of the recipes that are narrower than a patch of latents cannot learn the identity.
WIDER: dict[str, dict[str, Any]] = {
    "sd3_controlnet": {"attention_head_dim": 32, "caption_projection_dim": 64},
    **{key: {"num_layers": 2, "num_attention_heads": 4} for key in ("flux_kontext", "flux_fill", "flux_control")},
}
SAMPLE = """
import sys, torch
from diffusers import DiffusionPipeline
saved, pipeline = torch.load(sys.argv[1], weights_only=False), DiffusionPipeline.from_pretrained(sys.argv[2])
assert not [name for name in sys.modules if name.startswith("diffusers_fm")]
pipeline.set_progress_bar_config(disable=True)
for number, images in enumerate(saved["images"]):
    drawn = pipeline(**saved["call"], **images, num_inference_steps=30, output_type="latent",
                      generator=torch.Generator().manual_seed(number)).images
    for target in (saved["data"][number], saved["data"][1 - number]):
        print(((drawn[0] - target).norm() / target.norm()).item())
"""


def smooth(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Values that vary slowly along height and width."""
    coarse = torch.randn(*shape[:-2], 2, 2, generator=generator)
    return torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear")


def overfit(name: str, steps: int, folder: Path) -> tuple[float, list[float]]:
    """Last loss, and relative errors of latents that the stock pipeline samples: of own and other target, by image."""
    from tiny_families import awake
    from tiny_families_2 import MORE

    from diffusers_fm.text_to_image.field import TrainedField
    from diffusers_fm.text_to_image.images import pictures

    family = MORE[name]()
    parts = dict(family.pipeline.components)
    config = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    wide = {**config, **WIDER[name]}
    parts["transformer"] = awake(type(parts["transformer"])(**wide)).train()
    if "controlnet" in parts:
        own = {key: value for key, value in parts["controlnet"].config.items() if not key.startswith("_")}
        parts["controlnet"] = awake(type(parts["controlnet"])(**{**own, **WIDER[name]})).requires_grad_(False)
    pipeline = type(family.pipeline)(**parts)
    side = family.call["height"]
    field = TrainedField(pipeline, "transformer", dict(family.call), call_columns=COLUMNS[name])
    field.check_size((side, side))
    assert field.images is not None

    generator = torch.Generator().manual_seed(0)
    decode_map = field.decode_map((side, side))
    data = decode_map.from_latents(smooth((2, *decode_map.map.y_shape), generator))
    data = (data - data.mean()) / data.std()
    given = {}
    for argument in COLUMNS[name]:
        pixels = (127.5 + 60 * smooth((2, 3, side, side), generator)).clamp(0, 255).to(torch.uint8)
        if "mask" in argument:
            pixels = torch.zeros(2, 1, side, side, dtype=torch.uint8)
            pixels[..., side // 2 :] = 255
        given[argument] = pixels.repeat(4, 1, 1, 1)
    shift = field.shift((side, side))
    optimizer = torch.optim.Adam(field.field.network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    clean, level_shape = data.repeat(4, *[1] * (data.ndim - 1)), (-1, *[1] * (data.ndim - 1))
    for _step in range(steps):
        t = torch.rand(8, generator=generator)
        t = shift * t / (1 + (shift - 1) * t)
        noise = torch.randn(clean.shape, generator=generator)
        level = t.reshape(level_shape)
        images = field.images.of_batch({"conditions": given}, None)
        x_t = (1 - level) * clean + level * noise
        velocity = field(x_t, 1000 * t, ["a red square"] * 8, (side, side), None, images)
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(field.field.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    pipeline.save_pretrained(folder / name)
    images = [{key: pictures(each)[row] for key, each in given.items()} for row in range(2)]
    call = {**field.field.call, "height": side, "width": side, "prompt": "a red square"}
    torch.save({"images": images, "call": call, "data": data}, folder / f"{name}.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-c", SAMPLE, str(folder / f"{name}.pt"), str(folder / name)]
    out = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return loss.item(), [float(word) for word in out.stdout.split()[-4:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(COLUMNS))
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            loss, (own, other, own_2, other_2) = overfit(name, args.steps, Path(folder))
            errors = f"{own:.3f} and {own_2:.3f}, of the other image {other:.3f} and {other_2:.3f}"
            print(f"{name:14s} loss {loss:.4f}  relative errors {errors}", flush=True)


if __name__ == "__main__":
    main()
