# SPDX-License-Identifier: Apache-2.0
"""Adapters: stock diffusers reads them, they change nothing at scale 0, and a resumed run is the uninterrupted one."""

import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from processes import run_stock
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_pipelines import tiny_dit, tiny_vae
from tiny_text_to_image import sample, save_colours, tiny_stable_diffusion_3, train_text_to_image
from training_runs import ROOT, load_script, read_log, unused_arguments

from diffusers_fm.arguments import parse_arguments
from diffusers_fm.pipelines.families import LORA_LAYERS
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.lora import (
    adaptable_layers,
    add_lora,
    parameter_groups,
    save_lora,
)


SCRIPT = ROOT / "training_scripts" / "train_text_to_image_lora.py"
script = load_script(SCRIPT)
train = partial(train_text_to_image, script)

ADAPTED = ("transformer", "text_encoder", "text_encoder_2")
WEIGHTS = "pytorch_lora_weights.safetensors"

# Loads adapters and samples with and without them, in a process that knows diffusers alone.
STOCK = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
def sample():
    return pipeline(
        "a red square", height=16, width=16, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=16,
        generator=torch.Generator().manual_seed(0), output_type="np",
    ).images
base = sample()
pipeline.load_lora_weights(sys.argv[2])
adapted = sample()
for name, adapters in pipeline.get_list_adapters().items():
    pipeline.set_adapters(adapters, 0.0)
