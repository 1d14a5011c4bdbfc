# SPDX-License-Identifier: Apache-2.0
"""Two processes with a sample each against one with both."""

import pickle
from pathlib import Path
from typing import Any

import torch
from processes import server
from test_families import UNUSED, conditions, make
from torch.nn.parallel import DistributedDataParallel


NAMES = ["flux_text", "z_image", "qwen"]


def _work(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[tuple[str, str], Any] = {}
    for name in NAMES:
        for wrapped in ("field", "network"):
            family, field, x_t, t = make(name)
            network = field.network
            # What distributed training would stop at is frozen first.
            for unused in field.without_gradient(x_t, t, **conditions(family, [0, 1])):
                network.get_parameter(unused).requires_grad_(False)
            if wrapped == "network":
                field.network = DistributedDataParallel(network)
            module = DistributedDataParallel(field) if wrapped == "field" else field
            for _ in range(2):
                module.zero_grad()
                velocity = module(x_t[rank : rank + 1], t[rank : rank + 1], **conditions(family, [rank]))
                velocity.square().mean().backward()
            found[name, wrapped] = {key: p.grad for key, p in network.named_parameters() if p.grad is not None}
    if rank == 0:
        Path(folder, "gradients").write_bytes(pickle.dumps(found))
    # No process group is destroyed: the process ends without the interpreter's end, for which its threads might wait.
    torch.distributed.barrier()


def test_two_processes_have_the_gradients_of_one(tmp_path: Path) -> None:
    processes = [server().Process(target=_work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=120)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    for (name, _), gradients in pickle.loads((tmp_path / "gradients").read_bytes()).items():
        family, field, x_t, t = make(name)
        field.network.zero_grad()
        field(x_t, t, **conditions(family, [0, 1])).square().mean().backward()
        parameters = dict(field.network.named_parameters())
        assert len(gradients) == len(parameters) - UNUSED.get(name, 0)
        for key, gradient in gradients.items():
            torch.testing.assert_close(gradient, parameters[key].grad, atol=1e-6, rtol=1e-4)
        field.network.zero_grad()
