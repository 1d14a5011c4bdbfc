# SPDX-License-Identifier: Apache-2.0
"""A whole sampling loop, network and scheduler together, compiles into one graph and gives the same samples."""

import pytest
import torch

from diffusers_fm import FlowMatchScheduler


ANGLE = {"sampling_path": "angle", "timestep_spacing": "graded"}
SETTINGS = {
    "euler": {},
    "heun": {"solver": "heun", "path": "vp"},
    "rk4": {"solver": "rk4"},
    "ab2": {"solver": "ab2"},
    "dpmpp_2m": {"solver": "dpmpp_2m", "path": "ve"},
    "abm3": {"solver": "abm3"} | ANGLE,
}


class Network(torch.nn.Module):
    """A small network that reads its timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(5, 8)
        self.outer = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        time = (timestep / 1000).expand(len(x), 1)
        return self.outer(torch.tanh(self.inner(torch.cat([x, time], dim=1))))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_loop_compiles_into_one_graph(name: str) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    network = Network()
    scheduler = FlowMatchScheduler(**SETTINGS[name])

    def loop(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        for i in range(len(timesteps)):
            model_input = scheduler.scale_model_input(x, timesteps[i])
            x = scheduler.step(network(model_input, timesteps[i]), timesteps[i], x, return_dict=False)[0]
        return x

    compiled = torch.compile(loop, fullgraph=True, backend="eager")
    noise = torch.randn(3, 4) * scheduler.init_noise_sigma
    with torch.no_grad():
        results = []
        for run in (loop, compiled, compiled):
            scheduler.set_timesteps(4)
            scheduler.set_begin_index(0)
            results.append(run(noise, scheduler.timesteps))
    # The same arithmetic, up to a few units in the last place of values of order init_noise_sigma.
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6 * scheduler.init_noise_sigma)
