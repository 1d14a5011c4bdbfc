# SPDX-License-Identifier: Apache-2.0
"""
The scheduler's sampling loop against exact solutions: mixtures of Gaussians, for which a network of every prediction
type is known in closed form, an independent solver of the ODE, DDIM's formula, and the paths' own formulas.

Networks are asked at the float32 times in `timesteps`, the scheduler's coefficients are in float64. Where a test needs
more than the 6e-8 between them, it picks times that float32 holds exactly (1,024 train timesteps).
"""

import copy
import functools
import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from helpers import draw_mixture, flow_of_gaussian, gaussian
from scipy.integrate import solve_ivp

from diffusers_fm import FlowMatchScheduler
from diffusers_fm.coordinates import SAMPLING_PATHS
from diffusers_fm.paths import PREDICTION_TYPES, ConditionalPath, OTPath, register_path
from diffusers_fm.schedulers import sampling_plan
from diffusers_fm.schedulers.settings import STRAIGHT_ONLY
from diffusers_fm.solvers import odeint


PATHS = {
    "ot": {"path": "ot"},
    "ot sigma_min": {"path": "ot", "path_kwargs": {"sigma_min": 0.02}},
    "vp": {"path": "vp"},
    "ve": {"path": "ve"},
    "cosine": {"path": "cosine"},
    "vp_discrete": {"path": "vp_discrete"},
}
# `calibrated` needs a calibration, and has tests of its own.
SOLVERS = tuple(solver for solver in sampling_plan.SOLVERS if solver != "calibrated")
every_path = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
PROBLEM = draw_mixture(5, (2,), narrowest=0.4, widest=0.8)
Network = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make(steps: int | None = None, **settings: object) -> FlowMatchScheduler:
    """A scheduler whose dyadic times are exact in float32, laid out."""
    scheduler = FlowMatchScheduler(**({"num_train_timesteps": 1024} | settings))
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(
    scheduler: FlowMatchScheduler, network: Network, x: torch.Tensor, first: int = 0, **options: object
) -> list[torch.Tensor]:
    """The sampling loop as a pipeline writes it; every sample between the turns, the start included."""
    samples = [x]
    for timestep in scheduler.timesteps[first:]:
        t = scheduler.time(timestep.double())[None]
        x = scheduler.step(network(x, t), timestep, x, **options).prev_sample
        samples.append(x)
    return samples


def run(scheduler: FlowMatchScheduler, network: Network, x: torch.Tensor, **options: object) -> torch.Tensor:
    return loop(scheduler, network, x, **options)[-1]


def bounded_network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network that knows nothing of any path."""
    return torch.tanh(1.3 * x) + 0.2 * torch.cos(3 * t).reshape(-1, *[1] * (x.ndim - 1))


def exact_end(path: ConditionalPath, start: torch.Tensor, s0: float, s1: float) -> torch.Tensor:
    """Where the exact ODE leads from the straight time `s0` to `s1`, by another library's solver of order 8."""

    def scale(s: float) -> torch.Tensor:
        t = path.time_at(torch.tensor(s, dtype=torch.float64))
        return path.alpha(t) + path.sigma(t)

    field = PROBLEM.straight_field()

    def derivative(s: float, y: torch.Tensor) -> torch.Tensor:
        points = torch.from_numpy(y).reshape(start.shape)
        return field(torch.full((len(points),), s, dtype=torch.float64), points).numpy().ravel()

    y = (start / scale(s0)).numpy().ravel()
    solution = solve_ivp(derivative, (s0, s1), y, method="DOP853", rtol=1e-10, atol=1e-11)
    return torch.from_numpy(solution.y[:, -1]).reshape(start.shape) * scale(s1)


