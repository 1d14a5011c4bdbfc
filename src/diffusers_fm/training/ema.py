# SPDX-License-Identifier: Apache-2.0
"""EMA of the weights: one of constant decay, or several of power-function profiles."""

import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import written_aside


# Name of the parameters of auxiliary losses in the model that is trained.
AUXILIARY = "auxiliary"
SNAPSHOT_FOLDER = "ema_snapshots"

_SNAPSHOT = re.compile(r"step-(\d+)\.ema-[\w-]+\.safetensors")

# Snapshots of a run by default. The profile of another width is then met to 0.3 % between the tracked widths and up to
# 0.15.
NUM_SNAPSHOTS = 32

# Width of the flattest power function, an average with equal weights: exponent 0.
MAX_SIGMA_REL = 12**-0.5


@functools.cache
def power_exponent(sigma_rel: float) -> float:
    """
    Exponent gamma of a power-function EMA of a relative width (arXiv 2312.02696, section 3.1):
    `sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))`.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise ValueError(f"The relative width of an EMA must be in (0, {MAX_SIGMA_REL:.4f}), got {sigma_rel}.")
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return float(roots.real.max())


@dataclass(frozen=True)
class ConstantDecay:
    """Decay that rises to a constant, as diffusers' `EMAModel` has it with `use_ema_warmup`."""

    name: ClassVar[str] = "constant"
    max_decay: float = 0.9999
    inv_gamma: float = 1.0
    power: float = 0.75

    def decay(self, update: int) -> float:
        """Part of the average that is kept at an update, counted from 1."""
        return min(self.max_decay, 1 - (1 + (update - 1) / self.inv_gamma) ** -self.power)


@dataclass(frozen=True)
class PowerFunction:
    """
    Average whose profile is a power of the time, `(gamma + 1) tau^gamma / t^(gamma + 1)` for `tau` in [0, t]: it is as
    wide, relative to the steps done, at any step (arXiv 2312.02696, section 3.1). `sigma_rel` is in (0, 0.2887).
    """

    sigma_rel: float

    def __post_init__(self) -> None:
        power_exponent(self.sigma_rel)

    @property
    def name(self) -> str:
        """Name in files."""
        return width_name(self.sigma_rel)

    def decay(self, update: int) -> float:
        """Part of the average that is kept at update n, counted from 1: `(1 - 1/n)^(gamma + 1)`."""
        return (1 - 1 / update) ** (power_exponent(self.sigma_rel) + 1)


