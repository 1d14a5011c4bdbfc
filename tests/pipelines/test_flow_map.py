# SPDX-License-Identifier: Apache-2.0
"""Sampling of flow maps by pipelines: each call of the network gets the end of its step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from stock_pipelines import flux, stable_diffusion_3
from tiny_pipelines import images_of, labels_of, tiny_class_embedder, tiny_dit, tiny_sd3, tiny_unet

from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, IntervalEmbedding, calibrate, with_flow_map
from diffusers_fm.flow_maps import AverageVelocity, average_velocity, sample_flow_map
from diffusers_fm.models.interval import IntervalConditioning


# Some roundings of float32 for each step.
TOLERANCE = 1e-6


def few_step(kind: str, first_block: int = 1, **scheduler: Any) -> FlowMatchPipeline:
    """A pipeline whose network answers otherwise for every end of a step."""
    flow_map = {"first_block": first_block, "num_inference_steps": 3} if kind != "unet" else {"num_inference_steps": 3}
    components: dict[str, Any] = {"scheduler": FlowMatchScheduler(solver="flow_map", flow_map=flow_map, **scheduler)}
    if kind == "unet":
        embedding = IntervalEmbedding(4 * tiny_unet().config.block_out_channels[0], 16)
        torch.nn.init.normal_(embedding.time_embedding.linear_2.weight)
        components |= {"unet": tiny_unet(), "interval_embedding": embedding}
    elif kind == "dit":
        components["transformer"] = tiny_dit(num_layers=3)
    else:
        components |= {"transformer": tiny_sd3(num_layers=3), "class_embedder": tiny_class_embedder()}
    pipeline = FlowMatchPipeline(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: FlowMatchPipeline, **options: Any) -> torch.Tensor:
    options = {"class_labels": labels_of(pipeline), "latents": noise(pipeline), "output_type": "latent", **options}
    return pipeline(**options).images


def noise(pipeline: FlowMatchPipeline) -> torch.Tensor:
    return torch.randn(3, *pipeline.sample_shape, generator=torch.Generator().manual_seed(1))


def map_of(pipeline: FlowMatchPipeline) -> tuple[AverageVelocity, IntervalConditioning]:
    """Average velocity of the pipeline's own network."""
    scheduler = pipeline.scheduler
    conditioning = IntervalConditioning.of(pipeline.denoiser)
    assert conditioning is not None
    labels = pipeline.prepare_class_labels(labels_of(pipeline))

    def predict(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditioning.end = r
        return pipeline.predict(x, t, labels)

    kind = scheduler.config.prediction_type
    return average_velocity(predict, scheduler.path, kind, scheduler.timestep_scale), conditioning


@pytest.mark.parametrize("kind", ["dit", "sd3", "unet"])
@pytest.mark.parametrize("path", ["ot", "cosine"])
def test_a_pipeline_samples_its_flow_map(kind: str, path: str) -> None:
    pipeline = few_step(kind, path=path, shift=2.0)
    drawn = sample(pipeline, num_inference_steps=3)
    conditioning = IntervalConditioning.of(pipeline.denoiser)
    assert conditioning is not None
    assert conditioning.end is None
    with torch.no_grad():
        u, conditioning = map_of(pipeline)
        pipeline.scheduler.set_timesteps(3)
        expected = sample_flow_map(u, noise(pipeline), pipeline.scheduler.sigmas)
        conditioning.end = None
    # Cosine has no conversion that is a copy, so its numbers differ by more roundings.
    scale = expected.abs().max().item()
    torch.testing.assert_close(drawn, expected, rtol=0, atol=TOLERANCE * max(1.0, scale) * (1 if path == "ot" else 20))
    # The network does look at the end of the step.
    assert (sample(pipeline, num_inference_steps=3, solver="euler") - drawn).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_stock_pipeline_samples_a_flow_map_unchanged(family: str, tmp_path: Path) -> None:
    """Stable Diffusion 3 gives timesteps of 1000 t to its network, Flux t, and a grid of its own to its scheduler."""
    case = (stable_diffusion_3() if family == "sd3" else flux())[0]
    network = case.denoiser
    layers = {"num_layers": 2} if family == "sd3" else {"num_single_layers": 3}
    torch.manual_seed(0)
    deeper = network.from_config({**network.config, **layers}).eval()
    scheduler = FlowMatchScheduler.from_config(
        case.scheduler.config, solver="flow_map", flow_map={"first_block": 1, "num_inference_steps": 3}
    )
    components = {**case.pipeline.components, "transformer": deeper, "scheduler": scheduler}
    type(case.pipeline)(**components).save_pretrained(tmp_path)
    absent = {name: None for name, component in components.items() if component is None}
    pipeline = with_flow_map(type(case.pipeline).from_pretrained(tmp_path, **absent))
    pipeline.set_progress_bar_config(disable=True)

    calls: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    options = {**case.inputs, "num_inference_steps": 3, "output_type": "latent", "return_dict": False}
    if family == "sd3":
        options["guidance_scale"] = 1.0
    drawn = pipeline(**options, generator=torch.Generator().manual_seed(0))[0]
    hook.remove()
    assert len(calls) == 3

    conditioning = IntervalConditioning.of(pipeline.transformer)
    assert conditioning is not None
    begin = calls[0]["hidden_states"]
    unit = calls[0]["timestep"].item()

    def u(x: torch.Tensor, r: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        conditioning.end = (unit * r).float()
        return pipeline.transformer(**{**calls[0], "hidden_states": x, "timestep": (unit * t).float()})[0]

    with torch.no_grad():
        expected = sample_flow_map(u, begin, pipeline.scheduler.sigmas)
    if isinstance(pipeline, FluxPipeline):
        expected = pipeline._unpack_latents(expected, 16, 16, pipeline.vae_scale_factor)
        drawn = pipeline._unpack_latents(drawn, 16, 16, pipeline.vae_scale_factor)
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(drawn, expected, rtol=0, atol=TOLERANCE * scale)
    conditioning.remove()
    flow = pipeline(**options, generator=torch.Generator().manual_seed(0))[0]
    assert (flow.flatten() - drawn.flatten()).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("kind", ["dit", "sd3", "unet"])
def test_a_saved_pipeline_draws_the_same_in_its_own_number_of_calls(kind: str, tmp_path: Path) -> None:
    pipeline = few_step(kind)
    drawn = sample(pipeline)
    pipeline.save_pretrained(tmp_path)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    output = loaded(class_labels=labels_of(loaded), latents=noise(loaded), output_type="latent")
    assert output.nfe == 3
    torch.testing.assert_close(output.images, drawn, rtol=0, atol=0)
    if kind != "unet":
        conditioning = IntervalConditioning.of(loaded.transformer)
        assert conditioning is not None
        assert conditioning.first_block == 1
    # Another pipeline that shares the network conditions it once.
    shared = FlowMatchPipeline.from_pipe(loaded)
    shared.set_progress_bar_config(disable=True)
    torch.testing.assert_close(sample(shared), drawn, rtol=0, atol=0)
    assert len(loaded.denoiser._forward_pre_hooks) == 1


def test_the_flow_within_a_flow_map_is_the_network_as_it_was() -> None:
    pipeline = few_step("dit")
    plain = FlowMatchPipeline(FlowMatchScheduler(), transformer=tiny_dit(num_layers=3))
    plain.set_progress_bar_config(disable=True)
    sample(pipeline)
    assert torch.equal(sample(pipeline, solver="euler", num_inference_steps=5), sample(plain, num_inference_steps=5))
    pipeline.scheduler = pipeline.scheduler.with_settings(solver="euler")
    images = images_of(pipeline)
    assert torch.equal(pipeline.encode(images, 0), plain.encode(images, 0))


def test_a_call_in_a_callback_leaves_the_outer_one_alone() -> None:
    pipeline = few_step("dit")
    expected = sample(pipeline)

    def inner(_pipeline: Any, _index: int, _timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        sample(pipeline, num_inference_steps=2)
        return tensors

    assert torch.equal(sample(pipeline, callback_on_step_end=inner), expected)


def test_purposes_that_need_a_flow_are_refused() -> None:
    pipeline = few_step("dit")
    images = images_of(pipeline)
    for attempt in (
        lambda: pipeline.encode(images, 0),
        lambda: pipeline.decode(noise(pipeline), 0),
        lambda: pipeline.interpolate(images[:1], images[1:2], class_labels=0),
        lambda: pipeline.log_likelihood(images, 0),
        lambda: sample(pipeline, solver="dopri5"),
        lambda: calibrate(lambda *_: None, pipeline.scheduler, 4),
    ):
        with pytest.raises(ValueError, match=r"needs a flow, and the scheduler samples a flow map"):
            attempt()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling_path": "angle"}, "The solver 'flow_map' needs `sampling_path` 'ot', got 'angle'"),
        ({"eta": 0.5}, "`eta` needs the solver 'euler'"),
        ({"s_churn": 1.0}, "`s_churn` needs one of the solvers"),
        ({"invert_sigmas": True}, "needs a time that falls from noise to data"),
        ({"flow_map": {"calls": 3}}, r"`flow_map` must be a dictionary with keys among .* got \{'calls': 3\}"),
        ({"flow_map": {"first_block": 0}}, "`first_block` of `flow_map` must be an integer of at least 1, got 0"),
        ({"flow_map": {"flow_shift": 0}}, "`flow_shift` of `flow_map` must be a number above 0, got 0"),
        ({"flow_map": {"guidance_scale": 0.0}}, "`guidance_scale` of `flow_map` must be a number above 0, got 0.0"),
    ],
)
def test_settings_that_do_not_go_with_flow_maps_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatchScheduler(**{"solver": "flow_map", **settings})


def test_networks_and_schedulers_that_cannot_are_refused() -> None:
    unet = FlowMatchPipeline(FlowMatchScheduler(solver="flow_map"), unet=tiny_unet())
    with pytest.raises(ValueError, match="UNet2DModel needs an `embedding`"):
        sample(unet)
    case = stable_diffusion_3()[0]
    case.pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match=r"must be a FlowMatchScheduler with the solver 'flow_map', got a FlowMatchE"):
        with_flow_map(case.pipeline)
    pipeline = few_step("dit", 2)
    sample(pipeline)
    pipeline.scheduler = pipeline.scheduler.with_settings(flow_map={"first_block": 1})
    with pytest.raises(ValueError, match="conditioned from block 2 on, the scheduler's `flow_map` has the `first_bl"):
        sample(pipeline)


def test_the_end_of_a_step_in_the_unit_of_its_start() -> None:
    scheduler = FlowMatchScheduler(solver="flow_map", path="vp", shift=3.0)
    start = torch.tensor([0.8, 0.8])
    assert torch.equal(scheduler.interval_end(start), start)
    scheduler.set_timesteps(4)
    times = [*scheduler.timesteps.tolist(), 0.0]
    for i, (now, end) in enumerate(zip(times, times[1:])):
        for unit in (1.0, 0.001, 7.0):
            found = scheduler.interval_end(torch.tensor([unit * now]))
            torch.testing.assert_close(found, torch.tensor([unit * end]), rtol=1e-5, atol=1e-5 * unit)
        scheduler.step(torch.zeros(1, 2), scheduler.timesteps[i], torch.ones(1, 2))
    assert torch.equal(scheduler.interval_end(start), start)
