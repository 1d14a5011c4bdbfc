# SPDX-License-Identifier: Apache-2.0
"""Tableaux against the order conditions; solvers against exact flows: order, error, work, interval, independence."""

import functools
import math

import pytest
import torch
from helpers import draw_mixture, flow_of_gaussian, gaussian

from diffusers_fm.paths import PATHS, make_path
from diffusers_fm.solvers import (
    ADAMS,
    TABLEAUX,
    ButcherTableau,
    adams_weights,
    graded_grid,
    odeint,
    quadrature_weights,
)


FIXED_METHODS = [*TABLEAUX, *ADAMS]
ADAPTIVE_METHODS = [name for name, tableau in TABLEAUX.items() if tableau.b_error is not None]
ORDERS = {name: tableau.order for name, tableau in TABLEAUX.items()} | {
    name: order for name, (order, _) in ADAMS.items()
}

# Heun's method with Euler's embedded: its last stage is not the first of the next step.
HEUN_EULER = ButcherTableau(
    "heun_euler", order=2, a=((), (1.0,)), b=(1 / 2, 1 / 2), c=(0.0, 1.0), b_error=(-1 / 2, 1 / 2)
)

# A rooted tree is the sorted tuple of the trees at its root.
Tree = tuple


def rooted_trees(nodes: int) -> set[Tree]:
    """All rooted trees with this many nodes."""
    if nodes == 1:
        return {()}
    trees = set()
    for smaller in rooted_trees(nodes - 1):
        # A new leaf at any node of the smaller tree.
        trees |= with_new_leaf(smaller)
    return trees


def with_new_leaf(tree: Tree) -> set[Tree]:
    grown = {tuple(sorted((*tree, ())))}
    for i, branch in enumerate(tree):
        grown |= {tuple(sorted((*tree[:i], larger, *tree[i + 1 :]))) for larger in with_new_leaf(branch)}
    return grown


def size(tree: Tree) -> int:
    return 1 + sum(size(branch) for branch in tree)


def density(tree: Tree) -> int:
    return size(tree) * math.prod(density(branch) for branch in tree)


def stage_weights(tableau: ButcherTableau, tree: Tree) -> list[float]:
    """The product over the branches at the root of their weights, at each stage."""
    weights = [1.0] * tableau.stages
    for branch in tree:
        inner = stage_weights(tableau, branch)
        for i, row in enumerate(tableau.a):
            weights[i] *= sum(a * w for a, w in zip(row, inner))
    return weights


def order_defect(tableau: ButcherTableau, b: tuple[float, ...], order: int) -> float:
    """The largest violation of the conditions of exactly this order (Hairer et al. I, theorem II.2.13)."""
    return max(
        abs(sum(x * w for x, w in zip(b, stage_weights(tableau, tree))) - 1 / density(tree))
        for tree in rooted_trees(order)
    )


def test_rooted_trees_are_counted_right():
    assert [len(rooted_trees(nodes)) for nodes in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", TABLEAUX)
def test_tableau_has_its_order_and_no_more(name):
    tableau = TABLEAUX[name]
    for order in range(1, tableau.order + 1):
        assert order_defect(tableau, tableau.b, order) < 1e-14
    assert order_defect(tableau, tableau.b, tableau.order + 1) > 1e-4
    assert tableau.without_error_estimate().b_error is None
    assert tableau.without_error_estimate().b[-1] != 0


@pytest.mark.parametrize("name", ADAPTIVE_METHODS)
def test_embedded_method_is_one_order_lower(name):
    tableau = TABLEAUX[name]
    embedded = tuple(b - error for b, error in zip(tableau.b, tableau.b_error))
    for order in range(1, tableau.order):
        assert order_defect(tableau, embedded, order) < 1e-14
    assert order_defect(tableau, embedded, tableau.order) > 1e-4
    assert tableau.first_same_as_last


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": ((),)}, "2 weights `b`, but 1 rows"),
        ({"a": ((), (0.5, 0.5))}, "must have 1 entries, not 2"),
        ({"a": ((), (0.6,))}, "sums to 0.6"),
        ({"b": (0.0, 0.9)}, "sum to 0.9"),
        ({"b_error": (1.0,)}, "1 `b_error`"),
        ({"b_error": (1.0, 0.0)}, "`b_error`.*sum to 1.0"),
        ({"a": ((), (1.5,)), "c": (0.0, 1.5)}, "outside the step"),
        ({"order": 0}, "at least 1"),
    ],
)
def test_tableau_refuses_inconsistent_numbers(changes, message):
    numbers = {"name": "wrong", "order": 2, "a": ((), (0.5,)), "b": (0.0, 1.0), "c": (0.0, 0.5)}
    with pytest.raises(ValueError, match=message):
        ButcherTableau(**(numbers | changes))


