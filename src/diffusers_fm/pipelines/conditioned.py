# SPDX-License-Identifier: Apache-2.0
"""Velocity of a stock pipeline under the conditions of a batch, as a function of x_t and t."""

from collections.abc import Sequence
from typing import Any

import torch

from .replay import CapturedCall, capture
from .velocity_field import VelocityField


Prompts = str | list[str]


class Conditioned:
    """
    Velocity of a pipeline under the conditions of a batch, a function of x_t and t.

    The network is called alone where that verifies, otherwise through the pipeline.

    Args:
        field ([`VelocityField`]):
            The field.
        call (`dict[str, Any]`):
            Arguments of the pipeline's call, lists and tensors with an entry for each sample.
        shape (`tuple[int, ...]`):
            Shape of a batch of states.
        scale (`float`, *optional*, defaults to 1.0):
            Time of the network at t = 1.
        single (`bool`, *optional*, defaults to `False`):
            Whether parts of the batch may be asked for, by the numbers of their samples.
    """

    def __init__(
        self,
        field: VelocityField,
        call: dict[str, Any],
        shape: tuple[int, ...],
        scale: float = 1.0,
        single: bool = False,
    ) -> None:
        self.field, self.call, self.size, self.scale = field, call, shape[0], scale
        self._captured: dict[tuple[int, ...], CapturedCall] = {}
        numbers = tuple(range(self.size))
        x_t = torch.zeros(shape, device=next(field.network.parameters()).device)
        for rows in [(number,) for number in numbers] if single else [numbers]:
            try:
                self._captured[rows] = capture(field, x_t[: len(rows)], **self._of(rows))
            except ValueError:
                # Guidance, or more than the network in a step; what is wrong with the call is said by the field.
                field.ask(x_t[: len(rows)], **self._of(rows))
                break

    def __call__(self, x_t: torch.Tensor, t: torch.Tensor, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """The velocity noise - data, of all samples or those of these numbers."""
        rows = tuple(range(self.size)) if numbers is None else tuple(numbers.tolist())
        t = self.scale * t.to(x_t).expand(len(x_t))
        if rows in self._captured:
            return self._captured[rows](x_t, t)
        if not all((number,) in self._captured for number in rows):
            return self.field(x_t, t, **self._of(rows))
        singles = [self._captured[number,] for number in rows]
        try:
            self._captured[rows] = CapturedCall.join(singles)
        except ValueError:
            return torch.cat([one(x_t[i : i + 1], t[i : i + 1]) for i, one in enumerate(singles)])
        return self._captured[rows](x_t, t)

    def _of(self, rows: Sequence[int]) -> dict[str, Any]:
        return rows_of(self.call, rows, self.size)


def for_each(batch_size: int, name: str, prompt: Prompts) -> list[str]:
    """Prompts of a batch, from one for all or one for each; a `ValueError` for others."""
    prompts = [prompt] * batch_size if isinstance(prompt, str) else list(prompt)
    if len(prompts) != batch_size or not all(isinstance(text, str) for text in prompts):
        raise ValueError(f"`{name}` must be a string, or one for each of the {batch_size} images, got {prompt!r}.")
    return prompts


def prompted(prompts: list[str], call: dict[str, Any]) -> dict[str, Any]:
    """Arguments with prompts, unless their embeddings are among them."""
    return call if "prompt_embeds" in call else {"prompt": prompts, **call}


def rows_of(call: dict[str, Any], rows: Sequence[int], size: int) -> dict[str, Any]:
    """Arguments of some samples of a batch."""
    return {name: _rows(value, rows, size) for name, value in call.items()}


def _rows(value: Any, rows: Sequence[int], size: int) -> Any:
    """Entries of some samples of an argument that has one for each."""
    if not isinstance(value, (list, torch.Tensor)) or len(value) != size:
        return value
    return value[list(rows)] if isinstance(value, torch.Tensor) else [value[row] for row in rows]
