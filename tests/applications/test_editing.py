# SPDX-License-Identifier: Apache-2.0
"""FlowEdit against what it must do to Gaussians, and against plain sampling."""

import pytest
import torch
from helpers import gaussian

from diffusers_fm.applications.editing import flow_edit
from diffusers_fm.paths import ConditionalPath, CosinePath, DiscreteVPPath, OTPath, VEPath, VPPath
from diffusers_fm.solvers import odeint


SHAPE = (1, 3, 2)
PATHS = [OTPath(), OTPath(0.05), VPPath(), VEPath(), CosinePath(), DiscreteVPPath()]
every_path = pytest.mark.parametrize("path", PATHS, ids=str)


def noise(seed: int):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(4, *SHAPE, generator=generator, dtype=torch.float64)


def network(path: ConditionalPath, mean: float, prediction_type: str = "flow_prediction"):
    """Exact for data from a Gaussian of a given mean."""
    problem = gaussian(SHAPE, mean, 0.6)
    return lambda x, t: problem.predict(path, x, t.expand(len(x)), prediction_type)


def last(steps) -> torch.Tensor:
    *_, state = steps
    return state


@every_path
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_averages", [1, 3])
def test_between_gaussians_of_one_shape_an_edit_is_the_shift(
    path: ConditionalPath, prediction_type: str, num_averages: int
) -> None:
    # From r = 1 the offset is (1 - r) (m_2 - m_1), linear in r and whatever the noise: Euler makes no error.
    ratios = torch.linspace(path.ratio_max, 0, 9, dtype=torch.float64).tolist()
    data = gaussian(SHAPE, 0.5, 0.6).sample(4)
    source, target = (network(path, mean, prediction_type) for mean in (0.5, -1.2))
    edited = last(
        flow_edit(
            source, target, data, path, ratios, noise(0), prediction_type=prediction_type, num_averages=num_averages
        )
    )
    # What is missing before ratio_max, 1 / 51 on VE, is missed at the end to first order in it.
    torch.testing.assert_close(edited, data - 1.7, rtol=0, atol=1e-9 + 1.7 * 1.5 * (1 - path.ratio_max))


@every_path
def test_equal_conditions_change_no_bit(path: ConditionalPath) -> None:
    data = gaussian(SHAPE, 0.5, 0.6).sample(4)
    same = network(path, 0.5, "v_prediction")
    steps = flow_edit(same, same, data, path, [0.9, 0.4, 0.1, 0.0], noise(0), prediction_type="v_prediction")
    assert all(torch.equal(state, data) for state in steps)


def test_free_steps_alone_are_sampling_from_noised_data() -> None:
    path, ratios = OTPath(), [0.8, 0.5, 0.2, 0.0]
    data = gaussian(SHAPE, 0.5, 0.6).sample(4)
    target = network(path, -1.2)
    edited = last(flow_edit(target, target, data, path, ratios, noise(0), num_free_steps=3))
    start = path.sample(data, noise(0)(), torch.tensor(0.8, dtype=torch.float64))
    field = gaussian(SHAPE, -1.2, 0.6).field(path)
    expected = odeint(field, start, 0.8, 0.0, method="euler", grid=ratios).x
    torch.testing.assert_close(edited, expected)


def test_an_edit_of_a_part_of_the_way_is_a_part_of_the_edit() -> None:
    path = OTPath()
    data = gaussian(SHAPE, 0.5, 0.6).sample(4)
    source, target = network(path, 0.5), network(path, -1.2)
    moved = []
    for start in (0.2, 0.5, 0.9):
        ratios = torch.linspace(start, 0, 40, dtype=torch.float64).tolist()
        moved.append((data - last(flow_edit(source, target, data, path, ratios, noise(0)))).mean().item())
    assert 0 < moved[0] < moved[1] < moved[2] < 1.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratios": [0.5]}, "at least two falling times"),
        ({"ratios": [0.5, 0.7, 0.0]}, "at least two falling times"),
        ({"ratios": [1.2, 0.0]}, "at least two falling times"),
        ({"num_averages": 0}, "`num_averages` must be at least 1"),
        ({"num_free_steps": 3}, "`num_free_steps` must be from 0 to the 2 steps"),
        ({"prediction_type": "epsilon", "ratios": [1.0, 0.0]}, "has no limit at t = 1"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict, message: str) -> None:
    path = OTPath()
    call = {"ratios": [0.5, 0.2, 0.0], **arguments}
    with pytest.raises(ValueError, match=message):
        last(flow_edit(network(path, 0), network(path, 1), torch.zeros(4, *SHAPE), path, draw_noise=noise(0), **call))
