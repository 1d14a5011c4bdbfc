# SPDX-License-Identifier: Apache-2.0
"""Images beside captions: each reaches its own sample, with the crop of the target; runs, resumed and sampled."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from stock_fields import stock_step
from stock_pipelines import flux
from tiny_encoders import umt5
from tiny_families_2 import MORE, letters
from tiny_text_to_image import train_text_to_image
from training_runs import ROOT, assert_same_weights, load_script, png, read_log

from diffusers_fm.data.images import ImageData
from diffusers_fm.data.transforms import ImageTransform
from diffusers_fm.data.unreadable import UnreadableImageError
from diffusers_fm.models import widen_input
from diffusers_fm.pipelines.replay import capture
from diffusers_fm.text_to_image.field import TrainedField
from diffusers_fm.text_to_image.images import held_out_rows, pictures


COLUMNS = {
    "flux_kontext": {"image": "source"},
    "flux_fill": {"image": "image", "mask_image": "mask"},
    "flux_control": {"control_image": "source"},
    "sd3_controlnet": {"control_image": "source"},
    "wan_image": {"image": "image"},
}
GIVEN = ("height", "width", "max_sequence_length", "num_frames")


def make(name: str) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """A pipeline whose autoencoder's posterior has a width, and its call."""
    family = MORE[name]()
    parts = dict(family.pipeline.components)
    if name.startswith("flux"):
        parts["vae"] = flux()[0].pipeline.vae
    if name == "wan_image":
        pytest.importorskip("ftfy", reason="stock reads prompts with it")
        parts |= {"text_encoder": umt5(16), "tokenizer": letters()}
    return type(family.pipeline)(**parts), family.call


def conditions(names: dict[str, str], count: int, side: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    found = {}
    for name in names:
        found[name] = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
        if "mask" in name:
            halves = torch.randint(0, 2, (count, 1, 2, 2), generator=generator, dtype=torch.uint8)
            found[name] = 255 * halves.repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)
    return found


@pytest.mark.parametrize(
    ("name", "network"), [*((name, "transformer") for name in COLUMNS), ("sd3_controlnet", "controlnet")]
)
def test_each_image_reaches_its_own_sample(name: str, network: str) -> None:
    pipeline, call = make(name)
    field = TrainedField(pipeline, network, dict(call), call_columns=COLUMNS[name])
    size = call["height"], call["width"]
    field.check_size(size)
    assert field.images is not None
    x_t = torch.randn(2, *field.state_shape(size), generator=torch.Generator().manual_seed(1))
    t, captions = torch.tensor([0.3, 0.8]), ["a red cat", "blue"]
    rows = conditions(COLUMNS[name], 2, size[0])
    images = field.images.of_batch({"conditions": rows}, None)
    velocity = field(x_t, 1000 * t, captions, size, None, images)
    common = {"height": size[0], "width": size[1]}
    for row in range(2):
        own: dict[str, Any] = {key: pictures(each)[row] for key, each in rows.items()}
        own["generator"] = images["generator"][row]
        step = stock_step(
            pipeline, x_t[row : row + 1], t[row].item(), prompt=captions[row], **{**field.field.call, **common, **own}
        )
        torch.testing.assert_close(velocity[row : row + 1], step[0], rtol=1e-4, atol=1e-5)
    assert field.images.together == (name != "wan_image")  # stock takes one image for all videos of a call
    field.images.together = False
    images = field.images.of_batch({"conditions": rows}, None)  # stock has drawn from those generators
    alone = field(x_t, 1000 * t, captions, size, None, images)
    torch.testing.assert_close(alone, velocity, rtol=1e-4, atol=1e-5)
    rolled = {key: each.roll(1, 0) for key, each in rows.items()}
    # Nothing depends on the place in the batch: what the posterior of an image is drawn with neither.
    images = field.images.of_batch({"conditions": rolled}, None)
    turned = field(x_t.flip(0), 1000 * t.flip(0), captions[::-1], size, None, images)
    torch.testing.assert_close(turned.flip(0), velocity, rtol=1e-4, atol=1e-5)
    other = field(x_t, 1000 * t, captions, size, None, field.images.of_batch({"conditions": rolled}, None))
    assert ((other - velocity).abs().amax(list(range(1, velocity.ndim))) > 1e-3).all()
    weight = next(each for each in field.parameters() if each.requires_grad and each.ndim > 1)
    assert torch.autograd.grad(velocity.square().sum(), weight, allow_unused=True)[0] is not None

    # A replay would have to know which of its arguments are of the image.
    one = field.images.given({key: each[:1] for key, each in images.items()}, {})
    given = {"prompt": captions[:1], "height": size[0], "width": size[1], **one}
    if name == "sd3_controlnet" and network == "transformer":
        # What it says of x_t goes beside the transformer, which a replay does not ask for again.
        with pytest.raises(ValueError, match="does more than its network in a step"):
            capture(field.field, x_t[:1], **given)
    else:
        with pytest.raises(ValueError, match="(before|after) its network"):
            capture(field.field, x_t[:1], **given)


