# SPDX-License-Identifier: Apache-2.0
"""Steps whose gradient is not finite: kept away from the weights, counted, and after a limit the end of the run."""

import math

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType


class GradientGuard:
    """
    Skips optimizer steps whose gradient is not finite.

    The device is not asked at each step. A fused optimizer is told on the device, as `torch.amp.GradScaler` tells it:
    with `found_inf` it leaves weights, moments and its own count of steps alone. What was skipped is counted when the
    run looks at its numbers anyway. The norm is that of the whole gradient, so all processes skip the same steps.

    Args:
        accelerator (`Accelerator`):
            Of the run.
        limit (`int`):
            More steps in a row than these are an error; 0 for an error at the first.

    Attributes:
        skipped (`int`), in_a_row (`int`):
            Steps without a finite gradient up to the last look, in all and up to now without a break.
    """

    def __init__(self, accelerator: Accelerator, limit: int) -> None:
        self._limit = limit
        # A scaler skips by itself, and DeepSpeed's step is done when its norm is known.
        self._acts = accelerator.scaler is None and accelerator.distributed_type != DistributedType.DEEPSPEED
        self._pending: list[torch.Tensor] = []
        self.in_a_row = 0
        self.skipped = 0

    def before_step(self, optimizer: AcceleratedOptimizer, norm: torch.Tensor) -> bool:
        """
        Called when the gradient is complete.

        Args:
            optimizer (`AcceleratedOptimizer`):
                About to step.
            norm (`torch.Tensor`):
                The norm of the gradient, a number.

        Returns:
            `bool`: whether it is to step; one that does the skipping itself is.
        """
        self._pending.append(norm)
        if not self._acts:
            return True
        if norm.device.type == "cpu":
            # Nothing is waited for here, and a fused optimizer that is told counts its steps one by one.
            return math.isfinite(norm.numpy())
        inner = optimizer.optimizer
        if getattr(inner, "_step_supports_amp_scaling", False):
            inner.found_inf = 1 - torch.isfinite(norm).float()
        elif not torch.isfinite(norm):
            return False
        return True

    def look(self, done: int) -> str | None:
        """
        Count what was skipped since the last look.

        Args:
            done (`int`):
                Optimizer steps done.

        Returns:
            `str`, *optional*: what is wrong, if the limit was passed.
        """
        if not self._pending:
            return None
        finite = torch.isfinite(torch.stack(self._pending)).tolist()
        first = done - len(finite) + 1
        self._pending.clear()
        for step, good in enumerate(finite, first):
            self.skipped += not good
            self.in_a_row = 0 if good else self.in_a_row + 1
            if self.in_a_row > self._limit:
                if self._limit == 0:
                    return f"The gradient at step {step} is not finite."
                return f"The gradient is not finite at step {step}, nor was it in the {self._limit} steps before."
        return None

    def state_dict(self) -> dict[str, int]:
        """What was counted up to the last look."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Take up what [`state_dict`] gave."""
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]
