# SPDX-License-Identifier: Apache-2.0
"""Guiders of diffusers against closed forms on class mixtures, in pipelines and beside diffusers' modular ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DiffusionPipeline,
    TangentialClassifierFreeGuidance,
)
from helpers import GaussianMixture, draw_mixture
from tiny_pipelines import generators, tiny_class_embedder, tiny_pipeline, tiny_sd3, tiny_unet

from diffusers_fm import (
    FlowMatchEditPipeline,
    FlowMatchInversePipeline,
    FlowMatchPipeline,
    FlowMatchScheduler,
    FlowMatchUpscalePipeline,
)
from diffusers_fm.pipelines.guidance import Guidance


ALL = draw_mixture(3, (2, 3), modes=4, narrowest=0.4, widest=0.8)
ONE = GaussianMixture(torch.ones(1, dtype=torch.float64), ALL.means[:1], ALL.stds[:1])
PATHS = {"ot": "flow_prediction", "vp": "v_prediction", "ve": "sample"}
every_path = pytest.mark.parametrize(("path", "kind"), PATHS.items(), ids=PATHS)


def flat_dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum(dim=(1, 2), keepdim=True)


def cfg(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """arXiv 2207.12598."""
    return u + 3 * (c - u)


def zero_star(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """arXiv 2503.18886, algorithm 1."""
    u = flat_dot(c, u) / flat_dot(u, u) * u
    return u + 3 * (c - u)


def apg(c: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """arXiv 2410.02416, algorithm 1, with the parallel part halved and differences of norm 0.2 at most."""
    difference = c - u
    difference = difference * (0.2 / flat_dot(difference, difference).sqrt()).clamp(max=1)
    parallel = flat_dot(difference, c) / flat_dot(c, c) * c
    return u + 3 * (difference - 0.5 * parallel)


CASES: dict[str, tuple[Any, str | None, str, Callable[..., torch.Tensor]]] = {
    "cfg": (ClassifierFreeGuidance(3.0), None, "velocity", cfg),
    "cfg-epsilon": (ClassifierFreeGuidance(3.0), "epsilon", "epsilon", cfg),
    "zero-star": (ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=0), None, "velocity", zero_star),
    "apg": (AdaptiveProjectedGuidance(3.0, None, 0.2, eta=0.5), None, "sample", apg),
    "apg-velocity": (AdaptiveProjectedGuidance(3.0, None, 0.2, eta=0.5), "velocity", "velocity", apg),
}


def point(scheduler: FlowMatchScheduler, t: float) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Points of the path, their timestep, and the exact answers for the class and without one."""
    x_t = ALL.marginal_sample(scheduler.path, t, 16)
    times = torch.full((16,), t, dtype=torch.float64)
    kind = scheduler.config.prediction_type
    answers = {
        "conditional": lambda: ONE.predict(scheduler.path, x_t, times, kind),
        "unconditional": lambda: ALL.predict(scheduler.path, x_t, times, kind),
    }
    return x_t, scheduler.timestep(times[0]), answers


