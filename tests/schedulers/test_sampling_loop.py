# SPDX-License-Identifier: Apache-2.0
"""What a pipeline may do to a sampling loop, and what a loop keeps of a pipeline's: buffers, grids, cuts, devices."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.solvers import ADAMS, TABLEAUX, odeint


ANGLE = {"sampling_path": "angle", "timestep_spacing": "graded"}
SETTINGS = {
    "euler": {},
    "midpoint": {"solver": "midpoint"},
    "heun": {"solver": "heun"},
    "rk4": {"solver": "rk4"},
    "dopri5": {"solver": "dopri5"},
    "ab3": {"solver": "ab3"},
    "abm3": {"solver": "abm3"} | ANGLE,
    "dpmpp_2m": {"solver": "dpmpp_2m", "prediction_type": "sample"},
    "vp": {"path": "vp", "solver": "heun"},
    "clip": {"clip_sample": True},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())


def noise(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return torch.sin(2 * x) + x * (t / 1000)


# The caller's tensors


@every_setting
def test_a_network_may_write_all_its_answers_into_one_buffer(settings: dict) -> None:
    ends = []
    for shared in (False, True):
        scheduler = FlowMatchScheduler(**settings)
        scheduler.set_timesteps(6)
        inputs, outputs, x = torch.empty(2, 3), torch.empty(2, 3), noise()
        for t in scheduler.timesteps:
            # With buffers, also the sample is handed over in one: a captured graph reads from it.
            x = inputs.copy_(x) if shared else x
            answer = network(x, t)
            answer = outputs.copy_(answer) if shared else answer
            x = scheduler.step(answer, t, x, return_dict=False)[0]
            assert x.data_ptr() not in (inputs.data_ptr(), outputs.data_ptr())
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=0, atol=0)


@pytest.mark.parametrize("method", [*TABLEAUX, *ADAMS])
@pytest.mark.parametrize("fixed", [True, False])
def test_a_field_may_write_all_its_answers_into_one_buffer(method: str, fixed: bool) -> None:
    if not fixed and method not in ("dopri5", "bosh3"):
        return  # they have no adaptive steps
    buffer = torch.empty(2, 3, dtype=torch.float64)
    options = {"num_steps": 4} if fixed else {"rtol": 1e-3, "atol": 1e-3}
    ends = [
        odeint(field, noise().double(), 1.0, 0.0, method=method, **options).x
        for field in (lambda t, x: torch.sin(3 * x), lambda t, x: buffer.copy_(torch.sin(3 * x)))
    ]
    torch.testing.assert_close(*ends, rtol=0, atol=0)


# Compilation


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"solver": "ab2"},
        {"solver": "heun"},
        {"solver": "abm3"} | ANGLE,
        {"solver": "dpmpp_2m", "path": "vp"},
        {"clip_sample": True},
        {"invert_sigmas": True},
    ],
    ids=str,
)
def test_a_compiled_step_makes_three_graphs_for_any_loop_and_the_same_samples(settings: dict) -> None:
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounter()
    ends = []
    for compiled in (False, True):
        scheduler = FlowMatchScheduler(**settings)
        step = torch.compile(scheduler.step, backend=counter, fullgraph=True) if compiled else scheduler.step
        for _ in range(2):
            scheduler.set_timesteps(50 // scheduler.order)
            scheduler.set_begin_index(0)
            x = noise()
            for t in scheduler.timesteps:
                x = step(network(x, t), t, x, return_dict=False)[0]
        ends.append(x)
    assert counter.frame_count <= 3
    # Each turn rounds differently, by 1e-7 of values near 1.
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


# Waiting for a device


class Looks(TorchDispatchMode):
    """Counts numbers that Python reads from tensors: for each of them a device would have to be waited for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
        return func(*args, **(kwargs or {}))


@every_setting
def test_a_loop_reads_no_number_but_where_it_begins(settings: dict) -> None:
    for begin in (0, None):
        scheduler = FlowMatchScheduler(**settings)
        scheduler.set_timesteps(4)
        if begin is not None:
            scheduler.set_begin_index(begin)
        x, looks = noise(), Looks()
        for t in scheduler.timesteps:
            answer = network(x, t)
            with looks:
                x = scheduler.step(answer, t, x, return_dict=False)[0]
        # Without a begin the first timestep is copied, and its place read from a copy of the grid on the CPU.
        assert looks.count == (0 if begin == 0 else 1)


# Grids that pipelines change


@pytest.mark.parametrize(
    "settings", [{}, {"solver": "ab2"}, {"solver": "heun"}, {"path": "vp"}, {"invert_sigmas": True}]
)
@pytest.mark.parametrize("inference", [False, True])
def test_sigmas_that_a_pipeline_writes_count_also_after_the_begin_is_set(settings: dict, inference: bool) -> None:
    ends = []
    for written in (False, True):
        scheduler = FlowMatchScheduler(**settings)
        sigmas = [1.0, 0.7, 0.4, 0.2]
        with torch.inference_mode(inference):
            if written:
                scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.4, 0.2])
                place = scheduler.order
                scheduler.sigmas[place] = 0.3 if settings.get("invert_sigmas") else 0.7
            else:
                scheduler.set_timesteps(sigmas=sigmas)
            scheduler.set_begin_index(0)
            x = noise()
            for i in range(len(scheduler.timesteps)):
                x = scheduler.step(network(x, torch.tensor(500.0)), scheduler.timesteps[i], x, return_dict=False)[0]
        ends.append(x)
    torch.testing.assert_close(*ends, rtol=0, atol=1e-6)


