# SPDX-License-Identifier: Apache-2.0
"""Plans say what runs then take: activations, checkpoints, caches, steps."""

import itertools
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import tiny_pipeline
from tiny_text_to_image import save_colours, tiny_stable_diffusion_3, train_text_to_image
from torch import nn
from torch.profiler import ProfilerActivity, profile
from training_runs import ROOT, load_script, make_dataset, save_untrained, train

from diffusers_fm.arguments import parse_arguments
from diffusers_fm.models.costs import saved_bytes
from diffusers_fm.objectives.flow_matching import TrainableModel
from diffusers_fm.pipelines.families import LORA_LAYERS
from diffusers_fm.text_to_image.lora import add_lora
from diffusers_fm.training.metrics import GPUS, find_gpu
from diffusers_fm.training.optimizers import OPTIMIZERS
from diffusers_fm.training.planning import GIB, OVERHEAD, DryRun, Plan


SCRIPTS = {name: load_script(ROOT / "training_scripts" / f"train_text_to_image{name}.py") for name in ("", "_lora")}


class Network(nn.Module):
    """Transformer with all of its arguments by place."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        return self.transformer(sample, *text, timestep, return_dict=False)[0]


def text_to_image_model(lora: bool = False) -> Network:
    pipeline = tiny_stable_diffusion_3(num_layers=4, dual_attention_layers=(0,), qk_norm="rms_norm", sample_size=24)
    pipeline.transformer.requires_grad_(True).train()
    if lora:
        add_lora(pipeline.transformer, 2, 2.0, LORA_LAYERS)
    return Network(pipeline.transformer)


def plan_of(script: ModuleType, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan that a script would print."""
    plans = []
    monkeypatch.setattr(DryRun, "finish", lambda run: plans.append(run.plan()))
    script.main(parse_arguments(script.ScriptArguments, [*words, "--dry_run"]))
    return plans[0]


