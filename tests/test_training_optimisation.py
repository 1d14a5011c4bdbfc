# SPDX-License-Identifier: Apache-2.0
"""The trainable part of a pipeline, its optimizer, and the question whether to stop."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny_pipelines import KINDS, labels_of, tiny_pipeline

from diffusers_fm.training import StopSignal, TrainableModel, make_optimizer


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
