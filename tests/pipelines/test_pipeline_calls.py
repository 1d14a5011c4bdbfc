# SPDX-License-Identifier: Apache-2.0
"""Calls of a pipeline: what overlaps, what is shared, and what is refused before any work."""

import copy
import inspect
import json
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusion3Pipeline
from tiny_pipelines import NUM_CLASSES, generators, images_of, tiny_dit, tiny_pipeline, tiny_unet

from diffusers_fm import (
    FlowMatchEditPipeline,
    FlowMatchInversePipeline,
    FlowMatchPipeline,
    FlowMatchScheduler,
    FlowMatchUpscalePipeline,
    StableDiffusion3EditPipeline,
    init_pipeline,
)
from diffusers_fm.applications.operators import MaskOperator


PIPELINES = Path(__file__).parents[2] / "pipelines"


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def upscaler() -> FlowMatchUpscalePipeline:
    unet = tiny_unet(in_channels=2, num_class_embeds=NUM_CLASSES + 1)
    return quiet(FlowMatchUpscalePipeline(FlowMatchScheduler(), unet, num_classes=NUM_CLASSES, scale_factor=2))


def inverse() -> FlowMatchInversePipeline:
    return quiet(FlowMatchInversePipeline.from_pipe(tiny_pipeline("unet-classes")))


def editor() -> FlowMatchEditPipeline:
    return quiet(FlowMatchEditPipeline.from_pipe(tiny_pipeline("unet-classes")))


# Calls that overlap

GRAY = torch.full((1, 1, 8, 8), 0.5)
SMALL = torch.linspace(0, 1, 64).reshape(1, 1, 8, 8)
# A pipeline and two calls of it that share as little as they can.
OVERLAPS: dict[str, tuple[Callable[[], Any], dict, dict]] = {
    "sampling": (
        lambda: tiny_pipeline("unet-classes"),
        {"num_inference_steps": 5},
        {"num_inference_steps": 9, "guidance_scale": 6.0},
    ),
    "solvers": (
        lambda: tiny_pipeline("unet-classes"),
        {"num_inference_steps": 5, "solver": "heun", "guidance_scale": 2.0},
        {"num_inference_steps": 3, "solver": "ab2", "guidance_scale": 6.0},
    ),
    "stochastic": (
        lambda: tiny_pipeline("unet-classes", stochastic_sampling=True),
        {"num_inference_steps": 5, "guidance_scale": 2.0},
        {"sigmas": [1.0, 0.2]},
    ),
    "upscaling": (
        upscaler,
        {"image": SMALL, "num_inference_steps": 4},
        {"image": SMALL, "num_inference_steps": 3, "tile_size": 8, "guidance_scale": 6.0},
    ),
    "inverse": (
        inverse,
        {"image": GRAY, "mask_image": torch.ones(8, 8), "num_inference_steps": 4, "guidance_scale": 2.0},
        {"image": GRAY, "mask_image": torch.ones(8, 8), "num_inference_steps": 7, "guidance_scale": 6.0},
    ),
}


def call(pipeline: Any, label: int, arguments: dict, **more: Any) -> torch.Tensor:
    return pipeline(
        class_labels=[label], generator=generators(label), output_type="latent", **{**arguments, **more}
    ).images


