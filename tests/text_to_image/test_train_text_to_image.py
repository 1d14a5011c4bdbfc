# SPDX-License-Identifier: Apache-2.0
"""Training of text-to-image pipelines: what comes out loads without this package; caches change nothing; refusals."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiTPipeline, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from processes import check_processes, run_stock
from safetensors.torch import load_file
from tiny_pipelines import tiny_dit, tiny_vae
from tiny_text_to_image import colours, sample, save_colours, tiny_stable_diffusion_3, train_text_to_image
from training_runs import ROOT, assert_same_weights, load_script, read_log, unused_arguments

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.schedulers import recommendation


SCRIPT = ROOT / "training_scripts" / "train_text_to_image.py"
script = load_script(SCRIPT)
train = partial(train_text_to_image, script)

# Loads and samples in a process that knows diffusers alone.
STOCK = """
import sys
import numpy as np
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
pipeline.set_progress_bar_config(disable=True)
options = dict(height=16, width=16, num_inference_steps=3, guidance_scale=2.0, max_sequence_length=16)
image = pipeline("a red square", generator=torch.Generator().manual_seed(0), output_type="np", **options).images
np.save(sys.argv[2], image)
assert not any(name.startswith("diffusers_fm") for name in sys.modules)
print(type(pipeline).__name__, type(pipeline.scheduler).__name__)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_stable_diffusion_3().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_colours(tmp_path_factory.mktemp("data"))


