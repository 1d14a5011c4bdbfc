# SPDX-License-Identifier: Apache-2.0
"""What a run notes within its steps and tells between them: losses, gradients, speed, unreadable images."""

import argparse
import math
from collections.abc import Collection
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from ..data.streams import StreamPosition
from ..data.unreadable import UnreadableImages
from .logs import LossMeter
from .optimizers import GradientGuard
from .throughput import make_throughput


class RunMeters:
    """
    The meters of a run, read together.

    Args:
        args (`argparse.Namespace`):
            Of the script.
        accelerator (`Accelerator`):
            Of the run.
        global_batch_size (`int`):
            Samples in an optimizer step.
        unreadable_rows (`Collection[int | str]`, *optional*):
            Rows whose images could not be read before the run was interrupted.

    Attributes:
        losses ([`LossMeter`]):
            Losses by time; with a state for checkpoints.
        guard ([`GradientGuard`]):
            Steps that were skipped; with a state for checkpoints.
        throughput ([`Throughput`]):
            Where the time goes.
        unreadable ([`UnreadableImages`]):
            Images that could not be read.
        stream ([`StreamPosition`], *optional*):
            Where the run is in its data, if that is a stream.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        global_batch_size: int,
        unreadable_rows: Collection[int | str] = (),
    ) -> None:
        self._accelerator = accelerator
        self.losses = LossMeter()
        self.guard = GradientGuard(accelerator, 0 if args.nan_policy == "stop" else args.max_skipped_steps)
        self.throughput = make_throughput(args, accelerator, global_batch_size)
        self.unreadable = UnreadableImages(args.max_unreadable_images, unreadable_rows)
        self.stream: StreamPosition | None = None
        self._gradient_norm = torch.zeros(())

    def before_step(self, optimizer: AcceleratedOptimizer, gradient_norm: torch.Tensor) -> bool:
        """Note the norm of a whole gradient, a tensor of shape `()`; whether the optimizer is to step."""
        self._gradient_norm = gradient_norm
        return self.guard.before_step(optimizer, gradient_norm)

    def loaded(self) -> None:
        """After a checkpoint was loaded, by every process: the losses in it are those of all, and the main one's."""
        if not self._accelerator.is_main_process:
            self.losses.clear()

    def gather(self) -> None:
        """Take what all processes have noted into the main one. Every process calls it."""
        self.losses.reduce(self._accelerator)
        self.unreadable.gather(self._accelerator)

    def gather_stream(self) -> dict[str, Any]:
        """Where all processes are in a stream, for the checkpoint. Every process calls it."""
        return {} if self.stream is None else {"stream": self.stream.gather(self._accelerator.num_processes)}

    def report(self) -> dict[str, Any]:
        """What is to be told since the last report. Every process calls it."""
        self.losses.reduce(self._accelerator)
        norm = float(self._gradient_norm)
        unreadable = self.unreadable.gather(self._accelerator)
        return {
            **self.losses.report(),
            "gradient_norm": norm if math.isfinite(norm) else None,
            **self.throughput.report(),
            **({"skipped_steps": self.guard.skipped} if self.guard.skipped else {}),
            **({"unreadable_images": unreadable} if unreadable else {}),
        }

    def look_at_gradients(self, done: int) -> str | None:
        """
        What is wrong, if too many gradients in a row were not finite. Every process calls it.

        Args:
            done (`int`):
                Optimizer steps done.

        Returns:
            `str`, *optional*: a few sentences.
        """
        fault = self.guard.look(done)
        if fault is None:
            return None
        self.losses.reduce(self._accelerator)
        report = self.losses.report()
        counts = report.get("non_finite_by_time")
        return (
            f"{fault} Losses by time, from data to noise, are {report['loss_by_time']}"
            f"{'' if counts is None else f', and the numbers of those that are not finite {counts}'}."
        )