def test_a_widened_network_answers_as_before() -> None:
    plain = make("flux_kontext")[0].transformer
    wide = widen_input(copy.deepcopy(plain), 16)
    assert (wide.config.in_channels, wide.config.out_channels) == (16, 8)
    pipeline, call = make("flux_control")
    pipeline.register_modules(transformer=wide)
    field = TrainedField(pipeline, "transformer", dict(call), call_columns=COLUMNS["flux_control"])
    field.check_size((16, 16))
    kontext = make("flux_kontext")[0].components
    text = diffusers.FluxPipeline(**{**kontext, "vae": pipeline.vae, "transformer": plain})
    x_t, t = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([400.0])
    velocity = [each(x_t, t, ["red"], (16, 16)) for each in (field, TrainedField(text, "transformer", dict(call)))]
    torch.testing.assert_close(velocity[0], velocity[1], rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(velocity[0].square().sum(), wide.x_embedder.weight)[0][:, 8:].any()
    again = type(wide).from_config(wide.config)
    again.load_state_dict(wide.state_dict())
    with pytest.raises(ValueError, match="must be more than the 16 of"):
        widen_input(wide, 16)
    prior = diffusers.PriorTransformer(num_attention_heads=1, attention_head_dim=4, num_layers=1, embedding_dim=4)
    with pytest.raises(ValueError, match="PriorTransformer has no `in_channels` in its configuration"):
        widen_input(prior, 16)


def test_what_cannot_be_conditioned_is_refused() -> None:
    family = MORE["flux_kontext"]()
    with pytest.raises(ValueError, match="--call_columns imag=source: the call of FluxKontextPipeline takes image"):
        TrainedField(family.pipeline, "transformer", dict(family.call), call_columns={"imag": "source"})
    for name, sentence in [
        ("flux_image", "does not depend on `image`: leave out --call_columns"),
        ("ltx_image", "--call_columns image=source cannot be trained: .* has no inverse"),
    ]:
        family = MORE[name]()
        field = TrainedField(family.pipeline, "transformer", dict(family.call), call_columns={"image": "source"})
        with pytest.raises(ValueError, match=sentence):
            field.check_size((family.call["height"], family.call["width"]))


def rows_of(count: int, height: int, width: int, scale: int = 1) -> list[dict[str, Any]]:
    """Images of coloured squares, the same in `scale` times the size, and where their red is bright."""
    rng = np.random.default_rng(height + width)
    rows = []
    for number in range(count):
        squares = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
        image = PIL.Image.fromarray(squares.repeat(4, 0).repeat(4, 1))
        large = PIL.Image.fromarray(np.asarray(image).repeat(scale, 0).repeat(scale, 1))
        mask = PIL.Image.fromarray(np.where(np.asarray(large)[..., 0] > 127, 255, 0).astype(np.uint8))
        cells = {"image": image, "source": large, "mask": mask}
        caption = "red" if number % 2 else "a blue square"
        rows.append({"text": caption, **{key: {"bytes": png(each), "path": None} for key, each in cells.items()}})
    return rows


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    columns = dict.fromkeys(("image", "source", "mask"), datasets.Image())
    return datasets.Dataset.from_list(rows, features=datasets.Features({"text": datasets.Value("string"), **columns}))


@pytest.mark.parametrize("budget", [0, 2**20])
def test_conditions_have_crop_and_mirror_of_their_image(budget: int) -> None:
    rows = [*rows_of(4, 16, 24), *rows_of(4, 24, 16, scale=2)]
    names = {"control_image": "source", "mask_image": "mask", "image": "image"}
    transform = ImageTransform(16, 3, random_flip=True, buckets=((16, 20), (20, 16)))
    data = ImageData(table(rows), transform, memory_budget=budget, condition_columns=names)
    for numbers in ([0, 1, 2, 3], [4, 5, 6, 7]):
        seen = set()
        for epoch in range(6):
            batch = data[np.array([[epoch, number] for number in numbers])]
            images, given = batch["images"], batch["conditions"]
            seen.add(images.numpy().tobytes())
            assert torch.equal(given["image"], images)
            assert given["mask_image"].shape == (4, 1, *images.shape[2:])
            if numbers[0] == 0:
                # Covered without resizing: pixel for pixel.
                assert torch.equal(given["control_image"], images)
                assert torch.equal(given["mask_image"][:, 0] > 127, images[:, 0] > 127)
            else:
                # From twice the size, up to what resizing does at the edges of squares.
                assert (given["control_image"].float() - images).abs().mean() < 12
                assert set(given["mask_image"].unique().tolist()) <= {0, 255}
                assert ((given["mask_image"][:, 0] > 127) == (images[:, 0] > 127)).float().mean() > 0.9
        assert len(seen) > 1
    # Where latents are kept, conditions are read all the same.
    data.read_moments = lambda index, mirrored: torch.zeros(1)
    kept = data[np.array([[5, number] for number in range(4)])]
    data.read_moments = None
    whole = data[np.array([[5, number] for number in range(4)])]
    assert "images" not in kept and all(torch.equal(kept["conditions"][n], whole["conditions"][n]) for n in names)
    assert data.fingerprint() != ImageData(table(rows), transform, condition_columns={"image": "image"}).fingerprint()


def test_a_resumed_run_knows_the_contents_of_conditions(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> dict[str, Any]:
        cells = {name: {"bytes": None, "path": str(folder / f"{name}.png")} for name in ("image", "source", "mask")}
        data = table([{"text": "red", **cells}])
        return ImageData(data, ImageTransform(16, 3), condition_columns={"image": "source"}).fingerprint()

    (tmp_path / "data").mkdir()
    for name, colour in (("image", "red"), ("source", "green")):
        PIL.Image.new("RGB", (16, 16), colour).save(tmp_path / "data" / f"{name}.png")
    before = fingerprint(tmp_path / "data")
    moved = (tmp_path / "data").rename(tmp_path / "moved")
    assert fingerprint(moved) == before
    PIL.Image.new("RGB", (16, 16), "blue").save(moved / "source.png")
    after = fingerprint(moved)
    assert [name for name in before if after[name] != before[name]] == ["conditions"]


def test_held_out_rows_that_cannot_be_read_are_not_shown() -> None:
    rows = rows_of(3, 16, 16)
    rows[1]["source"] = {"bytes": b"none", "path": None}
    names = COLUMNS["flux_kontext"]
    options: dict[str, Any] = {"caption_column": "text", "max_unreadable": 1, "condition_columns": names}
    data = ImageData(table(rows), ImageTransform(16, 3, center_crop=True), **options)
    pipeline, call = make("flux_kontext")
    field = TrainedField(pipeline, "transformer", dict(call), call_columns=names)
    assert field.images is not None
    field.images.together = True
    args: Any = SimpleNamespace(num_validation_images=3, num_inference_steps=1)
    drawn = PIL.Image.new("RGB", (16, 16))
    shown = held_out_rows(lambda *_, **__: [drawn], pipeline, field.images, args, data, (16, 16))
    # The source is the target here, and of the row without one there is no picture.
    assert [row[0].tobytes() == row[2].tobytes() for row in shown] == [True, True]


def test_a_condition_that_cannot_be_read_is_named() -> None:
    rows = rows_of(3, 16, 16)
    rows[1]["source"] = {"bytes": b"none", "path": None}
    data = ImageData(table(rows), ImageTransform(16, 3), condition_columns={"control_image": "source"})
    with pytest.raises(UnreadableImageError, match="row 1 .* column 'source'"):
        data[np.array([[0, 0], [0, 1]])]
    data = ImageData(table(rows), ImageTransform(16, 3), condition_columns={"image": "source"}, max_unreadable=1)
    assert "1" in map(str, data[np.array([[0, 0], [0, 1]])]["unreadable"])
    with pytest.raises(ValueError, match="--call_columns mask_image=image: masks need a column of their own"):
        ImageData(table(rows), ImageTransform(16, 3), condition_columns={"mask_image": "image"})
    with pytest.raises(ValueError, match="no image column 'depth'"):
        ImageData(table(rows), ImageTransform(16, 3), condition_columns={"image": "depth"})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("conditions")
    (folder / "data").mkdir()
    for split, count in (("train", 8), ("test", 3)):
        table(rows_of(count, 16, 20)).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "clips").mkdir()
    for split, count in (("train", 8), ("test", 2)):
        for number in range(count):
            place = folder / "clips" / split / str(number)
            place.mkdir(parents=True)
            for frame in range(5):
                PIL.Image.new("RGB", (16, 16), (20 * number, 40 * frame, 0)).save(place / f"{frame}.png")

    def run(name: str, script: str, output_dir: Path, *columns: str, **options: Any) -> Path:
        pipeline, call = make(name)
        if not (folder / name).exists():
            pipeline.save_pretrained(folder / name)
        words = [f"{key}={json.dumps(value)}" for key, value in call.items() if key not in GIVEN]
        values = {"max_train_steps": 3, "num_validation_images": 2, "random_flip": True, **options}
        if options.get("train_data_dir"):
            values["train_data_dir"] = folder / options["train_data_dir"]
        words = ["--call_columns", *columns, *(["--call", *words] if words else [])]
        trained = load_script(ROOT / "training_scripts" / f"{script}.py")
        return train_text_to_image(trained, folder / name, folder / "data", output_dir, *words, **values)

    return run


def test_a_run_is_resumed_bit_for_bit_and_sampled_by_its_stock_pipeline(run: Any, tmp_path: Path) -> None:
    options = {"checkpointing_steps": 2, "use_ema": True}
    whole = run("flux_kontext", "train_text_to_image", tmp_path / "whole", "image=source", **options)
    part = run(
        "flux_kontext", "train_text_to_image", tmp_path / "part", "image=source", **options | {"max_train_steps": 2}
    )
    run("flux_kontext", "train_text_to_image", part, "image=source", resume_from_checkpoint="latest", **options)
    assert_same_weights(whole, part)
    assert read_log(whole, "loss", "validation_loss") == read_log(part, "loss", "validation_loss")
    # Condition, drawn, target; a row for each of two held-out samples.
    with PIL.Image.open(whole / "grid.png") as grid:
        pixels = np.asarray(grid)
        assert grid.size == (2 + 3 * 50, 2 + 2 * 50)
    assert np.array_equal(pixels[2:50, 2:50], pixels[2:50, 102:150])  # here the condition is the target
    card = (whole / "README.md").read_text()
    assert 'image = load_image("image.png")' in card and "image=image)" in card
    assert "`image` from the column 'source'" in card

    pipeline = DiffusionPipeline.from_pretrained(whole)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline) is diffusers.FluxKontextPipeline
    call: Any = pipeline
    common = {"height": 16, "width": 16, "num_inference_steps": 2, "max_area": 256, "_auto_resize": False}
    drawn = [
        call(
            image=PIL.Image.new("RGB", (16, 16), colour),
            prompt="red",
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **common,
        ).images
        for colour in ("red", "blue")
    ]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-4