def test_cosmos_calls_with_rising_sigmas_and_levels_up_to_80() -> None:
    registered = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}
    ends = []
    stock = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    stock.register_to_config(**registered)
    ours = FlowMatchScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 8, dtype=torch.float64))
        scheduler.sigmas[-1] = scheduler.sigmas[-2]
        x = 80 * noise()
        for i, t in enumerate(scheduler.timesteps):
            level = scheduler.sigmas[i]
            x = scheduler.step(torch.tanh(x / level), t, x, return_dict=False)[0]
        ends.append(x)
    # Karras' levels in stock's float32, of up to 80.
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=1e-5, atol=0)
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-4, atol=1e-4)


def test_levels_above_one_take_other_solvers_and_grids() -> None:
    # Exact network of data N(0, 1): dx / dlevel is x level / (1 + level^2), and the end x / sqrt(1 + 80^2).
    scheduler = FlowMatchScheduler(use_exponential_sigmas=True, solver="ab3")
    scheduler.register_to_config(sigma_max=80.0, sigma_min=0.002)
    scheduler.set_timesteps(sigmas=torch.linspace(0, 1, 200))
    assert scheduler.sigmas[0] == pytest.approx(80.0)
    x = 80 * noise().double()
    for i, t in enumerate(scheduler.timesteps):
        level = scheduler.sigmas[i].double()
        x = scheduler.step(x * level / (1 + level**2), t, x, return_dict=False)[0]
    torch.testing.assert_close(x, 80 * noise().double() / np.hypot(1, 80), rtol=2e-3, atol=0)


def test_rising_sigmas_are_still_refused_where_nothing_replaces_them() -> None:
    with pytest.raises(ValueError, match="descend"):
        FlowMatchScheduler().set_timesteps(sigmas=[0.1, 0.5, 1.0])


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4", "dopri5"])
def test_timesteps_of_a_checkpoint_are_not_cut_within_a_step(solver: str) -> None:
    scheduler = FlowMatchScheduler.from_config(EulerDiscreteScheduler().config, solver=solver)
    scheduler.set_timesteps(6)
    count = (scheduler.timesteps >= 400).sum().item()  # as SDXL's `denoising_end` does
    assert count % scheduler.order
    with pytest.raises(ValueError, match="cut"):
        scheduler.timesteps[:count]
    assert type(scheduler.timesteps[: scheduler.order]) is torch.Tensor
    assert type(scheduler.timesteps[scheduler.order :]) is torch.Tensor
    assert all(type(t) is torch.Tensor for t in scheduler.timesteps)
    single = FlowMatchScheduler.from_config(DDIMScheduler().config, solver="ab2")
    single.set_timesteps(6)
    assert len(single.timesteps[:3]) == 3


@pytest.mark.parametrize("kind", ["sigmas", "timesteps"])
@pytest.mark.parametrize(
    "turn", [lambda v: v[::-1], lambda v: torch.tensor(v[::-1].copy()), lambda v: v[::-1].tolist()]
)
def test_grids_are_read_in_every_form(kind: str, turn) -> None:
    values = np.linspace(0.25, 1, 4) * (1000 if kind == "timesteps" else 1)
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(**{kind: turn(values)})
    assert scheduler.timesteps.tolist() == [1000.0, 750.0, 500.0, 250.0]


# Ends and shapes


@pytest.mark.parametrize("path", ["ot", "vp", "ve", "cosine"])
@pytest.mark.parametrize("solver", ["heun", "rk4", "dopri5"])
def test_no_network_is_called_at_timestep_zero(path: str, solver: str) -> None:
    for end in ("zero", "sigma_min"):
        scheduler = FlowMatchScheduler(path=path, solver=solver, final_sigmas_type=end)
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.min() > 0
        assert torch.log(scheduler.timesteps).isfinite().all()
    assert scheduler.timestep(torch.zeros(2)).min() > 0


def test_trained_timestep_zero_stays() -> None:
    scheduler = FlowMatchScheduler.from_config(DDIMScheduler(timestep_spacing="linspace").config)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps[-1] == 0
    own = FlowMatchScheduler()
    own.set_timesteps(timesteps=[500.0, 0.0])
    assert own.timesteps.tolist() == [500.0, 0.0]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda s, x: s.add_noise(x, x[:1], torch.tensor([3.0])), "`noise` must be .*(2, 3).*(1, 3)"),
        (lambda s, x: s.scale_noise(x, torch.tensor([3.0]), x[:, :2]), "`noise`"),
        (lambda s, x: s.get_velocity(x, x.flatten(), torch.tensor([3.0])), "`noise`"),
        (lambda s, x: s.get_target(x, x[:1], torch.tensor([3.0])), "`noise`"),
        (lambda s, x: s.add_noise(x, x, torch.tensor([3.0, 4.0, 5.0])), "`timesteps`.*2 samples.*(3,)"),
        (lambda s, x: s.get_velocity(x, x, torch.tensor([[3.0], [4.0]])), "`timesteps`"),
        (lambda s, x: s.step(torch.cat([x, x], 1), torch.tensor(500.0), x), "`model_output`.*(2, 3).*(2, 6)"),
        (lambda s, x: s.step(x[:1], torch.tensor(500.0), x), "`model_output`"),
    ],
)
def test_shapes_that_do_not_match_are_refused(call, said: str) -> None:
    scheduler = FlowMatchScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match=said.replace("(", r"\(").replace(")", r"\)").replace("[", r"\[")):
        call(scheduler, noise())


def test_values_that_are_not_finite_are_said_to_be_the_fields() -> None:
    with pytest.raises(ValueError, match="The field answered with NaN or infinity"):
        odeint(lambda t, x: x / 0.0, torch.ones(2, 1), 1.0, 0.0, method="euler", num_steps=2)
