# SPDX-License-Identifier: Apache-2.0
"""Averages of a model that is sharded by FSDP2 over two processes on the CPU, against those of the whole model."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from diffusers_fm.training.ema import EMA, ConstantDecay, PowerFunction


def main(folder: Path) -> None:
    """Prints `same` in each process."""
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    # Five rows do not divide into two shards evenly.
    whole = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    # The root is not resharded after a forward pass, the harder case.
    fully_shard(sharded[0], mesh=mesh)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=False)
    profiles = [ConstantDecay(0.9), PowerFunction(0.1)]
    averages = [EMA(model, profiles) for model in (whole, sharded)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1) for model in (whole, sharded)]
    inputs = torch.randn(4, 3)

    def train(ema: EMA, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        for _ in range(num_steps):
            model(inputs).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.step()

    def outputs(ema: EMA, model: nn.Module, track: int) -> torch.Tensor:
        with torch.no_grad(), ema.averaged_weights(track):
            return model(inputs)

    for num_steps in (3, 2):
        for ema, model, optimizer in zip(averages, (whole, sharded), optimizers):
            train(ema, model, optimizer, num_steps)
        for track in range(len(profiles)):
            assert not torch.allclose(outputs(averages[0], whole, track), whole(inputs))
            torch.testing.assert_close(outputs(averages[1], sharded, track), outputs(averages[0], whole, track))
            # Looking at the average does not change what is trained.
            with torch.no_grad():
                torch.testing.assert_close(sharded(inputs), whole(inputs))
    states = [ema.state_dict() for ema in averages]
    for profile in profiles:
        torch.testing.assert_close(states[1]["averages"][profile.name], states[0]["averages"][profile.name])
    averages[1].save_snapshots(accelerator, folder)
    accelerator.wait_for_everyone()
    (file,) = (folder / "ema_snapshots").iterdir()
    torch.testing.assert_close(load_file(file), states[0]["averages"]["ema-0_100"])

    # What one process saved, two take up.
    again = EMA(sharded, profiles)
    again.load_state_dict(states[0])
    assert again.num_updates == 5
    torch.testing.assert_close(again.state_dict(), states[0])
    print("same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
