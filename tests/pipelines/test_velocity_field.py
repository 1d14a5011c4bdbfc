# SPDX-License-Identifier: Apache-2.0
"""Velocity fields of stock pipelines against the pipelines and their own schedulers."""

import threading
from typing import Any

import accelerate.hooks
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from stock_fields import CASES, TEXT, TIME_ARGUMENTS, make, sample, split, stock_step
from stock_pipelines import flow_cases
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_fm.pipelines import VelocityField, findings
from diffusers_fm.pipelines.one_step import OneTimeScheduler
from diffusers_fm.pipelines.pipeline_calls import ENTRIES
from diffusers_fm.timesteps import shift_time


# Images, packed images, a reversed time, and an inverted scheduler that rounds its states.
FEW = ("sd3-text", "flux-text", "lumina2", "mochi")


@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_samples_and_the_stock_pipeline(name: str) -> None:
    field, x_t, own = make(name)
    t = torch.tensor([0.2, 0.7])
    batch = field(x_t, t, **own)
    alone = torch.cat([field(x_t[i : i + 1], t[i : i + 1], **sample(own, i)) for i in range(2)])
    assert (batch - alone).abs().max() <= 1e-5 * alone.abs().max()
    inverted = field.pipeline.scheduler.config.invert_sigmas
    for i in range(2):
        call = {**field.call, **sample(own, i)}
        output, state, data = stock_step(field.pipeline, x_t[i : i + 1], t[i].item(), **call)
        assert torch.equal(state, x_t[i : i + 1])
        assert torch.equal(-output if inverted else output, alone[i : i + 1])
        # The step goes from x_t to the data that the velocity points away from; float32 leaves about 1e-6 / t.
        torch.testing.assert_close((state - data) / t[i], alone[i : i + 1], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", FEW)
def test_gradients_are_those_of_the_samples(name: str) -> None:
    field, x_t, own = make(name)
    t, target = torch.tensor([0.2, 0.7]), x_t.flip(0)
    parameters = [p for p in field.network.parameters() if p.requires_grad]

    def gradients(v: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor | None]:
        return torch.autograd.grad((v - target).square().sum(), parameters, allow_unused=True)

    batch = gradients(field(x_t, t, **own), target)
    assert sum(gradient is not None for gradient in batch) >= 0.8 * len(parameters)
    alone = [gradients(field(x_t[i : i + 1], t[i], **sample(own, i)), target[i : i + 1]) for i in range(2)]
    for both, first, second in zip(batch, *alone):
        if both is not None:
            torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-4 * max(1, both.abs().max().item()))


@pytest.mark.parametrize("name", TEXT)
def test_time_of_the_network(name: str) -> None:
    field, x_t, own = make(name)
    seen: list[torch.Tensor] = []
    hook = field.network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["timestep"].double()), with_kwargs=True
    )
    try:
        field.ask(x_t, **own)
        for t in (0.25, 0.5, 0.75):
            field(x_t, torch.tensor([t, 1 - t]), **own)
            expected = TIME_ARGUMENTS[name.removesuffix("-text")](torch.tensor([t, 1 - t]).double())
            torch.testing.assert_close(seen[-1].reshape(2, -1)[:, 0], expected, rtol=1e-6, atol=0)
    finally:
        hook.remove()


@pytest.mark.parametrize("planted", ["time", "sign"])
@pytest.mark.parametrize("name", ["flux-text", "mochi", "lumina2"])
def test_a_reversed_time_and_a_wrong_sign_would_be_seen(
    name: str, planted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted == "time":
        offer = OneTimeScheduler.offer
        monkeypatch.setattr(OneTimeScheduler, "offer", lambda self, t, *a, **k: offer(self, 1 - t, *a, **k))
    else:
        step = OneTimeScheduler.step
        monkeypatch.setattr(OneTimeScheduler, "step", lambda self, output, *a, **k: step(self, -output, *a, **k))
    with pytest.raises(AssertionError):
        test_a_batch_is_its_samples_and_the_stock_pipeline(name)


@pytest.mark.parametrize("name", FEW)
def test_every_way_in_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t, velocities = torch.tensor([0.2, 0.7]), []
    for entry in ENTRIES:
        # Names that no pipeline has take a way out.
        others = tuple(each if each == entry else "-" for each in ENTRIES[:2])
        monkeypatch.setattr(findings, "ENTRIES", (*others, "step"))
        field, x_t, own = make(name)
        velocities.append(field(x_t, t, **own))
        assert [found["x_t"] for found in field.describe()] == [entry]
    assert torch.equal(velocities[0], velocities[1])
    assert torch.equal(velocities[0], velocities[2])


# Shift


def test_shift_is_the_one_that_the_pipeline_passes() -> None:
    pipeline = FluxPipeline(**flow_cases()["flux-text"].pipeline.components)
    pipeline.vae_scale_factor = 8
    own = sample(split(flow_cases()["flux-text"])[1], 0)
    field = VelocityField(pipeline, height=1024, width=1024)
    assert field.mu(**own) == pytest.approx(1.15, abs=1e-9)
    assert shift_time(torch.tensor(0.5), field.shift(**own)).item() == pytest.approx(0.76, abs=0.005)
    # The grid of the stock scheduler is the shifted one.
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=1.15)
    shifted = shift_time(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), field.shift(**own))
    torch.testing.assert_close(scheduler.sigmas[:3].double(), shifted, rtol=1e-6, atol=0)


