# SPDX-License-Identifier: Apache-2.0
"""The trainable part of a pipeline, its optimizer, and the question whether to stop."""

import copy
import functools
import math
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from tiny_pipelines import KINDS, labels_of, tiny_pipeline
from training_runs import assert_same_weights, load, make_dataset, read_log, save_untrained, train, weights

from diffusers_fm.objectives.flow_matching import TrainableModel
from diffusers_fm.training.distributed import StopSignal
from diffusers_fm.training.metrics import GradientGuard, clip_gradients
from diffusers_fm.training.optimizers import (
    OPTIMIZERS,
    kept_settings,
    make_lr_scheduler,
    make_optimizer,
    non_finite_parameters,
    restart_optimizer,
    state_bytes,
)


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


def test_a_schedule_begins_anew() -> None:
    """Two cosines with a warm-up each, of 6 and of 20 steps."""

    def rates_of(num_steps: int, restarts: dict[int, float], warmup: int = 2) -> list[float]:
        optimizer = make_optimizer([torch.nn.Parameter(torch.ones(1))], 0.5)
        schedule = make_lr_scheduler(optimizer, num_steps, restarts, "cosine", warmup, num_cycles=1, power=1.0)
        rates = []
        for _ in range(num_steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return rates

    def cosine(num_steps: int) -> list[float]:
        return [0.5 * 0.5 * (1 + math.cos(math.pi * k / num_steps)) for k in range(num_steps)]

    rates = rates_of(26, {6: 1.0})
    assert rates == pytest.approx([0.0, 0.25, *cosine(4), 0.0, 0.25, *cosine(18)])
    # Of a longer warm-up there is a tenth of the steps that follow, and all of it at the start of a run.
    assert rates_of(26, {6: 1.0}, 4)[6:] == pytest.approx(rates[6:])
    assert rates_of(26, {6: 1.0}, 4)[:4] == pytest.approx([0.0, 0.125, 0.25, 0.375])
    # A run that begins where another ended.
    assert rates_of(20, {0: 0.1}, 4) == pytest.approx([0.1 * rate for rate in rates[6:]])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_begins_anew(name: str, accelerator: Accelerator) -> None:
    """After a restart each step is that of one that was made at that place."""
    rate = 1.0 if name == "prodigy" else 1e-2
    one, other = (torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2))
    optimizer: Any = accelerator.prepare(make_optimizer([one], rate, name, weight_decay=0.1))
    generator = torch.Generator().manual_seed(0)

    def step(parameter: torch.nn.Parameter, each: Any, gradient: torch.Tensor) -> None:
        each.train() if name == "schedule_free" else None
        parameter.grad = gradient.clone()
        each.step()

    for _ in range(5):
        step(one, optimizer, 10 * torch.randn(64, 64, generator=generator))
    restart_optimizer(optimizer)
    other.data.copy_(one.data)
    fresh = make_optimizer([other], rate, name, weight_decay=0.1)
    for _ in range(3):
        gradient = torch.randn(64, 64, generator=generator)
        step(one, optimizer, gradient)
        step(other, fresh, gradient)
        assert torch.equal(one, other)


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
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_clipping_is_torchs_own(accelerator: Accelerator, name: str, max_norm: float) -> None:
    def parameters() -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,), (2, 3, 4, 4))]

    own, reference = parameters(), parameters()
    # So large an epsilon that a step tells the length of its gradient.
    make = functools.partial(make_optimizer, learning_rate=0.1, name=name, epsilon=10.0)
    optimizer, other = accelerator.prepare(make([*own, torch.nn.Parameter(torch.ones(1))])), make(reference)
    # Long, short, long: a scale must not outlive its step.
    for scale in (10.0, 0.01, 1.0):
        for parameter, twin in zip(own, reference):
            gradient = scale * torch.randn_like(parameter)
            parameter.grad, twin.grad = gradient, gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_(reference, max_norm)
        torch.testing.assert_close(clip_gradients(accelerator, own, max_norm), norm)
        optimizer.step()
        other.step()
        for parameter, twin in zip(own, reference):
            torch.testing.assert_close(parameter, twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(accelerator: Accelerator, name: str, bad: float) -> None:
    parameter = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = accelerator.prepare(make_optimizer([parameter], 1e-2, name))
    optimizer.train()
    guard = GradientGuard(accelerator, limit=1)

    def step(gradient: float) -> bool:
        parameter.grad = torch.ones_like(parameter)
        parameter.grad[0, 0] = gradient
        steps = guard.before_step(optimizer, clip_gradients(accelerator, [parameter], 1.0))
        if steps:
            optimizer.step()
        return steps

    assert step(1.0)
    before, state = parameter.detach().clone(), copy.deepcopy(optimizer.state_dict())
    assert not step(bad)
    assert torch.equal(parameter, before)
    torch.testing.assert_close(optimizer.state_dict(), state, rtol=0, atol=0)
    assert step(1.0)
    assert not torch.equal(parameter, before)
    assert guard.look(3) is None
    assert (guard.skipped, guard.in_a_row) == (1, 0)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_good_step_ends_the_count_of_skipped_ones(
    accelerator: Accelerator, caplog: pytest.LogCaptureFixture, at_once: bool
) -> None:
    optimizer = accelerator.prepare(make_optimizer([torch.nn.Parameter(torch.ones(1))], 1e-2))
    guard = GradientGuard(accelerator, limit=2)
    # Never three in a row before the last one.
    norms = [1.0, math.nan, math.inf, 1.0, math.nan, 1.0, math.inf, math.nan]
    for step, norm in enumerate(norms, 1):
        assert guard.before_step(optimizer, torch.tensor(norm)) == math.isfinite(norm)
        if not at_once or step == len(norms):
            assert guard.look(step) is None
            assert guard.look(step) is None
    assert (guard.skipped, guard.in_a_row) == (5, 2)
    steps = ["2, 3, 5, 7, 8"] if at_once else ["2", "3", "5", "7", "8"]
    totals = [5] if at_once else [1, 2, 3, 4, 5]
    assert caplog.messages == [
        f"The gradient was not finite at step {step}: skipped, {total} in all." for step, total in zip(steps, totals)
    ]
    # A resumed run goes on counting.
    for norm, fault in ((math.nan, "at step 9, nor was it in the 2 steps before."), (1.0, None)):
        resumed = GradientGuard(accelerator, limit=2)
        resumed.load_state_dict(guard.state_dict())
        resumed.before_step(optimizer, torch.tensor(norm))
        assert resumed.look(9) == (fault and f"The gradient is not finite {fault}")
    stops = GradientGuard(accelerator, limit=0)
    stops.before_step(optimizer, torch.tensor(math.nan))
    assert stops.look(4) == "The gradient at step 4 is not finite."


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_optimizer_has_the_settings_of_now(accelerator: Accelerator, name: str) -> None:
    def made(rates: list[float], schedule: str, num_steps: int, **settings: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        groups = [{"params": [torch.nn.Parameter(torch.randn(64, 64))], "lr": rate} for rate in rates]
        optimizer = make_optimizer(groups, rates[0], name, **settings)
        scheduler = get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=num_steps)
        return accelerator.prepare(optimizer), scheduler

    def train(optimizer: Any, scheduler: Any) -> None:
        optimizer.train()
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.randn(64, 64)
        optimizer.step()
        scheduler.step()

    def group_settings(optimizer: Any) -> list[dict[str, Any]]:
        return [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    # Prodigy has one rate for all.
    rates, other_rates = ([1.0, 1.0], [0.1, 0.1]) if name == "prodigy" else ([1.0, 0.5], [0.1, 0.2])
    first = {"betas": (0.5, 0.75), "weight_decay": 0.25, "epsilon": 0.5}
    former, former_scheduler = made(rates, "cosine", 10, **first)
    for _ in range(3):
        train(former, former_scheduler)
    saved, saved_schedule = copy.deepcopy(former.state_dict()), former_scheduler.state_dict()
    # Unchanged settings: what is loaded, to the bit.
    same, same_scheduler = made(rates, "cosine", 10, **first)
    with kept_settings(same, same_scheduler):
        same.load_state_dict(copy.deepcopy(saved))
        same_scheduler.load_state_dict(saved_schedule)
    assert group_settings(same) == group_settings(former)
    assert same_scheduler.get_last_lr() == former_scheduler.get_last_lr()
    # Others: theirs, and those of a run that had them from the beginning.
    now = {"betas": (0.25, 0.5), "weight_decay": 0.125, "epsilon": 0.25}
    resumed, scheduler = made(other_rates, "linear", 20, **now)
    with kept_settings(resumed, scheduler):
        resumed.load_state_dict(copy.deepcopy(saved))
        scheduler.load_state_dict(saved_schedule)
    fresh, fresh_scheduler = made(other_rates, "linear", 20, **now)
    for _ in range(3):
        train(fresh, fresh_scheduler)
    for group, expected, old in zip(resumed.param_groups, fresh.param_groups, former.param_groups):
        for key in ("lr", "initial_lr", "betas", "eps", "weight_decay"):
            assert group.get(key) == expected.get(key), key
        # The step size that Prodigy has found is no setting.
        assert group.get("d") == (old if name == "prodigy" else expected).get("d")
    assert scheduler.get_last_lr() == fresh_scheduler.get_last_lr()
    for state, old in zip(resumed.state_dict()["state"].values(), saved["state"].values(), strict=True):
        torch.testing.assert_close(state, old, rtol=0, atol=0)
    train(resumed, scheduler)
    train(fresh, fresh_scheduler)
    assert [group["lr"] for group in resumed.param_groups] == [group["lr"] for group in fresh.param_groups]


def test_parameters_that_are_not_finite_are_named() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert non_finite_parameters(model) == []
    with torch.no_grad():
        model[0].weight[0, 0], model[1].bias[1] = math.nan, math.inf
    assert non_finite_parameters(model) == ["0.weight", "1.bias"]
    # What is not trained is not the run's.
    model[0].requires_grad_(False)
    assert non_finite_parameters(model) == ["1.bias"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_missing_optimizer_names_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, extra = OPTIMIZERS[name]
    if package == "torch":
        return
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=re.escape(f'--optimizer {name} needs `pip install -e ".[{extra}]"`')):
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
