# SPDX-License-Identifier: Apache-2.0
"""Cost of a step of `train_flow_matching.py` beyond the model: against a bare step, and against diffusers' loop.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_training.py --use_cpu
    python tests/benchmarks/bench_training.py --config pipelines/dit-digits/training.json --num_steps 60

The script itself runs; between its steps, steps of two other loops are timed on copies of its model, so that all three
see the same machine at the same time. Each step of the script is divided by the steps of the others beside it, and the
median of these ratios is what counts; by wall time and, on the CPU, by the processor time of the process, which other
work on the machine does not enter.

* bare: forward, backward and a fused AdamW step on a fixed batch, x_t, times and target; nothing else.
* diffusers: the work that `examples/unconditional_image_generation/train_unconditional.py` does in a step: images
  decoded and transformed one by one, noise, a step of the diffusion's table for each sample, clipping, AdamW as it is
  by default, a schedule, and the loss read from the device and shown at each step. EMA and trackers are off, as they
  are by default. It is written anew from what that script does; torchvision's transforms are PIL's and numpy's here.
"""

import argparse
import copy
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_fm.arguments import parse_arguments
from diffusers_fm.training.run import TrainingRun


ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "training_scripts" / "train_flow_matching.py"


def bare_step(model: nn.Module, batch_size: int, shape: tuple[int, ...], labels: bool) -> Callable[[], None]:
    """Forward, backward and optimizer step on a fixed batch."""
    device = next(model.parameters()).device
    x_t, target = torch.randn(2, batch_size, *shape, device=device)
    timestep = torch.rand(batch_size, device=device) * 1000
    classes = torch.zeros(batch_size, dtype=torch.int64, device=device) if labels else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        F.mse_loss(model(x_t, timestep, classes), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def diffusers_step(
    model: nn.Module, args: argparse.Namespace, shape: tuple[int, ...], has_labels: bool
) -> Callable[[], None]:
    """A step of diffusers' loop, its data included."""
    device, side = next(model.parameters()).device, shape[1]
    train = datasets.load_dataset(str(ROOT / args.dataset_name), split="train")

    def transform(examples: dict[str, list]) -> dict[str, list]:
        images = []
        for image in examples["image"]:
            mode = "L" if shape[0] == 1 else "RGB"
            image = image.convert(mode).resize((side, side), PIL.Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(image, dtype=np.uint8).reshape(side, side, -1)).permute(2, 0, 1)
            images.append(pixels.contiguous().float().div(255).sub(0.5).div(0.5))
        return {"input": images, "label": examples["label"]}

    train.set_transform(transform)
    loader = DataLoader(train, batch_size=args.train_batch_size, shuffle=True, drop_last=True)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=10_000)
    progress_bar = tqdm(disable=True)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            yield from loader

    stream = batches()

    def step() -> None:
        batch = next(stream)
        clean = batch["input"].to(device)
        noise = torch.randn(clean.shape, device=clean.device)
        timesteps = torch.randint(0, 1000, (clean.shape[0],), device=clean.device).long()
        noisy = scheduler.add_noise(clean, noise, timesteps)
        labels = batch["label"].to(clean.device) if has_labels else None
        loss = F.mse_loss(model(noisy, timesteps, labels).float(), noise.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        progress_bar.update(1)
        progress_bar.set_postfix(loss=loss.detach().item(), lr=lr_scheduler.get_last_lr()[0])

    return step


def now() -> np.ndarray:
    """Seconds on the wall and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


class TimedRun(TrainingRun):
    """A run whose steps take turns with those of the other loops."""

    seconds: dict[str, list[np.ndarray]]

    def steps(self) -> Iterator[int]:
        """The run's steps."""
        # A copy of the model's pipeline comes with a copy of the model.
        bare, other = (copy.deepcopy(self.accelerator.unwrap_model(self.model)).train() for _ in range(2))
        for model in (bare, other):
            # The run counts the operations of its first call by a hook, which the copies would do at each.
            model._forward_pre_hooks.clear()
        pipeline = bare._predict[0].__self__
        shape, has_labels = pipeline.sample_shape, pipeline.num_classes > 0
        loops = {
            "bare": bare_step(bare, self.args.train_batch_size, shape, has_labels),
            "diffusers": diffusers_step(other, self.args, shape, has_labels),
        }
        self.seconds = {"script": [], "bare": [], "diffusers": []}
        own = super().steps()
        step: int | None = next(own, None)
        while step is not None:
            start = now()
            yield step
            step = next(own, None)
            self.seconds["script"].append(now() - start)
            for name, loop in loops.items():
                start = now()
                loop()
                self.seconds[name].append(now() - start)


def measure(config: Path, num_steps: int, num_warmup_steps: int, words: list[str]) -> dict[str, Any]:
    """
    Medians of the three loops, and of the ratios of their steps.

    Args:
        config (`Path`):
            Arguments of the script.
        num_steps (`int`):
            Steps of each.
        num_warmup_steps (`int`):
            Steps before these, not counted.
        words (`list[str]`):
            More arguments of the script.

    Returns:
        `dict[str, Any]`: milliseconds of a step, and ratios.
    """
    spec = importlib.util.spec_from_file_location("train_flow_matching", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    runs: list[TimedRun] = []

    class Kept(TimedRun):
        def __init__(self, args: argparse.Namespace) -> None:
            super().__init__(args)
            runs.append(self)

    script.TrainingRun = Kept
    with tempfile.TemporaryDirectory() as folder:
        line = [
            f"--config={config}",
            f"--output_dir={folder}/run",
            f"--max_train_steps={num_steps + num_warmup_steps}",
        ]
        line += ["--num_validation_images=0", "--checkpointing_steps=1000000", "--validation_steps=1000000"]
        # No search for a solver at the end.
        line += ["--num_inference_steps=1"]
        script.main(parse_arguments(script.ScriptArguments, [*line, "--report_to=none", *words]))
    seconds = {name: np.array(values[num_warmup_steps:]) for name, values in runs[0].seconds.items()}
    figures: dict[str, Any] = {}
    for column, clock in enumerate(("wall", "cpu")):
        for name, values in seconds.items():
            figures[f"{name}_{clock}_ms"] = round(1e3 * float(np.median(values[:, column])), 3)
        for name in ("bare", "diffusers"):
            ratios = seconds["script"][:, column] / seconds[name][:, column]
            figures[f"script_over_{name}_{clock}"] = round(float(np.median(ratios)), 4)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "pipelines" / "unet-digits" / "training.json")
    parser.add_argument("--num_steps", type=int, default=150)
    parser.add_argument("--num_warmup_steps", type=int, default=5)
    known, words = parser.parse_known_args()
    print(json.dumps(measure(**vars(known), words=words), indent=2))
