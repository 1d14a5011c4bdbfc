# SPDX-License-Identifier: Apache-2.0
"""Options that may learn faster: gradients reach what they should, and nothing of them is left in what is saved."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel, StableDiffusion3Pipeline
from processes import check_processes
from safetensors.torch import load_file
from tiny_pipelines import NUM_CLASSES, tiny_class_embedder, tiny_dit, tiny_sd3, tiny_unet
from tiny_text_to_image import sample, save_colours, tiny_stable_diffusion_3, train_text_to_image
from training_runs import (
    ROOT,
    SCRIPT,
    assert_same_weights,
    command_line,
    load_script,
    make_dataset,
    read_log,
    script,
    train,
)
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler
from diffusers_fm.arguments import parse_arguments
from diffusers_fm.data.features import VisionEncoder
from diffusers_fm.data.randomness import BatchSlice
from diffusers_fm.losses import flow_matching_loss
from diffusers_fm.objectives.auxiliary import INTERNAL_NETWORK, Auxiliary, StepInputs, begin_auxiliaries
from diffusers_fm.objectives.flow_matching import TrainableModel
from diffusers_fm.training.checkpoints import damage, read_manifest
from diffusers_fm.training.distributed import SHARDING
from diffusers_fm.training.planning import DryRun, Plan


WEIGHTS = "diffusion_pytorch_model.safetensors"
# Adam divides by the size of the gradient, and so makes noise of gradients that are zero but for rounding.
SMOOTH = {"adam_epsilon": 1e-2}
SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("teacher")
    ViTModel(ViTConfig(**SMALL, intermediate_size=8, image_size=8, patch_size=4)).save_pretrained(folder)
    return folder


def pipeline_of(kind: str) -> FlowMatchPipeline:
    """A pipeline for the digits' shape whose network has four blocks, or a UNet's two."""
    sizes = {"in_channels": 1, "out_channels": 1, "num_layers": 4}
    components: dict[str, Any] = {
        "dit": lambda: {"transformer": tiny_dit(**sizes)},
        "sd3": lambda: {"transformer": tiny_sd3(**sizes), "class_embedder": tiny_class_embedder()},
        "unet": lambda: {"unet": tiny_unet(num_class_embeds=NUM_CLASSES + 1), "num_classes": NUM_CLASSES},
    }[kind]()
    return FlowMatchPipeline(FlowMatchScheduler(), **components)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    pipeline_of("dit").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(folder, data, tmp_path_factory.mktemp("plain") / "run", max_train_steps=1)


@pytest.mark.parametrize("number", [1, 2])
def test_nothing_is_left_and_a_resumed_run_is_the_same(
    number: int, folder: Path, data: Path, teacher: Path, plain: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"checkpointing_steps": 2, "max_train_steps": 3, "center_crop": True, "use_ema": True}
    if number == 1:
        options |= {"repa_teacher": teacher, "repa_width": 8, "repa_stop_step": 2, "cache_features": True}
        options |= {"internal_block": 1, "self_block": 1, "contrastive_weight": 0.05, "mixflow_slowing": 0.8}
        options |= {"shift_base_dimension": 16, "precomputed_dir": tmp_path / "cache"}
    else:
        options |= {"semidiscrete_ot": True, "semidiscrete_steps": 20}
    whole = train(folder, data, tmp_path / "whole", **options)
    part = shutil.copytree(whole, tmp_path / "part")
    train(folder, data, part, **options, resume_from_checkpoint="checkpoint-2")
    assert_same_weights(whole, part)
    trained, otherwise = (load_file(run / "transformer" / WEIGHTS) for run in (whole, plain))
    assert trained.keys() == otherwise.keys()
    assert not all(torch.equal(trained[name], otherwise[name]) for name in trained)
    assert (whole / "model_index.json").read_text() == (plain / "model_index.json").read_text()
    auxiliary = [name for name in load_file(whole / "checkpoint-2" / "model.safetensors") if "auxiliary" in name]
    assert bool(auxiliary) == (number == 1)
    card = (whole / "README.md").read_text()
    assert ("velocity learned" in card) == (number == 1)
    assert len(read_log(whole, "coupling_variance")) == (number == 2)
    shift = FlowMatchPipeline.from_pretrained(whole).scheduler.config.shift
    assert shift == pytest.approx((64 / 16) ** 0.5 if number == 1 else 1.0)


def test_stock_pipelines_are_trained_and_saved_alike(tmp_path: Path, teacher: Path) -> None:
    text_script = load_script(ROOT / "training_scripts" / "train_text_to_image.py")
    tiny_stable_diffusion_3(num_layers=3).save_pretrained(tmp_path / "model")
    colours = save_colours(tmp_path / "data")
    options: dict[str, Any] = {"repa_teacher": teacher, "repa_projector": "conv", "repa_mean_share": 0.6}
    options |= {"internal_block": 1, "self_block": 1, "max_train_steps": 2, "shift_base_dimension": 64}
    run = partial(train_text_to_image, text_script, tmp_path / "model", colours)
    output_dir = run(tmp_path / "run", **options)
    pipeline = StableDiffusion3Pipeline.from_pretrained(output_dir)
    before, after = (load_file(path / "transformer" / WEIGHTS) for path in (tmp_path / "model", output_dir))
    assert before.keys() == after.keys()
    values = pipeline.transformer.config.in_channels * 8 * 8
    assert np.isfinite(sample(pipeline)).all()
    shift = np.exp(pipeline.scheduler.config.base_shift)
    assert shift == pytest.approx((values / 64) ** 0.5, rel=1e-6)


def test_two_processes_are_a_larger_batch(folder: Path, data: Path, teacher: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SMOOTH, "use_ema": True, "checkpointing_steps": 2, "num_validation_images": 1}
    options |= {"repa_teacher": teacher, "repa_width": 8, "internal_block": 1, "self_block": 1, "mixflow_slowing": 0.8}
    whole = train(folder, data, tmp_path / "whole", train_batch_size=8, **options)
    two = tmp_path / "two"
    line = command_line(folder, data, two, train_batch_size=4, **{**options, "report_to": "tensorboard"})
    check_processes(SCRIPT, line, num_processes=2)
    assert_same_weights(whole, two, atol=1e-6)
    # Sums in another order: losses and norms of order one.
    for name in ("loss", "validation_loss", "gradient_norm"):
        for one, other in zip(read_log(whole, name), read_log(two, name), strict=True):
            assert one == pytest.approx(other, rel=2e-6)
    for (_, one), (_, other) in zip(read_log(whole, "loss_by_time"), read_log(two, "loss_by_time")):
        assert [value is None for value in one] == [value is None for value in other]
        assert [value or 0 for value in one] == pytest.approx([value or 0 for value in other], rel=1e-5)
    # What is trained besides has moved, by the gradients of both processes.
    states = [[load_file(run / f"checkpoint-{step}" / "model.safetensors") for run in (whole, two)] for step in (2, 4)]
    for name in (name for name in states[0][0] if "auxiliary" in name):
        torch.testing.assert_close(*(state[name] for state in states[1]), rtol=0, atol=1e-6)
        assert not torch.equal(states[0][0][name], states[1][0][name]), name
    # One process goes on where two were.
    assert damage(two / "checkpoint-2") is None
    assert read_manifest(two / "checkpoint-2")["num_processes"] == 2
    resumed = tmp_path / "resumed"
    shutil.copytree(two / "checkpoint-2", resumed / "checkpoint-2")
    train(folder, data, resumed, train_batch_size=8, resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, resumed, atol=1e-6)


@pytest.mark.parametrize("engine", SHARDING)
def test_shards_are_refused(engine: str, teacher: Path) -> None:
    with pytest.raises(ValueError, match="do not go with FSDP2 and DeepSpeed: use DDP"):
        Step("dit", engine=engine, repa_teacher=teacher)


def test_dry_runs_count_what_is_trained_besides_and_the_teacher(
    folder: Path, data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans: list[Plan] = []
    monkeypatch.setattr(DryRun, "finish", lambda run: plans.append(run.plan()))
    options: dict[str, Any] = {"repa_teacher": teacher, "repa_width": 8, "contrastive_weight": 0.05}
    cached = {"cache_features": True, "center_crop": True, "precomputed_dir": tmp_path / "cache"}
    for more in ({}, options, {**options, **cached}):
        train(folder, data, tmp_path / "run", dry_run=True, **more)
    step = Step("dit", repa_teacher=teacher, repa_width=8)
    projector = sum(p.numel() for p in step.auxiliary.parameters())
    none, online, beforehand = plans
    assert online.trained_parameters - none.trained_parameters == projector
    assert online.gradients - none.gradients == 4 * projector
    assert online.activations > none.activations
    encoder = VisionEncoder(str(teacher)).model
    assert online.frozen - none.frozen == sum(p.nbytes for p in [*encoder.parameters(), *encoder.buffers()])
    assert beforehand.frozen == none.frozen


class Step:
    """An auxiliary loss on a pipeline, without a run."""

    def __init__(self, kind: str, engine: str = "NO", **options: Any) -> None:
        words = ["--pretrained_model_name_or_path=x", "--dataset_name=x", *(f"--{k}={v}" for k, v in options.items())]
        args = parse_arguments(script.ScriptArguments, words)
        accelerator = SimpleNamespace(distributed_type=engine, device=torch.device("cpu"))
        run: Any = SimpleNamespace(args=args, accelerator=accelerator, seed=0)
        self.pipeline = pipeline_of(kind)
        self.model = TrainableModel(self.pipeline).requires_grad_(True).train()
        scheduler: Any = self.pipeline.scheduler
        made = begin_auxiliaries(run, self.model, self.pipeline.denoiser, scheduler, None)
        self.auxiliary: Auxiliary = next(iter(made))
        assert len(made) == 1
        generator = torch.Generator().manual_seed(0)
        self.data, self.noise = torch.randn(2, 3, 1, 8, 8, generator=generator)
        self.t, self.labels = torch.tensor([0.2, 0.5, 0.9]), torch.tensor([0, 1, 2])
        path = scheduler.path
        x_t = path.sample(self.data, self.noise, self.t)
        loss = partial(flow_matching_loss, path, data=self.data, noise=self.noise, t=self.t)
        images = (self.data * 60 + 128).clamp(0, 255).to(torch.uint8)
        part = BatchSlice(0, 0, 0, 3, 3)
        self.inputs = StepInputs(0, part, {"images": images}, self.data, self.noise, x_t, self.t, self.predict, loss)

    def predict(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.model(x_t, 1000 * t, self.labels)

    def reached(self) -> set[str]:
        """Parameters that get a gradient from the auxiliary loss alone."""
        self.predict(self.inputs.x_t, self.t)
        self.auxiliary.losses(self.inputs).mean().backward()
        named = self.model.named_parameters()
        return {name for name, p in named if p.grad is not None and p.grad.abs().max() > 0}


def blocks(names: set[str]) -> set[int]:
    return {int(name.split("blocks.")[1].split(".")[0]) for name in names if "blocks." in name}


@pytest.mark.parametrize(
    ("kind", "options", "reached"),
    [
        ("dit", {"repa_teacher": "TEACHER", "repa_block": 2, "repa_width": 8}, {0, 1}),
        ("sd3", {"repa_teacher": "TEACHER", "repa_block": 2, "repa_projector": "conv"}, {0, 1}),
        ("unet", {"repa_teacher": "TEACHER", "repa_block": 2, "repa_width": 8}, {0, 1}),
        ("dit", {"self_block": 1}, {0}),
        ("sd3", {"self_block": 2, "self_teacher_block": 4}, {0, 1}),
        ("dit", {"internal_block": 2}, {0, 1}),
        ("sd3", {"internal_block": 2}, {0, 1}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_gradients_reach_the_blocks_before_and_the_own_parameters(
    kind: str, options: dict[str, Any], reached: set[int], teacher: Path
) -> None:
    options = {name: teacher if value == "TEACHER" else value for name, value in options.items()}
    step = Step(kind, **options)
    names = step.reached()
    assert blocks(names) == reached
    own = {name for name, _ in step.model.named_parameters() if name.startswith("auxiliary")}
    assert own and own <= names
    # Neither the network's own head, nor the encoder.
    assert not any(name.startswith(("denoiser.proj_out", "denoiser.norm_out", "denoiser.conv_out")) for name in names)
    if "repa_teacher" in options:
        assert not any(name.startswith("auxiliary.0._encoder") for name in step.model.state_dict())

    # Taken out, the model is as it was.
    step.auxiliary.remove()
    modules: Iterator[torch.nn.Module] = step.model.modules()
    assert not any(module._forward_hooks for module in modules)
    assert "forward" not in vars(step.pipeline.denoiser)


def test_the_internal_network_is_the_early_blocks_with_the_second_head(tmp_path: Path) -> None:
    step = Step("dit", internal_block=2)
    step.predict(step.inputs.x_t, step.t)
    predicted: list[torch.Tensor] = []
    loss = step.inputs.loss
    vars(step.inputs)["loss"] = lambda answer: predicted.append(answer) or loss(answer)
    step.auxiliary.losses(step.inputs)
    step.auxiliary.save(tmp_path)
    network = DiTTransformer2DModel.from_pretrained(tmp_path / INTERNAL_NETWORK)
    assert len(network.transformer_blocks) == 2
    with torch.no_grad():
        alone = network(step.inputs.x_t, 1000 * step.t, step.labels).sample
    torch.testing.assert_close(alone, predicted[0].detach(), rtol=1e-5, atol=1e-5)
    # The whole network answers otherwise.
    assert not torch.allclose(alone, step.predict(step.inputs.x_t, step.t), atol=1e-2)


def test_features_of_any_vision_encoder(teacher: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vision = {**SMALL, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    text = {**SMALL, "intermediate_size": 8, "vocab_size": 9}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    Dinov2Model(Dinov2Config(**SMALL, image_size=8, patch_size=4)).save_pretrained(tmp_path / "dino")
    (tmp_path / "dino" / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}')
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    for folder, resolution, side in ((teacher, None, 2), (tmp_path / "clip", 16, 4), (tmp_path / "dino", 12, 3)):
        encoder = VisionEncoder(str(folder), resolution)
        assert encoder(images).shape == (2, encoder.num_channels, side, side)
        grey = encoder(images[:, :1])
        assert torch.equal(grey, encoder(images[:, :1].expand(-1, 3, -1, -1)))
    # Patches are where they are in the image, and pixels are normalised as the folder says.
    encoder = VisionEncoder(str(tmp_path / "dino"), 8)
    pixels = torch.rand(1, 3, 8, 8)
    hidden = encoder.model(pixel_values=(pixels * 255).byte() / 255).last_hidden_state
    assert torch.allclose(encoder((pixels * 255).byte())[0, :, 1, 0], hidden[0, 3], atol=1e-6)
    with pytest.raises(ValueError, match="holds no model of transformers"):
        VisionEncoder(str(tmp_path))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--repa_block=1"], "--repa_block 1 needs --repa_teacher"),
        (["--contrastive_weight=1"], r"--contrastive_weight must be in \[0, 1\), got 1.0"),
        (["--contrastive_weight=0.1", "--train_batch_size=1"], "needs a --train_batch_size of at least 2, got 1"),
        (["--self_block=1", "--torch_compile"], "--torch_compile does not go with"),
        (["--shift=2", "--shift_base_dimension=9"], "Of --shift and --shift_base_dimension one may be given"),
        (["--semidiscrete_ot", "--random_flip"], "as they are: leave out --random_flip"),
        (["--semidiscrete_ot", "--coupling=minibatch_ot"], "--coupling minibatch_ot does not go with"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse_arguments(script.ScriptArguments, ["--pretrained_model_name_or_path=x", "--dataset_name=x", *words])


@pytest.mark.parametrize("option", ["--num_frames=5", "--audio_seconds=2"])
def test_auxiliary_losses_are_for_images(option: str) -> None:
    arguments = load_script(ROOT / "training_scripts" / "train_text_to_image.py").ScriptArguments
    words = ["--pretrained_model_name_or_path=x", "--dataset_name=x", "--internal_block=1", option]
    with pytest.raises(ValueError, match=f"--self_block are for images: leave out {option.partition('=')[0]}"):
        parse_arguments(arguments, words)


def test_blocks_that_are_not_there_are_refused() -> None:
    for kind, options, sentence in (
        ("dit", {"self_block": 5}, "--self_block must be from 1 to 4 for this network, got 5"),
        ("dit", {"self_block": 3, "self_teacher_block": 2}, "must be above --self_block 3, got 2"),
        ("unet", {"internal_block": 1}, "--internal_block does not work for a UNet2DModel"),
    ):
        with pytest.raises(ValueError, match=sentence):
            Step(kind, **options)