def test_adams_weights_are_the_textbook_ones_at_equal_steps():
    def weights(times: list[float]) -> list[float]:
        return [round(12 * weight, 12) for weight in adams_weights(times, 0.0, 1.0)]

    assert weights([0.0]) == [12]
    assert weights([0.0, -1.0]) == [18, -6]
    assert weights([0.0, -1.0, -2.0]) == [23, -16, 5]
    assert weights([1.0, 0.0]) == [6, 6]
    assert weights([1.0, 0.0, -1.0]) == [5, 8, -1]


@pytest.mark.parametrize("degree", range(6))
def test_quadrature_is_exact_for_polynomials_on_uneven_times(degree):
    times = graded_grid(2.0, 0.3, 11, grading=1.7)
    integral = sum(weight * time**degree for weight, time in zip(quadrature_weights(times), times))
    assert integral == pytest.approx((0.3 ** (degree + 1) - 2.0 ** (degree + 1)) / (degree + 1), abs=1e-12)
    few = quadrature_weights(times[:3])
    assert sum(few) == pytest.approx(times[2] - times[0], abs=1e-14)


def test_graded_grid():
    assert graded_grid(1.0, 0.0, 4, grading=2.0) == pytest.approx([1.0, 9 / 16, 4 / 16, 1 / 16, 0.0], abs=1e-15)
    assert graded_grid(0.2, 1.0, 4) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-15)
    with pytest.raises(ValueError, match="start -0.1"):
        graded_grid(-0.1, 1.0, 4)