@every_path
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("t", [0.05, 0.6])
def test_guided_predictions_have_their_closed_form(case: Any, path: str, kind: str, t: float) -> None:
    guider, asked, space, formula = case
    scheduler = FlowMatchScheduler(path=path, prediction_type=kind)
    x_t, timestep, answers = point(scheduler, t)
    guided = Guidance(guider, scheduler, torch.nn.Identity(), asked)(x_t, timestep, **answers)

    times = torch.full((16,), t, dtype=torch.float64)
    exact = [
        {each: mixture.predict(scheduler.path, x_t, times, each) for each in ("sample", "epsilon")}
        for mixture in (ONE, ALL)
    ]
    handed = [each["epsilon"] - each["sample"] if space == "velocity" else each[space] for each in exact]
    estimate = formula(*handed)
    # The data and the noise that belong to the estimate, by x_t = alpha data + sigma noise.
    alpha, sigma = scheduler.path.alpha(times[:1]).item(), scheduler.path.sigma(times[:1]).item()
    if space == "velocity":
        data = (x_t - sigma * estimate) / (alpha + sigma)
    else:
        data = estimate if space == "sample" else (x_t - sigma * estimate) / alpha
    expected = scheduler.path.target(data, (x_t - alpha * data) / sigma, times, kind)
    # Norms in float32 within diffusers' CFG-Zero*.
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@every_path
def test_guidance_of_one_and_outside_the_interval_is_the_conditional_field(path: str, kind: str) -> None:
    scheduler = FlowMatchScheduler(path=path, prediction_type=kind)
    inside, outside = ((sigma, (0.3, 0.7)) for sigma in (0.5, 0.8))
    for guider, (sigma, interval), same in (
        (ClassifierFreeGuidance(1.0), inside, True),
        (AdaptiveProjectedGuidance(1.0), inside, True),
        (ClassifierFreeGuidance(3.0), outside, True),
        (ClassifierFreeGuidance(3.0), inside, False),
        # Shares of sigma, whatever the grid.
        (ClassifierFreeGuidance(3.0, start=0.6), inside, True),
        (ClassifierFreeGuidance(3.0, start=0.4), inside, False),
    ):
        t = scheduler.path.time_at(torch.tensor(sigma * scheduler.path.ratio_max, dtype=torch.float64)).item()
        x_t, timestep, answers = point(scheduler, t)
        guided = Guidance(guider, scheduler, torch.nn.Identity(), "sample", interval)(x_t, timestep, **answers)
        assert torch.equal(guided, answers["conditional"]()) == same


def test_the_two_spaces_of_projection_differ() -> None:
    scheduler = FlowMatchScheduler()
    x_t, timestep, answers = point(scheduler, 0.6)
    guider = AdaptiveProjectedGuidance(3.0, eta=0.0)
    one, other = (
        Guidance(guider, scheduler, torch.nn.Identity(), space)(x_t, timestep, **answers)
        for space in ("sample", "velocity")
    )
    assert (one - other).norm() > 0.02 * other.norm()


# In pipelines


LABELS = {"class_labels": [1, 3], "num_inference_steps": 5, "output_type": "latent"}


def draw(pipeline: FlowMatchPipeline, **call: Any) -> Any:
    return pipeline(**LABELS, **call, generator=generators(1, 2)).images


def test_a_guider_is_saved_and_loaded(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("unet-classes", solver="abm3", sampling_path="angle")
    plain, guided = draw(pipeline), draw(pipeline, guidance_scale=3.0)
    guider = AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5)
    pipeline = FlowMatchPipeline(
        **pipeline.components | {"guider": guider}, num_classes=5, guidance_interval=[0.1, 0.9]
    )
    pipeline.set_progress_bar_config(disable=True)
    images = draw(pipeline)
    assert not torch.allclose(images, plain)
    # A call keeps its momentum to itself.
    assert torch.equal(draw(pipeline), images)
    pipeline.save_pretrained(tmp_path)
    for load in (FlowMatchPipeline, DiffusionPipeline):
        loaded = load.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert loaded.config.guidance_interval == [0.1, 0.9]
        assert torch.equal(draw(loaded), images)
    # The plain rule is that of `guidance_scale`, but for one call of the network in place of two.
    pipeline = FlowMatchPipeline(**pipeline.components | {"guider": ClassifierFreeGuidance(3.0)}, num_classes=5)
    pipeline.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(pipeline), guided, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["set", "from_pipe", "from_pretrained"])
