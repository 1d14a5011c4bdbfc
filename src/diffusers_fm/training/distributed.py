# SPDX-License-Identifier: Apache-2.0
"""How a training script starts, and how it is asked to stop."""

import atexit
import gc
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    is_tensorboard_available,
)
from torch.distributed.device_mesh import DeviceMesh

from .sharding import fsdp_plugin, shard_on_cpu


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
    The accelerator of a script, on the CPU where there is nothing else, with as many processes as were launched.

    Args:
        output_dir (`Path`):
            Folder of the run.
        logging_dir (`str`, *optional*, defaults to `"logs"`):
            Folder of the trackers in it.
        mixed_precision (`str`, *optional*):
            `"no"`, `"fp16"` or `"bf16"`; by default what `accelerate launch` or its configuration says.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Batches to an optimizer step.
        report_to (`str`, *optional*):
            Tracker, `"all"` or `"none"`; by default TensorBoard, if it is installed.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Use the CPU although there is an accelerator.
        torch_compile (`bool`, *optional*, defaults to `False`):
            Compile the model with inductor; otherwise as accelerate is configured.
        train_batch_size (`int`, *optional*, defaults to 1):
            Samples of a process in an accumulation step, for DeepSpeed.

    Returns:
        `Accelerator`: ready for `prepare`.

    Raises:
        ValueError: if accelerate runs another number of processes than was launched, the tracker is not installed,
            `accelerate launch` was told another number of accumulation steps, or to shard by FSDP of version 1.
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
    # Without `cpu=True` accelerate runs several CPU processes as so many independent runs of one.
    accelerator = Accelerator(
        cpu=use_cpu or not torch.accelerator.is_available(),
        mixed_precision=mixed_precision,
        dynamo_backend="inductor" if torch_compile else None,
        fsdp_plugin=plugin,
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=gradient_accumulation_steps, adjust_scheduler=False, sync_with_dataloader=False
        ),
        log_with=None if report_to == "none" else report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / logging_dir)),
    )
    shard_on_cpu(accelerator, plugin)
    if accelerator.state.deepspeed_plugin is not None:
        # No loader is prepared, from which accelerate would know it.
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config["train_micro_batch_size_per_gpu"] = train_batch_size
    world_size = os.environ.get("WORLD_SIZE", "1")
    # Without --multi_gpu, `accelerate launch` of several processes on the CPU starts one, and this is all it leaves.
    if "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" in os.environ:
        if (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")) == ("127.0.0.1", "29500"):
            world_size = "several"
    if world_size != str(accelerator.num_processes):
        raise ValueError(
            f"Of the processes that were launched ({world_size}), accelerate runs {accelerator.num_processes}: on the"
            " CPU, use `accelerate launch --multi_gpu --num_processes N` or `torchrun --nproc_per_node N`."
        )
    if accelerator.num_processes > 1:
        atexit.register(_let_go_of_process_groups, [dist.group.WORLD] if dist.is_initialized() else [])
    return accelerator


def _let_go_of_process_groups(groups: list[dist.ProcessGroup]) -> None:
    """
    End the threads of process groups, which must not outlive the interpreter: a thread that gives up the last of its
    tensors then aborts the process, after all of its work is done.

    The wrapped model keeps its group, in a cycle of references, and FSDP's meshes, which torch caches, keep theirs.
    The list must be the last to do so: a group that goes with the C++ part of a model waits for its threads without
    letting go of the interpreter, for which one of them may be waiting.

    Args:
        groups (`list[dist.ProcessGroup]`):
            Those that models may have. Emptied.
    """
    for mesh in [thing for thing in gc.get_objects() if type(thing) is DeviceMesh]:
        registry = getattr(mesh, "_pg_registry", {})
        groups.extend(registry.values())
        registry.clear()
    gc.collect()
    groups.clear()


def failures(accelerator: Accelerator, error: BaseException | None) -> list[str]:
    """
    What went wrong in any process, so that all of them go on or none. Every process calls it; it is a barrier, too.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        error (`BaseException`, *optional*):
            What went wrong in this process.

    Returns:
        `list[str]`: a few words for each process in which something did.
    """
    if accelerator.num_processes == 1:
        return [] if error is None else [str(error) or type(error).__name__]
    text = None if error is None else f"process {accelerator.process_index}: {str(error) or type(error).__name__}"
    return [found for found in gather_object([text]) if found is not None]


class StopSignal:
    """
    Turns SIGTERM, SIGINT, SIGUSR1 (what Slurm's `--signal` sends) and the appearance of a file into a question that
    the loop asks after each step, with one answer for all processes.

    The processes of a run get the signal at different moments. So each step starts an exchange of what they know,
    which is looked at after the next step: nobody waits for it, and all stop at the same step. A second signal ends
    the process at once.

    Args:
        accelerator (`Accelerator`):
            Tells how many processes there are.
        stop_file (`Path`, *optional*):
            Its appearance is a wish to stop. The main process looks once a second and removes it.
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
        """Wait for the exchange that is under way: before the processes part. Every process calls it."""
        if self._exchange is not None:
            self._exchange[1].wait()
            self._exchange = None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
        signal.signal(signum, self._former[signum])

    def _look_for_file(self) -> None:
        now = time.monotonic()
        if self._stop_file is not None and now >= self._looked + 1:
            self._looked = now
            if self._stop_file.exists():
                self._stop_file.unlink(missing_ok=True)
                self.signum = self.signum or self.STOP_FILE

    def received(self, wait: bool = False) -> int:
        """
        Whether to stop now. Called by every process after each step.

        Args:
            wait (`bool`, *optional*, defaults to `False`):
                Wait for what the other processes know at this moment: after something that took long.

        Returns:
            `int`: the number of the signal, `STOP_FILE`, or 0 to go on.
        """
        self._look_for_file()
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