@functools.cache
def reference_end(path_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a mixture at t = 1, and where the exact velocity takes them, to the last digits of float64."""
    path, problem = make_path(path_name), draw_mixture(3, (2,), modes=3, narrowest=0.2, widest=0.5)
    x = problem.marginal_sample(path, 1.0, 8)
    return x, odeint(problem.field(path), x, 1.0, 0.05, num_steps=600).x


@pytest.mark.parametrize("path_name", ["ot", "vp", "ve"])
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_order_of_convergence_on_exact_mixtures(method, path_name):
    # Noise to data on the path's own velocity, off t = 0, where VP's time is singular.
    path, order = make_path(path_name), ORDERS[method]
    problem = draw_mixture(3, (2,), modes=3, narrowest=0.2, widest=0.5)
    x, exact = reference_end(path_name)

    def error(num_steps: int) -> float:
        x_end = odeint(problem.field(path), x, 1.0, 0.05, method=method, num_steps=num_steps).x
        return (x_end - exact).square().mean().sqrt().item()

    if order == 5:
        # Rounding leaves no room for more steps than these, at which the next order of the error still helps; that the
        # order is not higher is what the order conditions say.
        assert math.log2(error(64) / error(128)) > 4.9
    else:
        # The next term of the error is smaller by a power of the step, and larger for Adams' one call a step: it
        # shifts the slope by up to 0.2 here.
        steps = 256 if method in ADAMS else 96
        assert math.log2(error(steps) / error(2 * steps)) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("direction", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("path_name", PATHS)
@pytest.mark.parametrize("method", FIXED_METHODS)
def test_both_ends_are_stable(method, path_name, direction):
    # A single Gaussian, whose exact flow is known, over the whole interval in the straight coordinates.
    path, problem = make_path(path_name), gaussian((3,), mean=0.5, std=0.6)
    start, end = (path.ratio_max if t == 1.0 else path.ratio_min for t in direction)
    t0, t1 = (torch.full((4,), t, dtype=torch.float64) for t in direction)
    x = problem.marginal_sample(path, direction[0], 4)
    exact, _ = path.to_straight(flow_of_gaussian(problem, path, x, *direction), t1)
    for steps in (16, 48):
        x_end = odeint(
            problem.straight_field(), path.to_straight(x, t0)[0], start, end, method=method, num_steps=steps
        ).x
        # Euler's error is at most h / 2 times the length of the path times the integral of |x''|, all of order one.
        assert (x_end - exact).abs().max() < 3 / steps


@pytest.mark.parametrize("step_control", ["batch", "per_sample"])
@pytest.mark.parametrize("path_name", ["ot", "vp", "ve"])
@pytest.mark.parametrize("method", ADAPTIVE_METHODS)
def test_adaptive_error_follows_the_tolerance(method, path_name, step_control):
    path, problem = make_path(path_name), gaussian((3,), mean=0.3, std=0.5)
    x = problem.marginal_sample(path, 1.0, 4)
    exact = flow_of_gaussian(problem, path, x, 1.0, 0.01)
    work = []
    for tolerance in (1e-4, 1e-6, 1e-8):
        solution = odeint(
            problem.field(path),
            x,
            1.0,
            0.01,
            method=method,
            rtol=tolerance,
            atol=tolerance,
            step_control=step_control,
            max_steps=5000,
        )
        # Each step is within its tolerance, relative to a state of at most max(1, |x|). Errors of n steps add up and,
        # towards the data, shrink: n times the tolerance bounds the sum.
        bound = tolerance * solution.accepted.max() * (1 + x.abs().max())
        assert (solution.x - exact).abs().max() < bound
        work.append(solution.nfe)
    # A hundredth of the tolerance costs the 1 / order power of a hundred more steps, once the error is asymptotic.
    assert work[2] / work[1] == pytest.approx(100 ** (1 / TABLEAUX[method].order), rel=0.35)


@pytest.mark.parametrize("interval", [(1.0, 0.0), (0.0, 1.0), (0.9359, 0.1), (0.7, 0.71)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", [*ADAPTIVE_METHODS, *FIXED_METHODS, "per_sample"])
def test_field_is_never_called_outside_the_interval(settings, interval, dtype):
    times = []

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert t.shape == (3,)
        assert t.dtype == dtype
        times.append(t)
        return x * torch.sin(20 * t)[:, None]

    x = torch.ones(3, 2, dtype=dtype)
    if settings == "per_sample":
        odeint(field, x, *interval, step_control="per_sample", rtol=1e-3, atol=1e-3)
    elif settings in ADAPTIVE_METHODS:
        odeint(field, x, *interval, method=settings, rtol=1e-3, atol=1e-3)
    else:
        odeint(field, x, *interval, method=settings, num_steps=7)
    seen = torch.cat(times)
    low, high = (torch.tensor(bound, dtype=dtype) for bound in sorted(interval))
    assert seen.min() >= low
    assert seen.max() <= high
    assert (seen == torch.tensor(interval[0], dtype=dtype)).any()


def decay(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Each sample decays at a rate of its own size: large ones need short steps at first."""
    return -(x.abs().pow(3)) * x


def test_calls_are_counted():
    x = torch.linspace(0.1, 1.5, 5, dtype=torch.float64)
    calls = []

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        calls.append(len(x))
        return decay(t, x)

    for method in FIXED_METHODS:
        calls.clear()
        solution = odeint(field, x, 0.0, 1.0, method=method, num_steps=6)
        stages = TABLEAUX[method].without_error_estimate().stages if method in TABLEAUX else 1
        assert solution.nfe == len(calls) == 6 * stages
        assert solution.evaluations.tolist() == [6 * stages] * 5
        assert solution.accepted.tolist() == [6] * 5
        assert solution.rejected.tolist() == [0] * 5

    for method in ADAPTIVE_METHODS:
        calls.clear()
        solution = odeint(field, x, 0.0, 1.0, method=method, first_step=1.0)
        tried = int(solution.accepted[0] + solution.rejected[0])
        # The last stage of a step is the first of the next, and of the same one tried again.
        assert solution.nfe == len(calls) == 1 + (TABLEAUX[method].stages - 1) * tried
        assert solution.rejected[0] > 0
        calls.clear()
        chosen = odeint(field, x, 0.0, 1.0, method=method)
        assert chosen.nfe == 2 + (TABLEAUX[method].stages - 1) * int(chosen.accepted[0] + chosen.rejected[0])

    calls.clear()
    solution = odeint(field, x, 0.0, 5.0, step_control="per_sample")
    assert solution.nfe == len(calls)
    assert solution.evaluations.sum() == sum(calls) < 5 * len(calls)
    assert solution.evaluations.max() == solution.nfe
    assert (solution.evaluations == 2 + 6 * (solution.accepted + solution.rejected)).all()


@pytest.mark.parametrize("method", [*ADAPTIVE_METHODS, HEUN_EULER])
def test_per_sample_steps_do_not_depend_on_the_batch(method):
    x = torch.tensor([[0.1, -0.2], [3.0, 1.0], [0.5, 0.4], [8.0, 2.0]], dtype=torch.float64)
    rates = torch.tensor([1.0, 3.0, 0.1, 0.5], dtype=torch.float64)

    def field(t: torch.Tensor, x: torch.Tensor, rates: torch.Tensor) -> torch.Tensor:
        return -rates[:, None] * x * (1 + x.abs())

    options = {"method": method, "step_control": "per_sample", "rtol": 1e-4, "atol": 1e-4}
    together = odeint(field, x, 0.0, 2.0, args=(rates,), **options)
    assert together.evaluations.unique().numel() > 1
    for i in range(4):
        alone = odeint(field, x[i : i + 1], 0.0, 2.0, args=(rates[i : i + 1],), **options)
        # Vectorised kernels may round differently for other batch shapes, by an ulp; steps magnify it little.
        torch.testing.assert_close(together.x[i : i + 1], alone.x, rtol=1e-12, atol=0)
        assert together.evaluations[i] == alone.nfe
        assert together.accepted[i] == alone.accepted[0]
        # The exact solution of x' = -r x (1 + |x|) is logistic.
        start, decayed = x[i], torch.exp(-2.0 * rates[i])
        exact = start * decayed / (1 + start.abs() * (1 - decayed))
        assert (alone.x[0] - exact).abs().max() < 1e-3


def test_a_tableau_of_ones_own_with_an_error_estimate():
    x = torch.ones(2, 1, dtype=torch.float64)
    solution = odeint(lambda t, x: -x, x, 0.0, 1.0, method=HEUN_EULER, rtol=1e-6, atol=1e-6)
    assert (solution.x - math.exp(-1)).abs().max() < 1e-5
    # Two stages a step tried and, as the second stage is not at the new point, one call after each step.
    assert solution.nfe == 2 + 2 * int(solution.accepted[0] + solution.rejected[0]) - 1


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 4, 3), (5, 3, 4, 4), (5, 2, 3, 4, 4)])
@pytest.mark.parametrize("options", [{"method": "abm3", "num_steps": 50}, {}, {"step_control": "per_sample"}])
def test_any_shape(shape, options):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    solution = odeint(lambda t, x: t.reshape(-1, *[1] * (x.ndim - 1)) * x, x, 0.0, 1.0, **options)
    assert solution.x.shape == x.shape
    assert solution.x.dtype == torch.float32
    torch.testing.assert_close(solution.x, math.exp(0.5) * x, rtol=1e-4, atol=1e-4)


