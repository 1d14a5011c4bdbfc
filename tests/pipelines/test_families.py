# SPDX-License-Identifier: Apache-2.0
"""Velocity fields of many families of diffusers, against the stock pipelines."""

import inspect
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from stock_fields import Decoded, stock_step, stop_at_decoder
from tiny_families import FAMILIES, TIMES, Family
from tiny_families_2 import MORE

from diffusers_fm.families import table
from diffusers_fm.pipelines import CapturedCall, DecodeMap, VelocityField, families
from diffusers_fm.pipelines.findings import find
from diffusers_fm.pipelines.one_step import StandIn
from diffusers_fm.pipelines.pipeline_calls import NetworkCalls, PipelineCalls
from diffusers_fm.pipelines.prompt_memo import PromptMemo


RECIPES = {**FAMILIES, **MORE}
SHORT_AND_LONG = ["red", "a longer caption of blue"]
EQUALLY_LONG = ["a red square", "a long patch"]
# Parameters that the velocity does not depend on: the text branch of the last block, unrouted experts, unused layers.
UNUSED = {
    "qwen": 6, "qwen_to_image": 6, "hidream": 14, "lumina": 1, "hunyuan_video_15": 6, "stable_audio_3": 4,
}  # fmt: skip
# Arguments of the network that are its time, where they are several: the ends of a step, which are the same.
TIME_ARGUMENTS = {"ace_step": 2}
# What these decode is not all of their state, or has no encoder that returns latents.
NOT_DECODED = {"ltx_image": "that has no inverse"}
# Conditions that are drawn from a posterior, here of a deviation of 3e-7.
DRAWN = {"flux_fill", "flux_control", "ltx_image", "sd3_controlnet"}


def conditions(family: Family, samples: list[int], captions: list[str] | None = None) -> dict[str, Any]:
    captions = captions or (SHORT_AND_LONG if family.neutral else EQUALLY_LONG)
    prompts = {"prompt": [captions[i] for i in samples]} if family.prompts else {}
    return {**prompts, **family.own(samples)}


def make(name: str) -> tuple[Family, VelocityField, torch.Tensor, torch.Tensor]:
    family = RECIPES[name]()
    family.pipeline.set_progress_bar_config(disable=True)
    field = VelocityField(family.pipeline, family.network, **family.call)
    both = conditions(family, [0, 1])
    x_t = torch.randn(field.state_shape(**both), generator=torch.Generator().manual_seed(1))
    field.ask(x_t, **both)
    low, high = field.times_range or (0.0, 1.0)
    return family, field, x_t, low + (high - low) * torch.tensor([0.2, 0.7])


def test_enough_of_them() -> None:
    networks = {type(family.pipeline.components[family.network]) for family in (make() for make in RECIPES.values())}
    assert len(RECIPES) >= 45
    assert len(networks) >= 30


@pytest.mark.parametrize("name", RECIPES)
def test_a_batch_is_its_samples_and_the_stock_pipeline(name: str) -> None:
    family, field, x_t, t = make(name)
    times: list[dict[str, Any]] = []
    hook = field.network.register_forward_pre_hook(lambda module, args, kwargs: times.append(kwargs), with_kwargs=True)
    try:
        batch = field(x_t, t, **conditions(family, [0, 1]))
    finally:
        hook.remove()
    # 1. A batch with two times is its samples
    alone = torch.cat([field(x_t[i : i + 1], t[i], **conditions(family, [i])) for i in range(2)])
    assert (batch - alone).abs().max() <= 1e-5 * alone.abs().max()
    # 2. The network was given the family's times; tokens of a condition are at time 0
    (found,) = [found for found in field.describe() if found["shape"] == list(x_t.shape)]
    assert len(found["time"]) == TIME_ARGUMENTS.get(name, 1)
    for argument in found["time"]:
        given = times[-1][argument].double().reshape(2, -1).amax(1)
        torch.testing.assert_close(given, TIMES[family.time](t.double()), rtol=1e-6, atol=0)
    # 3. The stock pipeline on its own noise
    output, state, _ = stock_step(
        family.pipeline, None, t[0].item(), **{**field.call, **conditions(family, [0])}, network=family.network
    )
    inverted = field._scheduler.config.invert_sigmas
    velocity = field(state, t[0], **conditions(family, [0]))
    expected = (-output if inverted else output).to(velocity.dtype)
    assert torch.equal(velocity, expected) or (name in DRAWN and (velocity - expected).abs().max() <= 2e-6)
    # 4. Gradients
    unused = field.without_gradient(x_t, t, **conditions(family, [0, 1]))
    assert len(unused) == UNUSED.get(name, 0), unused