@pytest.mark.parametrize("where", ["thread", "callback"])
@pytest.mark.parametrize("name", OVERLAPS)
def test_calls_that_overlap_give_what_each_gives_alone(name: str, where: str) -> None:
    make, outer, inner = OVERLAPS[name]
    pipeline = make()
    alone = [call(pipeline, 1, outer), call(pipeline, 2, inner)]
    found: list[torch.Tensor] = []
    seen = []

    def run_inner() -> None:
        found.append(call(pipeline, 2, inner))

    def callback(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        seen.append((given.num_timesteps, given.guidance_scale, given.do_classifier_free_guidance))
        if step == 1 and where == "callback":
            run_inner()
        elif step == 1:
            thread = threading.Thread(target=run_inner)
            thread.start()
            thread.join()
        return {}

    found.insert(0, call(pipeline, 1, outer, callback_on_step_end=callback))
    torch.testing.assert_close(found, alone, rtol=0, atol=0)
    assert len(set(seen)) == 1
    assert seen[0][1:] == (outer.get("guidance_scale", 1.0), "guidance_scale" in outer)


def test_threads_that_run_at_once_give_what_each_gives_alone() -> None:
    pipeline = tiny_pipeline("unet-classes")
    calls = [{"num_inference_steps": 4 + label, "guidance_scale": 1.0 + label} for label in range(4)]
    alone = [call(pipeline, label, arguments) for label, arguments in enumerate(calls)]
    barrier = threading.Barrier(len(calls))
    found: dict[int, torch.Tensor] = {}

    def wait(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step < 3:  # all of them are in step
            barrier.wait(60)
        return {}

    def run(label: int) -> None:
        found[label] = call(pipeline, label, calls[label], callback_on_step_end=wait)

    threads = [threading.Thread(target=run, args=(label,)) for label in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close([found[label] for label in range(len(calls))], alone, rtol=0, atol=0)


def test_a_callback_stops_its_own_call_alone() -> None:
    pipeline = tiny_pipeline("unet")
    inner = []

    def stop(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        given._interrupt = True
        return {}

    def callback(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        if step == 0:
            inner.append(given(num_inference_steps=5, output_type="latent", callback_on_step_end=stop).nfe)
        return {}

    outer = pipeline(num_inference_steps=4, output_type="latent", callback_on_step_end=callback)
    assert (inner, outer.nfe) == ([1], 4)


def test_another_thread_can_stop_the_call_that_began_last() -> None:
    pipeline = tiny_pipeline("unet")

    def callback(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        button = threading.Thread(target=setattr, args=(pipeline, "_interrupt", True))
        button.start()
        button.join()
        return {}

    assert pipeline(num_inference_steps=4, callback_on_step_end=callback).nfe == 1
    assert pipeline(num_inference_steps=4).nfe == 4


def test_a_call_shows_its_own_scheduler_and_leaves_the_pipelines_alone() -> None:
    pipeline = tiny_pipeline("unet")
    before = pipeline.scheduler.timesteps.clone()
    grids = []

    def callback(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        grids.append(given.scheduler.timesteps.tolist())
        return {}

    for solver in (None, "euler"):
        pipeline(timesteps=[900.0, 300.0], solver=solver, callback_on_step_end=callback)
    assert grids == [[900.0, 300.0]] * 4
    assert torch.equal(pipeline.scheduler.timesteps, before)
    assert pipeline.scheduler.begin_index is None
    pipeline.scheduler = FlowMatchScheduler(shift=3.0)
    assert pipeline.scheduler.shift == 3.0
    assert pipeline.components["scheduler"] is pipeline.scheduler


def test_a_call_with_its_own_times_changes_nothing_of_later_encodings() -> None:
    # On VE the input is scaled by the time, and stock's grid ties given timesteps to shifted sigmas.
    pipeline = tiny_pipeline("unet", path="ve", timestep_spacing="linspace", shift=3.0)
    images = images_of(pipeline)
    expected = pipeline.encode(images, num_inference_steps=4)
    pipeline(timesteps=[900.0, 300.0])
    assert torch.equal(pipeline.encode(images, num_inference_steps=4), expected)


def test_a_pipeline_that_was_called_can_be_copied_and_pickled() -> None:
    pipeline = tiny_pipeline("unet")
    expected = pipeline(num_inference_steps=2, generator=generators(1), output_type="latent").images
    for other in (copy.copy(pipeline), copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline))):
        assert torch.equal(
            other(num_inference_steps=2, generator=generators(1), output_type="latent").images, expected
        )


# Solvers and the scheduler's own class


def test_a_subclass_keeps_its_notes_and_its_path_in_every_call() -> None:
    class Noted(FlowMatchScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            turns.append(type(self))
            return super().step(*args, **kwargs)

    turns: list[type] = []
    pipeline = tiny_pipeline("unet")
    pipeline.scheduler = Noted()
    for solver in (None, "heun"):
        pipeline(num_inference_steps=2, solver=solver)
    assert turns == [Noted] * 6


# Precision


def dtypes(pipeline: Any) -> dict[str, torch.dtype]:
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {name: part.dtype for name, part in modules.items()}


@pytest.mark.parametrize("target", [FlowMatchPipeline, FlowMatchInversePipeline, FlowMatchEditPipeline])
def test_sharing_keeps_every_dtype(target: type[FlowMatchPipeline], tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3-vae")
    pipeline.transformer.to(torch.bfloat16)
    pipeline.class_embedder.to(torch.float16)
    expected = dtypes(pipeline)
    shared = target.from_pipe(pipeline)
    assert type(shared) is target
    assert dtypes(shared) == dtypes(pipeline) == expected
    assert len(set(expected.values())) == 3
    shared.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == target.__name__
    # Who asks for a dtype gets it.
    assert set(dtypes(target.from_pipe(pipeline, dtype=torch.float32)).values()) == {torch.float32}


def test_sharing_keeps_the_dtype_of_stock_pipelines() -> None:
    stock = DDPMPipeline(tiny_unet(), DDPMScheduler()).to(torch.float16)
    assert FlowMatchPipeline.from_pipe(stock).unet.dtype == torch.float16
    prompts = init_pipeline(PIPELINES / "sd3-tiny", seed=0, pipeline_class=StableDiffusion3Pipeline)
    prompts.to(torch.bfloat16)
    edits = StableDiffusion3EditPipeline.from_pipe(prompts)
    assert set(dtypes(edits).values()) == {torch.bfloat16} == set(dtypes(prompts).values())


def test_the_network_is_not_searched_at_every_call() -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), transformer=tiny_dit(num_layers=8))
    x, labels = torch.zeros(1, 4, 8, 8), torch.tensor([1])
    visits = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal visits
        visits += event == "call" and frame.f_code.co_name in ("modules", "named_modules")

    sys.setprofile(count)
    try:
        with torch.no_grad():
            pipeline.predict(x, 500.0, labels)
    finally:
        sys.setprofile(None)
    # The first weight lies three modules deep; there are more than a hundred.
    assert visits <= 10 < len(list(pipeline.transformer.modules()))


def test_a_network_that_is_put_in_later_keeps_its_labels() -> None:
    pipeline = tiny_pipeline("dit")
    labels, x = torch.arange(64) % NUM_CLASSES, torch.randn(1, 4, 8, 8).expand(64, -1, -1, -1)
    with torch.no_grad():
        expected = pipeline.predict(x, 500.0, labels)
        pipeline.transformer = tiny_dit().train()
        torch.testing.assert_close(pipeline.predict(x, 500.0, labels), expected, rtol=1e-4, atol=1e-5)


# Networks of the logarithm of time, and networks that give NaN


@pytest.mark.parametrize("scheduler", [{}, {"path": "ve", "prediction_type": "v_prediction"}], ids=["ot", "ve"])
def test_a_network_of_the_logarithm_of_time_is_never_given_zero(scheduler: dict) -> None:
    unet = tiny_unet(time_embedding_type="fourier")
    pipeline = quiet(FlowMatchPipeline(FlowMatchScheduler(**scheduler), unet=unet))
    images, steps = images_of(pipeline), {"num_inference_steps": 3}
    for solver in ("heun", "rk4", "dopri5"):
        tolerances = {"rtol": 1e-1, "atol": 1e-1} if solver == "dopri5" else steps
        assert pipeline(solver=solver, output_type="latent", **tolerances).images.isfinite().all()
    noise = pipeline.encode(images, **steps)
    assert noise.isfinite().all()
    assert pipeline.decode(noise, output_type="latent", **steps).isfinite().all()
    assert pipeline.log_likelihood(images, num_steps=3).log_prob.isfinite().all()
    edits = quiet(FlowMatchEditPipeline.from_pipe(pipeline))
    assert edits.invert(images, num_inference_steps=3).round_trip_max.isfinite().all()


def test_times_of_training_are_given_to_such_a_network_as_they_are() -> None:
    unet = tiny_unet(time_embedding_type="fourier")
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), unet=unet)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 700.0])
    with torch.no_grad():
        torch.testing.assert_close(pipeline.predict(x, t), unet(x, t).sample)


NETWORK = r"The network, UNet2DModel in torch.float32, gave values that are not finite"
FIELD = "The field answered with NaN or infinity"


@pytest.mark.parametrize(
    ("make", "use", "message"),
    [
        (lambda: tiny_pipeline("unet"), lambda p: p(num_inference_steps=2), NETWORK),
        (lambda: tiny_pipeline("unet"), lambda p: p(num_inference_steps=2, solver="ab2"), NETWORK),
        (lambda: tiny_pipeline("unet"), lambda p: p.encode(GRAY, num_inference_steps=2), FIELD),
        (lambda: tiny_pipeline("unet"), lambda p: p.decode(torch.zeros(1, 1, 8, 8), num_inference_steps=2), FIELD),
        (lambda: tiny_pipeline("unet"), lambda p: p.log_likelihood(GRAY, num_steps=2), FIELD),
        (lambda: tiny_pipeline("unet"), lambda p: p.bits_per_dim(GRAY.long(), num_steps=2), FIELD),
        (editor, lambda p: p(GRAY, 1, 2, num_inference_steps=3), NETWORK),
        (editor, lambda p: p(GRAY, 1, 2, num_inference_steps=3, method="inversion"), FIELD),
        (editor, lambda p: p.invert(GRAY, 1, num_inference_steps=2), FIELD),
        (inverse, lambda p: p(image=GRAY, mask_image=GRAY, class_labels=1, num_inference_steps=2), NETWORK),
        (upscaler, lambda p: p(GRAY, num_inference_steps=2), NETWORK),
        (upscaler, lambda p: p(GRAY, num_inference_steps=2, tile_size=8), NETWORK),
    ],
)
def test_nan_is_said_to_be_the_networks(make: Callable[[], Any], use: Callable[[Any], Any], message: str) -> None:
    pipeline = make()
    with torch.no_grad():
        pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=message):
        use(pipeline)


