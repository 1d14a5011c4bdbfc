# SPDX-License-Identifier: Apache-2.0
"""The trainable part of a pipeline, its optimizer, and the question whether to stop."""

import functools
import math
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tiny_pipelines import KINDS, labels_of, tiny_pipeline
from training_runs import assert_same_weights, load, make_dataset, read_log, save_untrained, train, weights

from diffusers_fm.training.distributed import StopSignal
from diffusers_fm.training.optimizers import OPTIMIZERS, GradientClipping, TrainableModel, make_optimizer, state_bytes


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_model_is_trained_and_nothing_else(kind: str) -> None:
    pipeline = tiny_pipeline(kind)
    model = TrainableModel(pipeline).train()
    x_t = torch.randn(3, *pipeline.sample_shape)
    labels = labels_of(pipeline)
    labels = None if labels is None else torch.tensor(labels)
    timesteps = torch.tensor([1.5, 500.25, 999.0])
    prediction = model(x_t, timesteps, labels)
    assert torch.equal(prediction, pipeline.predict(x_t, timesteps, labels))
    prediction.square().mean().backward()
    # Distributed training waits for the gradient of each parameter.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    if pipeline.vae is not None:
        assert all(parameter.grad is None for parameter in pipeline.vae.parameters())
        assert not {id(p) for p in pipeline.vae.parameters()} & {id(p) for p in model.parameters()}


def test_adamw_takes_what_it_is_given() -> None:
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = make_optimizer([parameter], learning_rate=0.1, betas=(0.5, 0.75), weight_decay=0.25, epsilon=0.5)
    expected, m, v = 1.0, 0.0, 0.0
    for step, gradient in ((1, 2.0), (2, -1.0)):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
        # arXiv 1711.05101, algorithm 2.
        m, v = 0.5 * m + 0.5 * gradient, 0.75 * v + 0.25 * gradient**2
        adapted = m / (1 - 0.5**step) / ((v / (1 - 0.75**step)) ** 0.5 + 0.5)
        expected -= 0.1 * (adapted + 0.25 * expected)
        assert parameter.item() == pytest.approx(expected, rel=1e-6)


def regression(name: str, learning_rate: float, steps: int) -> tuple[torch.optim.Optimizer, list[float]]:
    """A layer of 64 x 64 weights and 64 biases that learns another one."""
    torch.manual_seed(0)
    model, other = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    optimizer: Any = make_optimizer(model.parameters(), learning_rate, name)
    if name == "schedule_free":
        optimizer.train()
    losses = []
    for _ in range(steps):
        x = torch.randn(128, 64)
        loss = (model(x) - other(x)).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_learn_and_keep_as_much_as_they_say(name: str) -> None:
    optimizer, losses = regression(name, 1.0 if name == "prodigy" else 1e-2, 200)
    assert losses[-1] < 0.3 * losses[0], losses[::20]
    # All that is kept, but counters and the tables of the 8-bit numbers.
    for parameter, state in optimizer.state.items():
        tensors = [value for key, value in state.items() if isinstance(value, torch.Tensor) and "qmap" not in key]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.numel() > 1)
        assert kept == state_bytes(name, parameter.shape)


@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
@pytest.mark.parametrize("copied_numbers", [0, 2**20])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_clipping_is_torchs_own(
    accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, name: str, copied_numbers: int, max_norm: float
) -> None:
    monkeypatch.setattr("diffusers_fm.training.optimizers.COPIED_NUMBERS", copied_numbers)

    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 3, 4, 4))]

    own, reference = parameters(), parameters()
    # So large an epsilon that a step tells the length of its gradient.
    make = functools.partial(make_optimizer, learning_rate=0.1, name=name, epsilon=10.0)
    optimizer, other = accelerator.prepare(make([*own, torch.nn.Parameter(torch.ones(1))])), make(reference)
    clipping = GradientClipping(accelerator, optimizer, own, max_norm)
    # Long, short, long: a scale must not outlive its step.
    for scale in (10.0, 0.01, 1.0):
        for parameter, twin in zip(own, reference):
            gradient = scale * torch.randn_like(parameter)
            parameter.grad, twin.grad = gradient, gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference, max_norm)
        torch.testing.assert_close(clipping.before_step(), norm)
        optimizer.step()
        other.step()
        for parameter, twin in zip(own, reference):
            torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_optimizer_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = OPTIMIZERS[name]
    if package == "torch":
        return
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=re.escape(f'--optimizer {name} needs `pip install "diffusers-fm[{extra}]"`')):
        make_optimizer([torch.nn.Parameter(torch.ones(1))], 1e-3, name)


def test_prodigy_is_told_of_a_learning_rate_for_adamw(caplog: pytest.LogCaptureFixture) -> None:
    make_optimizer([torch.nn.Parameter(torch.ones(1))], 1e-4, "prodigy")
    assert "far below the usual 1" in caplog.text


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_a_run_resumes_with_every_optimizer(name: str, tmp_path: Path) -> None:
    model, data = save_untrained(tmp_path / "model", "unet"), make_dataset(tmp_path / "data")
    # A pipeline of its own in each validation, which must leave no trace.
    options = {"optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 1e-3, "checkpointing_steps": 2}
    whole = train(model, data, tmp_path / "whole", max_train_steps=5, validation_steps=1, **options)
    resumed = train(model, data, tmp_path / "resumed", max_train_steps=5, **options)
    train(model, data, resumed, max_train_steps=5, resume_from_checkpoint="checkpoint-2", **options)
    assert_same_weights(whole, resumed)
    assert read_log(whole, "loss") == read_log(resumed, "loss")


def test_what_schedule_free_saves_is_its_average(tmp_path: Path) -> None:
    model, data = save_untrained(tmp_path / "model", "unet"), make_dataset(tmp_path / "data")
    options = {"optimizer": "schedule_free", "adam_beta1": 0.75, "checkpointing_steps": 4}
    run = train(model, data, tmp_path / "run", max_train_steps=4, **options)
    trained = load_file(run / "checkpoint-4" / "model.safetensors")
    states = torch.load(run / "checkpoint-4" / "optimizer.bin", weights_only=True)["state"]
    saved = weights(run)
    names = [name for name, _ in TrainableModel(load(run)).named_parameters()]
    for number, name in enumerate(names):
        # arXiv 2405.15682, equation 2: the gradient is taken at y = (1 - beta) z + beta x, and x is what is wanted.
        x, z = saved[name.replace("denoiser.", "unet.")], states[number]["z"]
        assert torch.allclose(trained[name], 0.25 * z + 0.75 * x, atol=1e-6), name
        assert not torch.equal(x, trained[name])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_asks_and_the_second_insists(accelerator: Accelerator, number: signal.Signals) -> None:
    former = signal.getsignal(number)
    with StopSignal(accelerator) as stop:
        assert stop.received() == 0
        os.kill(os.getpid(), number)
        assert stop.received() == number
        # The next one does what it would have done without us.
        assert signal.getsignal(number) == former
    assert signal.getsignal(number) == former