@pytest.mark.parametrize("name", [name for name in RECIPES if RECIPES[name]().prompts])
def test_kept_text_is_the_encoders(name: str) -> None:
    family, field, x_t, t = make(name)
    expected = field(x_t, t, **conditions(family, [0, 1]))
    single = field(x_t[:1], t[0], **conditions(family, [0]))
    field.keep_text()
    torch.testing.assert_close(field(x_t[:1], t[0], **conditions(family, [0])), single, atol=1e-6, rtol=0)
    if name.startswith("kandinsky5"):
        with pytest.raises(ValueError, match="packs the samples of a batch into one: take batches of one"):
            field(x_t, t, **conditions(family, [0, 1]))
        return
    torch.testing.assert_close(field(x_t, t, **conditions(family, [0, 1])), expected, atol=1e-6, rtol=0)
    if not family.neutral:
        with pytest.raises(ValueError, match="pads captions so that a batch changes them: group captions"):
            field(x_t, t, **conditions(family, [0, 1], SHORT_AND_LONG))


@pytest.mark.parametrize("name", RECIPES)
def test_data_are_what_the_decoder_is_given(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, field, x_t, _ = make(name)
    one = conditions(family, [0])
    if name in NOT_DECODED:
        with pytest.raises(ValueError, match=NOT_DECODED[name]):
            DecodeMap(field, **one)
        return
    decode_map = DecodeMap(field, **one)
    latents = torch.randn(1, *decode_map.map.y_shape, generator=torch.Generator().manual_seed(2))
    given = stop_at_decoder(monkeypatch, family.pipeline.vae)
    state = decode_map.from_latents(latents)
    assert state.shape == x_t[:1].shape
    output_type = {"output_type": "pt"} if "output_type" in field.arguments else {}
    call = {**field.call, **one, **output_type}
    with pytest.raises(Decoded):
        stock_step(family.pipeline, None, 0.0, **call, network=family.network, result=state)
    torch.testing.assert_close(given[0], latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("text", "image"), [("chroma", "chroma_image"), ("z_image", "z_to_image")])
def test_encoded_data_is_that_of_image_to_image(text: str, image: str) -> None:
    family, field, x_t, _ = make(text)
    sibling = RECIPES[image]()
    call = {**VelocityField(sibling.pipeline, **sibling.call).call, **conditions(family, [0]), **sibling.own([0])}
    # The scheduler of `stock_step` adds no noise to what the sibling prepares of its image.
    _, state, _ = stock_step(sibling.pipeline, None, 0.5, **{**call, "strength": 1.0})
    images = 2 * sibling.own([0])["image"] - 1
    draws = torch.Generator().manual_seed(0)
    encoded = DecodeMap(field, **conditions(family, [0])).encode(images, sample=True, generator=draws)
    assert encoded.shape == x_t[:1].shape
    torch.testing.assert_close(encoded, state, atol=1e-5, rtol=0)


# The table


def test_checked_families_are_those_of_the_recipes() -> None:
    names = {type(make().pipeline).__name__.removesuffix("Pipeline") for make in RECIPES.values()}
    assert names == set(families.CHECKED)


def test_names_of_the_table_are_names_of_diffusers() -> None:
    names = [name for name in dir(diffusers) if name.endswith("Pipeline")]
    for key in (*families.REFUSED, *families.GUIDANCE_OFF, *families.LORA_LAYERS_OF):
        assert any(name.startswith(key) for name in names), key
    for name in families.CHECKED:
        assert f"{name}Pipeline" in names


def test_families_have_names_in_one_place() -> None:
    source = Path(inspect.getfile(families))
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 80
    word = re.compile("|".join(rf"\b{name}\b" for name in {"Flux", "Wan", *families.CHECKED, *families.REFUSED}))
    for module in (VelocityField, DecodeMap, PromptMemo, CapturedCall, find, NetworkCalls, PipelineCalls, StandIn):
        assert word.search(inspect.getsource(inspect.getmodule(module))) is None, module


def test_a_refused_pipeline() -> None:
    class AnyFlowPipeline(diffusers.FluxPipeline):
        pass

    pipeline = AnyFlowPipeline(**RECIPES["flux_text"]().pipeline.components)
    with pytest.raises(ValueError, match="AnyFlowPipeline is no velocity field: it learns flow maps"):
        VelocityField(pipeline)


def test_a_pipeline_that_uses_the_time_outside_its_network_is_found() -> None:
    class Preconditioned(diffusers.StableDiffusion3Pipeline):
        """Its network predicts the data, and the pipeline makes the velocity with the batch's one time."""

    family = RECIPES["sd3"]()
    pipeline = Preconditioned(**family.pipeline.components)
    field = VelocityField(pipeline, **family.call)
    call = conditions(family, [0, 1])
    step = type(field._scheduler).step

    class Scheduler(type(field._scheduler)):  # type: ignore[misc]
        def step(self, output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return step(self, (sample - output) / self.t, timestep, sample, *args, **kwargs)

    field._scheduler.__class__ = Scheduler
    x_t = torch.randn(field.state_shape(**call))
    with pytest.raises(ValueError, match="times differ within a batch .* it uses the time outside its network"):
        field(x_t, torch.tensor([0.2, 0.7]), **call)


def test_documented_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "velocity_field.md").read_text(encoding="utf-8")
    rows = [tuple(line.strip("| ").split(" | ")) for line in page.splitlines() if re.match(r"\| \w+Pipeline ", line)]
    # Of another diffusers than the page's, the table has other rows.
    same = f"diffusers {diffusers.__version__}\n" in page
    assert rows == table() if same else len(rows) > 100