def test_static_shift_is_the_scheduler_s() -> None:
    field, _, own = make("wan")
    assert field.shift(**own) == 5.0


def test_linear_dynamic_shift() -> None:
    field, _, own = make("cogview4")
    mu = field.mu(**own)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(field.pipeline.scheduler.config)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.1], mu=mu)
    shifted = shift_time(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64), field.shift(**own))
    torch.testing.assert_close(scheduler.sigmas[:3].double(), shifted, rtol=1e-6, atol=0)


# Guidance


GUIDED = {
    "sd3-text": "guidance_scale",
    "lumina2": "guidance_scale",
    "qwen-text": "true_cfg_scale",
    "wan": "guidance_scale",
}


@pytest.mark.parametrize("name", GUIDED)
def test_guidance_is_refused_in_training_and_right_in_sampling(name: str) -> None:
    case = flow_cases()[name]
    field, x_t, own = make(name)
    negative = {
        key: torch.cat([value, value.roll(1, -1)]) if isinstance(value, torch.Tensor) else value
        for key, value in case.inputs.items()
        if "negative" in key
    }
    call = {**own, **negative, GUIDED[name]: 3.0}
    with pytest.raises(ValueError, match="guidance is on, turn it off"):
        field(x_t, torch.tensor([0.2, 0.7]), **call)
    guided = VelocityField(field.pipeline, guidance=True, **field.call)
    t = torch.tensor([0.2, 0.7])
    batch = guided(x_t, t, **call)
    assert (batch - field(x_t, t, **own)).abs().max() > 1e-2
    for i in range(2):
        one = {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in call.items()}
        output, _, _ = stock_step(field.pipeline, x_t[i : i + 1], t[i].item(), **{**field.call, **one})
        torch.testing.assert_close(batch[i : i + 1], output, rtol=0, atol=1e-5 * output.abs().max().item())
    assert guided.describe()[0]["rows"] in ([4], [2, 2])


# What a training loop does


def test_the_pipeline_is_left_alone_by_an_exception() -> None:
    field, x_t, own = make("sd3-text")
    before, config = dict(vars(field.pipeline)), dict(field.pipeline.config)
    training = [module.training for module in field.network.train().modules()]

    def fail(*args: Any) -> None:
        raise RuntimeError("planted")

    handle = field.network.register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="planted"):
            field(x_t, torch.tensor([0.2, 0.7]), **own)
        assert torch.is_grad_enabled()
    finally:
        handle.remove()
    assert dict(vars(field.pipeline)) == before
    assert dict(field.pipeline.config) == config
    assert [module.training for module in field.network.modules()] == training
    field.network.eval()


def test_the_global_random_state_is_left_alone() -> None:
    field, x_t, own = make("flux-image")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    field.ask(x_t, **own)
    assert torch.equal(torch.rand(3), expected)


def test_threads_share_a_pipeline() -> None:
    field, x_t, own = make("sana")
    t = torch.linspace(0.1, 0.9, 8)
    expected = [field(x_t[:1], each, **sample(own, 0)) for each in t]
    found: dict[int, torch.Tensor] = {}

    def work(i: int) -> None:
        found[i] = field(x_t[:1], t[i], **sample(own, 0))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[i], expected[i]) for i in range(8))


def test_parameters_without_gradient_are_named() -> None:
    field, x_t, own = make("qwen-text")
    names = field.without_gradient(x_t, torch.tensor([0.2, 0.7]), **own)
    # The text branch of the last block leads nowhere.
    assert len(names) == 6
    assert all(name.startswith("transformer_blocks.0.") for name in names)
    field, x_t, own = make("sd3-text")
    assert field.without_gradient(x_t, torch.tensor([0.2, 0.7]), **own) == []


def test_gradient_checkpointing_changes_nothing() -> None:
    field, x_t, own = make("flux-text")
    t = torch.tensor([0.2, 0.7])
    weight = field.network.x_embedder.weight
    plain = torch.autograd.grad(field(x_t, t, **own).sum(), weight)[0]
    field.network.train().enable_gradient_checkpointing()
    try:
        assert torch.equal(torch.autograd.grad(field(x_t, t, **own).sum(), weight)[0], plain)
    finally:
        field.network.eval().disable_gradient_checkpointing()