def test_a_controlnet_is_trained_beside_its_frozen_network(run: Any, tmp_path: Path) -> None:
    kept = {"cache_latents": True, "cache_text_embeddings": True, "center_crop": True}
    names = ("sd3_controlnet", "train_text_to_image")
    done = run(*names, tmp_path / "run", "control_image=source", network="controlnet", **kept)
    before, after = MORE["sd3_controlnet"]().pipeline, DiffusionPipeline.from_pretrained(done)
    assert type(after) is type(before)
    same = {
        name: all(torch.equal(a, b) for a, b in zip(before.components[name].parameters(), model.parameters()))
        for name, model in after.components.items()
        if isinstance(model, torch.nn.Module)
    }
    assert [name for name, each in same.items() if not each] == ["controlnet"]


def test_adapters(run: Any, tmp_path: Path) -> None:
    columns = ("image=image", "mask_image=mask")
    done = run("flux_fill", "train_text_to_image_lora", tmp_path / "run", *columns, rank=2, mixed_precision="bf16")
    pipeline: Any = make("flux_fill")[0]
    pipeline.load_lora_weights(done)
    pipeline.unload_lora_weights()
    state = load_file(done / "pytorch_lora_weights.safetensors")
    assert any(each.any() for key, each in state.items() if "lora_B" in key)
    assert (done / "grid.png").is_file()


