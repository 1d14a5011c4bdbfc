# SPDX-License-Identifier: Apache-2.0
"""Overfit tiny networks of many families on one target, and sample them by their stock pipelines and schedulers.

    python tests/benchmarks/bench_families.py [names] [--steps 300]

The network is trained through a `VelocityField`; a second process that imports nothing of this package samples the
stock pipeline in 30 steps of the stock scheduler. Printed is the relative error of the final latents. `--planted`
trains on the negative velocity instead, which the error has to show.
"""

import argparse
import copy
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch


TESTS = Path(__file__).parents[1]
LIMITS = {
    "sd3": 0.1, "flux_text": 0.1, "flux2_klein": 0.1, "ltx_text": 0.1, "qwen": 0.1, "z_image": 0.1, "aura": 0.1,
    "chroma": 0.3, "cogview4_text": 0.3, "sana_text": 0.3, "lumina2_text": 0.3, "wan_text": 0.3, "mochi_text": 0.3,
}  # fmt: skip
# Networks of the recipes that are narrower than a patch of latents cannot learn the identity.
WIDER: dict[str, dict[str, Any]] = {
    "sd3": {"attention_head_dim": 32, "caption_projection_dim": 64},
    "flux_text": {"num_layers": 2, "num_attention_heads": 4},
    "flux2_klein": {"num_layers": 2, "num_attention_heads": 4},
    "qwen": {"num_layers": 2, "num_attention_heads": 4},
    "z_image": {"dim": 64, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2},
    "aura": {"attention_head_dim": 32, "caption_projection_dim": 64, "num_mmdit_layers": 2},
    "ltx_text": {"attention_head_dim": 32, "cross_attention_dim": 64, "num_layers": 2},
    "chroma": {"num_layers": 2, "num_attention_heads": 4},
    "cogview4_text": {"attention_head_dim": 32, "num_layers": 2, "time_embed_dim": 64},
    "sana_text": {"num_layers": 2, "num_attention_heads": 8, "attention_head_dim": 8, "num_cross_attention_heads": 8,
                  "cross_attention_head_dim": 8, "cross_attention_dim": 64, "interpolation_scale": 1.0},
    "lumina2_text": {"hidden_size": 64, "num_layers": 2, "num_attention_heads": 4, "num_kv_heads": 4,
                     "axes_dim_rope": (8, 4, 4)},
    "wan_text": {"attention_head_dim": 32, "num_layers": 2, "ffn_dim": 128, "freq_dim": 64},
    "mochi_text": {"attention_head_dim": 64, "num_attention_heads": 4, "pooled_projection_dim": 64,
                   "time_embed_dim": 64},
}  # fmt: skip
# Each channel of their latents has a scale and a mean of its own, and a slow target is little else: they learn white
# noise.
WHITE = ("qwen", "wan_text")
# Steps in units of those of the others.
LONGER = {"wan_text": 3}
SAMPLE = """
import pickle, sys, torch
sys.path.insert(0, sys.argv[2])
saved, weights, text, call, noise, data = pickle.load(open(sys.argv[1], "rb"))
pipeline = pickle.loads(saved)
pipeline.encode_prompt = lambda *args, **kwargs: text
pipeline.transformer.load_state_dict(weights)
pipeline.transformer.eval()
assert not [name for name in sys.modules if name.startswith("diffusers_fm")]
pipeline.set_progress_bar_config(disable=True)
latents = noise
if type(pipeline).__name__.startswith("Flux2"):
    pipeline.prepare_latents, prepare = (lambda *a, **k: (noise, *prepare(*a, **k)[1:])), pipeline.prepare_latents
    latents = None
end = []
original = pipeline.scheduler.step
def step(*args, **kwargs):
    out = original(*args, **kwargs)
    end.append(out[0])
    return out
pipeline.scheduler.step = step
pipeline(**call, latents=latents, num_inference_steps=30, output_type="latent")
print(((end[-1] - data).norm() / data.norm()).item())
"""


def smooth(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Latents that vary slowly along height and width."""
    coarse = torch.randn(*shape[:-2], 2, 2, generator=generator).flatten(0, -4)
    return torch.nn.functional.interpolate(coarse, shape[-2:], mode="bilinear").reshape(shape)


def overfit(name: str, steps: int, sign: float, folder: Path) -> tuple[float, float]:
    """Last loss, and relative error of the latents that the stock pipeline samples."""
    from tiny_families import FAMILIES, awake

    from diffusers_fm.pipelines import DecodeMap, VelocityField

    family = FAMILIES[name]()
    pipeline = family.pipeline
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    pipeline.transformer = awake(type(pipeline.transformer)(**{**config, **WIDER[name]})).train()
    without_text = copy.copy(pipeline)  # text encoders cannot be pickled whole; what they say of the prompt is
    vars(without_text).update({key: None for key in pipeline.components if key.startswith(("text_enc", "tokenizer"))})
    saved = pickle.dumps(without_text)
    field, steps = VelocityField(pipeline, **family.call), LONGER.get(name, 1) * steps
    prompt = {"prompt": ["a red square"]}
    generator = torch.Generator().manual_seed(0)
    decode_map = DecodeMap(field, **prompt)
    data = decode_map.from_latents(smooth((1, *decode_map.map.y_shape), generator))
    data = torch.randn(data.shape, generator=generator) if name in WHITE else (data - data.mean()) / data.std()
    shape = data.shape
    shift = field.shift(**prompt)
    optimizer = torch.optim.Adam(field.network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    batch = {"prompt": prompt["prompt"] * 8}
    memo = field.keep_text()
    for _ in range(steps):
        t = torch.rand(8, generator=generator)
        t = shift * t / (1 + (shift - 1) * t)
        noise = torch.randn(8, *shape[1:], generator=generator)
        level = t.reshape(-1, *[1] * (data.ndim - 1))
        velocity = sign * field((1 - level) * data + level * noise, t, **batch)
        loss = (velocity - (noise - data)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(field.network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    noise = torch.randn(shape, generator=generator)
    (text,) = memo.kept.values()
    path = folder / f"{name}.pickle"
    path.write_bytes(pickle.dumps((saved, field.network.state_dict(), text, {**field.call, **prompt}, noise, data)))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [sys.executable, "-c", SAMPLE, str(path), str(TESTS)]
    out = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return loss.item(), float(out.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(LIMITS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--planted", action="store_true", help="train on the negative velocity")
    args = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            loss, error = overfit(name, args.steps, -1.0 if args.planted else 1.0, Path(folder))
            print(f"{name:14s} loss {loss:.4f}  relative error {error:.3f}  limit {LIMITS[name]}", flush=True)


if __name__ == "__main__":
    main()