@functools.cache
def problem_on(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Start and exact end on a path, from its noise end to its data end."""
    scheduler = make(**PATHS[name])
    start = draw(8, 2) * scheduler.init_noise_sigma
    return start, exact_end(scheduler.path, start, scheduler.path.ratio_max, scheduler.path.ratio_min)


# Orders of convergence

ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "ab2": 2, "abm2": 2}


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampling_path", SAMPLING_PATHS)
def test_sampling_converges_to_the_exact_solution_with_the_order_of_the_solver(name: str, sampling_path: str) -> None:
    # `sigma_min`: a path that keeps noise at t = 0 (OT with sigma_min, VE, vp_discrete) is compared there, since the
    # jump from there to the data estimate is one Euler step and would hide the order.
    start, exact = problem_on(name)
    # On vp_discrete the velocity, a derivative in t, jumps at every knot; the noise does not.
    prediction = "epsilon" if name == "vp_discrete" else "flow_prediction"
    for solver, order in ORDERS.items():
        if sampling_path == "native" and name == "vp_discrete":
            continue  # the ODE itself has a kink at every knot
        errors = []
        for steps in (16, 32):
            scheduler = make(
                steps,
                prediction_type=prediction,
                solver=solver,
                sampling_path=sampling_path,
                final_sigmas_type="sigma_min",
                **PATHS[name],
            )
            end = run(scheduler, PROBLEM.model(scheduler.path, prediction), start)
            errors.append((end - exact).abs().max().item())
        # 16 steps are nearly in the asymptotic range: a third of an order is allowed, a whole one is not.
        assert math.log2(errors[0] / errors[1]) > order - 0.35, (solver, errors)
        if order == 1:
            assert math.log2(errors[0] / errors[1]) < 1.35, (solver, errors)
        # The native ODE of VE has solutions of size 50, and VP's and VE's are stiff near the noise.
        assert errors[1] < {1: 0.12, 2: 0.02, 4: 1e-4}[order] * (10 if sampling_path == "native" else 1), solver


@pytest.mark.parametrize("prediction", ["flow_prediction", "epsilon", "v_prediction"])
@pytest.mark.parametrize(("solver", "order"), [("heun", 2), ("rk4", 4), ("dopri5", 5)])
def test_the_native_ode_of_vp_keeps_the_order_in_its_last_step(solver: str, order: int, prediction: str) -> None:
    # VP's velocity is infinite at t = 0 and its flow is smooth: the last stage lies beside the end.
    start, exact = problem_on("vp")
    errors = []
    for steps in (32, 64):
        scheduler = make(steps, solver=solver, sampling_path="native", path="vp", prediction_type=prediction)
        assert len(scheduler.timesteps) == steps * scheduler.order
        assert scheduler.timesteps.min() > 0
        errors.append((run(scheduler, PROBLEM.model(scheduler.path, prediction), start) - exact).abs().max().item())
    # With order 5 the error is already that of the last stage's time, which is 1e-7 beside where it belongs.
    assert order == 5 or math.log2(errors[0] / errors[1]) > order - 0.35, errors
    assert errors[1] < {2: 2e-3, 4: 1e-5, 5: 1e-7}[order]


@pytest.mark.parametrize("name", ["ot", "vp", "cosine"])
def test_dpm_solver_has_order_two_before_its_last_step(name: str) -> None:
    # The last step to clean data is the data estimate itself, of lower order, so it stops at a ratio of 0.05.
    scheduler = make(path=name, solver="dpmpp_2m")
    start = draw(8, 2)
    exact = exact_end(scheduler.path, start, scheduler.path.ratio_max, 0.0625)
    errors = []
    for steps in (32, 64):
        grid = torch.linspace(1, 0.0625, steps + 1, dtype=torch.float64)
        scheduler.set_timesteps(sigmas=grid)
        samples = loop(scheduler, PROBLEM.model(scheduler.path), start)
        errors.append((samples[steps] - exact).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > 1.65 and errors[1] < 0.02


# Euler in straight coordinates is DDIM


def written_ddim(
    path: ConditionalPath, x: torch.Tensor, output: torch.Tensor, t: torch.Tensor, end: tuple[float, float], kind: str
) -> torch.Tensor:
    """`alpha' data + sigma' noise` of the estimates (arXiv 2010.02502, equation 12 with eta 0)."""
    a, s = path.alpha(t), path.sigma(t)
    da, ds = path.d_alpha(t), path.d_sigma(t)
    d = a * ds - da * s
    data = {
        "flow_prediction": (ds * x - s * output) / d,
        "epsilon": (x - s * output) / a,
        "sample": output,
        "v_prediction": (a * x - s * torch.hypot(a, s) * output) / (a**2 + s**2),
        "score": (x + s**2 * output) / a,
    }[kind]
    return end[0] * data + end[1] * (x - a * data) / s


@every_path
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_euler_is_ddim_on_any_grid(path: dict, kind: str) -> None:
    scheduler = make(prediction_type=kind, **path)
    low, high = max(scheduler.path.ratio_min, 0.01), min(scheduler.path.ratio_max, 0.99)
    for seed in range(3):
        inner = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        grid = (low + (high - low) * inner).sort(descending=True).values
        scheduler.set_timesteps(sigmas=grid)
        # The network's answer is any tensor: the step is the formula whatever it is.
        samples = loop(scheduler, bounded_network, draw(3, 2))
        # Stock's code, which shifts given sigmas, holds them in float32.
        times = scheduler.path.time_at(grid.float().double())
        ends = [(scheduler.path.alpha(t).item(), scheduler.path.sigma(t).item()) for t in times[1:]] + [(1.0, 0.0)]
        for i, t in enumerate(times):
            output = bounded_network(samples[i], scheduler.time(scheduler.timesteps[i].double()))
            expected = written_ddim(scheduler.path, samples[i], output, t, ends[i], kind)
            scale = expected.abs().max().item() + 1
            torch.testing.assert_close(samples[i + 1], expected, rtol=0, atol=1e-9 * scale)


SAME_FOR_ALL_TYPES = [
    {"solver": "euler"},
    {"solver": "ab2"},
    {"solver": "dpmpp_2m"},
    {"solver": "abm3", "sampling_path": "angle"},
    {"solver": "midpoint", "sampling_path": "native"},
    {"eta": 0.7},
    {"stochastic_sampling": True},
    {"solver": "euler_maruyama"},
]


@every_path
@pytest.mark.parametrize("options", SAME_FOR_ALL_TYPES, ids=lambda options: "-".join(map(str, options.values())))
def test_all_prediction_types_give_the_same_samples(path: dict, options: dict) -> None:
    # From t = 0.95 on, where the noise still determines the data. On this grid float32 holds every time exactly.
    ends = []
    for kind in PREDICTION_TYPES:
        scheduler = make(prediction_type=kind, **path, **options)
        # Between the knots of vp_discrete, where its velocity jumps.
        scheduler.set_timesteps(timesteps=[972.5, 810.5, 640.5, 512.5, 300.5, 128.5, 60.5, 16.5])
        start = draw(4, 2) * scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(1)
        ends.append(run(scheduler, PROBLEM.model(scheduler.path, kind), start, generator=generator))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-7)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("sampling_path", SAMPLING_PATHS)
def test_runge_kutta_stages_of_every_prediction_type_are_those_of_the_velocity(kind: str, sampling_path: str) -> None:
    # On OT dyadic steps have dyadic stages (but those of dopri5); in the angle they have not, and float32 times leave
    # 6e-8 / alpha.
    for solver in ("midpoint", "heun", "rk4"):
        ends = []
        for prediction in ("flow_prediction", kind):
            scheduler = make(prediction_type=prediction, solver=solver, sampling_path=sampling_path)
            scheduler.set_timesteps(timesteps=[960, 768, 512, 256, 64])
            samples = loop(scheduler, PROBLEM.model(scheduler.path, prediction), draw(4, 2))
            ends.append(samples[4 * scheduler.order])  # the last step may be a jump, by type
        torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-9 if sampling_path != "angle" else 1e-5)


# Gaussian data: the map from noise to data is linear and known


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("sampling_path", SAMPLING_PATHS)
def test_gaussian_data_are_reached_by_the_closed_form_map(name: str, sampling_path: str) -> None:
    problem = gaussian((2,), mean=0.8, std=0.5)
    for solver in ("midpoint", "abm2"):
        scheduler = make(128, solver=solver, sampling_path=sampling_path, final_sigmas_type="sigma_min", **PATHS[name])
        start = draw(6, 2) * scheduler.init_noise_sigma
        expected = flow_of_gaussian(problem, scheduler.path, start, 1.0, 0.0)
        end = run(scheduler, problem.model(scheduler.path), start)
        # Second order with 128 steps; native VE passes through points of size 50.
        torch.testing.assert_close(end, expected, rtol=0, atol=2e-2 if sampling_path == "native" else 2e-3)


@every_path
@pytest.mark.parametrize("sampling_path", SAMPLING_PATHS)
def test_gaussian_data_end_with_their_mean_and_spread(path: dict, sampling_path: str) -> None:
    # The whole way, from `init_noise_sigma` times standard noise to clean data. The map of a Gaussian is affine, so
    # two points tell the end of the distribution. What is missing of alpha(1) = 0 (VP, vp_discrete: 0.0066; VE: 1/50)
    # moves the mean by that share of 0.8 and the spread by less.
    mean, std = 0.8, 0.5
    problem = gaussian((1,), mean, std)
    scheduler = make(100, solver="midpoint", sampling_path=sampling_path, **path)
    sigma = scheduler.init_noise_sigma
    one = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    low, high = run(scheduler, problem.model(scheduler.path), one * sigma).flatten().tolist()
    assert abs((low + high) / 2 - mean) < 0.02 and abs((high - low) / 2 - std) < 0.02


STOCHASTIC = [
    {"eta": 0.5},
    {"eta": 1.0},
    {"s_churn": 5.0},
    {"s_churn": 30.0, "solver": "heun", "s_tmin": 0.1, "s_tmax": 10.0},
    {"solver": "euler_maruyama"},
    {"solver": "euler_maruyama", "sampling_path": "angle", "diffusion_form": "sigma_squared", "diffusion_scale": 2.0},
]


@every_path
@pytest.mark.parametrize("options", STOCHASTIC, ids=lambda options: "-".join(map(str, options.values())))
def test_stochastic_sampling_keeps_the_marginals(path: dict, options: dict) -> None:
    # 10,000 samples know the mean to 0.005 and the spread to 0.0035. Steps of order one leave up to 0.05 of a spread
    # of 0.5 (0.018 without noise), halved by every doubling; the missing alpha(1) moves the mean by up to 0.016.
    problem = gaussian((1,), mean=0.8, std=0.5)
    scheduler = make(64, **path, **options)
    start = draw(10_000, 1) * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(3)
    end = run(scheduler, problem.model(scheduler.path), start, generator=generator)
    assert abs(end.mean() - 0.8) < 0.03 and abs(end.std() - 0.5) < 0.06


@every_path
def test_replacing_all_the_noise_keeps_the_mean(path: dict) -> None:
    # `stochastic_sampling` jumps to the data estimate and noises it again: the mean stays (10,000 samples know it to
    # 0.005), the spread of the data shrinks, since an estimate is narrower than the data.
    problem = gaussian((1,), mean=0.8, std=0.5)
    for steps in (2, 12):
        scheduler = make(steps, stochastic_sampling=True, **path)
        start = draw(10_000, 1) * scheduler.init_noise_sigma
        generator = torch.Generator().manual_seed(3)
        end = run(scheduler, problem.model(scheduler.path), start, generator=generator)
        assert abs(end.mean() - 0.8) < 0.02 and 0.05 < end.std() < 0.51


@every_path
def test_one_stochastic_step_is_the_written_formula(path: dict) -> None:
    # data estimate * alpha' + fresh noise * sigma', and DDPM's split of the noise at eta = 1 (arXiv 2010.02502).
    for options, eta in (({"stochastic_sampling": True}, None), ({"eta": 1.0}, 1.0), ({"eta": 0.3}, 0.3)):
        scheduler = make(prediction_type="sample", **path, **options)
        scheduler.set_timesteps(timesteps=[800, 400])
        p = scheduler.path
        t, end = (scheduler.time(torch.tensor(value, dtype=torch.float64)) for value in (800.0, 400.0))
        x, data = draw(5, 3), draw(5, 3, seed=1)
        z = draw_like(x, 7)
        result = scheduler.step(
            data, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(7)
        ).prev_sample
        noise = (x - p.alpha(t) * data) / p.sigma(t)
        fresh = p.sigma(end)
        if eta is not None:
            kept = p.alpha(t) * p.sigma(end) / (p.alpha(end) * p.sigma(t))
            fresh = eta * p.sigma(end) * (1 - kept**2).sqrt()
        old = (p.sigma(end) ** 2 - fresh**2).clamp(min=0).sqrt()
        expected = p.alpha(end) * data + old * noise + fresh * z
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def draw_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The noise that a step draws."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


# The loop is the solver that `odeint` is


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dopri5", "ab2", "ab3", "abm2", "abm3"])
@pytest.mark.parametrize("name", ["ot", "cosine", "ve", "vp"])
def test_the_native_loop_is_a_fixed_step_solver_of_the_paths_own_ode(solver: str, name: str) -> None:
    if name == "vp" and solver in ("heun", "rk4", "dopri5"):
        return  # no stage at VP's t = 0, see above
    scheduler = make(solver=solver, sampling_path="native", final_sigmas_type="sigma_min", **PATHS[name])
    grid = [1024.0, 896.0, 640.0, 512.0, 256.0, 192.0]
    scheduler.set_timesteps(timesteps=grid)
    start = draw(5, 2) * scheduler.init_noise_sigma
    model = PROBLEM.model(scheduler.path)
    end = run(scheduler, model, start)
    times = [time / 1024 for time in grid] + [0.0]
    # The exact stages of dopri5 (c = 1/5, 8/9) are not in float32: ask the field at the times that the loop names.
    seen = iter(scheduler.timesteps.double() / 1024)
    rounded = lambda t, x: model(x, next(seen).expand(len(x)))  # noqa: E731
    solution = odeint(rounded, start, 1.0, 0.0, method=solver, grid=times)
    assert solution.nfe == len(scheduler.timesteps)
    torch.testing.assert_close(end, solution.x, rtol=1e-10, atol=1e-10 * scheduler.init_noise_sigma)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun", "rk4", "dopri5", "ab2", "ab3", "abm2", "abm3"])
@pytest.mark.parametrize("name", ["vp", "ve", "cosine"])
def test_the_straight_loop_is_that_of_the_optimal_transport_path(solver: str, name: str) -> None:
    # The same grid of straight times, the network asked in straight coordinates: samples are scaled copies.
    scheduler = make(solver=solver, prediction_type="v_prediction", **PATHS[name])
    path, straight = scheduler.path, make(solver=solver)
    sigmas = [0.96875, 0.75, 0.5, 0.25, 0.0625]
    start = draw(5, 2)
    field = PROBLEM.straight_field()

    scheduler.set_timesteps(sigmas=sigmas)
    x, points = start * (path.alpha(at := path.time_at(torch.tensor(sigmas[0]).double())) + path.sigma(at)), []
    for i, timestep in enumerate(scheduler.timesteps):
        # A network whose data and noise are those of the field at the loop's own time.
        t = path.time_at(scheduler.sigmas[i].double())[None]
        position, s = path.to_straight(x, t)
        velocity = field(s, position)
        data, noise = position - s[:, None] * velocity, position + (1 - s[:, None]) * velocity
        x = scheduler.step(path.target(data, noise, t, "v_prediction"), timestep, x).prev_sample
        points.append(x)

    straight.set_timesteps(sigmas=sigmas)
    expected = run(straight, lambda x, t: field(t, x), start)
    if len(straight.timesteps) == len(scheduler.timesteps):
        # Stages have float32 times in one loop and float32 ratios in the other.
        scale = 1.0 if path.ratio_min == 0 else path.alpha(torch.zeros(()).double()).item()
        torch.testing.assert_close(x / scale, expected, rtol=0, atol=2e-5)


# Training uses the same path


@every_path
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_training_functions_are_the_formulas_of_the_path(path: dict, kind: str) -> None:
    scheduler = make(prediction_type=kind, **path)
    p, scale = scheduler.path, scheduler.timestep_scale
    assert scale == (1023 if path["path"] == "vp_discrete" else 1024)
    data, noise = draw(4, 3, 2), draw(4, 3, 2, seed=1)
    timesteps = torch.tensor([0.37, 100.0, 511.77, 1000.123], dtype=torch.float64)
    t = timesteps / scale
    alpha, sigma, d_alpha, d_sigma = (f(t)[:, None, None] for f in (p.alpha, p.sigma, p.d_alpha, p.d_sigma))
    x_t = alpha * data + sigma * noise
    torch.testing.assert_close(scheduler.add_noise(data, noise, timesteps), x_t, rtol=1e-12, atol=1e-12)
    assert torch.equal(scheduler.scale_noise(data, timesteps, noise), scheduler.add_noise(data, noise, timesteps))
    velocity = d_alpha * data + d_sigma * noise
    torch.testing.assert_close(scheduler.get_velocity(data, noise, timesteps), velocity, rtol=1e-11, atol=1e-11)
    target = {
        "flow_prediction": velocity,
        "epsilon": noise,
        "sample": data,
        "v_prediction": (alpha * noise - sigma * data) / (alpha**2 + sigma**2).sqrt(),
        "score": -noise / sigma,
    }[kind]
    torch.testing.assert_close(scheduler.get_target(data, noise, timesteps), target, rtol=1e-11, atol=1e-11)
    # Each sample has its own time.
    for i in range(4):
        one = scheduler.add_noise(data[i : i + 1], noise[i : i + 1], timesteps[i : i + 1])
        assert torch.equal(one, scheduler.add_noise(data, noise, timesteps)[i : i + 1])


@every_path
def test_integer_and_single_timesteps_mean_the_same_times(path: dict) -> None:
    scheduler = make(**path)
    data, noise = draw(3, 2), draw(3, 2, seed=1)
    exact = scheduler.add_noise(data, noise, torch.tensor([1.0, 500.0, 1020.0], dtype=torch.float64))
    for dtype in (torch.int64, torch.int32, torch.float32):
        timesteps = torch.tensor([1, 500, 1020], dtype=dtype)
        torch.testing.assert_close(scheduler.add_noise(data, noise, timesteps), exact, rtol=1e-5, atol=1e-5)
    same = scheduler.add_noise(data, noise, torch.tensor([500.0, 500.0, 500.0]))
    for one in (torch.tensor(500.0), torch.tensor([500.0]), torch.tensor(500), 500.0):
        torch.testing.assert_close(scheduler.scale_noise(data, one, noise), same, rtol=1e-6, atol=1e-6)
    # The path's ends are times too.
    ends = scheduler.add_noise(data[:2], noise[:2], torch.tensor([0.0, scheduler.timestep_scale]))
    assert ends.isfinite().all()


@every_path
def test_what_is_added_is_what_sampling_removes(path: dict) -> None:
    # With a perfect guess of the data one Euler step from any x_t lies on the same line of data and noise.
    scheduler = make(8, prediction_type="v_prediction", **path)
    data, noise = draw(2, 3), draw(2, 3, seed=1)
    for i in range(len(scheduler.timesteps)):
        timestep = scheduler.timesteps[i].double()
        x_t = scheduler.add_noise(data, noise, timestep)
        answer = scheduler.get_target(data, noise, timestep)
        scheduler.set_begin_index(i)
        scheduler._step_index = None
        moved = scheduler.step(answer, scheduler.timesteps[i], x_t).prev_sample
        last = i + 1 == len(scheduler.timesteps)
        expected = data if last else scheduler.add_noise(data, noise, scheduler.timesteps[i + 1].double())
        torch.testing.assert_close(moved, expected, rtol=0, atol=2e-5 * scheduler.init_noise_sigma)


# The grid


@pytest.mark.parametrize("solver", SOLVERS)
@every_path
def test_turns_are_order_times_steps(solver: str, path: dict) -> None:
    stages = {"midpoint": 2, "heun": 2, "rk4": 4, "dopri5": 6}.get(solver, 1)
    scheduler = make(solver=solver, **path)
    assert scheduler.order == stages
    for steps in (1, 5):
        scheduler.set_timesteps(steps)
        # A last step beyond the end of a path that keeps some noise is one call, a jump to the data estimate.
        jumps = scheduler.path.ratio_min > 0
        turns = stages * steps - (stages - 1) * jumps
        assert len(scheduler.timesteps) == turns and len(scheduler.sigmas) == turns + 1
        assert scheduler.num_inference_steps == steps
        assert (scheduler.timesteps.diff() <= 0).all() and (scheduler.sigmas.diff() <= 0).all()
        assert 0 <= scheduler.timesteps.min() and scheduler.timesteps.max() <= scheduler.timestep_scale
        assert scheduler.sigmas[-1] == 0
        ratio = scheduler.path.ratio(scheduler.timesteps.double() / scheduler.timestep_scale)
        torch.testing.assert_close(scheduler.sigmas[:-1].double(), ratio, rtol=0, atol=1e-6)
        samples = loop(scheduler, bounded_network, draw(2, 2))
        assert samples[-1].isfinite().all()
        with pytest.raises(ValueError, match="call `set_timesteps`"):
            scheduler.step(samples[0], scheduler.timesteps[0], samples[0])


def test_no_call_lies_outside_the_path() -> None:
    # 0 <= t <= 1 for every stage, of which the first is at pure noise, whatever the solver and the coordinates.
    for solver, sampling_path, (_, path) in itertools.product(SOLVERS, SAMPLING_PATHS, PATHS.items()):
        if solver in STRAIGHT_ONLY and sampling_path != "ot":
            continue
        scheduler = make(7, solver=solver, sampling_path=sampling_path, **path)
        assert scheduler.timesteps[0] == scheduler.timestep_scale
        assert scheduler.timesteps.min() >= 0
        torch.testing.assert_close(scheduler.sigmas[0].item(), scheduler.path.ratio_max, rtol=1e-6, atol=0)


@pytest.mark.parametrize("sampling_path", SAMPLING_PATHS)
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "graded"])
@pytest.mark.parametrize("name", ["ot", "vp", "ve", "cosine"])
def test_every_spacing_starts_at_pure_noise(name: str, spacing: str, sampling_path: str) -> None:
    for steps in (1, 2, 9):
        scheduler = make(steps, timestep_spacing=spacing, sampling_path=sampling_path, **PATHS[name])
        assert len(scheduler.timesteps) == steps
        assert scheduler.timesteps[0].item() == pytest.approx(1024, rel=1e-6)


@pytest.mark.parametrize("sampling_path", SAMPLING_PATHS)
@pytest.mark.parametrize("spacing", ["trailing", "linspace", "graded"])
@every_path
def test_given_timesteps_are_the_grid_in_every_spacing(path: dict, spacing: str, sampling_path: str) -> None:
    given = [1000.0, 700.5, 300.25, 20.0]
    for arguments in ({}, {"num_inference_steps": 4}):
        scheduler = make(timestep_spacing=spacing, sampling_path=sampling_path, **path)
        scheduler.set_timesteps(timesteps=given, **arguments)
        torch.testing.assert_close(scheduler.timesteps, torch.tensor(given), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{}, {"eta": 0.5}, {"stochastic_sampling": True}, {"s_churn": 5.0}]
    + [{"solver": solver} for solver in SOLVERS if solver != "euler"]
    + [{"solver": "euler_maruyama", "sampling_path": "angle", "diffusion_form": "constant"}],
    ids=str,
)
@pytest.mark.parametrize("path", ["ot", "vp", "cosine"])
def test_a_grid_may_hold_clean_data_as_its_last_point(path: str, settings: dict) -> None:
    # `np.linspace(1, 0, n)` ends in 0, and the scheduler appends another 0: the last step stands still, and samples
    # are those of the grid without it.
    ends = []
    for sigmas in ([1.0, 0.5, 0.25, 0.0], [1.0, 0.5, 0.25]):
        scheduler = make(path=path, prediction_type="v_prediction", **settings)
        scheduler.set_timesteps(sigmas=sigmas)
        start = draw(3, 2)
        ends.append(run(scheduler, bounded_network, start, generator=torch.Generator().manual_seed(0)))
        assert ends[-1].isfinite().all()
    if settings.get("solver") not in ("abm2", "abm3", "euler_maruyama"):
        # A corrector uses the call at clean data, and the diffusion stops in the last step, whichever that is.
        torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta_max", [60.0, 200.0, 1000.0])
def test_vp_paths_that_end_in_pure_noise_but_for_rounding(beta_max: float) -> None:
    for solver, sampling_path in itertools.product(("euler", "heun", "ab2"), SAMPLING_PATHS):
        scheduler = make(
            6,
            path="vp",
            path_kwargs={"beta_max": beta_max},
            prediction_type="sample",
            solver=solver,
            sampling_path=sampling_path,
        )
        assert scheduler.timesteps[0] == 1024
        assert run(scheduler, bounded_network, draw(3, 2)).isfinite().all()


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_timesteps_of_an_inverted_network_lead_to_the_data(spacing: str) -> None:
    # Mochi: the network's time is 1 - t, so its timesteps rise, and `sigmas`, given in its sense, too.
    scheduler = make(invert_sigmas=True, timestep_spacing=spacing)
    scheduler.set_timesteps(timesteps=[64.0, 256.0, 512.0, 960.0])
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([64.0, 256.0, 512.0, 960.0]))
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([0.0625, 0.25, 0.5, 0.9375, 1.0]))
    plain = make()
    plain.set_timesteps(timesteps=[960.0, 768.0, 512.0, 64.0])
    start = draw(3, 2)
    x, y = start, start
    for ours, theirs in zip(scheduler.timesteps, plain.timesteps):
        x = scheduler.step(-torch.tanh(x), ours, x).prev_sample
        y = plain.step(torch.tanh(y), theirs, y).prev_sample
    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


NAN, INF = float("nan"), float("inf")
BAD_GRIDS = [
    ({}, {}),
    ({}, {"num_inference_steps": 0}),
    ({}, {"num_inference_steps": -3}),
    ({}, {"num_inference_steps": 2.5}),
    ({}, {"num_inference_steps": NAN}),
    ({}, {"sigmas": []}),
    ({}, {"sigmas": [0.5, 0.5]}),
    ({}, {"sigmas": [0.5, 0.6]}),
    ({}, {"sigmas": [1.1, 0.5]}),
    ({}, {"sigmas": [1.0, -0.1]}),
    ({}, {"sigmas": [1.0, NAN]}),
    ({}, {"timesteps": []}),
    ({}, {"timesteps": [500.0, 600.0]}),
    ({}, {"timesteps": [500.0, 500.0]}),
    ({}, {"timesteps": [1000.5]}),
    ({}, {"timesteps": [900.0, -1.0]}),
    ({}, {"timesteps": [NAN]}),
    ({"path": "vp_discrete"}, {"timesteps": [1000.0, 500.0]}),
    ({"path": "vp_discrete"}, {"num_inference_steps": 1001}),
    ({"invert_sigmas": True}, {"timesteps": [500.0, 100.0]}),
    ({}, {"sigmas": [1.0, 0.5], "num_inference_steps": 3}),
    ({}, {"timesteps": [900.0, 500.0], "num_inference_steps": 3}),
    ({}, {"sigmas": [1.0, 0.5], "timesteps": [900.0]}),
    ({"use_dynamic_shifting": True}, {"num_inference_steps": 4}),
    *(({"use_dynamic_shifting": True}, {"num_inference_steps": 4, "mu": mu}) for mu in (NAN, INF, -INF)),
    *(
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, {"num_inference_steps": 4, "mu": mu})
        for mu in (NAN, INF, 0.0, -1.0)
    ),
    ({"use_exponential_sigmas": True}, {"sigmas": [1.0, 0.5, 0.0]}),
    ({"prediction_type": "epsilon"}, {"num_inference_steps": 4}),
    ({"prediction_type": "score", "path": "cosine"}, {"num_inference_steps": 4}),
    ({"prediction_type": "sample"}, {"timesteps": [900.0, 0.0]}),
]


@pytest.mark.parametrize(("settings", "arguments"), BAD_GRIDS, ids=str)
def test_grids_that_cannot_be_are_refused_in_one_sentence(settings: dict, arguments: dict) -> None:
    scheduler = FlowMatchScheduler(**settings)
    with pytest.raises(ValueError, match=r"`|no limit at t = ") as raised:
        scheduler.set_timesteps(**arguments)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 300


BAD_SETTINGS = [
    *({"shift": shift} for shift in (0.0, -1.0, NAN, INF)),
    *({"num_train_timesteps": steps} for steps in (0, -1, 2.5)),
    *({"sigma_data": value} for value in (0.0, -1.0, NAN, INF)),
    *({"eta": value} for value in (-0.1, 1.1, NAN)),
    *({"s_churn": value} for value in (-1.0, NAN)),
    *({"s_churn": 1.0, "s_noise": value} for value in (-1.0, NAN, INF)),
    {"s_churn": 1.0, "s_tmin": NAN},
    {"s_churn": 1.0, "s_tmax": NAN},
    *({"solver": "euler_maruyama", "diffusion_scale": value} for value in (-1.0, NAN, INF)),
    *({"clip_sample": True, "clip_sample_range": value} for value in (-1.0, NAN)),
    {"shift_terminal": NAN},
    {"shift_terminal": 1.5},
    {"shift_terminal": -0.5},
    {"path_kwargs": "sigma_min"},
    {"path_kwargs": {"sigma_min": "0.1"}},
    {"path_kwargs": {"beta_min": 0.1}},
    {"path": "vp_discrete", "path_kwargs": {"num_train_timesteps": 50}},
    {"path": "vp_discrete", "num_train_timesteps": 1},
]


@pytest.mark.parametrize("settings", BAD_SETTINGS, ids=str)
def test_settings_without_a_meaning_are_refused_in_one_sentence(settings: dict) -> None:
    with pytest.raises(ValueError, match="`") as raised:
        FlowMatchScheduler(**settings)
    message = str(raised.value)
    assert "\n" not in message and message.endswith(".") and len(message) < 300


@pytest.mark.parametrize("shift", [0.0, -1.0, NAN, INF])
def test_a_shift_set_later_is_checked_too(shift: float) -> None:
    def lay_out() -> None:
        scheduler = FlowMatchScheduler()
        scheduler.set_shift(shift)
        scheduler.set_timesteps(4)

    with pytest.raises(ValueError, match="`shift` must be"):
        lay_out()


# Beginning in the middle: image to image

SINGLE_STEP = [solver for solver in SOLVERS if not solver.startswith(("ab", "dpm"))]


@pytest.mark.parametrize(
    ("solver", "sampling_path"),
    [
        each
        for each in itertools.product(SINGLE_STEP, SAMPLING_PATHS)
        if each[0] not in STRAIGHT_ONLY or each[1] == "ot"
    ],
)
def test_the_tail_of_the_loop_is_the_loop_from_there(solver: str, sampling_path: str) -> None:
    settings = {"solver": solver, "sampling_path": sampling_path, "path": "cosine", "shift": 2.0}
    whole = make(6, **settings)
    samples = loop(whole, bounded_network, draw(3, 2), generator=torch.Generator().manual_seed(5))
    for step in range(1, 6):
        first = step * whole.order
        # By begin index, and by looking for the timestep.
        for set_begin in (True, False):
            tail = make(6, **settings)
            generator = torch.Generator().manual_seed(5)
            if solver == "euler_maruyama":
                for _ in range(first):
                    torch.randn(3, 2, generator=generator, dtype=torch.float64)
            if set_begin:
                tail.set_begin_index(first)
                assert tail.begin_index == first
            rest = loop(tail, bounded_network, samples[first], first=first, generator=generator)
            for ours, theirs in zip(rest, samples[first:]):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("solver", [solver for solver in SOLVERS if solver not in SINGLE_STEP])
def test_a_multistep_solver_that_begins_later_is_a_fresh_one_on_the_rest_of_the_grid(solver: str) -> None:
    sigmas = [1.0, 0.875, 0.625, 0.5, 0.375, 0.125]
    for step in (1, 3, 5):
        tail, fresh = make(solver=solver, path="vp"), make(solver=solver, path="vp")
        tail.set_timesteps(sigmas=sigmas)
        tail.set_begin_index(step)
        fresh.set_timesteps(sigmas=sigmas[step:])
        start = draw(3, 2)
        torch.testing.assert_close(
            loop(tail, bounded_network, start, first=step)[-1],
            run(fresh, bounded_network, start),
            rtol=1e-12,
            atol=1e-12,
        )


@pytest.mark.parametrize("solver", ["midpoint", "heun", "rk4", "dopri5"])
def test_a_step_is_not_entered_in_the_middle(solver: str) -> None:
    scheduler = make(4, solver=solver)
    x = draw(2, 2)
    for index in range(1, scheduler.order):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(scheduler.order + index)
        with pytest.raises(ValueError, match=f"multiple of its {scheduler.order} stages, got index"):
            scheduler.step(x, scheduler.timesteps[scheduler.order + index], x)


def test_a_time_between_the_grid_points_begins_at_the_nearest_step() -> None:
    for solver in ("euler", "heun", "rk4"):
        scheduler = make(4, solver=solver)  # steps begin at 1024, 768, 512, 256
        x = draw(2, 2)
        for timestep, step in ((1023.0, 0), (900.0, 0), (890.0, 1), (500.3, 2), (256.0, 3), (1.0, 3)):
            scheduler.set_timesteps(4)
            scheduler.step(x, torch.tensor(timestep), x)
            assert scheduler.step_index == step * scheduler.order + 1


# State and compilation


def test_schedulers_share_nothing_and_copies_go_their_own_way() -> None:
    for solver in ("rk4", "abm3", "dpmpp_2m"):
        scheduler = make(5, solver=solver, path="vp")
        start = draw(3, 2)
        samples = loop(make(5, solver=solver, path="vp"), bounded_network, start)
        half = len(scheduler.timesteps) // 2
        x = start
        for timestep in scheduler.timesteps[:half]:
            x = scheduler.step(bounded_network(x, scheduler.time(timestep.double())), timestep, x).prev_sample
        twin = copy.deepcopy(scheduler)
        # The twin runs first and to its end, the original is then where it was.
        for one in (twin, scheduler):
            y = x
            for timestep in one.timesteps[half:]:
                y = one.step(bounded_network(y, one.time(timestep.double())), timestep, y).prev_sample
            assert torch.equal(y, samples[-1])


def test_laying_out_the_grid_again_forgets_the_run() -> None:
    for solver in SOLVERS:
        scheduler = make(5, solver=solver, path="ve")
        start = draw(3, 2)
        options = {"generator": torch.Generator().manual_seed(0)}
        scheduler.step(start, scheduler.timesteps[0], start, **options)
        scheduler.set_timesteps(5)
        options = {"generator": torch.Generator().manual_seed(0)}
        first = run(scheduler, bounded_network, start, **options)
        options = {"generator": torch.Generator().manual_seed(0)}
        assert torch.equal(first, run(make(5, solver=solver, path="ve"), bounded_network, start, **options))


@pytest.mark.parametrize("solver", ["euler", "heun", "ab2", "dpmpp_2m"])
def test_a_turn_compiles_into_one_graph(solver: str) -> None:
    torch.compiler.reset()
    scheduler, plain = (make(3, solver=solver, path="vp") for _ in range(2))
    for one in (scheduler, plain):
        one.set_begin_index(0)
    turn = torch.compile(
        lambda x, y, t: scheduler.step(y, t, x, return_dict=False)[0], fullgraph=True, backend="eager"
    )
    x = draw(2, 3).float()
    y = torch.tanh(x)
    expected = plain.step(y, plain.timesteps[0], x).prev_sample
    torch.testing.assert_close(turn(x, y, scheduler.timesteps[0]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_are_integrated_in_float32(dtype: torch.dtype) -> None:
    # The path on which an answer is multiplied by the most, beside the one on which it is not.
    for solver, path in itertools.product(SOLVERS, ("ot", "ve")):
        half, single = (make(4, solver=solver, path=path, prediction_type="v_prediction") for _ in range(2))
        x = draw(2, 3).to(dtype)
        for i, timestep in enumerate(half.timesteps):
            options = [{"generator": torch.Generator().manual_seed(i)} for _ in range(2)]
            answer = torch.tanh(x.float()).to(dtype)
            moved = half.step(answer, timestep, x, **options[0]).prev_sample
            exact = single.step(answer.float(), timestep, x.float(), **options[1]).prev_sample
            assert moved.dtype == dtype and torch.equal(moved, exact.to(dtype))
            x = moved


def test_a_path_of_ones_own() -> None:
    class Parabola(ConditionalPath):
        def alpha(self, t: torch.Tensor) -> torch.Tensor:
            return 1 - t.square()

        def sigma(self, t: torch.Tensor) -> torch.Tensor:
            return t

    register_path("parabola", Parabola)
    for sampling_path in SAMPLING_PATHS:
        errors = []
        for steps in (16, 32):
            own = {"path": "parabola", "sampling_path": sampling_path}
            scheduler = FlowMatchScheduler(num_train_timesteps=1024, solver="midpoint", **own)
            scheduler.set_timesteps(steps)
            start = draw(6, 2)
            exact = exact_end(OTPath(), start, 1.0, 0.0)
            errors.append((run(scheduler, PROBLEM.model(scheduler.path), start) - exact).abs().max().item())
        assert errors[1] < 0.01 and math.log2(errors[0] / errors[1]) > 1.6


# Random configurations


def random_case(seed: int) -> tuple[dict, dict]:
    """Settings and arguments of `set_timesteps` at random, many of which exclude each other."""
    r = random.Random(seed)
    name = r.choice(["ot", "vp", "ve", "cosine", "vp_discrete"])
    settings: dict = {
        "path": name,
        "prediction_type": r.choice(["flow_prediction", *PREDICTION_TYPES]),
        "solver": r.choice([*SOLVERS, "euler", "euler"]),
    }
    kwargs = {
        "ot": {"sigma_min": r.choice([0.0, 1e-5, 0.01, 0.3])},
        "vp": {"beta_min": r.choice([0.01, 0.1, 1.0]), "beta_max": r.choice([1.0, 5.0, 20.0, 60.0, 200.0])},
        "ve": {"sigma_min": r.choice([1e-4, 0.01, 0.5]), "sigma_max": r.choice([0.6, 50.0, 348.0])},
        "cosine": {},
        "vp_discrete": {
            "beta_schedule": r.choice(["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"]),
            "rescale_betas_zero_snr": r.random() < 0.3,
        },
    }[name]
    if r.random() < 0.6:
        settings["path_kwargs"] = kwargs
    options: list[tuple[float, str, list]] = [
        (0.3, "num_train_timesteps", [1, 2, 10, 1000, 4000]),
        (0.3, "shift", [0.1, 0.5, 3.0, 12.0, 1e3]),
        (0.1, "use_dynamic_shifting", [True]),
        (0.1, "time_shift_type", ["exponential", "linear"]),
        (0.1, "shift_terminal", [0.02, 0.1, 0.5]),
        (0.25, r.choice(["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]), [True]),
        (0.05, "invert_sigmas", [True]),
        (0.1, "stochastic_sampling", [True]),
        (0.1, "clip_sample", [True]),
        (0.1, "clip_sample_range", [0.5, 3.0]),
        (0.4, "sampling_path", list(SAMPLING_PATHS)),
        (0.4, "timestep_spacing", ["trailing", "linspace", "graded", "leading"]),
        (0.4, "final_sigmas_type", ["zero", "sigma_min"]),
        (0.1, "steps_offset", [0, 1, 5]),
        (0.1, "sigma_data", [0.05, 0.5, 4.0]),
        (0.1, "eta", [0.3, 1.0]),
        (0.1, "s_churn", [0.5, 10.0, 1000.0]),
        (0.1, "s_tmin", [0.05, 1.0]),
        (0.1, "s_tmax", [0.05, 50.0]),
        (0.1, "diffusion_form", ["sigma", "sigma_squared", "constant"]),
        (0.1, "diffusion_scale", [0.0, 5.0]),
    ]
    for chance, key, values in options:
        if r.random() < chance:
            settings[key] = r.choice(values)
    scale = settings.get("num_train_timesteps", 1000) - (name == "vp_discrete")
    points = {r.random() for _ in range(r.choice([1, 2, 4, 7]))}
    points |= {1.0} if r.random() < 0.5 else set()
    points |= {0.0} if r.random() < 0.15 else set()
    falling = sorted(points, reverse=True)
    timesteps = [scale * point for point in falling]
    arguments: dict = r.choice(
        [
            {"num_inference_steps": r.choice([1, 2, 3, 5, 8])},
            {"num_inference_steps": r.choice([1, 2, 3, 5, 8])},
            {"sigmas": falling},
            {"timesteps": timesteps[::-1] if settings.get("invert_sigmas") else timesteps},
        ]
    )
    if "use_dynamic_shifting" in settings:
        arguments["mu"] = r.choice([0.5, 1.15, 3.0])
    return settings, arguments


def trouble(seed: int) -> str | None:
    """What is wrong with the random case: not finite, not one sentence, not the same after a round trip."""
    settings, arguments = random_case(seed)
    try:
        scheduler = FlowMatchScheduler(**settings)
        scheduler.set_timesteps(**arguments)
    except ValueError as error:
        message = str(error)
        return None if message.endswith(".") and "\n" not in message else f"unclear: {message!r}"
    sigmas, timesteps = scheduler.sigmas, scheduler.timesteps
    if len(sigmas) != len(timesteps) + 1:
        return "sigmas are not one longer than timesteps"
    if not (sigmas.isfinite().all() and timesteps.isfinite().all()):
        return "a grid that is not finite"
    if sigmas.min() < 0 or sigmas.max() > 1:
        return "sigmas outside [0, 1]"
    if timesteps.min() < 0 or timesteps.max() > scheduler.timestep_scale * (1 + 1e-6):
        return "timesteps out of range"
    if "s_churn" not in settings and (sigmas.diff() * (-1 if scheduler.config.invert_sigmas else 1) > 1e-6).any():
        return "sigmas turn"
    twin = FlowMatchScheduler.from_config(scheduler.config)
    mine, its = ({k: v for k, v in one.config.items() if k[0] != "_"} for one in (scheduler, twin))
    if mine != its or twin.path != scheduler.path:
        return "another scheduler after a round trip"
    twin.set_timesteps(**arguments)
    ends = []
    for one in (scheduler, twin):
        start = draw(2, 3).float() * one.init_noise_sigma
        generator = torch.Generator().manual_seed(seed)
        x = start
        for timestep in one.timesteps:
            x = one.step(torch.tanh(1.3 * x + timestep / 1000), timestep, x, generator=generator).prev_sample
        ends.append(x)
    if not torch.equal(ends[0], ends[1]):
        return "not finite" if not ends[0].isfinite().all() else "other samples after a round trip"
    return None if ends[0].isfinite().all() else "not finite"


@pytest.mark.parametrize("block", range(8))
def test_random_configurations_give_finite_samples_or_one_clear_sentence(block: int) -> None:
    found = {}
    for seed in range(100 * block, 100 * block + 100):
        try:
            what = trouble(seed)
        except Exception as error:  # any other error is a finding too
            what = f"{type(error).__name__}: {error}"
        if what is not None:
            found[seed] = (what, *random_case(seed))
    assert not found
