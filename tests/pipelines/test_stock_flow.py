# SPDX-License-Identifier: Apache-2.0
"""Flows of stock pipelines: densities, inversion, edits, inverse problems; against closed forms and stock calls."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
)
from tiny_families import FAMILIES, Family
from tiny_families_2 import MORE

from diffusers_fm import FlowMatchScheduler, OTPath
from diffusers_fm.applications.editing import flow_edit
from diffusers_fm.applications.operators import DownsampleOperator
from diffusers_fm.pipelines import StockFlow
from diffusers_fm.pipelines.guided_flow import draw_guided
from diffusers_fm.pipelines.velocity_field import guidance_call


RECIPES = {**FAMILIES, **MORE}
# Every layout, time and sign; guidance in one call and in two, embedded, none; videos; a condition beside the text.
DRAWN_BY_STOCK = (
    "sd3", "flux_text", "qwen", "z_image", "lumina2_text", "lumina", "aura", "chroma", "cogview4_text", "krea2",
    "bria", "hunyuan_video", "wan_text", "ltx_text", "mochi_text", "ovis", "longcat_image", "sana_text", "sana_pag",
    "sd3_controlnet", "flux_control",
)  # fmt: skip
BOTH = ("sd3", "flux_text")
PROMPTS = ["a red square", "a long patch"]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def make(name: str) -> tuple[Family, StockFlow, torch.Tensor, dict[str, int]]:
    """A flow, two images or videos, and their size."""
    family = RECIPES[name]()
    family.pipeline.set_progress_bar_config(disable=True)
    call = dict(family.call)
    size = {key: call.pop(key) for key in ("height", "width", "num_frames") if key in call}
    flow = StockFlow(family.pipeline, family.network, **call)
    frames = (size["num_frames"],) if size.get("num_frames", 1) > 1 else ()
    images = torch.rand(2, *frames, 3, size["height"], size["width"], generator=generator())
    return family, flow, images, size


@pytest.mark.parametrize("name", DRAWN_BY_STOCK)
def test_free_steps_alone_draw_what_the_stock_pipeline_draws(name: str) -> None:
    # The whole way from noise: velocity, guidance, grid and shift are those of the stock call.
    family, flow, images, size = make(name)
    names = flow.field().arguments
    own = family.own([0, 1])
    guided = "negative_prompt" in names and bool({"guidance_scale", "true_cfg_scale"} & set(names))
    scale = 2.0 if guided else None
    off = {key: value for key, value in flow.field().call.items() if key not in flow.call}
    found = flow.edit(
        images,
        "a",
        PROMPTS,
        strength=1.0,
        num_inference_steps=2,
        num_free_steps=2,
        guidance_scale=scale,
        generator=generator(),
        output_type="latent",
        **own,
    )
    stock = guidance_call(family.pipeline, flow.network, 2.0) if guided else off
    stock |= {"negative_prompt": ["", ""]} if guided else {}
    stock |= {"output_type": "latent"} if "output_type" in names else {}
    noise = torch.randn(found.images.shape, generator=generator())
    call = {**flow.call, **size, **stock, **own}
    expected = family.pipeline(prompt=list(PROMPTS), latents=noise, num_inference_steps=2, return_dict=False, **call)[
        0
    ]
    # Random conditions are drawn from a posterior of a deviation of 3e-7, and CogView4 rounds its times.
    torch.testing.assert_close(found.images, expected, rtol=0, atol=2e-5)
    assert found.nfe == 2


@pytest.mark.parametrize("name", BOTH)
def test_round_trip(name: str) -> None:
    _, flow, images, size = make(name)
    coarse, fine = (flow.invert(images, PROMPTS, steps) for steps in (4, 16))
    assert (coarse.nfe, fine.nfe) == (8, 32)
    # Order 2: a quarter of the step leaves at most 1/8 of the error, with a margin of 2, down to float32.
    assert bool((fine.round_trip_error < (coarse.round_trip_error / 8).clamp(min=1e-5)).all())
    data = flow.to_data(images)
    noise = flow.encode(images, PROMPTS, 16, solver="heun")
    assert torch.equal(noise, fine.latents)
    back = flow.decode(noise, PROMPTS, size, 16, "latent", solver="heun")
    torch.testing.assert_close((back - data).flatten(1).square().mean(1).sqrt(), fine.round_trip_error)
    pictures = flow.decode(noise, PROMPTS, size, 16, "pt", solver="heun")
    again = flow.to_images(back, size, "pt")
    assert torch.equal(pictures, again) and pictures.shape == images.shape


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("method", ["flowedit", "inversion"])
def test_an_image_of_the_wanted_prompt_stays_bit_for_bit(name: str, method: str) -> None:
    _, flow, images, _ = make(name)
    found = flow.edit(images, PROMPTS, PROMPTS[:1] + ["blue"], method=method, num_inference_steps=3, output_type="pt")
    assert torch.equal(found.images[0], images[0])
    assert (found.images[1] - images[1]).abs().max() > 1e-3
    assert found.nfe == 2


def test_edits_of_stable_diffusion_3_written_out() -> None:
    family, flow, images, _ = make("sd3")
    pipeline = family.pipeline
    call = {"source_guidance_scale": 3.0, "guidance_scale": 5.0, "num_inference_steps": 6, "output_type": "latent"}
    found = flow.edit(images, PROMPTS, ["blue", "green"], "dark", strength=0.5, generator=generator(), **call).images

    def under(prompts: list[str], scale: float) -> Any:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompts, None, None, negative_prompt=["dark", "dark"], max_sequence_length=16
        )

        def predict(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            times = (1000 * t).float().expand(len(x))
            with torch.no_grad():
                without = pipeline.transformer(x, negative, negative_pooled, times, return_dict=False)[0]
                output = pipeline.transformer(x, embeds, pooled, times, return_dict=False)[0]
            return without + scale * (output - without)

        return predict

    scheduler = FlowMatchScheduler.from_stock(pipeline.scheduler)
    scheduler.set_timesteps(6)
    ratios, draws = scheduler.sigmas[-4:].tolist(), generator()
    data = flow.to_data(images)
    steps = flow_edit(
        under(PROMPTS, 3.0),
        under(["blue", "green"], 5.0),
        data,
        OTPath(),
        ratios,
        lambda: torch.randn(data.shape, generator=draws),
    )
    *_, expected = steps
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * expected.abs().max().item())


# Densities


def gaussian_velocity(x: torch.Tensor, t: torch.Tensor, deviation: float) -> torch.Tensor:
    """Velocity of the straight path of normal data: its marginals are normal with variance (1 - t)^2 s^2 + t^2."""
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    return x * (t - (1 - t) * deviation**2) / ((1 - t) ** 2 * deviation**2 + t**2)


class Linear3(SD3Transformer2DModel):
    def forward(self, hidden_states: Any, encoder_hidden_states: Any = None, pooled_projections: Any = None,
                timestep: Any = None, **kwargs: Any) -> Any:  # fmt: skip
        return (gaussian_velocity(hidden_states, timestep / 1000, 0.4),)


class LinearFlux(FluxTransformer2DModel):
    def forward(self, hidden_states: Any, encoder_hidden_states: Any = None, pooled_projections: Any = None,
                timestep: Any = None, **kwargs: Any) -> Any:  # fmt: skip
        return (gaussian_velocity(hidden_states, timestep, 0.4),)


@pytest.mark.parametrize(("name", "network"), [("sd3", Linear3), ("flux_text", LinearFlux)])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_likelihood_under_a_linear_flow(name: str, network: type, divergence: str) -> None:
    family, _, images, _ = make(name)
    linear = network(**{key: value for key, value in family.pipeline.transformer.config.items() if key[0] != "_"})
    call = {"max_sequence_length": family.call["max_sequence_length"]}
    parts = {**family.pipeline.components, "transformer": linear}
    flow = StockFlow(type(family.pipeline)(**parts), **call)
    found = flow.log_likelihood(images, PROMPTS, divergence=divergence, num_steps=32, generator=generator())
    data = flow.to_data(images).double().flatten(1)
    expected = -((data / 0.4).square() + math.log(2 * math.pi * 0.4**2)).sum(1) / 2
    # 32 steps of order 3 on a flow that changes by 1 / 0.4 leave 1e-5 for each dimension.
    torch.testing.assert_close(found.log_prob.double(), expected, rtol=0, atol=1e-4 * data.shape[1])


@pytest.mark.parametrize("name", ["flux_text", "qwen"])  # captions of one length, and of their own
def test_a_likelihood_does_not_depend_on_its_batch(name: str) -> None:
    _, flow, images, _ = make(name)
    captions = ["red", "a longer caption of blue"]
    options = {"num_steps": 2, "divergence": "exact", "mode": "reverse"}
    both = flow.log_likelihood(images, captions, **options).log_prob
    cut = flow.log_likelihood(images, captions, batch_size=1, **options).log_prob
    alone = [flow.log_likelihood(images[i : i + 1], captions[i], **options).log_prob for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(both, cut, rtol=1e-4, atol=1e-3)


# Inverse problems


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("method", ["projection", "guided"])
def test_what_was_measured_is_met(name: str, method: str) -> None:
    _, flow, images, _ = make(name)
    mask = torch.zeros(1, 1, *images.shape[-2:])
    mask[..., : images.shape[-1] // 2] = 1
    found = flow.restore(
        image=images,
        mask_image=mask,
        prompt=PROMPTS,
        method=method,
        num_inference_steps=3,
        generator=generator(),
        output_type="pt",
    )
    torch.testing.assert_close(found.images * (1 - mask), images * (1 - mask), rtol=0, atol=1e-5)
    assert found.nfe == 3 and (found.num_backward > 0) == (method == "guided")
    assert (found.images - images).abs().max() > 0.05


def test_superresolution() -> None:
    _, flow, images, size = make("flux_text")
    operator = DownsampleOperator(2)
    value = operator.forward(2 * images - 1)
    call = {"num_inference_steps": 2, "generator": generator(), "output_type": "pt", "guidance_scale": 2.0}
    found = flow.restore(value, operator, prompt=PROMPTS, size=size, **call)
    torch.testing.assert_close(operator.forward(2 * found.images - 1), value, rtol=0, atol=1e-4)


# Refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a", "b", "c"]}, "`prompt` must be a string, or one for each of the 2 images"),
        ({"guidance_scale": math.inf}, "`guidance_scale` must be a finite number"),
        ({"images": torch.zeros(2, 5, 16, 16)}, "`image` must have 3 channels, got 5"),
        ({"images": torch.zeros(2, 3, 16, 13)}, "makes no images of|takes no images of 16 x 13 pixels"),
        ({"promt": "a"}, "StableDiffusion3Pipeline takes no 'promt' here, only"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    _, flow, images, _ = make("sd3")
    with pytest.raises(ValueError, match=message):
        flow.edit(**{"images": images, "source_prompt": "a", "prompt": "b", "num_inference_steps": 2, **arguments})


def test_a_density_has_no_guidance() -> None:
    _, flow, images, _ = make("sd3")
    with pytest.raises(ValueError, match="guidance is on, turn it off"):
        flow.log_likelihood(images, PROMPTS, guidance_scale=3.0)
    with pytest.raises(ValueError, match="Give `image` and `mask_image`, or `measurement` and `operator`"):
        flow.restore()


@pytest.mark.parametrize("name", BOTH)
def test_a_guider_in_the_place_of_the_pipelines_own_guidance(name: str) -> None:
    family, flow, images, size = make(name)
    noise = torch.randn(flow.to_data(images).shape, generator=generator())
    options = {"size": size, "num_inference_steps": 3, "output_type": "latent"}
    guided = draw_guided(flow, ClassifierFreeGuidance(2.0), noise, PROMPTS, "blue", **options)
    field = flow.field()
    scale = "true_cfg_scale" if "true_cfg_scale" in field.arguments else "guidance_scale"
    call = {**field.call, **size, scale: 2.0, "negative_prompt": ["blue", "blue"], "output_type": "latent"}
    expected = family.pipeline(prompt=PROMPTS, latents=noise, num_inference_steps=3, return_dict=False, **call)[0]
    torch.testing.assert_close(guided, expected, rtol=0, atol=2e-5)
    # Scale 1 is the plain flow; projection in the space of the data is another guidance than in that of the velocity.
    plain = draw_guided(flow, ClassifierFreeGuidance(1.0), noise, PROMPTS, "blue", **options)
    alone = draw_guided(flow, ClassifierFreeGuidance(3.0), noise, PROMPTS, PROMPTS, **options)
    torch.testing.assert_close(plain, alone, rtol=0, atol=1e-6)
    spaces = [
        draw_guided(
            flow, AdaptiveProjectedGuidance(50.0, eta=0.0), noise, PROMPTS, "blue", guidance_space=space, **options
        )
        for space in ("sample", "velocity")
    ]
    assert (spaces[0] - spaces[1]).abs().max() > 1e-5
    # Outside of the interval the prediction is that of the prompt.
    outside = draw_guided(
        flow, ClassifierFreeGuidance(3.0), noise, PROMPTS, "blue", guidance_interval=[0.0, 1e-9], **options
    )
    torch.testing.assert_close(outside, plain, rtol=0, atol=1e-6)