def test_a_clip_gives_its_own_first_frame(run: Any, tmp_path: Path) -> None:
    clips = {"dataset_name": None, "train_data_dir": "clips", "num_frames": 5, "instance_prompt": "a clip"}
    done = run("wan_image", "train_text_to_image", tmp_path / "run", "image=image", **clips)
    assert type(DiffusionPipeline.from_pretrained(done)) is diffusers.WanImageToVideoPipeline
    assert "each sample in a call of its own" in (done / "README.md").read_text()


def test_a_dry_run_knows_conditions(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("flux_control", "train_text_to_image", tmp_path / "run", "control_image=source", dry_run=True)
    assert "`control_image` from the column 'source'" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"columns": ["image"]}, "--call_columns must read like control_image=depth"),
        ({"columns": ["image=a", "image=b"]}, "each argument once"),
        ({"streaming": True}, "--call_columns does not go with --streaming"),
        ({"offload": True}, "--offload does not go with --call_columns"),
        ({"validation_prompts": "red"}, "--validation_prompts does not go with --call_columns"),
        ({"solver": "abm3"}, "--solver does not go with --call_columns"),
        ({"script": "train_text_to_image_flow_map"}, "--call_columns is not for flow maps"),
        ({"columns": ["image=depth"]}, "There is no image column 'depth'"),
    ],
)
def test_refusals(run: Any, words: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    options = {"script": "train_text_to_image", "columns": ["image=source"], **words}
    script, columns = options.pop("script"), options.pop("columns")
    with pytest.raises((ValueError, SystemExit), match=re.escape(sentence)):
        run("flux_kontext", script, tmp_path / "run", *columns, **options)