def test_half_precision_is_integrated_in_float32():
    x = torch.randn(3, 4).bfloat16()

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        assert x.dtype == t.dtype == torch.float32
        return (-x).bfloat16()

    assert odeint(field, x, 0.0, 1.0, num_steps=10).x.dtype == torch.float32


@pytest.mark.parametrize("options", [{"method": "rk4", "num_steps": 20}, {"method": "abm3", "num_steps": 200}, {}])
def test_gradients_flow_through_the_solution(options):
    x = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    odeint(lambda t, x: -rate * x, x, 0.0, 1.0, **options).x.sum().backward()
    torch.testing.assert_close(x.grad, torch.exp(-rate).expand(2).detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(rate.grad, -1.5 * torch.exp(-rate).detach(), rtol=1e-4, atol=0)


def test_grid_of_ones_own():
    x = torch.ones(2, dtype=torch.float64)
    grid = torch.linspace(1.0, 0.2, 41)
    same = odeint(lambda t, x: t * x, x, 1.0, 0.2, method="rk4", num_steps=40)
    given = odeint(lambda t, x: t * x, x, 1.0, 0.2, method="rk4", grid=grid)
    # The grid in float32 moves the times by 1e-7, which cancels up to the method's own error.
    torch.testing.assert_close(given.x, same.x, rtol=1e-7, atol=0)
    # A list keeps its precision, however short the interval is beside its distance from 0.
    seen = []
    short = graded_grid(0.9934711772509035, 0.9894119025771618, 4, grading=1.5)
    odeint(lambda t, x: (seen.append(t[0].item()), x)[1], x, short[0], short[-1], method="euler", grid=short)
    assert seen == short[:-1]
    for wrong in ([1.0, 0.5, 0.6, 0.2], [1.0, 0.5, 0.2, 0.1], [0.2, 1.0], [1.0], [[1.0, 0.2]]):
        with pytest.raises(ValueError, match="`grid` must"):
            odeint(lambda t, x: x, x, 1.0, 0.2, grid=wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "rk5"}, "'rk5'"),
        ({"method": "rk4"}, "no error estimate"),
        ({"method": "abm3"}, "no error estimate"),
        ({"num_steps": 0}, "`num_steps`.*0"),
        ({"num_steps": 2, "grid": [0.0, 1.0]}, "not both"),
        ({"num_steps": 2, "rtol": 1e-3, "max_steps": 7}, "rtol.*max_steps"),
        ({"step_control": "sample"}, "'sample'"),
        ({"rtol": -1.0}, "-1.0"),
        ({"rtol": 0.0, "atol": 0.0}, "nor both zero"),
        ({"first_step": 2.0}, "2.0"),
        ({"max_steps": 0}, "max_steps"),
        ({"args": (torch.ones(3),)}, r"\[3\]"),
        ({"t1": 0.0}, "two different finite ends"),
        ({"t1": math.inf}, "two different finite ends"),
        ({"x": torch.ones(2, dtype=torch.long)}, "int64"),
        ({"x": torch.tensor(1.0)}, "batch"),
        ({"field": lambda t, x: x[:1]}, "returned shape"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"field": lambda t, x: -x, "x": torch.ones(2), "t0": 0.0, "t1": 1.0} | options
    with pytest.raises(ValueError, match=message):
        odeint(**arguments)


