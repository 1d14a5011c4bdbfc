# SPDX-License-Identifier: Apache-2.0
"""Processes of a run: the accelerator, signals that stop it, and weights in shards (FSDP2)."""

import atexit
import copy
import gc
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    is_tensorboard_available,
)
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from ..data.cache import DryAccelerator
from ..models.costs import DTYPES, OneNetwork


# Engines whose checkpoints are in a format of their own.
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)

# `DiTTransformer2DModel` calls that of its first block from outside of the block.
_CALLED_FROM_OUTSIDE = (CombinedTimestepLabelEmbeddings,)
_LAUNCHER = os.getppid()
_is_stopping = threading.Event()


def check_tracker(name: str | None) -> None:
    """Refuse a tracker of `--report_to` that accelerate does not know, or whose package is not installed."""
    if name in (None, "none", "all"):
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"--report_to must be one of none, all, {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}.")
    if name not in map(str, get_available_trackers()):
        package = name.replace("_", "-")
        raise ValueError(f"--report_to {name} needs a package that is not installed: `pip install {package}`.")


def make_accelerator(
    output_dir: Path,
    logging_dir: str = "logs",
    mixed_precision: str | None = None,
    gradient_accumulation_steps: int = 1,
    report_to: str | None = None,
    use_cpu: bool = False,
    torch_compile: bool = False,
    train_batch_size: int = 1,
) -> Accelerator:
    """
    Accelerator of a script, on the CPU where there is nothing else, with as many processes as were launched.

    `mixed_precision` is by default what was launched, `report_to` TensorBoard if it is installed. `train_batch_size`,
    the samples of a process in an accumulation step, is for DeepSpeed.

    Raises:
        ValueError: if accelerate runs another number of processes, another engine or another number of accumulation
            steps than was launched, or FSDP is of version 1.
    """
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched not in ("1", str(gradient_accumulation_steps)):
        raise ValueError(
            f"accelerate was launched for {launched} accumulation steps, the script for {gradient_accumulation_steps}:"
            " give --gradient_accumulation_steps to the script."
        )
    if report_to is None:
        report_to = "tensorboard" if is_tensorboard_available() else "none"
    plugin = fsdp_plugin(mixed_precision)
    cpu = use_cpu or not torch.accelerator.is_available()
    if cpu and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError("DeepSpeed needs GPUs, and on the CPU accelerate runs without it: launch without DeepSpeed.")
    # Without `cpu=True` accelerate runs several CPU processes as so many independent runs.
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=mixed_precision,
        dynamo_backend="inductor" if torch_compile else None,
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / logging_dir)),
    )
    if accelerator.state.deepspeed_plugin is not None:
        # No loader is prepared, from which accelerate would know it.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = train_batch_size
    world_size = os.environ.get("WORLD_SIZE", "1")
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    # Without --multi_gpu, `accelerate launch` of several processes on the CPU starts one, and this is all it leaves.
    if "WORLD_SIZE" not in os.environ and by_accelerate:
        if (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")) == ("127.0.0.1", "29500"):
            world_size = "several"
    if world_size != str(accelerator.num_processes):
        raise ValueError(
            f"Of the processes that were launched ({world_size}), accelerate runs {accelerator.num_processes}: on the"
            " CPU, use `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`."
        )
    if plugin is not None and accelerator.distributed_type != DistributedType.FSDP:
        raise ValueError(
            f"FSDP needs several processes with a GPU each, and accelerate runs {accelerator.num_processes} on"
            f" {accelerator.device.type}, unsharded: launch without FSDP."
        )
    if accelerator.num_processes > 1:
        atexit.register(_let_go_of_process_groups, [dist.group.WORLD] if dist.is_initialized() else [])
    if by_accelerate or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=stop_after_launcher, daemon=True).start()
    return accelerator


def stop_after_launcher() -> None:
    """Send SIGTERM to this process when its launcher is gone: accelerate passes none on to a single process."""
    while os.getppid() == _LAUNCHER:
        time.sleep(0.2)
    # A second one would end the process at once.
    if not _is_stopping.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _let_go_of_process_groups(groups: list[dist.ProcessGroup]) -> None:
    """
    End the threads of process groups: one that outlives the interpreter, with the last of its tensors, aborts it.

    The wrapped model keeps its group, in a cycle of references, and FSDP's meshes, which torch caches, keep theirs.
    The list must be the last to do so: a group that goes with the C++ part of a model waits for its threads without
    letting go of the interpreter, for which one of them may be waiting.
    """
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        registry = getattr(mesh, "_pg_registry", {})
        groups.extend(registry.values())
        registry.clear()
    gc.collect()
    groups.clear()


def failures(accelerator: Accelerator, error: BaseException | None) -> list[str]:
    """Errors of all processes in a few words each, so that all go on or none. Every process calls it; a barrier."""
    if accelerator.num_processes == 1:
        return [] if error is None else [str(error) or type(error).__name__]
    text = None if error is None else f"process {accelerator.process_index}: {str(error) or type(error).__name__}"
    return [found for found in gather_object([text]) if found is not None]


