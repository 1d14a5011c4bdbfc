# SPDX-License-Identifier: Apache-2.0
"""Likelihoods against the closed forms of Gaussian mixtures; traces against Jacobians; bits per dimension."""

import functools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from helpers import GaussianMixture, cross_mixture, draw_mixture, flow_of_gaussian, gaussian, ring_mixture

from diffusers_fm.divergence import choose_mode, draw_probes, exact_trace, hutchinson_trace
from diffusers_fm.likelihood import Likelihood, bits_per_dim, log_likelihood
from diffusers_fm.paths import ConditionalPath, OTPath, VEPath, VPPath, make_path
from diffusers_fm.transport import transport


PATH_NAMES = ["ot", "vp", "ve", "cosine"]


def with_exact_prior(problem: GaussianMixture, path: ConditionalPath, result: Likelihood) -> torch.Tensor:
    """The log-density with the exact marginal as the prior at t = 1, which leaves the solver's error."""
    ones = torch.ones(len(result.noise), dtype=torch.float64)
    return problem.marginal_log_prob(path, result.noise, ones) + result.log_det


def exact_log_prob(problem: GaussianMixture, path: ConditionalPath, x: torch.Tensor, t: float = 0.0) -> torch.Tensor:
    return problem.marginal_log_prob(path, x, torch.full((len(x),), t, dtype=torch.float64))


# The trace.


def curved(x: torch.Tensor) -> torch.Tensor:
    """A function of each sample with a full, asymmetric Jacobian."""
    flat = x.flatten(1)
    matrix = torch.linspace(-1, 1, flat.shape[1] ** 2, dtype=x.dtype).reshape(flat.shape[1], -1).sin()
    return torch.tanh(flat @ matrix).reshape(x.shape) * x.flip(-1)


def jacobians(x: torch.Tensor) -> torch.Tensor:
    dims = x[0].numel()
    return torch.stack([torch.func.jacrev(curved)(row[None]).reshape(dims, dims) for row in x])


@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 3, 3), (2, 2, 2, 2)])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_exact_trace_is_that_of_the_jacobian(mode, shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for tangents in (1, 4, 64):
        output, trace = exact_trace(curved, x, mode, tangents)
        torch.testing.assert_close(output, curved(x))
        torch.testing.assert_close(trace[:, 0], jacobians(x).diagonal(dim1=1, dim2=2).sum(1))
    assert not output.requires_grad


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_probes_have_the_right_mean_and_variance(mode, probe):
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = 4000
    probes = draw_probes(x, count, probe, torch.Generator().manual_seed(1))
    output, estimates = hutchinson_trace(curved, x, probes, mode, tangents=500)
    torch.testing.assert_close(output, curved(x))
    jacobian = jacobians(x)
    symmetric = (jacobian + jacobian.transpose(1, 2)) / 2
    squares = 2 * symmetric.square()
    variance = squares.sum((1, 2))
    if probe == "rademacher":
        variance = variance - squares.diagonal(dim1=1, dim2=2).sum(1)
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    assert ((estimates.mean(1) - trace).abs() < 3 * (variance / count).sqrt()).all()
    # The variance of a variance is at most (kurtosis - 1) / count; quadratic forms have a kurtosis below 15.
    assert ((estimates.var(1) / variance - 1).abs() < 3 * math.sqrt(14 / count)).all()


def test_probes_do_not_depend_on_the_cut_of_the_batch():
    x = torch.zeros(5, 2, 3)
    for probe in ("rademacher", "gaussian"):
        whole = draw_probes(x, 7, probe, torch.Generator().manual_seed(0))
        assert whole.shape == (5, 7, 2, 3)
        generator = torch.Generator().manual_seed(0)
        parts = [draw_probes(part, 7, probe, generator) for part in x.split(2)]
        assert torch.equal(whole, torch.cat(parts))


def tiny_unet(attention: bool) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = ("AttnDownBlock2D", "AttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    return UNet2DModel(
        sample_size=4,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=blocks[:1],
        up_block_types=blocks[1:],
        norm_num_groups=4,
        attention_head_dim=4,
        add_attention=attention,
    ).eval()


def tiny_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=1,
        out_channels=1,
        num_layers=1,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    ).eval()