def test_what_comes_out_loads_without_this_package(model: Path, data: Path, tmp_path: Path) -> None:
    words = ["--validation_prompts", "red", "a blue square"]
    output_dir = train(
        model, data, tmp_path / "run", *words, num_validation_images=2, validation_steps=2, use_ema=True
    )
    index = json.loads((output_dir / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusion3Pipeline"
    libraries = {value[0] for value in index.values() if isinstance(value, list)}
    assert libraries - {None} == {"diffusers", "transformers"}

    told = run_stock(STOCK, output_dir, tmp_path / "image.npy").stdout
    assert told.split() == ["StableDiffusion3Pipeline", "FlowMatchEulerDiscreteScheduler"]
    expected = sample(StableDiffusion3Pipeline.from_pretrained(output_dir))
    assert np.allclose(np.load(tmp_path / "image.npy"), expected, atol=1e-5)

    # Only the transformer is trained.
    for file in model.rglob("*.safetensors"):
        before, after = load_file(file), load_file(output_dir / file.relative_to(model))
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (file.parent.name != "transformer"), file
    assert [line[0] for line in read_log(output_dir, "validation_loss")] == [2, 4]
    assert PIL.Image.open(output_dir / "grid.png").size == (2 + 2 * (48 + 2), 2 + 2 * (48 + 2))
    assert "pipeline_tag: text-to-image" in (output_dir / "README.md").read_text()


def test_the_default_resolution_is_the_transformers(model: Path, data: Path, tmp_path: Path) -> None:
    runs = [train(model, data, tmp_path / str(side), max_train_steps=1, resolution=side) for side in (16, None)]
    assert_same_weights(*runs)


def test_half_precision_trains_weights_in_full_precision(model: Path, data: Path, tmp_path: Path) -> None:
    runs = [train(model, data, tmp_path / str(name), mixed_precision=name) for name in ("no", "bf16")]
    full, half = (read_log(run, "loss") for run in runs)
    for one, other in zip(full, half, strict=True):
        assert one == pytest.approx(other, rel=2e-2)  # bfloat16 has a spacing of 2^-8
    state = load_file(runs[1] / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    # As it is loaded by default, with text encoders that were saved in less, it samples.
    pipeline = StableDiffusion3Pipeline.from_pretrained(runs[1])
    assert {pipeline.text_encoder.dtype, pipeline.text_encoder_3.dtype} == {torch.float32}
    assert np.isfinite(sample(pipeline)).all()


def test_a_compiled_run_is_the_same(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"use_ema": True, "checkpointing_steps": 2}
    plain = train(model, data, tmp_path / "plain", **options)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    # As by --dynamo_backend of accelerate: --torch_compile takes inductor, which takes minutes.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    compiled = train(model, data, tmp_path / "compiled", max_train_steps=2, **options)
    # The network with gradients, and without them for the held-out loss; nothing of the pipeline, no asking.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    train(model, data, compiled, resume_from_checkpoint="latest", **options)
    assert read_log(compiled, "loss") == read_log(plain, "loss")
    assert_same_weights(plain, compiled)


def test_another_path_carries_our_scheduler(data: Path, tmp_path: Path) -> None:
    scheduler = FlowMatchScheduler(path="cosine", prediction_type="v_prediction")
    tiny_stable_diffusion_3(t5=False, scheduler=scheduler).save_pretrained(tmp_path / "model")
    output_dir = train(tmp_path / "model", data, tmp_path / "run", max_train_steps=1)
    # Without its T5, diffusers wants to be told so.
    pipeline = StableDiffusion3Pipeline.from_pretrained(output_dir, text_encoder_3=None, tokenizer_3=None)
    assert type(pipeline.scheduler) is FlowMatchScheduler
    assert pipeline.scheduler.config.path == "cosine"
    assert np.isfinite(sample(pipeline)).all()


def test_stock_class_names_on_request(data: Path, tmp_path: Path) -> None:
    tiny_stable_diffusion_3(scheduler=FlowMatchScheduler()).save_pretrained(tmp_path / "ours")
    for save_stock, expected in ((False, FlowMatchScheduler), (True, FlowMatchEulerDiscreteScheduler)):
        output_dir = train(
            tmp_path / "ours", data, tmp_path / str(save_stock), max_train_steps=1, save_stock=save_stock
        )
        assert type(StableDiffusion3Pipeline.from_pretrained(output_dir).scheduler) is expected
    tiny_stable_diffusion_3(scheduler=FlowMatchScheduler(path="vp")).save_pretrained(tmp_path / "vp")
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler cannot give the same images"):
        train(tmp_path / "vp", data, tmp_path / "refused", save_stock=True)


def test_a_solver_is_searched_for_on_request(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The search itself is tested with exact networks; a short one will do.
    monkeypatch.setattr(recommendation, "REFERENCE_STEPS", 12)
    monkeypatch.setattr(recommendation, "BASELINE_STEPS", 3)
    options = {"max_train_steps": 1, "guidance_scale": 2.0, "eval_batch_size": 2, "num_validation_images": 1}
    words = ["--validation_prompts", "red"]
    output_dir = train(model, data, tmp_path / "run", *words, solver="ab2", **options)
    scheduler: Any = StableDiffusion3Pipeline.from_pretrained(output_dir).scheduler
    assert type(scheduler) is FlowMatchScheduler
    steps = scheduler.config.default_num_inference_steps
    assert (scheduler.config.solver, scheduler.config.sampling_path) == ("ab2", "angle")
    assert len(read_log(output_dir, "sampling_error", "euler_error")) == 1
    assert f"num_inference_steps={steps}" in (output_dir / "README.md").read_text()
    assert (output_dir / "grid.png").exists()
    with pytest.raises(ValueError, match="--solver needs this package's scheduler: leave out --save_stock"):
        train(model, data, tmp_path / "refused", solver="ab2", save_stock=True)


def test_caches_change_nothing(model: Path, data: Path, tmp_path: Path) -> None:
    options = {"center_crop": True, "caption_dropout": 0.3, "text_encoder_dropout": 0.4, "max_train_steps": 6}
    on_the_way = train(model, data, tmp_path / "on the way", **options)
    caches = {"cache_latents": True, "cache_text_embeddings": True, "precomputed_dir": tmp_path / "cache"}
    cached = train(model, data, tmp_path / "cached", **options, **caches)
    losses = read_log(on_the_way, "loss", "gradient_norm")
    # Encoders answer for a batch as for one, but for rounding.
    for one, other in zip(losses, read_log(cached, "loss", "gradient_norm"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    # A second run finds everything and computes nothing: the same to the bit.
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    again = train(model, data, tmp_path / "again", **options, **caches)
    assert_same_weights(cached, again)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*") if path.is_file()} == files


def test_a_resumed_run_is_the_uninterrupted_one(model: Path, tmp_path: Path) -> None:
    data = save_colours(tmp_path / "data", sizes=((16, 24), (24, 16), (16, 16)))
    options = {"aspect_ratio_buckets": "16,24;24,16;16,16", "random_flip": True}
    options |= {"train_batch_size": 2, "shift_base_resolution": 16, "use_ema": True, "checkpointing_steps": 3}
    whole = train(model, data, tmp_path / "whole", max_train_steps=5, **options)
    resumed = train(model, data, tmp_path / "resumed", max_train_steps=3, **options)
    train(model, data, resumed, max_train_steps=5, resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, resumed)
    # Training shifts by the size of the image, and the scheduler that is saved does it alike.
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(whole, subfolder="scheduler")
    assert scheduler.config.use_dynamic_shifting


def test_two_processes_share_buckets(model: Path, tmp_path: Path) -> None:
    sizes = ((16, 24), (24, 16), (16, 16))
    # An image is told by its caption; of each size there are 8, 8 and 4, and none of another is in its batch.
    rows = colours(24, sizes).remove_columns("text").add_column("text", [f"image {row}" for row in range(24)])
    rows.select([row for row in range(24) if row % 3 < 2 or row < 12]).to_parquet(tmp_path / "data" / "train.parquet")
    shape_of = {f"image {row}": [side // 2 for side in sizes[row % 3]] for row in range(24)}
    line = ["--pretrained_model_name_or_path", model, "--dataset_name", tmp_path / "data", "--resolution", 16]
    line += ["--aspect_ratio_buckets", "16,24;24,16;16,16", "--max_sequence_length", 16, "--train_batch_size", 2]
    line += [
        "--output_dir",
        tmp_path / "run",
        "--max_train_steps",
        10,
        "--seed",
        0,
        "--report_to",
        "none",
        "--use_cpu",
    ]
    check_processes(ROOT / "tests" / "recorded_batches.py", line, num_processes=2)

    taken = []
    for rank in range(2):
        lines = (tmp_path / "run" / f"batches-{rank}.jsonl").read_text().splitlines()
        batches = [json.loads(line) for line in lines]
        assert [batch["step"] for batch in batches] == list(range(10))
        assert all(shape_of[caption] == batch["size"] for batch in batches for caption in batch["captions"])
        taken += batches
    # 20 images are 5 steps of 2 processes with 2 each: two epochs, in orders of their own.
    epochs = [
        [caption for batch in taken if batch["step"] // 5 == epoch for caption in batch["captions"]]
        for epoch in (0, 1)
    ]
    assert len(epochs[0]) == 20
    assert set(epochs[0]) == set(epochs[1]) == {f"image {row}" for row in range(24) if row % 3 < 2 or row < 12}
    assert epochs[0] != epochs[1]
    # The two processes of a step need not have the same size.
    assert any(one["size"] != other["size"] for one, other in zip(taken[:10], taken[10:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"caption_column": "caption"}, "'caption'"),
        ({"resolution": 15}, "StableDiffusion3Pipeline takes no images of 15 x 15 pixels: .*divisible by 4"),
        ({"resolution": 52}, "StableDiffusion3Pipeline takes no images of 52 x 52 pixels: .*`pos_embed_max_size`: 12"),
        ({"shift": 3.0, "shift_base_resolution": 16}, "give one"),
        ({"caption_dropout": 1.5}, r"--caption_dropout must be in \[0, 1\], got 1.5"),
        ({"max_sequence_length": 600}, "--max_sequence_length must be from 0 to 512, got 600"),
        ({"cache_latents": True}, "--center_crop"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_refused(model: Path, data: Path, tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(model, data, tmp_path / "run", **options)
    assert not (tmp_path / "run" / "model_index.json").exists()


def test_pipelines_without_text_are_refused(data: Path, tmp_path: Path) -> None:
    DiTPipeline(tiny_dit(), tiny_vae(), FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "dit")
    with pytest.raises(ValueError, match="holds a FlowMatchPipeline, which reads no text: .* train_flow_matching.py"):
        train(tmp_path / "dit", data, tmp_path / "run")


def test_every_argument_is_used() -> None:
    assert unused_arguments(SCRIPT, script) == []