class StopSignal:
    """
    Handler of SIGTERM, SIGINT, SIGUSR1 (Slurm's `--signal`) and a file `STOP`, which the loop asks after each step.

    The processes of a run get a signal at different moments. So each step starts an exchange of what they know, which
    is looked at after the next step: nobody waits for it, and all stop at the same step. A second signal ends the
    process at once. The main process looks for the file once a second and removes it.
    """

    # What `received` answers for the file: no signal has this number.
    STOP_FILE = -1

    def __init__(self, accelerator: Accelerator, stop_file: Path | None = None) -> None:
        self.signum = 0
        numbers = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if os.name == "posix" else [])]
        self._former = {number: signal.getsignal(number) for number in numbers}
        self._stop_file = stop_file if accelerator.is_main_process else None
        self._looked = 0.0
        self._exchange: tuple[torch.Tensor, dist.Work] | None = None
        # A group of its own: the exchange must not stand between the collectives of the model.
        self._group = dist.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self) -> "StopSignal":
        for number in self._former:
            signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        # After an error the other processes may be gone, and nobody would answer.
        if exception[0] is None:
            self.settle()

    def settle(self) -> None:
        """Wait for the exchange that is under way, before the processes part. Every process calls it."""
        if self._exchange is not None:
            self._exchange[1].wait()
            self._exchange = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        _is_stopping.set()
        signal.signal(signum, self._former[signum])

    def received(self, wait: bool = False) -> int:
        """The signal that asks to stop now, `STOP_FILE`, or 0. `wait` for the others after what took long."""
        now = time.monotonic()
        if self._stop_file is not None and now >= self._looked + 1:
            self._looked = now
            if self._stop_file.exists():
                self._stop_file.unlink(missing_ok=True)
                self.signum = self.signum or self.STOP_FILE
        if self._group is None:
            return self.signum
        answer = self._answer()
        known = torch.tensor([self.signum, -self.signum])
        work = dist.all_reduce(known, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._exchange = (known, work)
        return self._answer() if wait else answer

    def _answer(self) -> int:
        if self._exchange is None:
            return 0
        self._exchange[1].wait()
        largest, smallest = self._exchange[0].tolist()
        return largest or -smallest


def fsdp_plugin(mixed_precision: str | None) -> FullyShardedDataParallelPlugin | None:
    """FSDP2 as launched, or `None`; FSDP of version 1 is refused."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    plugin = FullyShardedDataParallelPlugin()
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"FSDP of version {plugin.fsdp_version} is not supported, its shards have no names: use FSDP2"
            " (fsdp_version: 2, training_scripts/accelerate/fsdp2.yaml)."
        )
    dtype = DTYPES.get(mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    if dtype is not None:
        # Gradients are added up in float32, as DDP does. Inputs are left to autocast: accelerate's own policy would
        # cast the times, too, and bfloat16 knows times to two of a thousand.
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
        )
    return plugin


def block_names(model: nn.Module) -> list[str]:
    """Classes of the blocks that a model's networks are a list of: what is gathered and given up together."""
    lists = (child for network in model.children() for child in network.children() if isinstance(child, nn.ModuleList))
    names = {type(block).__name__ for blocks in lists for block in blocks}
    return sorted(names | {type(part).__name__ for part in model.modules() if isinstance(part, _CALLED_FROM_OUTSIDE)})


class EvalWeights:
    """
    Weights that are validated and saved, in the `bare` model, as the script made it; `trained` is the one to prepare.

    With FSDP2 that is a copy, in shards. The main process keeps the bare model, on the CPU, and gathers the weights
    into it when they are needed; the other processes keep nothing of it. Where weights are averaged, `average` is the
    context in which the trained model has their average.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.average: Callable[[], AbstractContextManager[None]] = nullcontext
        self._accelerator = accelerator
        self.bare = self.trained = model
        if accelerator.distributed_type == DistributedType.FSDP:
            self._copy_for_shards(accelerator.state.fsdp_plugin)

    def _copy_for_shards(self, plugin: Any) -> None:
        """Train a copy, to be sharded."""
        if not all(parameter.requires_grad for parameter in self.bare.parameters()):
            raise ValueError("FSDP2 works for models that are trained as a whole, not for adapters: use DDP.")
        if plugin.auto_wrap_policy is transformer_auto_wrap_policy and plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = block_names(self.bare)
        self.trained = copy.deepcopy(self.bare)
        forward = self.trained.forward

        def autocast_forward(*args: Any, **kwargs: Any) -> Any:
            # As accelerate does with models that are not sharded.
            with self._accelerator.autocast():
                return forward(*args, **kwargs)

        self.trained.forward = autocast_forward
        # The loop changes no prediction in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        self.bare.to("cpu" if self._accelerator.is_main_process else "meta")

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the script's models have the weights that would be saved. Every process enters it."""
        with self.average():
            if self.trained is self.bare:
                yield
                return
            is_main = self._accelerator.is_main_process
            if is_main:
                self.bare.to(self._accelerator.device)
            self._gather()
            try:
                yield
            finally:
                if is_main:
                    self.bare.to("cpu")

    @torch.no_grad()
    def _gather(self) -> None:
        """Take the weights and buffers of the shards into the whole model of the main process."""
        trained = self._accelerator.unwrap_model(self.trained, keep_torch_compile=False)
        targets = {**dict(self.bare.named_parameters()), **dict(self.bare.named_buffers())}
        for name, tensor in (*trained.named_parameters(), *trained.named_buffers()):
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self._accelerator.is_main_process:
                targets[name].copy_(value)


def compiles(accelerator: Accelerator | DryAccelerator) -> bool:
    """Return whether accelerate was launched to compile models."""
    if isinstance(accelerator, DryAccelerator):
        return False
    plugin: Any = accelerator.state.dynamo_plugin
    return plugin.backend != DynamoBackend.NO


def with_compiled_network(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """
    Compile the network of a [`OneNetwork`] in place, as accelerate was launched to; what is around it is Python that
    cannot be compiled. Of other models accelerate compiles the whole.
    """
    if compiles(accelerator) and isinstance(model, OneNetwork):
        plugin: Any = accelerator.state.dynamo_plugin
        network = model.main_network
        compile_parts = network.compile_repeated_blocks if plugin.use_regional_compilation else network.compile
        compile_parts(**plugin.to_kwargs())
        plugin.backend = DynamoBackend.NO
    return model