def test_the_settings_of_a_guider_go_with_it(way: str, tmp_path: Path) -> None:
    plain = tiny_pipeline("unet-classes")
    components = plain.components | {"guider": ClassifierFreeGuidance(3.0), "guiding_network": plain.unet}
    settings: dict[str, Any] = {"guidance_space": "epsilon", "guidance_interval": [0.1, 0.9]}
    pipeline = FlowMatchPipeline(**components, num_classes=5, **settings)
    if way == "set":
        pipeline.guider = None
        FlowMatchEditPipeline.from_pipe(pipeline)
    elif way == "from_pipe":
        assert FlowMatchEditPipeline.from_pipe(pipeline).config.guidance_space == "epsilon"
        pipeline = FlowMatchPipeline.from_pipe(pipeline, guider=None)
    else:
        pipeline.save_pretrained(tmp_path / "guided")
        pipeline = FlowMatchPipeline.from_pretrained(tmp_path / "guided", guider=None)
    pipeline.save_pretrained(tmp_path / "plain")
    loaded = FlowMatchPipeline.from_pretrained(tmp_path / "plain")
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
        assert (each.guider, each.guiding_network) == (None, None)
        assert not each.config.get("guidance_space") and not each.config.get("guidance_interval")
        assert torch.equal(draw(each), draw(plain))


@pytest.mark.parametrize("path", PATHS)
def test_zeroed_first_steps_are_no_part_of_a_solvers_history(path: str) -> None:
    settings = {"path": path, "solver": "abm3", "sampling_path": "angle"}
    pipeline = tiny_pipeline("unet-classes", **settings)
    guider = ClassifierFreeZeroStarGuidance(1.0, zero_init_steps=2)
    guided = FlowMatchPipeline(**pipeline.components | {"guider": guider}, num_classes=5)
    guided.set_progress_bar_config(disable=True)
    output = guided(**LABELS, generator=generators(1, 2))
    # Without guidance beside the zeros, it is the plain loop over the rest of the grid from the same straight point.
    scheduler = FlowMatchScheduler(**settings)
    scheduler.set_timesteps(5)
    rest = scheduler.sigmas[2:-1].tolist()
    spread = [
        scheduler.path.alpha(t) + scheduler.path.sigma(t)
        for t in scheduler.path.time_at(scheduler.sigmas[:3].double())
    ]
    noise = torch.stack([torch.randn(1, 8, 8, generator=each) for each in generators(1, 2)]) * (spread[2] / spread[0])
    scheduler.set_timesteps(sigmas=rest)
    x_t = noise.float() * scheduler.init_noise_sigma
    labels = torch.tensor(LABELS["class_labels"])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            x_t = scheduler.step(pipeline.predict(x_t, timestep, labels), timestep, x_t, return_dict=False)[0]
    assert output.nfe == 3
    torch.testing.assert_close(output.images, x_t, rtol=1e-4, atol=1e-4 * x_t.abs().max().item())


def test_a_second_network_guides() -> None:
    pipeline = tiny_pipeline("unet-classes")
    torch.manual_seed(5)
    weak = tiny_unet(num_class_embeds=6)
    with torch.no_grad():
        for parameter in weak.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    components = pipeline.components | {"guider": ClassifierFreeGuidance(2.0)}
    same = FlowMatchPipeline(**components | {"guiding_network": pipeline.unet}, num_classes=5)
    other = FlowMatchPipeline(**components | {"guiding_network": weak}, num_classes=5)
    for each in (same, other):
        each.set_progress_bar_config(disable=True)
    torch.testing.assert_close(draw(same), draw(pipeline), rtol=1e-4, atol=1e-4)
    # v_weak + 2 (v - v_weak) (arXiv 2406.02507, equation 3), both with the label.
    scheduler, labels = FlowMatchScheduler(), torch.tensor(LABELS["class_labels"])
    scheduler.set_timesteps(5)
    x_t = torch.stack([torch.randn(1, 8, 8, generator=each) for each in generators(1, 2)])
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            strong, away = (
                net(x_t, timestep, class_labels=labels, return_dict=False)[0] for net in (pipeline.unet, weak)
            )
            x_t = scheduler.step(away + 2 * (strong - away), timestep, x_t, return_dict=False)[0]
    torch.testing.assert_close(draw(other), x_t, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "call", "message"),
    [
        ({"guider": "cfg"}, {}, "`guider` must be one of `diffusers.guiders`, got str"),
        ({"guidance_space": "sample"}, {}, "need a `guider`, got none"),
        ({"guider": ClassifierFreeGuidance(), "guidance_space": "score"}, {}, r"None, got 'score'"),
        ({"guider": ClassifierFreeGuidance(), "guidance_interval": [0.7, 0.2]}, {}, r"rising sigmas in \[0, 1\]"),
        ({"guider": ClassifierFreeGuidance()}, {"guidance_scale": 2.0}, "`guidance_scale` 2.0 does not go with"),
        ({"guider": ClassifierFreeGuidance()}, {"solver": "dopri5"}, "one with fixed steps"),
        ({"guider": ClassifierFreeZeroStarGuidance(zero_init_steps=5)}, {}, "zeroes 5 of 5 steps"),
    ],
)
def test_what_a_guider_cannot_do_is_refused(settings: dict[str, Any], call: dict[str, Any], message: str) -> None:
    components = tiny_pipeline("unet-classes").components | settings
    with pytest.raises(ValueError, match=message):
        draw(FlowMatchPipeline(**components, num_classes=5), **call)