def width_name(sigma_rel: float) -> str:
    """
    Relative width as part of a file name and as a `variant` of diffusers, such as `ema-0_100`. No dot: diffusers looks
    at what stands before the next one, finds no such variant, and loads the other weights without a word.
    """
    digits = f"{sigma_rel:.3f}"
    return "ema-" + (digits if float(digits) == sigma_rel else str(sigma_rel)).replace(".", "_")


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """Part of a parameter that this process holds."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


class EMA:
    """
    Moving averages of the trainable parameters of a prepared bare model, by name, in float32, one for each profile.
    The first is validated and saved. Of a sharded model (FSDP2) each process averages its own shards. With `offload`
    the averages are kept on the CPU, and each step copies the weights there. After each of `restarts` updates they
    begin anew: what was averaged before was learning something else.
    """

    def __init__(
        self,
        model: nn.Module,
        profiles: Sequence[ConstantDecay | PowerFunction],
        offload: bool = False,
        restarts: Iterable[int] = (),
    ) -> None:
        self.profiles = list(profiles)
        self.num_updates = 0
        self._restarts = [0, *restarts]
        self._model = model
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._offload = offload
        self._averages = [[average.clone() for average in self._weights()] for _ in self.profiles]

    @torch.no_grad()
    def _weights(self) -> list[torch.Tensor]:
        """This process's part of the weights, in float32 where the averages are."""
        device = "cpu" if self._offload else None
        return [local_part(parameter).to(device, torch.float32) for parameter in self._parameters.values()]

    @torch.no_grad()
    def step(self) -> None:
        """Update the averages after a step of the optimizer. The device is not waited for."""
        self.num_updates += 1
        weights = self._weights()
        for profile, averages in zip(self.profiles, self._averages):
            torch._foreach_lerp_(averages, weights, 1 - profile.decay(self._since_restart()))

    def _since_restart(self) -> int:
        """Updates since the averages began, or began anew."""
        return self.num_updates - max((step for step in self._restarts if step < self.num_updates), default=0)

    @contextmanager
    def averaged_weights(self, track: int = 0) -> Iterator[None]:
        """Within this context the model has the weights of an average. Every process enters it."""
        kept = [weight.clone() for weight in self._weights()]
        self._set_weights(self._averages[track])
        try:
            yield
        finally:
            self._set_weights(kept)

    @torch.no_grad()
    def _set_weights(self, values: list[torch.Tensor]) -> None:
        for module in self._model.modules():
            # A forward pass may have gathered the former weights.
            if isinstance(module, FSDPModule):
                module.reshard()
        torch._foreach_copy_([local_part(parameter) for parameter in self._parameters.values()], values)

    def take(self) -> None:
        """Give the model the weights of the first average, for good. Every process calls it."""
        self._set_weights(self._averages[0])

    def average(self, track: int = 0) -> dict[str, torch.Tensor]:
        """Whole tensors of an average by name, float32; on the CPU if the model is sharded. Every process calls it."""
        whole = {}
        for (name, parameter), average in zip(self._parameters.items(), self._averages[track]):
            if isinstance(parameter, DTensor):
                shard = average.to(local_part(parameter).device)
                shards = DTensor.from_local(
                    shard,
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
                average = shards.full_tensor().cpu()
            whole[name] = average
        return whole

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors whatever the engine. Every process calls it."""
        averages = {profile.name: self.average(track) for track, profile in enumerate(self.profiles)}
        return {"num_updates": self.num_updates, "averages": averages}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what [`state_dict`] gave, with any number of processes. Every process calls it."""
        names = [profile.name for profile in self.profiles]
        if list(state_dict["averages"]) != names:
            raise ValueError(f"The checkpoint holds averages {list(state_dict['averages'])}, the run has {names}.")
        for averages, saved in zip(self._averages, state_dict["averages"].values()):
            if saved.keys() != self._parameters.keys():
                differing = sorted(saved.keys() ^ self._parameters.keys())
                raise ValueError(f"Average and model differ in {len(differing)} parameters, such as {differing[0]!r}.")
            for (name, parameter), average in zip(self._parameters.items(), averages):
                whole = saved[name]
                if isinstance(parameter, DTensor):
                    whole = whole.to(local_part(parameter).device)
                    whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements).to_local()
                average.copy_(whole)
        self.num_updates = state_dict["num_updates"]

    def save_snapshots(self, accelerator: Accelerator, output_dir: Path) -> None:
        """
        Write each average to `ema_snapshots/`, for [`posthoc_ema`], but none that will begin anew. Every process calls
        it, the main one writes.
        """
        if self.num_updates <= max(self._restarts):
            return
        folder = output_dir / SNAPSHOT_FOLDER
        for track, profile in enumerate(self.profiles):
            tensors = self.average(track)
            if accelerator.is_main_process and isinstance(profile, PowerFunction):
                folder.mkdir(exist_ok=True)
                file = folder / f"step-{self.num_updates}.{profile.name}.safetensors"
                metadata = {"update": str(self._since_restart()), "sigma_rel": repr(profile.sigma_rel)}
                with written_aside(file) as aside:
                    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata)


def snapshot_files(output_dir: Path) -> dict[Path, int]:
    """Snapshots of a run with the updates done; other files in their folder are the user's."""
    matches = {file: _SNAPSHOT.fullmatch(file.name) for file in (output_dir / SNAPSHOT_FOLDER).glob("*")}
    return {file: int(match[1]) for file, match in matches.items() if match is not None}


def remove_later_snapshots(output_dir: Path, num_updates: int) -> None:
    """Remove the snapshots of a run that went further than the step from which it is resumed."""
    for file, update in snapshot_files(output_dir).items():
        if update > num_updates:
            file.unlink()


def make_ema(
    accelerator: Accelerator,
    model: nn.Module,
    profiles: Sequence[ConstantDecay | PowerFunction],
    offload: bool = False,
    restarts: Iterable[int] = (),
) -> EMA:
    """[`EMA`] of a prepared model, registered for checkpoints; an engine whose shards have no names is refused."""
    deepspeed = accelerator.state.deepspeed_plugin
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError("--use_ema does not work with DeepSpeed ZeRO stage 3: use stage 2, or FSDP2.")
    ema = EMA(accelerator.unwrap_model(model, keep_torch_compile=False), profiles, offload, restarts)
    accelerator.register_for_checkpointing(ema)
    return ema