def test_nan_of_an_autoencoder_is_said_to_be_its_own() -> None:
    pipeline = tiny_pipeline("dit-vae")
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias.fill_(float("inf"))
    with pytest.raises(ValueError, match="The network, AutoencoderKL in torch.float32"):
        pipeline(1, num_inference_steps=1)


# Images

TAKERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Any], Any]]] = {
    "encode": (lambda: tiny_pipeline("unet"), lambda p, x: p.encode(x, num_inference_steps=2)),
    "log_likelihood": (
        lambda: tiny_pipeline("unet"),
        lambda p, x: p.log_likelihood(x, num_steps=2, divergence="exact").log_prob,
    ),
    "interpolate": (
        lambda: tiny_pipeline("unet"),
        lambda p, x: p.interpolate(x[:1], x[:1], num_images=2, num_inference_steps=2, output_type="pt"),
    ),
    "edit": (
        editor,
        lambda p, x: p(x, 1, 2, num_inference_steps=3, generator=generators(*range(len(x))), output_type="pt").images,
    ),
    "invert": (editor, lambda p, x: p.invert(x, 1, num_inference_steps=2).latents),
    "inverse": (
        inverse,
        lambda p, x: (
            p(
                image=x,
                mask_image=torch.ones(8, 8),
                class_labels=1,
                num_inference_steps=2,
                generator=generators(*range(len(x))),
                output_type="pt",
            ).images
        ),
    ),
    "upscale": (
        upscaler,
        lambda p, x: p(x, num_inference_steps=2, generator=generators(*range(len(x))), output_type="pt").images,
    ),
}
IMAGES = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
BAD_IMAGES = {
    "bytes": (255 * IMAGES).byte(),
    "integers": (255 * IMAGES).long(),
    "levels": 255 * IMAGES,
    "array of levels": (255 * IMAGES).permute(0, 2, 3, 1).numpy(),
    "array of bytes": (255 * IMAGES).byte().permute(0, 2, 3, 1).numpy(),
    "other scale": 2 * IMAGES - 1,
    "nan": torch.full_like(IMAGES, float("nan")),
}