np.savez(sys.argv[3], base=base, adapted=adapted, off=sample())
assert not any(name.startswith("diffusers_fm") for name in sys.modules)
print(*sorted(pipeline.get_list_adapters()))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the layout of Stable Diffusion 3.5, with a second attention in its first block."""
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion_3(dual_attention_layers=(0,), qk_norm="rms_norm").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("data"))


def adapters(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / WEIGHTS)


def assert_same_adapters(one: Path, other: Path) -> None:
    first, second = adapters(one), adapters(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_stock_diffusers_reads_what_comes_out(model: Path, data: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in model.rglob("*.safetensors")}
    options = {"rank": 2, "lora_alpha": 8, "learning_rate": 1e-2, "train_text_encoder": True, "text_encoder_lr": 1e-2}
    options |= {"use_ema": True, "num_validation_images": 1, "validation_steps": 2}
    words = ["--validation_prompts", "red", "a blue square"]
    output_dir = train(model, data, tmp_path / "run", *words, **options)
    assert {file: file.read_bytes() for file in model.rglob("*.safetensors")} == before
    assert [line[0] for line in read_log(output_dir, "validation_loss")] == [2, 4]
    assert not (output_dir / "model_index.json").exists()
    card = (output_dir / "README.md").read_text()
    assert f'pipeline.load_lora_weights("{output_dir}")' in card
    # The path of this machine is in none of the metadata.
    with safe_open(output_dir / WEIGHTS, "pt") as file:
        assert str(model) not in str(file.metadata())

    told = run_stock(STOCK, model, output_dir, tmp_path / "images.npz")
    assert told.stdout.split() == sorted(ADAPTED)
    assert "No LoRA keys" not in told.stderr
    images = np.load(tmp_path / "images.npz")
    assert np.array_equal(images["off"], images["base"])
    assert np.abs(images["adapted"] - images["base"]).max() > 1e-2

    # What the reader samples with is what training did: W + alpha / rank B A, merged here by hand.
    merged = StableDiffusion3Pipeline.from_pretrained(model)
    state = adapters(output_dir)
    assert {name.split(".")[0] for name in state} == set(ADAPTED)
    for name in {key.rsplit(".lora_", 1)[0] for key in state}:
        layer = merged.components[name.split(".")[0]].get_submodule(name.split(".", 1)[1])
        change = state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        # The last block's queries of the text ask for what nobody reads.
        assert change.any() != name.endswith("blocks.1.attn.add_q_proj"), name
        layer.weight.data += 8 / 2 * change
    assert np.allclose(sample(merged), images["adapted"], atol=1e-4)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_survive_saving(use_dora: bool, tmp_path: Path) -> None:
    pipeline = tiny_stable_diffusion_3()
    base = sample(pipeline)
    add_lora(pipeline.transformer, 2, 6.0, LORA_LAYERS, use_dora=use_dora)
    if not use_dora:
        # B is 0. DoRA divides by the rows' lengths and multiplies by them, which rounds.
        assert np.array_equal(sample(pipeline), base)
    assert np.allclose(sample(pipeline), base, atol=1e-4)
    torch.manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    save_lora(pipeline, tmp_path)
    loaded = tiny_stable_diffusion_3()
    loaded.load_lora_weights(tmp_path)
    adapted = sample(pipeline)
    assert np.abs(adapted - base).max() > 1e-2
    assert np.array_equal(sample(loaded), adapted)


def test_a_resumed_run_is_the_uninterrupted_one(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"lora_dropout": 0.2, "train_text_encoder": True, "use_ema": True, "caption_dropout": 0.3}
    options |= {"checkpointing_steps": 3, "lr_scheduler": "cosine", "lr_warmup_steps": 1, "text_encoder_lr": 1e-3}
    whole = train(model, data, tmp_path / "whole", max_train_steps=5, **options)
    resumed = train(model, data, tmp_path / "resumed", max_train_steps=5, **options, num_validation_images=0)
    for name in ("README.md", WEIGHTS):
        (resumed / name).unlink()
    train(model, data, resumed, max_train_steps=5, resume_from_checkpoint="checkpoint-3", **options)
    assert_same_adapters(whole, resumed)
    assert read_log(whole, "loss") == read_log(resumed, "loss")

    # A checkpoint holds the adapters alone, and their averages.
    state = load_file(whole / "checkpoint-3" / "model.safetensors")
    assert state
    assert all(".lora_" in name for name in state)
    with pytest.raises(ValueError, match="--lora_alpha was 4.0 in the run that is resumed and cannot be 2.0 now"):
        train(model, data, resumed, resume_from_checkpoint="latest", lora_alpha=2, max_train_steps=6, **options)


def test_cached_text_embeddings_serve_the_t5_of_trained_clips(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"center_crop": True, "caption_dropout": 0.3, "text_encoder_dropout": 0.3}
    options |= {"train_text_encoder": True, "text_encoder_lr": 1e-2, "gradient_checkpointing": True}
    on_the_way = train(model, data, tmp_path / "on the way", **options)
    cached = train(model, data, tmp_path / "cached", **options, cache_latents=True, cache_text_embeddings=True)
    losses = read_log(on_the_way, "loss", "gradient_norm")
    for one, other in zip(losses, read_log(cached, "loss", "gradient_norm"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    # Checkpointing computes again, it changes nothing.
    plain = train(model, data, tmp_path / "plain", **{**options, "gradient_checkpointing": False})
    for name, tensor in adapters(plain).items():
        assert torch.allclose(tensor, adapters(on_the_way)[name], atol=1e-6), name


def test_half_precision_freezes_the_base_and_not_the_adapters(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"train_text_encoder": True, "lora_blocks": "1", "lora_layers": "attn.to_q, ff.net.2"}
    output_dir = train(model, data, tmp_path / "run", mixed_precision="bf16", **options)
    state = adapters(output_dir)
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    layers = {name.rsplit(".lora_", 1)[0] for name in state if name.startswith("transformer.")}
    assert layers == {f"transformer.transformer_blocks.1.{layer}" for layer in ("attn.to_q", "ff.net.2")}
    assert all(tensor.any() for name, tensor in state.items() if "lora_B" in name)
    # Of a step of 1e-3 bfloat16 would have lost most.
    changed = adapters(train(model, data, tmp_path / "next", mixed_precision="bf16", max_train_steps=5, **options))
    assert all(not torch.equal(changed[name], tensor) for name, tensor in state.items())


def test_learning_rates_of_transformer_and_text_encoders() -> None:
    pipeline = tiny_stable_diffusion_3()
    add_lora(pipeline.transformer, 2, 2.0, ["to_q"])
    add_lora(pipeline.text_encoder, 2, 2.0, ["q_proj"])
    model = TrainedField(pipeline, "transformer", {}, [pipeline.text_encoder])
    own, others = parameter_groups(model, 1e-6)
    assert "lr" not in own
    assert others["lr"] == 1e-6
    # Two attentions and two layers of a CLIP, each with A and B.
    assert [len(own["params"]), len(others["params"])] == [4, 4]


def test_default_layers_are_all_projections_of_attention(model: Path) -> None:
    transformer = StableDiffusion3Pipeline.from_pretrained(model).transformer
    layers = [name for name in adaptable_layers(transformer) if ".to_" in name or ("_proj" in name and "attn" in name)]
    assert {name.split(".", 1)[1] for name in layers} == set(LORA_LAYERS)
    add_lora(transformer, 2, 2.0, LORA_LAYERS)
    adapted = {name.split(".lora_A")[0] for name, _ in transformer.named_parameters() if ".lora_A." in name}
    assert any(".attn2." in name for name in adapted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lora_layers": "to_q,to_qq"},
            r"SD3Transformer2DModel has no layers 'to_qq' for an adapter; it has .*attn2\.to_q",
        ),
        ({"lora_blocks": "1,2"}, r"has no blocks \[2\]; its blocks are 0 to 1"),
        ({"lora_blocks": "one"}, "--lora_blocks must read like"),
        ({"rank": 0}, "--rank must be at least 1, got 0"),
        ({"lora_alpha": -1}, "--lora_alpha must be above 0, got -1.0"),
        ({"lora_dropout": 1}, r"--lora_dropout must be in \[0, 1\), got 1.0"),
        ({"use_dora": True, "train_text_encoder": True}, "diffusers cannot read DoRA of a text encoder"),
        ({"offload": True, "train_text_encoder": True}, "--offload"),
        ({"use_ema": True, "ema_profile": "power"}, "--ema_profile power"),
        ({"save_stock": True}, "--save_stock"),
        ({"caption_column": "caption"}, "'caption'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(model: Path, data: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / WEIGHTS).exists()


def test_models_that_cannot_be_adapted_are_refused(data: Path, tmp_path: Path) -> None:
    DiTPipeline(tiny_dit(), tiny_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="holds a FlowMatchPipeline, which reads no text: .* train_flow_matching.py"):
        train(tmp_path / "dit", data, tmp_path / "run")
    tiny_stable_diffusion_3().save_pretrained(tmp_path / "untrained")
    (tmp_path / "untrained" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="is untrained: its output layer is zero"):
        train(tmp_path / "untrained", data, tmp_path / "run")


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_stable_diffusion_3().transformer
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=re.escape('pip install -e ".[lora]"')):
        add_lora(model, 2, 2.0, ["to_q"])
    with pytest.raises(ValueError, match=re.escape('pip install -e ".[lora]"')):
        parse_arguments(script.ScriptArguments, ["--pretrained_model_name_or_path=x", "--dataset_name=x"])


def test_the_recipe_is_for_this_script() -> None:
    args = parse_arguments(script.ScriptArguments, ["--config", str(ROOT / "pipelines" / "sd3-tiny" / "lora.json")])
    assert args.lora_alpha == args.rank


def test_every_argument_is_used() -> None:
    assert unused_arguments(SCRIPT, script) == []