def test_a_guider_needs_labels_where_only_the_null_class_is_there() -> None:
    guider, message = ClassifierFreeGuidance(3.0), "A `guider` needs classes and a null class"
    plain = FlowMatchPipeline(
        FlowMatchScheduler(),
        transformer=tiny_sd3(),
        class_embedder=tiny_class_embedder(num_classes=0),
        guider=guider,
    )
    unet = tiny_unet(in_channels=2, out_channels=1, num_class_embeds=1)
    upscaler = FlowMatchUpscalePipeline(FlowMatchScheduler(), unet=unet, num_classes=0, scale_factor=2, guider=guider)
    assert (plain.null_class, upscaler.null_class) == (0, 0)
    with pytest.raises(ValueError, match=message):
        plain(num_inference_steps=1)
    with pytest.raises(ValueError, match=message):
        upscaler(torch.zeros(1, 1, 4, 4), num_inference_steps=1)


def test_pipelines_without_a_sampling_loop_of_their_own_refuse_a_guider() -> None:
    pipeline = tiny_pipeline("unet-classes")
    components = pipeline.components | {"guider": ClassifierFreeGuidance(3.0)}
    image = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="A FlowMatchInversePipeline takes no `guider`"):
        FlowMatchInversePipeline(**components, num_classes=5)(image=image, mask_image=image, class_labels=1)
    with pytest.raises(ValueError, match="A FlowMatchEditPipeline takes no `guider`"):
        FlowMatchEditPipeline(**components, num_classes=5)(image, 1, 2)


@pytest.mark.parametrize(
    "guider",
    [
        ClassifierFreeGuidance(3.0),
        AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5),
        ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=1),
        TangentialClassifierFreeGuidance(3.0, guidance_rescale=0.2),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_a_guider_does_what_it_does_in_a_modular_pipeline(guider: Any) -> None:
    from diffusers.modular_pipelines.stable_diffusion_3.denoise import StableDiffusion3DenoiseStep

    pipeline = tiny_pipeline("sd3")
    guided = FlowMatchPipeline(**pipeline.components | {"guider": guider}, guidance_space="velocity")
    guided.set_progress_bar_config(disable=True)
    ours = draw(guided)

    labels = torch.tensor(LABELS["class_labels"])
    tokens, pooled = pipeline.class_embedder(labels)
    null_tokens, null_pooled = pipeline.class_embedder(torch.full_like(labels, pipeline.null_class))
    modular = StableDiffusion3DenoiseStep().init_pipeline()
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(5)
    modular.update_components(transformer=pipeline.transformer, scheduler=scheduler, guider=guider)
    noise = torch.stack([torch.randn(4, 8, 8, generator=each) for each in generators(1, 2)])
    theirs = modular(
        latents=noise, timesteps=scheduler.timesteps, num_inference_steps=5, prompt_embeds=tokens.detach(),
        negative_prompt_embeds=null_tokens.detach(), pooled_prompt_embeds=pooled.detach(),
        negative_pooled_prompt_embeds=null_pooled.detach(), output="latents",
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6 * theirs.abs().max().item())