@pytest.mark.parametrize("images", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
@pytest.mark.parametrize("taker", TAKERS)
def test_images_of_another_scale_are_refused(taker: str, images: Any) -> None:
    make, take = TAKERS[taker]
    with pytest.raises(ValueError, match=r"`(image|images)` must be floating-point with values in \[0, 1\], got"):
        take(make(), images)


@pytest.mark.parametrize("images", [IMAGES[:0], IMAGES[:0].permute(0, 2, 3, 1).numpy()], ids=["tensor", "array"])
@pytest.mark.parametrize("taker", TAKERS)
def test_no_images_are_refused(taker: str, images: Any) -> None:
    make, take = TAKERS[taker]
    with pytest.raises(ValueError, match=r"`(image|images)` must hold at least one image"):
        take(make(), images)


@pytest.mark.parametrize("taker", TAKERS)
def test_arrays_that_run_backwards_are_mirrored_images(taker: str) -> None:
    make, take = TAKERS[taker]
    pipeline = make()
    mirrored = IMAGES.permute(0, 2, 3, 1).numpy()[:, ::-1, ::-1]
    # Strides decide the order of sums.
    torch.testing.assert_close(take(pipeline, mirrored), take(pipeline, IMAGES.flip(2, 3)), rtol=1e-4, atol=1e-4)


def test_zero_batches_of_levels_noise_and_measurements_are_refused() -> None:
    pipeline = tiny_pipeline("unet")
    with pytest.raises(ValueError, match=r"at least one image, got the shape \(0, 1, 8, 8\)"):
        pipeline.bits_per_dim(IMAGES[:0].long())
    with pytest.raises(ValueError, match="A batch of floating-point samples is needed"):
        pipeline.decode(IMAGES[:0])
    with pytest.raises(ValueError, match="`batch_size` must be 1 or more, got 0"):
        pipeline(latents=IMAGES[:0])


def test_pixels_of_four_channels_are_pixels() -> None:
    # diffusers takes a tensor of four channels for latents, and leaves its scale.
    pipeline = quiet(FlowMatchPipeline(FlowMatchScheduler(), unet=tiny_unet(in_channels=4, out_channels=4)))
    images = torch.rand(2, 4, 8, 8)
    torch.testing.assert_close(pipeline.to_data(images), 2 * images - 1)


def test_images_are_not_resized() -> None:
    pipeline = tiny_pipeline("sd3-vae")
    with pytest.raises(ValueError, match="positive multiples of 4 for this pipeline, got 17 x 16"):
        pipeline.encode(torch.rand(1, 3, 17, 16), 1)
    with pytest.raises(ValueError, match=r"`images` must have the shape \(1, 3, 16, 16\)"):
        pipeline.encode(torch.rand(1, 4, 16, 16), 1)


def test_two_images_of_an_interpolation_have_one_size() -> None:
    with pytest.raises(ValueError, match=r"must be of one size, got \(1, 8, 8\) and \(1, 8, 16\)"):
        tiny_pipeline("unet").interpolate(torch.rand(1, 1, 8, 8), torch.rand(1, 1, 8, 16))


@pytest.mark.parametrize("mask", [np.eye(8) > 0, torch.eye(8) > 0, torch.eye(8).long(), np.eye(8)[::-1]])
def test_masks_of_any_kind(mask: Any) -> None:
    pipeline = inverse()
    known, _ = pipeline.prepare_mask(IMAGES, mask)
    expected = torch.as_tensor(np.asarray(mask).astype(np.float32))
    torch.testing.assert_close(known, (1 - expected) * (2 * IMAGES - 1))
    with pytest.raises(ValueError, match=r"`mask_image` must be floating-point with values in \[0, 1\]"):
        pipeline.prepare_mask(IMAGES, 100 * np.eye(8, dtype=np.uint8))


def test_pictures_of_pillow_keep_their_levels() -> None:
    pipeline = tiny_pipeline("unet")
    levels = (255 * IMAGES).round().byte()
    pictures = [PIL.Image.fromarray(level[0].numpy()) for level in levels]
    torch.testing.assert_close(pipeline.to_data(pictures), 2 * (levels.float() / 255) - 1)


# Settings given as strings, and other numbers that are none


@pytest.mark.parametrize("value", ["2", None, float("nan"), [2]], ids=repr)
@pytest.mark.parametrize(
    ("make", "arguments", "name"),
    [
        (lambda: tiny_pipeline("unet-classes"), {"class_labels": 1}, "guidance_scale"),
        (lambda: tiny_pipeline("unet"), {}, "num_inference_steps"),
        (editor, {"image": GRAY, "source_class_labels": 1, "class_labels": 2}, "guidance_scale"),
        (editor, {"image": GRAY, "source_class_labels": 1, "class_labels": 2}, "source_guidance_scale"),
        (editor, {"image": GRAY, "source_class_labels": 1, "class_labels": 2}, "strength"),
        (editor, {"image": GRAY, "source_class_labels": 1, "class_labels": 2}, "num_inference_steps"),
        (editor, {"image": GRAY, "source_class_labels": 1, "class_labels": 2}, "num_averages"),
        (editor, {"image": GRAY, "source_class_labels": 1, "class_labels": 2}, "num_free_steps"),
        (inverse, {"image": GRAY, "mask_image": GRAY, "class_labels": 1}, "noise_level"),
        (inverse, {"image": GRAY, "mask_image": GRAY, "class_labels": 1}, "num_covariance_iterations"),
        (inverse, {"image": GRAY, "mask_image": GRAY, "class_labels": 1}, "num_images_per_measurement"),
        (upscaler, {"image": GRAY}, "noise_level"),
        (upscaler, {"image": GRAY}, "num_images_per_prompt"),
    ],
)
def test_what_is_no_number_is_refused_by_name(make: Any, arguments: dict, name: str, value: Any) -> None:
    pipeline = make()
    if value is None and inspect.signature(type(pipeline).__call__).parameters[name].default is None:
        value = "None"  # the default, which is the scheduler's own number
    with pytest.raises(ValueError, match=f"`{name}`"):
        pipeline(**arguments, **{name: value})


@pytest.mark.parametrize("value", ["8", 8.0, float("nan")], ids=repr)
@pytest.mark.parametrize("name", ["height", "width", "tile_size", "batch_size"])
def test_sizes_are_whole_numbers(name: str, value: Any) -> None:
    pipeline, arguments = (tiny_pipeline("unet"), {}) if name == "batch_size" else (upscaler(), {"image": GRAY})
    with pytest.raises(ValueError, match=f"`{name}`"):
        pipeline(**arguments, **{name: value})


@pytest.mark.parametrize("noise", [torch.full((1, 1, 8, 8), float("inf")), torch.zeros(1, 1, 8, 8).long()])
def test_noise_is_finite(noise: torch.Tensor) -> None:
    pipeline = tiny_pipeline("unet")
    with pytest.raises(ValueError, match="`latents` must be finite and floating-point"):
        pipeline(latents=noise)
    with pytest.raises(ValueError, match="`noise` must be finite and floating-point"):
        pipeline.decode(noise)


def test_an_unknown_kind_of_output_is_refused_before_any_work() -> None:
    pipeline = tiny_pipeline("unet")
    pipeline.unet.forward = None
    for use in (
        lambda: pipeline.decode(torch.zeros(1, 1, 8, 8), output_type="jpg"),
        lambda: pipeline.interpolate(GRAY, GRAY, output_type="jpg"),
    ):
        with pytest.raises(ValueError, match="`output_type` must be one of pil, np, pt, latent, got 'jpg'"):
            use()


@pytest.mark.parametrize("value", ["2", [2], b"x"], ids=repr)
@pytest.mark.parametrize(
    ("make", "use", "names"),
    [
        (
            lambda: tiny_pipeline("unet"),
            lambda p, **given: p(**given),
            ["generator", "latents", "batch_size", "height"],
        ),
        (lambda: tiny_pipeline("unet"), lambda p, **given: p(solver="dopri5", **given), ["rtol", "atol"]),
        (
            lambda: tiny_pipeline("unet"),
            lambda p, **given: p.encode(GRAY, **given),
            ["num_inference_steps", "solver"],
        ),
        (lambda: tiny_pipeline("unet"), lambda p, **given: p.decode(**{"noise": GRAY, **given}), ["noise"]),
        (
            lambda: tiny_pipeline("unet"),
            lambda p, **given: p.log_likelihood(GRAY, **given),
            ["num_steps", "num_probes", "grading", "start", "end", "method"],
        ),
        (lambda: tiny_pipeline("unet"), lambda p, **given: p.bits_per_dim(**{"images": GRAY, **given}), ["images"]),
        (editor, lambda p, **given: p.invert(GRAY, 1, **given), ["num_inference_steps", "solver"]),
        (inverse, lambda p, **given: p(image=GRAY, mask_image=GRAY, class_labels=1, **given), ["eta", "sigma_data"]),
        (
            inverse,
            lambda p, **given: p(**{"measurement": GRAY, "operator": MaskOperator(GRAY.round()), **given}),
            ["measurement", "operator"],
        ),
    ],
)
def test_arguments_of_another_type_are_refused_in_one_sentence(make: Any, use: Any, names: list, value: Any) -> None:
    pipeline = make()
    for name in names:
        with pytest.raises(ValueError, match="must|given"):
            use(pipeline, **{name: value})