def inputs(size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(size, 4, 24, 24), 1000 * torch.rand(size), torch.randn(size, 32, 24), torch.randn(size, 20)


def held_and_peak(model: nn.Module, args: tuple[Any, ...], precision: str = "no") -> tuple[int, int]:
    """Bytes that the allocator has given out after a forward pass, its answer left out, and the most of them until the
    end of the backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != "no"):
            answer = model(*args)
        with torch.profiler.record_function("forward ends"):
            pass
        answer.float().mean().backward()
    results: Any = profiler.profiler and profiler.profiler.kineto_results
    events = sorted(results.events(), key=lambda event: event.start_ns())
    end = next(event.start_ns() for event in events if event.name() == "forward ends")
    changes = [(event.start_ns() < end, event.nbytes()) for event in events if event.name() == "[memory]"]
    held = sum(size for is_forward, size in changes if is_forward) - answer.untyped_storage().nbytes()
    return held, max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("no", 0.02), ("bf16", 0.03)])
def test_activations_are_what_the_allocator_gives_out(lora: bool, precision: str, tolerance: float) -> None:
    model = text_to_image_model(lora)
    args = inputs(8)
    model(*args).mean().backward()
    given = sum(tensor.nbytes for tensor in args)
    held, _ = held_and_peak(model, args, precision)
    planned = saved_bytes(model, args, mixed_precision=precision, rules_of_gpus=False) - given
    assert planned == pytest.approx(held, rel=tolerance)
    # Linear in the batch, but for weights in 16 bits; and GPUs keep more, for they normalize in float32.
    one, two, eight = (saved_bytes(model, inputs(size), mixed_precision=precision) for size in (1, 2, 8))
    assert 8 * (two - one) == pytest.approx(eight, rel=0.1)
    assert eight >= planned + given


def test_checkpointing_keeps_inputs_and_one_block() -> None:
    model = text_to_image_model()
    args = inputs(16)
    plain = saved_bytes(model, args)
    given = sum(tensor.nbytes for tensor in args)
    model.transformer.enable_gradient_checkpointing()
    planned = saved_bytes(model, args) - given
    model(*args).mean().backward()
    held, peak = held_and_peak(model, args)
    # On top come gradients, of the weights and within the block that is gone through.
    assert held < planned < peak < 1.3 * planned
    assert planned < 0.7 * plain


@pytest.mark.parametrize("kind", ["unet", "dit", "sd3"])
def test_activations_of_every_network(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    model = TrainableModel(pipeline).requires_grad_(True).train()

    def batch(size: int) -> tuple[Any, ...]:
        labels = torch.zeros(size, dtype=torch.int64) if pipeline.num_classes else None
        return torch.randn(size, *pipeline.sample_shape), torch.rand(size), labels

    args = batch(8)
    model(*args).mean().backward()
    given = sum(tensor.nbytes for tensor in args if tensor is not None)
    held, _ = held_and_peak(model, args)
    plain = saved_bytes(model, args)
    assert plain - given == pytest.approx(held, rel=0.02)
    pipeline.denoiser.enable_gradient_checkpointing()
    assert saved_bytes(model, args) < plain


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_runs_of_text_to_image_take_what_was_planned(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_stable_diffusion_3().save_pretrained(tmp_path / "model")
    run = partial(train_text_to_image, SCRIPTS[name], tmp_path / "model", data, tmp_path / "run")
    options = {"center_crop": True, "cache_latents": True, "cache_text_embeddings": True, "random_flip": True}
    options |= {"use_ema": True, "max_train_steps": 2, "checkpointing_steps": 2}
    run(dry_run=True, **options)
    told = capsys.readouterr().out
    assert "20 images, 5.0 steps an epoch.\n2 steps of 4 in all" in told
    assert "Adapters of" in told or name == ""
    assert "7 held out. `timestep` is 1000 t at noise level t, x_t of shape (4, 8, 8)." in told
    # Nothing is written.
    assert not (tmp_path / "run").exists()

    words = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data)]
    words += ["--resolution=16", "--max_sequence_length=16", "--train_batch_size=4", "--lora_alpha=4"]
    words = words[:-1] if name == "" else words
    words += [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
    plan = plan_of(SCRIPTS[name], words, monkeypatch)
    run(**options)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    state = load_file(checkpoint / "model.safetensors")
    trained = [tensor for key, tensor in state.items() if not key.endswith("pos_embed.pos_embed")]
    assert plan.trained_parameters == sum(tensor.numel() for tensor in trained)
    # Headers and names weigh something where the tensors are tiny.
    written = sum(file.stat().st_size for file in checkpoint.iterdir())
    assert 0.9 * plan.disk["each checkpoint"] < written < plan.disk["each checkpoint"] + 200_000
    for cache, folder in (("cache of latents", "latents"), ("cache of embeddings", "text_embeddings")):
        files = (tmp_path / "run" / "precomputed" / folder).glob("*.safetensors")
        size = sum(tensor.nbytes for file in files for tensor in load_file(file).values())
        # Images and captions of the held-out split, 7 of 20, are not in the plan.
        assert plan.disk[cache] <= size <= 1.4 * plan.disk[cache]


def test_flow_matching_plans(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, data = save_untrained(tmp_path / "model", "unet"), make_dataset(tmp_path / "data")
    train(model, data, tmp_path / "run", dry_run=True, gradient_accumulation_steps=2, gradient_checkpointing=True)
    told = capsys.readouterr().out
    assert "20 images, 1.2 steps an epoch.\n4 steps of 16 in all" in told
    assert told.splitlines()[-1].startswith("  this CPU ")
    assert not (tmp_path / "run").exists()


def test_memory_of_a_plan(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_stable_diffusion_3(t5=False, num_layers=1).save_pretrained(tmp_path / "model")
    words = ["--pretrained_model_name_or_path", str(tmp_path / "model"), "--dataset_name", str(data)]

    def plan(*more: str) -> Any:
        return plan_of(SCRIPTS[""], [*words, "--resolution=16", *more], monkeypatch)

    one = plan()
    assert one.weights - one.gradients < 0.5 * one.weights
    assert one.peak == one.weights + one.frozen + one.optimizer + max(one.gradients, one.activations)
    assert plan("--train_batch_size=32").activations == 2 * one.activations
    accumulated = plan("--gradient_accumulation_steps=2")
    assert accumulated.peak == one.peak + min(one.gradients, one.activations)
    assert accumulated.flops == 2 * one.flops
    half = plan("--mixed_precision=bf16")
    assert half.weights == one.weights
    assert half.copies == pytest.approx(one.gradients / 2, rel=0.1)
    assert plan("--offload").frozen == 0
    for optimizer in OPTIMIZERS:
        assert 0 < plan("--optimizer", optimizer).optimizer <= 2 * one.optimizer
    monkeypatch.setenv("WORLD_SIZE", "2")
    two = plan("--use_ema")
    assert two.buckets == two.average == one.gradients
    assert two.samples_per_step == 2 * one.samples_per_step
    assert plan("--use_ema", "--offload_ema").average == 0


def test_cards_are_known() -> None:
    assert all(find_gpu(f"NVIDIA {name}") is gpu for name, gpu in GPUS.items())
    assert OVERHEAD * GIB < GIB * min(gpu.memory for gpu in GPUS.values())


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA A10", "A10"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", "T4"),
        # Names that only begin with, or end in, that of another GPU.
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA T400", None),
        ("NVIDIA A1000", None),
    ],
)
def test_gpus_are_found_by_whole_words(device_name: str, name: str | None) -> None:
    assert find_gpu(device_name) is (None if name is None else GPUS[name])