@pytest.mark.parametrize("step_control", ["batch", "per_sample"])
def test_too_few_steps_and_broken_fields_are_errors(step_control):
    x = torch.ones(2, dtype=torch.float64)

    def oscillation(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(300 * t)

    with pytest.raises(RuntimeError, match="10 steps reached t = "):
        odeint(oscillation, x, 0.0, 1.0, step_control=step_control, max_steps=10)

    def broken(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where(t > 0.5, math.nan, -x)

    with pytest.raises(RuntimeError, match=r"step size fell to .* at t = 0\.[45]"):
        odeint(broken, x, 0.0, 1.0, step_control=step_control)


def test_a_jump_costs_rejected_steps_and_is_crossed():
    def jump(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 0.5, 1.0, -3.0).to(x)

    x = torch.zeros(2, dtype=torch.float64)
    solution = odeint(jump, x, 0.0, 1.0, rtol=1e-6, atol=1e-6)
    assert solution.rejected[0] > 0
    assert (solution.x - (0.5 - 1.5)).abs().max() < 1e-5


def test_norm_decides_what_counts():
    # Only the first column is held to the tolerance; the second, fast one is carried along.
    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[:, 0], 1000 * torch.cos(200 * t)], 1)

    def first(error: torch.Tensor) -> torch.Tensor:
        return error[:, 0].abs()

    x = torch.ones(2, 2, dtype=torch.float64)
    free, held = (odeint(field, x, 0.0, 1.0, norm=norm) for norm in (first, None))
    assert free.nfe < held.nfe / 4
    assert (free.x[:, 0] - math.e).abs().max() < 1e-4


# Trajectories


@pytest.mark.parametrize("method", [*FIXED_METHODS, HEUN_EULER])
def test_a_trajectory_has_the_state_of_every_step(method) -> None:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    # Euler errs by at most h / 2 e^-1 |x|, methods of order 2 by less than h^2 |x| = 5e-5.
    solution = odeint(lambda t, x: -x, x, 0.0, 1.0, method=method, num_steps=200, return_trajectory=True)
    assert solution.times.tolist() == pytest.approx([i / 200 for i in range(201)])
    exact = x * torch.exp(-solution.times)[:, None, None]
    torch.testing.assert_close(solution.trajectory, exact, atol=2e-3 if method == "euler" else 5e-5, rtol=0.0)
    assert solution.trajectory[-1].equal(solution.x)
    plain = odeint(lambda t, x: -x, x, 0.0, 1.0, method=method, num_steps=200)
    assert plain.trajectory is None
    assert plain.x.equal(solution.x)


def test_an_adaptive_trajectory_has_the_accepted_steps() -> None:
    x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)

    def field(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return -50 * (x - t.cos()[:, None])

    solution = odeint(field, x, 0.0, 0.5, first_step=0.5, return_trajectory=True)
    assert solution.rejected[0] > 0
    assert len(solution.times) == solution.accepted[0] + 1
    assert (solution.times.diff() > 0).all()
    for start, end, before, after in zip(
        solution.times, solution.times[1:], *[solution.trajectory[i:] for i in (0, 1)]
    ):
        fine = odeint(field, before, start.item(), end.item(), method="rk4", num_steps=50).x
        torch.testing.assert_close(after, fine, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="times that all samples share"):
        odeint(field, x, 0.0, 0.5, step_control="per_sample", return_trajectory=True)
