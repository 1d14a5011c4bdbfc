# SPDX-License-Identifier: Apache-2.0
"""Throughput of full-size transformers in training: images/s, TFLOP/s, MFU and peak memory, compiled and not.

    python tests/benchmarks/bench_throughput.py --json throughput.json
    python tests/benchmarks/bench_throughput.py --models sd3-medium --train_batch_size 32 --gradient_checkpointing
    python tests/benchmarks/bench_throughput.py --tiny --num_steps 3 --compile off

DiT-XL/2 and the transformer of Stable Diffusion 3 medium, from the configurations under `pipelines/`, with random
weights, on random latents of 256 x 256 images (32 x 32), on the GPU if there is one. A step is that of the training
scripts: noise, logit-normal times, x_t, the network under autocast, the velocity loss, clipping and fused AdamW in
float32; data and autoencoder are left out. The operations are those of the forward and backward pass, without what
gradient checkpointing computes again; MFU is their part of the GPU's dense peak. `--tiny` runs the same on small
configurations, to see that it runs.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from torch import nn

from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.models.costs import forward_flops, with_backward
from diffusers_fm.paths import make_path
from diffusers_fm.timesteps import sample_timesteps
from diffusers_fm.training.metrics import find_gpu, peak_flops, peak_memory
from diffusers_fm.training.optimizers import make_optimizer


PIPELINES = Path(__file__).parents[2] / "pipelines"
SIDE = 32
TEXT_TOKENS = 77 + 77

TINY = {
    "dit-xl": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8},
    "sd3-medium": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "caption_projection_dim": 16,
        "joint_attention_dim": 24,
        "pooled_projection_dim": 20,
    },
}


def make_dit(tiny: bool) -> tuple[nn.Module, Callable[[int, torch.device], dict[str, torch.Tensor]]]:
    """DiT-XL/2, and a batch of classes for it."""
    config = json.loads((PIPELINES / "dit-imagenet256" / "transformer" / "config.json").read_text(encoding="utf-8"))
    model: Any = DiTTransformer2DModel.from_config({**config, **(TINY["dit-xl"] if tiny else {})})
    return model, lambda size, device: {"class_labels": torch.randint(0, 1000, (size,), device=device)}


def make_sd3(tiny: bool) -> tuple[nn.Module, Callable[[int, torch.device], dict[str, torch.Tensor]]]:
    """The transformer of Stable Diffusion 3 medium, and embeddings of captions of the CLIPs' and a T5's 77 tokens."""
    config = json.loads((PIPELINES / "sd3-medium" / "transformer" / "config.json").read_text(encoding="utf-8"))
    config = {**config, **(TINY["sd3-medium"] if tiny else {})}
    widths = config["joint_attention_dim"], config["pooled_projection_dim"]
    model: Any = SD3Transformer2DModel.from_config(config)
    return model, lambda size, device: {
        "encoder_hidden_states": torch.randn(size, TEXT_TOKENS, widths[0], device=device),
        "pooled_projections": torch.randn(size, widths[1], device=device),
    }


MODELS = {"dit-xl": make_dit, "sd3-medium": make_sd3}


def make_step(
    model: nn.Module, accelerator: Accelerator, latents: torch.Tensor, conditions: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """A training step of a prepared model on a fixed batch."""
    path, size, device = make_path("ot"), len(latents), latents.device
    optimizer = make_optimizer(model.parameters(), 1e-4)

    def step() -> None:
        noise = torch.randn_like(latents)
        t = sample_timesteps("logit_normal", size)
        x_t = path.sample(latents, noise, t)
        prediction = model(x_t, timestep=(1000 * t).float().to(device), return_dict=False, **conditions)[0]
        losses = flow_matching_loss(path, prediction[:, : latents.shape[1]], latents, noise, t, "flow_prediction")
        accelerator.backward(losses.mean())
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, compiled: bool, args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """
    The figures of a model.

    Args:
        name (`str`):
            Of `MODELS`.
        compiled (`bool`):
            Whether it is compiled.
        args (`argparse.Namespace`):
            Of the command.
        accelerator (`Accelerator`):
            With the precision.

    Returns:
        `dict[str, Any]`: a row.
    """
    device = accelerator.device
    torch.manual_seed(0)
    model: Any
    model, make_conditions = MODELS[name](args.tiny)
    row: dict[str, Any] = {
        "model": name,
        "compile": compiled,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    latents = torch.randn(args.train_batch_size, 4 if name == "dit-xl" else 16, SIDE, SIDE, device=device)
    conditions = make_conditions(args.train_batch_size, device)
    forward = forward_flops(model, (latents,), {"timestep": torch.zeros(len(latents)), **conditions})
    flops = with_backward(model, forward)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    model = accelerator.prepare_model(model.train())
    step = make_step(torch.compile(model) if compiled else model, accelerator, latents, conditions)

    def seconds() -> float:
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    row["first_step_s"] = round(seconds(), 3)
    for _ in range(args.num_warmup_steps):
        step()
    step_time = statistics.median(seconds() for _ in range(args.num_steps))
    row["step_ms"] = round(1e3 * step_time, 2)
    row["images_per_second"] = round(len(latents) / step_time, 2)
    row["tflops_per_second"] = round(flops / step_time / 1e12, 4)
    row["peak_memory_gib"] = peak_memory(device)
    gpu = find_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    peak = None if gpu is None else peak_flops(gpu, accelerator.mixed_precision, args.allow_tf32)
    row["mfu"] = None if peak is None else round(flops / step_time / peak, 4)
    return row


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints a table, and writes the rows to a file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--compile", choices=["on", "off", "both"], default="both")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--num_steps", type=int, default=20)
    parser.add_argument("--num_warmup_steps", type=int, default=3)
    parser.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="bf16")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--allow_tf32", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="Small configurations.")
    parser.add_argument("--use_cpu", action="store_true")
    parser.add_argument("--json", type=Path, help="File for the rows.")
    args = parser.parse_args(argv)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision)
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"{name}, torch {torch.__version__}, {args.mixed_precision}, batch {args.train_batch_size}")
    columns = "model compile step_ms images_per_second tflops_per_second mfu peak_memory_gib first_step_s".split()
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    rows = []
    for model in args.models:
        for compiled in {"on": [True], "off": [False], "both": [False, True]}[args.compile]:
            try:
                row = measure(model, compiled, args, accelerator)
            except torch.OutOfMemoryError:
                row = {"model": model, "compile": compiled, "step_ms": "out of memory"}
            rows.append({"device": name, "train_batch_size": args.train_batch_size, **row})
            print("| " + " | ".join(_text(row.get(column)) for column in columns) + " |", flush=True)
            accelerator.free_memory()
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _text(value: object) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