@pytest.mark.parametrize("network", ["unet", "unet with attention", "dit"])
def test_mode_is_chosen_by_what_the_network_can_do_and_said(network):
    model = tiny_dit() if network == "dit" else tiny_unet(network == "unet with attention")
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))

    def predict(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if network == "dit":
            return model(x, timestep=1000 * t, class_labels=labels).sample
        return model(x, timestep=1000 * t).sample

    labels = torch.tensor([0, 2])
    options = {"divergence": "exact", "num_steps": 4, "args": (labels,)}
    result = log_likelihood(predict, x, OTPath(), **options)
    if network == "unet with attention":
        # Its group normalisation has no forward derivative for transposed tokens.
        assert result.mode == "reverse"
        assert "does not run in forward mode: view size" in result.reason
    else:
        assert result.mode == "forward"
    assert result.reason.endswith("products at a point") == (result.mode == "forward")
    reverse = log_likelihood(predict, x, OTPath(), mode="reverse", **options)
    assert (reverse.mode, reverse.reason) == ("reverse", "asked for")
    # Float32 products of order one, summed over 16 dimensions.
    torch.testing.assert_close(result.log_prob, reverse.log_prob, rtol=0, atol=1e-4)
    assert choose_mode(lambda x: x, x, 15) == ("reverse", "fewer than 16 products at a point")
    few = log_likelihood(predict, x, OTPath(), num_probes=3, num_steps=4, args=(labels,))
    assert few.mode == "reverse"


# Log-densities.


@pytest.mark.parametrize("path_name", PATH_NAMES)
@pytest.mark.parametrize("problem", [ring_mixture(8, 1.3), cross_mixture((1, 3, 3), 2.4)], ids=["ring", "image"])
def test_log_prob_is_the_closed_form(problem, path_name):
    # Both mixtures have the identity as covariance and no third moment, so at t = 1 they differ from the normal prior
    # by the fourth power of alpha / sigma, 2e-9 (VP) or 2e-7 (VE), times a polynomial of degree four in x / sigma.
    path = make_path(path_name)
    x = problem.sample(12, seed=3)
    result = log_likelihood(problem.model(path), x, path, divergence="exact", num_steps=160)
    assert (result.log_prob - exact_log_prob(problem, path, x)).abs().max() < 1e-4
    assert result.log_prob.shape == (12,)
    assert result.noise.shape == x.shape
    assert result.standard_error is None
    default = log_likelihood(problem.model(path), x, path, divergence="exact")
    assert (default.log_prob - exact_log_prob(problem, path, x)).abs().max() / problem.dim < 1e-3


SOLVERS = {
    "abm3": {"num_steps": 192},
    "abm2": {"method": "abm2", "num_steps": 384},
    "every step": {"num_steps": 192, "divergence_every": 1},
    "every fifth": {"num_steps": 203, "divergence_every": 5},
    "rk4": {"method": "rk4", "num_steps": 96, "divergence_every": 1},
    "midpoint": {"method": "midpoint", "num_steps": 400, "divergence_every": 8},
    "dopri5": {"method": "dopri5", "num_steps": None, "rtol": 1e-6, "atol": 1e-6},
    "per sample": {
        "method": "dopri5",
        "num_steps": None,
        "rtol": 1e-6,
        "atol": 1e-6,
        "step_control": "per_sample",
    },
}


@pytest.mark.parametrize("path_name", ["ot", "vp", "ve"])
@pytest.mark.parametrize("coordinates", ["ot", "angle", "native"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_in_all_coordinates(solver, coordinates, path_name):
    path, problem = make_path(path_name), draw_mixture(2, (3,), modes=3, narrowest=0.3, widest=0.6)
    x = problem.sample(6, seed=1)
    options = dict(SOLVERS[solver])
    if coordinates == "native" and options["num_steps"] is not None:
        # VE's native time is the logarithm of its noise, with nothing to be graded; VP's has a steep start.
        options["grading"] = 1.0 if path_name == "ve" else 1.5
        options["num_steps"] *= 2
    model = problem.model(path)
    result = log_likelihood(model, x, path, divergence="exact", coordinates=coordinates, start=1e-5, **options)
    # The prior's own error is that of the data, so the exact marginal is put in its place.
    error = with_exact_prior(problem, path, result) - exact_log_prob(problem, path, x, 1e-5)
    # The path's own coordinates cost more: methods of order two leave ten times the error at twice the steps.
    assert error.abs().max() < (1e-3 if coordinates == "native" else 1e-4)


@pytest.mark.parametrize("path_name", ["ot", "vp", "ve"])
def test_all_prediction_types_give_the_same_log_prob(path_name):
    path, problem = make_path(path_name), draw_mixture(5, (2,), modes=3)
    x = problem.sample(4, seed=2)
    reference = log_likelihood(problem.model(path), x, path, divergence="exact", start=0.01, end=0.99)
    for prediction_type in ("epsilon", "sample", "v_prediction", "score"):
        model = problem.model(path, prediction_type)
        result = log_likelihood(
            model, x, path, prediction_type=prediction_type, divergence="exact", start=0.01, end=0.99
        )
        # The same numbers up to rounding, which conversions near the ends multiply by up to 1e4.
        torch.testing.assert_close(result.log_prob, reference.log_prob, rtol=0, atol=1e-9)


def test_singular_starts():
    problem = draw_mixture(5, (2,), modes=3)
    path = VPPath()
    x = problem.sample(4, seed=2)
    exact = exact_log_prob(problem, path, x)
    # The straight coordinates start at t = 0 whatever the network predicts, though VP's velocity is infinite there.
    for prediction_type in ("flow_prediction", "epsilon", "v_prediction"):
        model = problem.model(path, prediction_type)
        result = log_likelihood(model, x, path, prediction_type=prediction_type, divergence="exact", num_steps=256)
        assert (with_exact_prior(problem, path, result) - exact).abs().max() < 1e-4
    # The path's own time has no start for a network that predicts the noise, and says so.
    options = {"prediction_type": "epsilon", "coordinates": "native", "divergence": "exact"}
    model = problem.model(path, "epsilon")
    with pytest.raises(ValueError, match="no limit at t = 0"):
        log_likelihood(model, x, path, **options)
    result = log_likelihood(model, x, path, start=1e-5, **options)
    # The density at 1e-5 differs from that at 0 by half the variance, 1e-6, times second derivatives of the density.
    assert (with_exact_prior(problem, path, result) - exact).abs().max() < 2e-2


def test_float32_images():
    path, problem = OTPath(), draw_mixture(7, (3, 6, 6), modes=3)
    x = problem.sample(4, seed=0)
    exact = exact_log_prob(problem, path, x)
    seen = set()

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.add((x.dtype, t.dtype))
        return problem.to(torch.float32).predict(path, x, t, "flow_prediction")

    result = log_likelihood(model, x.float(), path, divergence="exact")
    assert seen == {(torch.float32, torch.float32)}
    assert result.log_prob.dtype == torch.float64
    assert (result.log_prob - exact).abs().max() / problem.dim < 1e-3


@pytest.mark.parametrize("path_name", ["ot", "vp", "ve"])
@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(probe, path_name):
    path, problem = make_path(path_name), draw_mixture(8, (1, 2, 3), modes=3)
    x = problem.sample(3, seed=4)
    model = problem.model(path)
    exact = log_likelihood(model, x, path, divergence="exact", num_steps=12)
    estimate = log_likelihood(
        model, x, path, num_probes=300, probe=probe, num_steps=12, generator=torch.Generator().manual_seed(0)
    )
    assert estimate.mode == "forward"
    torch.testing.assert_close(estimate.noise, exact.noise)
    assert (estimate.standard_error > 0).all()
    assert ((estimate.log_prob - exact.log_prob).abs() < 3 * estimate.standard_error).all()


def test_rademacher_probes_are_exact_for_independent_coordinates():
    path, problem = VPPath(), gaussian((2, 3), mean=0.2, std=0.4)
    x = problem.sample(5)
    result = log_likelihood(problem.model(path), x, path, num_probes=2, num_steps=128)
    assert result.mode == "reverse"
    # Rounding aside, both probes say the same.
    assert result.standard_error.max() < 1e-12
    expected = exact_log_prob(problem, path, x)
    assert (with_exact_prior(problem, path, result) - expected).abs().max() < 1e-4


def test_standard_error_is_that_of_the_mean_over_probes():
    path, problem = OTPath(), draw_mixture(9, (4,), modes=4)
    x = problem.sample(1).expand(400, -1)
    result = log_likelihood(
        problem.model(path), x, path, num_probes=4, num_steps=12, generator=torch.Generator().manual_seed(0)
    )
    # 400 equal samples with their own probes: their spread is what each one reports.
    spread, reported = result.log_prob.std(), result.standard_error.square().mean().sqrt()
    assert spread.item() == pytest.approx(reported.item(), rel=0.15)


# Samples of a mixture that are moved, each by a distance of its own.
SHIFT = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


def moved_mixture():
    """The problem, moved samples, the model of the moved mixtures and a list of the rows that it is given in calls."""
    path, problem, rows = OTPath(), draw_mixture(10, (3, 2), modes=3), []

    def model(x: torch.Tensor, t: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        moved = x - (1 - t[:, None, None]) * shift[:, None, None]
        return problem.predict(path, moved, t, "flow_prediction") - shift[:, None, None]

    return problem, problem.sample(5) + SHIFT[:, None, None], model, rows


@pytest.mark.parametrize("options", [{}, {"num_probes": 20}, {"divergence": "exact"}, {"mode": "forward"}])
def test_batch_size_changes_no_result_and_bounds_the_rows(options):
    _, x, model, rows = moved_mixture()
    results = []
    for batch_size in (1, 2, 64):
        rows.clear()
        options |= {"num_steps": 6, "batch_size": batch_size, "generator": torch.Generator().manual_seed(3)}
        results.append(log_likelihood(model, x, OTPath(), args=(SHIFT,), **options))
        assert max(rows) <= batch_size
    for result in results[:2]:
        torch.testing.assert_close(result.log_prob, results[2].log_prob, rtol=0, atol=1e-10)


def test_each_sample_of_a_batch_has_its_own_argument():
    problem, x, model, _ = moved_mixture()
    exact = exact_log_prob(problem, OTPath(), x - SHIFT[:, None, None])
    result = log_likelihood(model, x, OTPath(), args=(SHIFT,), divergence="exact", batch_size=2, num_steps=160)
    assert (result.log_prob - exact).abs().max() < 1e-3


def test_work_is_counted():
    problem, path = draw_mixture(11, (5,), modes=2), OTPath()
    x = problem.sample(3)
    calls = []

    def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(t[0].item())
        return problem.predict(path, x, t, "flow_prediction")

    result = log_likelihood(model, x, path, num_steps=20, num_probes=3)
    # One call a step and one at the end, a divergence at every second: 11 times 3 backward passes of two forwards.
    assert result.nfe.tolist() == [21] * 3
    assert len(calls) == 21
    assert result.work.tolist() == [21 + 11 * 3 * 2] * 3
    assert calls[0] == 0.0
    assert calls[-1] == 1.0
    result = log_likelihood(model, x, path, num_steps=20, divergence="exact", mode="forward", divergence_every=4)
    assert result.work.tolist() == [21 + 6 * 5] * 3
    result = log_likelihood(model, x, path, method="rk4", num_steps=10)
    assert result.nfe.tolist() == [41] * 3
    assert result.work.tolist() == [41 + 6 * 2] * 3
    result = log_likelihood(model, x, path, method="bosh3", num_steps=None, rtol=1e-3, atol=1e-3)
    assert result.work.tolist() == (3 * result.nfe).tolist()


@pytest.mark.parametrize("path_name", PATH_NAMES)
@pytest.mark.parametrize("coordinates", ["ot", "angle"])
def test_transport_is_the_flow_there_and_back(coordinates, path_name):
    path, problem = make_path(path_name), gaussian((1, 2, 2), mean=0.3, std=0.5)
    x = problem.marginal_sample(path, 0.0, 6)
    options = {"coordinates": coordinates, "num_steps": 100}
    noise = transport(problem.model(path), x, path, **options)
    assert noise.nfe == 100
    exact = flow_of_gaussian(problem, path, x, 0.0, 1.0)
    assert (noise.x - exact).abs().max() < 1e-4 * path.prior_std
    back = transport(problem.model(path), noise.x, path, start=1.0, end=0.0, **options)
    assert (back.x - x).abs().max() < 1e-4
    # In between, by adaptive steps.
    half = transport(
        problem.model(path), x, path, end=0.5, coordinates=coordinates, method="dopri5", num_steps=None, rtol=1e-7
    )
    assert (half.x - flow_of_gaussian(problem, path, x, 0.0, 0.5)).abs().max() < 1e-4


@pytest.mark.parametrize("path_name", PATH_NAMES)
def test_a_trajectory_is_made_of_points_of_the_path(path_name):
    path, problem = make_path(path_name), gaussian((1, 2, 2), mean=0.3, std=0.5)
    noise = problem.marginal_sample(path, 1.0, 6)
    result = transport(problem.model(path), noise, path, start=1.0, end=0.0, num_steps=100, return_trajectory=True)
    assert result.trajectory.shape == (101, 6, 1, 2, 2)
    assert (result.times.diff() < 0).all()
    for i in (0, 30, 70, 100):
        exact = flow_of_gaussian(problem, path, noise, 1.0, result.times[i].item())
        assert (result.trajectory[i] - exact).abs().max() < 1e-4 * path.prior_std


# Bits per dimension.


def test_bits_per_dim_of_a_wide_density_is_its_logarithm():
    # Over a level of width 1 / 128 the density of deviation 0.5 is linear up to 1e-5.
    path, problem = OTPath(), gaussian((1, 3, 3), mean=-0.1, std=0.5)
    images = torch.randint(0, 256, (6, 1, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    result = bits_per_dim(
        problem.model(path),
        images,
        path,
        num_samples=4,
        dtype=torch.float64,
        num_steps=128,
        generator=torch.Generator().manual_seed(1),
    )
    centres = (images.double() + 0.5) / 128 - 1
    expected = 7 - problem.log_prob(centres) / (9 * math.log(2))
    # The mean of four values of u in nine dimensions has a deviation of 1 / 128 / sqrt(12 x 4 x 9), and the logarithm
    # a slope of at most 4.
    assert (result.bits_per_dim - expected).abs().max() < 3 * 4 / 128 / math.sqrt(12 * 4 * 9) / math.log(2)
    assert result.nfe.tolist() == [4 * 129] * 6
    torch.testing.assert_close(result.log_prob, -result.bits_per_dim * 9 * math.log(2))


def test_many_samples_give_the_probability_of_a_level():
    # One dimension, five levels: the probability of a level is a difference of two error functions.
    path, problem = OTPath(), gaussian((1,), mean=0.1, std=0.25)
    images = torch.arange(5)[:, None]
    edges = torch.arange(6, dtype=torch.float64) * 2 / 5 - 1
    cumulated = torch.special.ndtr((edges - 0.1) / 0.25)
    exact = (cumulated[1:] - cumulated[:-1]).log()
    estimates = {}
    for num_samples in (1, 150):
        result = bits_per_dim(
            problem.model(path),
            images,
            path,
            num_samples=num_samples,
            levels=5,
            dtype=torch.float64,
            num_steps=16,
            generator=torch.Generator().manual_seed(num_samples),
        )
        estimates[num_samples] = result.log_prob
    # The importance weights of the steepest level have a deviation of about twice their mean.
    assert (estimates[150] - exact).abs().max() < 3 * 2 / math.sqrt(150)
    assert (estimates[1] - exact).mean() < 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "trace"}, "'trace'"),
        ({"divergence": "exact", "num_probes": 2}, "belong to the 'hutchinson'"),
        ({"probe": "sphere"}, "'sphere'"),
        ({"mode": "backward"}, "'backward'"),
        ({"num_probes": 0}, "`num_probes`.*0"),
        ({"divergence_every": 0}, "`divergence_every`.*0"),
        ({"batch_size": 0}, "`batch_size`.*0"),
        ({"coordinates": "polar"}, "'polar'"),
        ({"method": "rk5"}, "'rk5'"),
        ({"num_steps": None, "method": "rk4"}, "no error estimate"),
        ({"num_steps": None, "grading": 2.0}, "belong to fixed steps"),
        ({"rtol": 1e-3}, "belong to adaptive steps"),
        ({"start": 1.0}, "before `end`"),
        ({"start": -0.1}, "-0.1"),
        ({"prediction_type": "noise"}, "'noise'"),
        ({"data": torch.zeros(3)}, r"shape \(3,\)"),
        ({"data": torch.zeros(2, 3, dtype=torch.long)}, "int64"),
        ({"args": (torch.zeros(1),)}, r"\[1\]"),
        ({"predict": lambda x, t: x[:, :1]}, r"returned \(2, 1\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    valid = {"predict": lambda x, t: -x, "data": torch.zeros(2, 3), "path": VEPath()}
    with pytest.raises(ValueError, match=message):
        log_likelihood(**(valid | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": torch.zeros(2, 3)}, "float32"),
        ({"images": torch.full((2, 3), 256)}, "0 to 255, not 256 to 256"),
        ({"images": torch.zeros(2, 3, dtype=torch.uint8), "num_samples": 0}, "`num_samples`.*0"),
        ({"images": torch.zeros(2, 3, dtype=torch.uint8), "levels": 1}, "`levels`.*1"),
    ],
)
def test_bad_images_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bits_per_dim(lambda x, t: -x, path=OTPath(), **arguments)


def test_transport_refuses_times_and_gradings_that_do_not_fit():
    move = functools.partial(transport, lambda x, t: -x, torch.zeros(2, 3), OTPath())
    with pytest.raises(ValueError, match=r"at 1.5"):
        move(end=1.5)
    with pytest.raises(ValueError, match="belongs to fixed steps"):
        move(num_steps=None, grading=2.0, method="dopri5")
    with pytest.raises(ValueError, match="two different finite ends"):
        move(start=0.5, end=0.5)


@pytest.mark.parametrize("shape", [(0, 4), (0, 1, 2, 2), (4,), ()])
def test_bits_per_dim_of_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a batch of at least one image, got the shape"):
        bits_per_dim(lambda x, t: x, torch.zeros(shape, dtype=torch.int64), OTPath())


@pytest.mark.parametrize(
    ("function", "options", "name"),
    [
        (log_likelihood, {"num_probes": "2"}, "num_probes"),
        (log_likelihood, {"divergence_every": 1.5}, "divergence_every"),
        (log_likelihood, {"batch_size": "64"}, "batch_size"),
        (bits_per_dim, {"num_samples": "1"}, "num_samples"),
        (bits_per_dim, {"levels": "256"}, "levels"),
    ],
)
def test_counts_given_as_strings_are_refused(function: Callable, options: dict, name: str) -> None:
    data = torch.zeros(2, 4) if function is log_likelihood else torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"`{name}` (must be )?at least|`{name}` must be at least"):
        function(lambda x, t: x, data, OTPath(), **options)
