# SPDX-License-Identifier: Apache-2.0
"""Maps of tensors that move, scale and offset numbers, found by asking a function."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..precision import to_float64, widest_float


# Place numbers up to its square are written in two digits, each exact in float32.
BASE = 4096


@dataclass(frozen=True)
class Rearrangement:
    """Map of the numbers of each sample: y[i] = offset[i] + scale[i] * x[place[i]]."""

    offset: torch.Tensor
    scale: torch.Tensor
    place: torch.Tensor
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        plain = not self.offset.any() and not (self.scale - self.scale[0]).any()
        in_order = torch.equal(self.place, torch.arange(len(self.place)))
        object.__setattr__(self, "factor", self.scale[0].item() if plain and in_order else None)
        object.__setattr__(self, "_copies", {})

    @classmethod
    def ask(
        cls, function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], name: str
    ) -> "Rearrangement":
        """The map that a function of a batch of one is, by zeros, ones and place numbers, and verified by noise."""
        size = torch.Size(shape).numel()
        if size > BASE**2:
            raise ValueError(f"{name} has {size} numbers to move, more than the {BASE**2} that can be told apart.")
        places = torch.arange(size)

        def answer(values: torch.Tensor) -> torch.Tensor:
            return to_float64(function(values.float().reshape(1, *shape)))

        offset = answer(torch.zeros(size))
        y_shape, offset = tuple(offset.shape[1:]), offset.flatten()
        scale = answer(torch.ones(size)).flatten() - offset
        if len(offset) != size or not scale.all():
            raise ValueError(f"{name} makes {len(offset)} numbers of {size}: that has no inverse.")
        digits = [
            (answer(digit).flatten() - offset).div(scale).round().long() for digit in (places % BASE, places // BASE)
        ]
        place = digits[0] + BASE * digits[1]
        if not torch.equal(place.sort().values, places):
            raise ValueError(f"{name} does more than move, scale and offset numbers.")
        found = cls(offset, scale, place, shape, y_shape)
        probe = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
        seen = answer(probe)
        error = (seen - to_float64(found(probe))).abs().max().item()
        if not error <= 1e-4 * seen.abs().max().item():
            raise ValueError(f"{name} does more than move, scale and offset numbers: that is off by {error:.1e}.")
        return found

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The map of a batch, in its dtype."""
        if self.factor is not None:
            return x.reshape(len(x), *self.y_shape) * self.factor
        offset, scale, place, _ = self._on(x)
        flat = x.flatten(1)[:, place].to(offset.dtype) * scale + offset
        return flat.reshape(len(x), *self.y_shape).to(x.dtype)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """The inverse map of a batch, in its dtype."""
        offset, scale, _, order = self._on(y)
        flat = (y.flatten(1).to(offset.dtype) - offset) / scale
        return flat[:, order].reshape(len(y), *self.x_shape).to(y.dtype)

    def _on(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Offset, scale, place and its inverse on the device of a tensor."""
        if x.device not in self._copies:
            dtype = widest_float(x)
            # Normal tensors whatever mode the first call is made in: later ones may need gradients.
            with torch.inference_mode(False):
                numbers = [self.offset.to(dtype), self.scale.to(dtype), self.place, self.place.argsort()]
                self._copies[x.device] = [each.to(x.device) for each in numbers]
        return self._copies[x.device]
