# SPDX-License-Identifier: Apache-2.0
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DConditionModel,
)
from diffusers.callbacks import PipelineCallback
from diffusers.models.embeddings import LabelEmbedding
from tiny_pipelines import (
    KINDS,
    NUM_CLASSES,
    generators,
    labels_of,
    tiny_class_embedder,
    tiny_dit,
    tiny_pipeline,
    tiny_sd3,
    tiny_unet,
    tiny_vae,
)

from diffusers_fm import FlowMatchPipeline, FlowMatchPipelineOutput, FlowMatchScheduler, decode_latents


GUIDED = ("unet-classes", "dit", "sd3")
SOLVER_STAGES = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4}
PATHS = ("ot", "vp", "ve", "cosine", "vp_discrete")
# Convolutions and matrix products over other batch sizes may sum in another order; a few hundred float32 roundings
# through a network whose output is of order 1 stay below this.
SAME = {"rtol": 1e-4, "atol": 1e-5}


def images_of(pipeline: FlowMatchPipeline, **call: Any) -> torch.Tensor:
    """Images as a tensor, three of them and different if nothing else is asked."""
    defaults = {
        "class_labels": labels_of(pipeline),
        "batch_size": 3,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "pt",
    }
    return pipeline(**{**defaults, **call}).images


class Recorder:
    """Counts the calls of a network and keeps the times and the dtypes that it was given."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.batch_sizes: list[int] = []
        self.timesteps: list[torch.Tensor] = []
        self.dtypes: list[torch.dtype] = []
        self.signature = inspect.signature(network.forward)
        network.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, network: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        given = self.signature.bind(*args, **kwargs).arguments
        sample = given.get("hidden_states", given.get("sample"))
        self.batch_sizes.append(sample.shape[0])
        self.dtypes.append(sample.dtype)
        self.timesteps.append(given["timestep"])


# What the integration does


@pytest.mark.parametrize("kind", KINDS)
def test_euler_on_the_straight_path_written_out(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    labels = None if pipeline.num_classes == 0 else torch.tensor(labels_of(pipeline))
    noise = torch.randn(3, *pipeline.sample_shape, generator=torch.Generator().manual_seed(0))
    x = noise.clone()
    with torch.no_grad():
        for t, t_next in [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]:
            x = x + (t_next - t) * pipeline.predict(x, 1000 * t, labels)
    got = images_of(pipeline, num_inference_steps=4, output_type="latent")
    torch.testing.assert_close(got, x, **SAME)
    torch.testing.assert_close(
        images_of(pipeline, latents=noise, num_inference_steps=4, output_type="latent"), x, **SAME
    )


@pytest.mark.parametrize("path", PATHS)
def test_integration_starts_from_the_prior(path: str) -> None:
    pipeline = tiny_pipeline("unet", path=path)
    noise = torch.randn(2, 1, 8, 8)
    expected = noise * pipeline.scheduler.init_noise_sigma
    torch.testing.assert_close(pipeline.prepare_latents((2, 1, 8, 8), "cpu", latents=noise), expected)
    t_end = torch.ones(())
    std = torch.hypot(pipeline.scheduler.path.alpha(t_end), pipeline.scheduler.path.sigma(t_end))
    assert pipeline.scheduler.init_noise_sigma == pytest.approx(std.item(), rel=1e-5)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["unet-classes", "sd3"])
def test_every_path_gives_finite_images(kind: str, path: str) -> None:
    images = images_of(tiny_pipeline(kind, path=path), output_type="latent")
    assert images.isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_network_sees_what_predict_shows_it(path: str) -> None:
    # `predict` is what training calls: at the first step it must equal the network's answer in sampling.
    pipeline = tiny_pipeline("unet", path=path)
    noise = torch.randn(2, 1, 8, 8)
    answers = []
    pipeline.unet.register_forward_hook(lambda network, args, output: answers.append(output[0]))
    pipeline(latents=noise, num_inference_steps=2, output_type="latent")
    with torch.no_grad():
        x = pipeline.prepare_latents(noise.shape, "cpu", latents=noise)
        pipeline.predict(x, pipeline.scheduler.timesteps[0])
    assert len(answers) == 3
    torch.testing.assert_close(answers[2], answers[0])


@pytest.mark.parametrize("solver", SOLVER_STAGES)
@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_nfe_is_the_number_of_calls(kind: str, solver: str) -> None:
    pipeline = tiny_pipeline(kind, solver=solver)
    recorder = Recorder(pipeline.denoiser)
    output = pipeline(labels_of(pipeline), batch_size=3, num_inference_steps=3, output_type="latent")
    assert output.nfe == len(recorder.timesteps) == 3 * SOLVER_STAGES[solver]
    assert pipeline.num_timesteps == output.nfe


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_the_last_step_of_vp_has_all_stages(solver: str) -> None:
    # The velocity of VP has no limit at t = 0: the last stages lie above it, and none is left out.
    pipeline = tiny_pipeline("unet", path="vp", sampling_path="native", solver=solver)
    recorder = Recorder(pipeline.unet)
    steps = []

    def callback(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        steps.append((step, timestep.item(), len(recorder.timesteps)))
        return {}

    output = pipeline(num_inference_steps=4, callback_on_step_end=callback, output_type="latent")
    stages = SOLVER_STAGES[solver]
    assert output.nfe == len(recorder.timesteps) == 4 * stages
    assert [(step, calls) for step, _, calls in steps] == [
        (0, stages), (1, 2 * stages), (2, 3 * stages), (3, 4 * stages),
    ]  # fmt: skip
    begins = [recorder.timesteps[step * stages][0].item() for step in range(4)]
    assert [timestep for _, timestep, _ in steps] == begins


def test_a_guided_call_counts_once_and_has_twice_the_batch() -> None:
    pipeline = tiny_pipeline("dit")
    recorder = Recorder(pipeline.transformer)
    output = pipeline([1, 2, 3], guidance_scale=3.0, num_inference_steps=4, output_type="latent")
    assert output.nfe == 4
    assert recorder.batch_sizes == [6] * 4


@pytest.mark.parametrize("solver", SOLVER_STAGES)
def test_solver_of_one_call(solver: str) -> None:
    pipeline = tiny_pipeline("dit")
    config = dict(pipeline.scheduler.config)
    got = images_of(pipeline, solver=solver, output_type="latent")
    assert dict(pipeline.scheduler.config) == config
    torch.testing.assert_close(got, images_of(tiny_pipeline("dit", solver=solver), output_type="latent"))


def test_custom_grids() -> None:
    pipeline = tiny_pipeline("unet")
    recorder = Recorder(pipeline.unet)
    by_sigmas = images_of(pipeline, sigmas=[1.0, 0.6, 0.1])
    by_timesteps = images_of(pipeline, timesteps=[1000.0, 600.0, 100.0])
    torch.testing.assert_close(by_sigmas, by_timesteps)
    times = torch.stack(recorder.timesteps)[:, 0]
    torch.testing.assert_close(times, torch.tensor([1000.0, 600.0, 100.0] * 2))


def test_dynamic_shift_follows_the_number_of_tokens() -> None:
    pipeline = tiny_pipeline("sd3", use_dynamic_shifting=True)
    # 8 x 8 latents in patches of 2 are 16 tokens; the line through (256, .5) and (4096, 1.15).
    mu = 0.5 + (16 - 256) * (1.15 - 0.5) / (4096 - 256)
    torch.testing.assert_close(images_of(pipeline), images_of(pipeline, mu=mu))
    assert not torch.allclose(images_of(pipeline), images_of(pipeline, mu=2.0))


# Guidance and classes


@pytest.mark.parametrize("kind", GUIDED)
@pytest.mark.parametrize("scale", [0.0, 0.5, 4.0])
def test_guidance_is_the_combination_of_two_predictions(kind: str, scale: float) -> None:
    pipeline = tiny_pipeline(kind)
    labels = torch.tensor(labels_of(pipeline))
    null = torch.full_like(labels, NUM_CLASSES)
    noise = torch.randn(3, *pipeline.sample_shape)
    x = noise.clone()
    with torch.no_grad():
        for t, t_next in [(1.0, 0.5), (0.5, 0.0)]:
            v_null, v_class = (pipeline.predict(x, 1000 * t, given) for given in (null, labels))
            x = x + (t_next - t) * (v_null + scale * (v_class - v_null))
    got = images_of(pipeline, latents=noise, guidance_scale=scale, num_inference_steps=2, output_type="latent")
    torch.testing.assert_close(got, x, **SAME)


@pytest.mark.parametrize("kind", GUIDED)
def test_guidance_scale_one_is_off(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    recorder = Recorder(pipeline.denoiser)
    images_of(pipeline, guidance_scale=1.0)
    assert set(recorder.batch_sizes) == {3}


@pytest.mark.parametrize("kind", GUIDED)
def test_classes_matter(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    noise = torch.randn(1, *pipeline.sample_shape).expand(NUM_CLASSES, -1, -1, -1)
    images = images_of(pipeline, class_labels=list(range(NUM_CLASSES)), batch_size=None, latents=noise)
    assert torch.unique(images, dim=0).shape[0] == NUM_CLASSES


@pytest.mark.parametrize("labels", [[2, 0], torch.tensor([2, 0]), np.array([2, 0]), (2, 0), ["mat", "cat"]], ids=repr)
def test_kinds_of_labels(labels: Any) -> None:
    pipeline = FlowMatchPipeline(
        FlowMatchScheduler(), transformer=tiny_dit(), id2label={0: "cat, felis", 1: "hat", 2: "mat", 3: "a", 4: "b"}
    )
    assert pipeline.prepare_class_labels(labels).tolist() == [2, 0]


@pytest.mark.parametrize("label", [2, np.int64(2), torch.tensor(2), "mat"], ids=repr)
def test_one_label_serves_the_batch(label: Any) -> None:
    pipeline = FlowMatchPipeline(
        FlowMatchScheduler(), transformer=tiny_dit(), id2label={"0": "cat, felis", "2": "mat", "3": "cat"}
    )
    assert pipeline.prepare_class_labels(label, batch_size=3).tolist() == [2, 2, 2]
    assert pipeline.prepare_class_labels(label).tolist() == [2]
    assert pipeline.get_label_ids("felis") == [0]
    assert len(pipeline(label, generator=generators(1, 2), num_inference_steps=1, output_type="latent").images) == 2
    with pytest.raises(ValueError, match=r"'cat' stands for the labels \[0, 3\]"):
        pipeline.get_label_ids("cat")


@pytest.mark.parametrize(
    ("kind", "num_classes", "null_class"),
    [("unet", 0, None), ("unet-classes", NUM_CLASSES, NUM_CLASSES), ("dit", NUM_CLASSES, NUM_CLASSES)]
    + [("sd3", NUM_CLASSES, NUM_CLASSES)],
)
def test_classes_of_a_pipeline(kind: str, num_classes: int, null_class: int | None) -> None:
    pipeline = tiny_pipeline(kind)
    assert (pipeline.num_classes, pipeline.null_class) == (num_classes, null_class)


def test_unet_without_a_null_class() -> None:
    unet = tiny_unet(num_class_embeds=NUM_CLASSES)
    for num_classes in (None, NUM_CLASSES):
        pipeline = FlowMatchPipeline(FlowMatchScheduler(), unet=unet, num_classes=num_classes)
        assert (pipeline.num_classes, pipeline.null_class) == (NUM_CLASSES, None)
        with pytest.raises(ValueError, match="needs a null class, and this network has none"):
            pipeline(class_labels=1, guidance_scale=2.0)


@pytest.mark.parametrize("kind", ["dit", "sd3"])
def test_unconditional_transformers_see_the_null_class(kind: str) -> None:
    if kind == "dit":
        components = {"transformer": tiny_dit(num_embeds_ada_norm=0)}
    else:
        components = {"transformer": tiny_sd3(), "class_embedder": tiny_class_embedder(num_classes=0)}
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), **components)
    pipeline.set_progress_bar_config(disable=True)
    assert (pipeline.num_classes, pipeline.null_class) == (0, 0)
    assert images_of(pipeline).shape == (3, 4, 8, 8)


# Training mode


@pytest.mark.parametrize("kind", ["unet-classes", "dit", "sd3"])
def test_predict_drops_no_labels_in_training_mode(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    labels = torch.arange(64) % NUM_CLASSES
    x = torch.randn(1, *pipeline.sample_shape).expand(64, -1, -1, -1)
    with torch.no_grad():
        expected = pipeline.predict(x, 500.0, labels)
        pipeline.denoiser.train()
        torch.testing.assert_close(pipeline.predict(x, 500.0, labels), expected, **SAME)
        assert pipeline.denoiser.training
        pipeline.denoiser.train()  # as a training loop does again and again
        torch.testing.assert_close(pipeline.predict(x, 500.0, labels), expected, **SAME)


def test_stock_dit_drops_labels_by_itself() -> None:
    # The reason for the test above; with 64 labels and two tables none is dropped once in 700,000 times.
    table = next(module for module in tiny_dit().train().modules() if isinstance(module, LabelEmbedding))
    torch.manual_seed(0)
    assert (table.token_drop(torch.zeros(128, dtype=torch.int64)) == NUM_CLASSES).any()


@pytest.mark.parametrize("kind", ["unet-classes", "dit", "sd3"])
def test_gradients_reach_every_weight(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    labels = torch.arange(NUM_CLASSES + 1)
    x = torch.randn(NUM_CLASSES + 1, *pipeline.sample_shape)
    pipeline.predict(x, torch.linspace(0, 1000, NUM_CLASSES + 1), labels).square().sum().backward()
    trained = [pipeline.denoiser] + ([] if pipeline.class_embedder is None else [pipeline.class_embedder])
    without = [name for module in trained for name, weight in module.named_parameters() if weight.grad is None]
    # diffusers' DiT and SD3 build the last block's layers whether or not they are used.
    assert [name for name in without if "norm1_context" not in name] == []


def test_compiled_network_is_recognised() -> None:
    pipeline = tiny_pipeline("dit")
    expected = images_of(pipeline)
    pipeline.transformer = torch.compile(pipeline.transformer, backend="eager")
    torch.testing.assert_close(images_of(pipeline), expected, **SAME)
    assert pipeline.null_class == NUM_CLASSES


# Independence of the batch


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_depend_on_their_batch(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    labels = labels_of(pipeline)
    together = images_of(pipeline, generator=generators(5, 6, 7))
    for i, seed in enumerate((5, 6, 7)):
        label = None if labels is None else labels[i]
        alone = images_of(pipeline, class_labels=label, batch_size=1, generator=generators(seed))
        torch.testing.assert_close(together[i : i + 1], alone, **SAME)


def test_stochastic_sampling_draws_from_the_generators() -> None:
    pipeline = tiny_pipeline("unet", stochastic_sampling=True)
    together = images_of(pipeline, generator=generators(5, 6, 7))
    torch.testing.assert_close(together, images_of(pipeline, generator=generators(5, 6, 7)), **SAME)
    alone = images_of(pipeline, batch_size=1, generator=generators(6))
    torch.testing.assert_close(together[1:2], alone, **SAME)


def test_batch_size_follows_from_what_is_given() -> None:
    pipeline = tiny_pipeline("unet")
    call = {"num_inference_steps": 1, "output_type": "latent"}
    assert len(pipeline(**call).images) == 1
    assert len(pipeline(batch_size=4, **call).images) == 4
    assert len(pipeline(generator=generators(1, 2), **call).images) == 2
    assert len(pipeline(latents=torch.randn(3, 1, 8, 8), **call).images) == 3
    assert len(tiny_pipeline("dit")([0, 1, 2, 3, 4], **call).images) == 5


# Outputs


@pytest.mark.parametrize("kind", ["unet", "dit-vae", "sd3-vae"])
def test_output_types_agree(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    latents = images_of(pipeline, output_type="latent")
    pixels = latents if pipeline.vae is None else decode_latents(pipeline.vae, latents).detach()
    tensor = images_of(pipeline, output_type="pt")
    torch.testing.assert_close(tensor, (pixels / 2 + 0.5).clamp(0, 1))
    array = images_of(pipeline, output_type="np")
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    pictures = images_of(pipeline, output_type="pil")
    assert isinstance(pictures, list)
    assert [picture.size for picture in pictures] == [(tensor.shape[3], tensor.shape[2])] * 3
    assert {picture.mode for picture in pictures} == {"L" if kind == "unet" else "RGB"}
    for picture, values in zip(pictures, array):
        # Half a level of 255 for the rounding.
        np.testing.assert_allclose(np.asarray(picture).reshape(values.shape) / 255, values, atol=0.51 / 255)


def test_tuple_output() -> None:
    pipeline = tiny_pipeline("unet")
    assert isinstance(pipeline(num_inference_steps=2), FlowMatchPipelineOutput)
    images, nfe = pipeline(num_inference_steps=2, return_dict=False)
    assert isinstance(images[0], PIL.Image.Image)
    assert nfe == 2


@pytest.mark.parametrize("kind", ["kl", "tiny", "dc"])
def test_latent_pipelines_decode_with_the_factors_of_the_autoencoder(kind: str) -> None:
    vae = tiny_vae(kind, scaling_factor=0.3)
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), transformer=tiny_dit(), vae=vae)
    pipeline.set_progress_bar_config(disable=True)
    latents = images_of(pipeline, output_type="latent")
    with torch.no_grad():
        expected = (vae.decode(latents / 0.3).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(images_of(pipeline), expected)


# Sizes


@pytest.mark.parametrize(
    ("kind", "height", "width"),
    [("unet", 4, 12), ("sd3", 12, 8), ("sd3-vae", 24, 16), ("dit", 12, 12), ("dit-vae", 20, 20)],
)
def test_other_sizes(kind: str, height: int, width: int) -> None:
    images = images_of(tiny_pipeline(kind), height=height, width=width)
    assert images.shape[-2:] == (height, width)


@pytest.mark.parametrize(
    ("kind", "height", "width", "message"),
    [
        ("unet", 9, 8, "positive multiples of 2 for this pipeline, got 9 x 8"),
        ("sd3", 9, 9, "positive multiples of 2 for this pipeline, got 9 x 9"),
        ("sd3-vae", 16, 18, "positive multiples of 4 for this pipeline, got 16 x 18"),
        ("sd3", 16, 8, "must not exceed 12, the reach of the transformer's position embeddings"),
        ("sd3", 0, 8, "positive multiples of 2"),
        ("dit", 8, 12, "DiTTransformer2DModel makes square images only, got 8 x 12"),
    ],
)
def test_sizes_that_cannot_be_made(kind: str, height: int, width: int, message: str) -> None:
    pipeline = tiny_pipeline(kind)
    with pytest.raises(ValueError, match=message):
        images_of(pipeline, height=height, width=width)


def test_unet_without_a_sample_size_needs_one() -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), unet=tiny_unet(sample_size=None))
    with pytest.raises(ValueError, match="no `sample_size`: `height` and `width` must be given"):
        pipeline()
    assert images_of(pipeline, height=8, width=4).shape == (3, 1, 8, 4)


def test_unet_without_a_sample_size_takes_that_of_the_data() -> None:
    pipeline, same = (FlowMatchPipeline(FlowMatchScheduler(), unet=tiny_unet(sample_size=size)) for size in (None, 8))
    for each in (pipeline, same):
        each.set_progress_bar_config(disable=True)
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert pipeline.makes_pictures
    for call in (
        lambda each: each.encode(images, num_inference_steps=2),
        lambda each: each.decode(2 * images - 1, num_inference_steps=2, output_type="latent"),
        lambda each: each.log_likelihood(images, num_steps=2, generator=torch.Generator().manual_seed(0)).log_prob,
    ):
        assert torch.equal(call(pipeline), call(same))
    with pytest.raises(ValueError, match=r"the shape \(2, 1, height, width\) for this pipeline, got \(2, 3, 8, 8\)"):
        pipeline.encode(images.expand(2, 3, 8, 8))


def test_unet_of_a_rectangular_size() -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), unet=tiny_unet(sample_size=(4, 8)))
    assert pipeline.sample_shape == (1, 4, 8)
    assert images_of(pipeline).shape == (3, 1, 4, 8)


# Precision


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_network_float32_state_and_times(kind: str) -> None:
    pipeline = tiny_pipeline(kind).to(torch.bfloat16)
    recorder = Recorder(pipeline.denoiser)
    output = pipeline(labels_of(pipeline), batch_size=3, num_inference_steps=7, output_type="latent")
    assert output.images.dtype == torch.float32
    assert output.images.isfinite().all()
    assert set(recorder.dtypes) == {torch.bfloat16}
    expected = 1000 * torch.arange(7, 0, -1) / 7
    torch.testing.assert_close(torch.stack(recorder.timesteps)[:, 0], expected)
    assert images_of(pipeline).dtype == torch.float32


def test_times_of_training_may_be_float64_and_on_the_cpu() -> None:
    pipeline = tiny_pipeline("unet")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([123.456, 789.0])
    torch.testing.assert_close(pipeline.predict(x, t.double()), pipeline.predict(x, t))


# Callbacks and progress


@pytest.mark.parametrize("solver", SOLVER_STAGES)
def test_callback_is_called_after_each_step_with_its_beginning(solver: str) -> None:
    pipeline = tiny_pipeline("unet", solver=solver)
    calls = []

    def callback(given: FlowMatchPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        assert given is pipeline
        calls.append((step, timestep.item(), sorted(tensors)))
        return {}

    images_of(pipeline, num_inference_steps=4, callback_on_step_end=callback)
    assert [(step, names) for step, _, names in calls] == [(step, ["latents"]) for step in range(4)]
    assert [timestep for *_, timestep, _ in calls] == pytest.approx([1000, 750, 500, 250])


@pytest.mark.parametrize("solver", SOLVER_STAGES)
def test_callback_can_change_the_latents(solver: str) -> None:
    pipeline = tiny_pipeline("unet", solver=solver)
    noise = torch.randn(3, 1, 8, 8)

    def restart(given: FlowMatchPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        return {"latents": noise / 2} if step == 0 else {}

    changed = images_of(pipeline, num_inference_steps=2, callback_on_step_end=restart, output_type="latent")
    # The second step from t = 1/2 to 0, started at what the callback gave.
    alone = images_of(pipeline, sigmas=[0.5], latents=noise / 2, output_type="latent")
    torch.testing.assert_close(changed, alone, **SAME)


def test_callback_can_stop_and_switch_guidance() -> None:
    pipeline = tiny_pipeline("dit")
    recorder = Recorder(pipeline.transformer)

    def callback(given: Any, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        given._guidance_scale = 1.0
        given._interrupt = step == 2
        return tensors

    output = pipeline([1], guidance_scale=2.0, num_inference_steps=9, callback_on_step_end=callback)
    assert output.nfe == 3
    assert recorder.batch_sizes == [2, 1, 1]


@pytest.mark.parametrize("solver", [None, "euler", "dopri5"])
def test_a_call_from_a_callback_is_the_call_by_itself(solver: str | None) -> None:
    pipeline = tiny_pipeline("unet", solver="ab2", default_num_inference_steps=4)
    call: dict[str, Any] = {"solver": solver, "num_inference_steps": None, "output_type": "latent"}
    alone, inner = images_of(pipeline, **call), []

    def callback(given: FlowMatchPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        assert given.scheduler.config.solver == "midpoint"
        inner.append(images_of(given, **call))
        return {}

    images_of(pipeline, solver="midpoint", num_inference_steps=1, callback_on_step_end=callback)
    assert torch.equal(inner[0], alone)


def test_callback_objects_name_their_tensors() -> None:
    class Halve(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict) -> dict:
            return {"latents": callback_kwargs["latents"] / 2}

    pipeline = tiny_pipeline("unet")
    plain = images_of(pipeline, num_inference_steps=1, output_type="latent")
    halved = images_of(pipeline, num_inference_steps=1, output_type="latent", callback_on_step_end=Halve())
    torch.testing.assert_close(halved, plain / 2)


def test_progress_bar_counts_steps(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = tiny_pipeline("unet", solver="heun")
    pipeline.set_progress_bar_config(disable=False)
    pipeline(num_inference_steps=3)
    assert "3/3" in capsys.readouterr().err


# Offloading


@pytest.mark.parametrize("kind", KINDS)
def test_model_cpu_offload_hooks(kind: str) -> None:
    # The hooks themselves, with the CPU in the place of the accelerator; that memory is freed cannot be seen here.
    pipeline = tiny_pipeline(kind)
    expected = images_of(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    assert len(pipeline._all_hooks) == (2 if kind.endswith("vae") else 1)
    for _ in range(2):
        torch.testing.assert_close(images_of(pipeline), expected)
        assert len(pipeline._all_hooks) == (2 if kind.endswith("vae") else 1)


# Bad input, before any work


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    [
        ("dit", {"class_labels": [0, 5]}, "Class label 5 is out of range: labels are 0 to 4"),
        ("dit", {"class_labels": -1}, "Class label -1 is out of range: labels are 0 to 4"),
        ("sd3", {"class_labels": torch.tensor([5])}, "Class label 5 is out of range: labels are 0 to 4"),
        ("unet-classes", {"class_labels": 5}, "Class label 5 is out of range: labels are 0 to 4"),
        ("dit", {"class_labels": [0.5]}, "A class label must be an integer or a class name, got 0.5"),
        ("dit", {"class_labels": [True]}, "A class label must be an integer or a class name, got True"),
        ("dit", {"class_labels": [[0, 1]]}, r"A class label must be an integer or a class name, got \[0, 1\]"),
        ("dit", {}, "`class_labels` must be given: this pipeline has 5 classes"),
        ("unet-classes", {"batch_size": 2}, "`class_labels` must be given: this pipeline has 5 classes"),
        ("dit", {"class_labels": [0, 1], "batch_size": 3}, "2 class labels were given for a batch of 3"),
        ("dit", {"class_labels": []}, "`batch_size` must be 1 or more, got 0"),
        ("dit", {"class_labels": "cat"}, "The class name 'cat' was given, but this pipeline has no `id2label`"),
        ("unet", {"class_labels": 1}, "`class_labels` 1 was given, but this pipeline has no classes"),
        ("unet", {"batch_size": 0}, "`batch_size` must be 1 or more, got 0"),
        ("unet", {"guidance_scale": 2.0}, "`guidance_scale` 2.0 needs classes, and this pipeline has none"),
        ("dit", {"class_labels": 1, "guidance_scale": float("nan")}, "`guidance_scale` must be a finite number"),
        ("unet", {"output_type": "jpeg"}, "`output_type` must be one of pil, np, pt, latent, got 'jpeg'"),
        ("unet", {"generator": generators(1, 2), "batch_size": 3}, "2 generators were given for a batch of 3"),
        ("unet", {"latents": torch.zeros(1, 3, 8, 8)}, r"`latents` must have the shape \(1, 1, 8, 8\), got"),
        ("unet", {"latents": torch.zeros(2, 1, 8, 8), "batch_size": 1}, "`latents` must have the shape"),
        ("unet", {"sigmas": [1.0], "timesteps": [1.0]}, "Only one of `sigmas` and `timesteps` can be given"),
        ("unet", {"solver": "rk5"}, "`solver` must be one of .*, got 'rk5'"),
        ("unet", {"timesteps": [1500.0]}, r"`timesteps` must lie in \[0, 1000\], got \[1500.0\]"),
        ("unet", {"num_inference_steps": 0}, "`num_inference_steps` must be an integer of at least 1, got 0"),
        ("unet", {"callback_on_step_end_tensor_inputs": ["x"]}, r"must be among \['latents'\], got \['x'\]"),
        ("dit-vae", {"class_labels": 1, "height": 8, "width": 10}, "positive multiples of 4"),
    ],
)
def test_bad_calls(kind: str, call: dict, message: str) -> None:
    pipeline = tiny_pipeline(kind)
    recorder = Recorder(pipeline.denoiser)
    with pytest.raises(ValueError, match=message):
        pipeline(**call)
    assert recorder.timesteps == []


def test_images_that_pil_cannot_hold() -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), unet=tiny_unet(in_channels=2, out_channels=2))
    with pytest.raises(ValueError, match="An image of 2 channels cannot be a PIL image"):
        pipeline()


def test_unknown_class_name() -> None:
    pipeline = FlowMatchPipeline(FlowMatchScheduler(), transformer=tiny_dit(), id2label={0: "cat"})
    with pytest.raises(ValueError, match="Unknown class name 'dog'"):
        pipeline("dog")


def test_predict_needs_labels_where_there_are_classes() -> None:
    pipeline = tiny_pipeline("dit")
    with pytest.raises(ValueError, match="`class_labels` must be given: this pipeline has 5 classes"):
        pipeline.predict(torch.zeros(1, 4, 8, 8), 1.0)


def test_scheduler_set_by_hand_is_checked() -> None:
    pipeline = tiny_pipeline("unet")
    pipeline.scheduler = DDIMScheduler()
    with pytest.raises(ValueError, match=r"got DDIMScheduler: convert it with `FlowMatchScheduler.from_config"):
        pipeline()


@pytest.mark.parametrize(
    ("components", "message"),
    [
        (lambda: {}, "needs either `unet` or `transformer`, neither was given"),
        (
            lambda: {"unet": tiny_unet(), "transformer": tiny_dit()},
            "needs either `unet` or `transformer`, both were given",
        ),
        (lambda: {"unet": tiny_dit()}, "`unet` must be a UNet2DModel, got DiTTransformer2DModel"),
        (
            lambda: {"unet": UNet2DConditionModel(block_out_channels=(8,) * 4, norm_num_groups=4)},
            "`unet` must be a UNet2DModel, got UNet2DConditionModel",
        ),
        (lambda: {"transformer": tiny_unet()}, "`transformer` must be a DiTTransformer2DModel or an SD3Transformer"),
        (lambda: {"transformer": tiny_sd3()}, "An SD3Transformer2DModel needs a ClassEmbedder as `class_embedder`"),
        (
            lambda: {"transformer": tiny_sd3(), "class_embedder": tiny_class_embedder(joint_attention_dim=13)},
            "`joint_attention_dim` 13 must equal the transformer's 12",
        ),
        (
            lambda: {"transformer": tiny_sd3(), "class_embedder": tiny_class_embedder(pooled_projection_dim=21)},
            "`pooled_projection_dim` 21 must equal the transformer's 20",
        ),
        (
            lambda: {"transformer": tiny_dit(), "class_embedder": tiny_class_embedder()},
            "A DiTTransformer2DModel takes labels by itself: `class_embedder` must be None",
        ),
        (lambda: {"transformer": tiny_dit(), "num_classes": 7}, "`num_classes` must be 5 for this network, got 7"),
        (lambda: {"unet": tiny_unet(), "num_classes": 7}, "`num_classes` must be 0 for this network, got 7"),
        (
            lambda: {"unet": tiny_unet(num_class_embeds=6), "num_classes": 7},
            "`num_classes` must be 5 or 6 for this network, got 7",
        ),
        (lambda: {"unet": tiny_unet(class_embed_type="timestep")}, "`class_embed_type` 'timestep' is not supported"),
        (lambda: {"unet": tiny_unet(out_channels=3)}, "`out_channels` must equal its `in_channels` 1, or be twice"),
        (
            lambda: {"unet": tiny_unet(), "vae": tiny_vae()},
            "The autoencoder has 4 latent channels, the network 1",
        ),
    ],
)
def test_components_that_do_not_fit(components: Callable[[], dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowMatchPipeline(FlowMatchScheduler(), **components())


# Saving and loading


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", [FlowMatchPipeline, DiffusionPipeline], ids=lambda loader: loader.__name__)
def test_saved_and_loaded_pipeline_gives_the_same_images(
    kind: str, loader: type[DiffusionPipeline], tmp_path: Path
) -> None:
    pipeline = tiny_pipeline(kind, path="vp", solver="heun", prediction_type="epsilon")
    pipeline.register_to_config(id2label={i: f"class {i}" for i in range(pipeline.num_classes)})
    pipeline.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is FlowMatchPipeline
    assert type(loaded.scheduler) is FlowMatchScheduler
    config, expected = dict(loaded.scheduler.config), dict(pipeline.scheduler.config)
    expected.pop("_use_default_values", None)
    assert config == expected
    assert (loaded.num_classes, loaded.null_class) == (pipeline.num_classes, pipeline.null_class)
    assert not loaded.denoiser.training
    if pipeline.num_classes:
        assert loaded.get_label_ids("class 3") == [3]
    torch.testing.assert_close(images_of(loaded), images_of(pipeline), **SAME)


def test_variants_and_shards(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("sd3-vae")
    pipeline.save_pretrained(tmp_path, variant="ema", max_shard_size="5KB")
    loaded = FlowMatchPipeline.from_pretrained(tmp_path, variant="ema")
    torch.testing.assert_close(images_of(loaded), images_of(pipeline), **SAME)


def test_components_given_to_from_pretrained(tmp_path: Path) -> None:
    pipeline = tiny_pipeline("dit-vae")
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights for vae"):
        FlowMatchPipeline.from_pretrained(tmp_path)
    loaded = FlowMatchPipeline.from_pretrained(tmp_path, vae=pipeline.vae)
    torch.testing.assert_close(images_of(loaded), images_of(pipeline), **SAME)
    assert FlowMatchPipeline.from_pretrained(tmp_path, vae=None).vae is None


def test_from_pipe_shares_the_components() -> None:
    pipeline = tiny_pipeline("sd3-vae")
    other = FlowMatchPipeline.from_pipe(pipeline)
    assert other.transformer is pipeline.transformer
    torch.testing.assert_close(images_of(other), images_of(pipeline))


# Checkpoints of diffusers' own pipelines


@pytest.mark.parametrize("clip_sample", [False, True])
def test_ddpm_checkpoint(clip_sample: bool, tmp_path: Path) -> None:
    unet = tiny_unet(in_channels=3, out_channels=3)
    DDPMPipeline(unet, DDPMScheduler(clip_sample=clip_sample)).save_pretrained(tmp_path)
    pipeline = FlowMatchPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.path == "vp_discrete"
    stock = DDIMPipeline(unet, DDIMScheduler.from_config(DDPMScheduler(clip_sample=clip_sample).config))
    noise = torch.Generator().manual_seed(0)
    expected = stock(batch_size=3, num_inference_steps=5, eta=0.0, output_type="np", generator=noise).images
    got = images_of(pipeline, num_inference_steps=5, output_type="np")
    np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("class_name", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_dit_checkpoint(class_name: str, guidance_scale: float, tmp_path: Path) -> None:
    # DiTPipeline knows 1000 classes only; the checkpoints on the Hub learn the variance and use the older class name.
    transformer = tiny_dit(num_embeds_ada_norm=1000, out_channels=8)
    scheduler = DDIMScheduler(clip_sample=False)
    stock = DiTPipeline(transformer, tiny_vae(), scheduler, id2label={7: "cock", 207: "golden retriever"})
    stock.save_pretrained(tmp_path)
    for file in (tmp_path / "model_index.json", tmp_path / "transformer" / "config.json"):
        file.write_text(file.read_text().replace("DiTTransformer2DModel", class_name))
    pipeline = FlowMatchPipeline.from_pretrained(tmp_path, id2label={7: "cock", 207: "golden retriever"})
    call = {"guidance_scale": guidance_scale, "num_inference_steps": 4, "output_type": "np"}
    expected = stock(class_labels=[207, 7], generator=torch.Generator().manual_seed(0), **call).images
    got = images_of(pipeline, class_labels=["golden retriever", "cock"], batch_size=None, **call)
    assert pipeline.null_class == 1000
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_scheduler_of_a_stock_flow_pipeline_is_converted() -> None:
    stock = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline = FlowMatchPipeline(stock, unet=tiny_unet())
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.scheduler) is FlowMatchScheduler
    assert type(stock) is FlowMatchEulerDiscreteScheduler
    laid_out = []

    def callback(given: FlowMatchPipeline, step: int, timestep: torch.Tensor, tensors: dict) -> dict:
        laid_out.append(given.scheduler.timesteps)
        return {}

    images_of(pipeline, num_inference_steps=4, callback_on_step_end=callback)
    stock.set_timesteps(4)
    torch.testing.assert_close(laid_out, [stock.timesteps] * 4)
