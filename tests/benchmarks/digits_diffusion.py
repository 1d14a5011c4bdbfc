# SPDX-License-Identifier: Apache-2.0
"""A diffusion model of the digits, and what it gains as a flow: distance to the data by the number of calls.

    python tests/benchmarks/digits_diffusion.py runs/ddpm-digits --train
    python tests/benchmarks/digits_diffusion.py runs/ddpm-digits runs/ddpm-digits-flow --picture calls.png

`--train` trains the first folder with diffusers alone: `UNet2DModel`, `DDPMScheduler`, the error of the noise, about
two minutes of one core. Then each folder is sampled: a `DDPMPipeline` by `DDIMScheduler`, a `FlowMatchPipeline` by its
own solver and by Euler, with and without clipping of the data estimates; `--solvers` chooses among these.
FD is the Frechet distance of 2,000 samples to the training split by the features of a small
classifier; `error` the root mean square difference to the folder's own samples of `--fine_calls`.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from digits_flow_map import SCALE, feature_network, set_solver
from digits_judge import load_split
from labelled import labelled
from torch.nn import functional

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.evaluation.distances import frechet_distance


UNET = Path(__file__).parents[2] / "pipelines" / "unet-digits" / "unet"


def train(folder: Path, images: np.ndarray, num_steps: int = 2000) -> None:
    """Train a DDPM (arXiv 2006.11239, algorithm 1) and save it as stock diffusers does."""
    torch.manual_seed(0)
    unet = UNet2DModel.from_config(UNet2DModel.load_config(UNET) | {"num_class_embeds": None})
    scheduler = DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, 100, num_steps)
    data = 2 * torch.from_numpy(images).float()[:, None] - 1
    for _ in range(num_steps):
        clean = data[torch.randint(len(data), (64,))]
        noise, timesteps = torch.randn_like(clean), torch.randint(1000, (64,))
        loss = functional.mse_loss(unet(scheduler.add_noise(clean, noise, timesteps), timesteps).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    DDPMPipeline(unet.eval(), scheduler).save_pretrained(folder)


def samplers(folder: str) -> dict[str, Callable[[torch.Tensor, int], torch.Tensor]]:
    """Ways to sample a folder: noise and a number of calls to images. DDPMs are clipped by default."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)

    def flow(noise: torch.Tensor, calls: int, solver: str, clip_sample: bool = False) -> torch.Tensor:
        set_solver(pipeline, solver, calls)
        pipeline.scheduler = pipeline.scheduler.with_settings(clip_sample=clip_sample)
        return pipeline(latents=noise, num_inference_steps=calls, output_type="latent").images

    @torch.no_grad()
    def ddim(x: torch.Tensor, calls: int, clip_sample: bool = False) -> torch.Tensor:
        scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=clip_sample)
        scheduler.set_timesteps(calls)
        for timestep in scheduler.timesteps:
            x = scheduler.step(pipeline.unet(x, timestep).sample, timestep, x).prev_sample
        return x

    if not isinstance(pipeline, FlowMatchPipeline):
        return {"ddim": ddim, "ddim, clipped": partial(ddim, clip_sample=True)}
    names = dict.fromkeys((pipeline.scheduler.config.solver, "euler"))
    own = {name: partial(flow, solver=name) for name in names}
    return own | {"euler, clipped": partial(flow, solver="euler", clip_sample=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--train", action="store_true", help="Train the first folder.")
    parser.add_argument("--calls", type=int, nargs="+", default=[5, 10, 20, 50])
    parser.add_argument("--fine_calls", type=int, default=200)
    parser.add_argument("--solvers", nargs="+", help="Names in the table.")
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--picture", help="File of a picture: a row of digits for each line of the table.")
    args = parser.parse_args()

    images, labels = load_split("train")
    if args.train:
        train(Path(args.folders[0]), images)
        return
    network = feature_network(images, labels)

    @torch.no_grad()
    def features(x: torch.Tensor) -> np.ndarray:
        return network(x.clamp(-1, 1))[0].numpy()

    reference = features(2 * torch.from_numpy(images).float()[:, None] - 1)
    noise = torch.randn(args.num_images, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    rows, names = [], []
    print("| pipeline | solver | calls | FD | error |\n|---|---|---|---|---|")
    for folder in args.folders:
        for solver, sample in samplers(folder).items():
            if args.solvers and solver not in args.solvers:
                continue
            fine = sample(noise, args.fine_calls)
            for calls in args.calls:
                drawn = sample(noise, calls)
                error = (drawn.clamp(-1, 1) - fine.clamp(-1, 1)).square().mean().sqrt() / 2
                shown = f"{Path(folder).name} | {solver} | {calls}"
                print(f"| {shown} | {frechet_distance(features(drawn), reference):.2f} | {error:.4f} |", flush=True)
                names.append(shown.replace(" |", ","))
                pixels = (drawn[:20, 0].clamp(-1, 1) / 2 + 0.5).numpy()
                rows.append(np.concatenate(list(np.pad(pixels, ((0, 0), (1, 1), (1, 1)))), axis=1))
    if args.picture:
        pixels = (255 * np.concatenate(rows)).round().astype(np.uint8)
        labelled(PIL.Image.fromarray(pixels), [""] * 20, names, SCALE).save(args.picture)


if __name__ == "__main__":
    main()