def test_a_compiled_network() -> None:
    field, x_t, own = make("sd3-text")
    t = torch.tensor([0.2, 0.7])
    expected = field(x_t, t, **own)
    compiled = VelocityField(field.pipeline, **field.call)
    compiled.network = torch.compile(field.network, backend="eager")
    assert torch.equal(compiled(x_t, t, **own), expected)
    field.pipeline.transformer = compiled.network
    try:
        assert torch.equal(VelocityField(field.pipeline, **field.call)(x_t, t, **own), expected)
    finally:
        field.pipeline.transformer = field.network


def test_hooks_of_accelerate_run() -> None:
    field, x_t, own = make("sd3-text")
    calls: list[int] = []

    class Count(accelerate.hooks.ModelHook):
        def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return args, kwargs

    field.ask(x_t, **own)
    accelerate.hooks.add_hook_to_module(field.network, Count())
    try:
        field(x_t, torch.tensor([0.2, 0.7]), **own)
    finally:
        accelerate.hooks.remove_hook_from_module(field.network)
    assert calls == [1]


@pytest.mark.parametrize("name", FEW)
def test_sixteen_bits(name: str) -> None:
    # Under autocast and with text in bfloat16, the state and its time stay in float32.
    field, x_t, own = make(name)
    t = torch.tensor([0.2, 0.7])
    expected = field(x_t, t, **own)
    low = {key: v.bfloat16() if v.is_floating_point() and "mask" not in key else v for key, v in own.items()}
    with torch.autocast("cpu", torch.bfloat16):
        velocity = field(x_t, t, **low)
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() <= 0.1 * expected.norm()


def test_weights_in_sixteen_bits() -> None:
    field, x_t, own = make("sd3-text")
    t = torch.tensor([0.2, 0.7])
    expected = field(x_t, t, **own)
    field.network.bfloat16()
    try:
        low = {key: value.bfloat16() for key, value in own.items()}
        for state in (x_t, x_t.bfloat16()):
            velocity = VelocityField(field.pipeline, **field.call)(state, t, **low)
            assert velocity.dtype == state.dtype
            assert (velocity.float() - expected).norm() <= 0.1 * expected.norm()
    finally:
        field.network.float()


def test_derivatives_by_state_and_time() -> None:
    field, x_t, own = make("flux-text")
    t = torch.tensor([0.3, 0.6])
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(8))

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return field(x, t, **own)

    state = x_t.clone().requires_grad_()
    gradient = torch.autograd.grad(velocity(state, t), state, direction)[0]
    # Fused attention has no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        _, forward = torch.func.jvp(velocity, (x_t, t), (direction, torch.zeros(2)))
        _, by_time = torch.func.jvp(velocity, (x_t, t), (torch.zeros_like(x_t), torch.ones(2)))
    torch.testing.assert_close((forward * direction).sum(), (gradient * direction).sum(), rtol=1e-4, atol=1e-4)
    # Central differences: the fastest of the network's sines turns by 0.1, which leaves 0.1^2 / 6, and rounding.
    difference = (velocity(x_t, t + 1e-4) - velocity(x_t, t - 1e-4)) / 2e-4
    assert (by_time - difference).norm() <= 1e-2 * difference.norm()


# Refusals


def test_what_is_refused_is_said_in_one_sentence() -> None:
    field, x_t, own = make("flux-text")
    with pytest.raises(ValueError, match="takes no 'promt' here, only prompt"):
        field(x_t, torch.tensor([0.2, 0.7]), promt="a cat")
    with pytest.raises(ValueError, match=r"`x_t` must have the shape \(2, 16, 8\) .*, got \(2, 15, 8\)"):
        field(x_t[:, 1:], torch.tensor([0.2, 0.7]), **own)
    with pytest.raises(ValueError, match=r"`t` must lie in \[0, 1\] for transformer, got 0.2 to 1.5"):
        field(x_t, torch.tensor([0.2, 1.5]), **own)
    with pytest.raises(ValueError, match=r"`t` must have the shape \(2,\) of the batch, got \(3,\)"):
        field(x_t, torch.rand(3), **own)
    with pytest.raises(ValueError, match="`network` must be one of"):
        VelocityField(field.pipeline, "unet")


def test_describe() -> None:
    field, x_t, own = make("mochi")
    assert field.describe() == []
    field.ask(x_t, **own)
    (found,) = field.describe()
    assert found["pipeline"] == "MochiPipeline"
    assert found["time"] == {"timestep": "1000 - 1000 t"}
    assert (found["sign"], found["calls"], found["x_t"]) == ("-", 1, "latents")
    assert found["shape"] == list(x_t.shape)
