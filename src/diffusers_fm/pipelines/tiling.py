# SPDX-License-Identifier: Apache-2.0
"""Tiling of large images: the network's outputs on overlapping tiles are blended at every call."""

from collections.abc import Callable, Iterator

import torch


Window = tuple[slice, slice, slice, slice]


class TileGrid:
    """
    Equally large tiles that cover a canvas and overlap.

    At each call of the network x_t is cut into tiles, and the answers are averaged with weights that rise from a
    tile's edge across the overlap (fusion at every step, as in MultiDiffusion, arXiv 2302.08113). All of this is
    linear, so the average of predictions of any type is that of velocities. There is one x_t for the whole canvas and
    no tile has a history of its own: a network that looks no further than `overlap` leaves no seams.

    Args:
        size (`tuple[int, int]`):
            Height and width of the canvas, in the pixels (or latents) of x_t.
        tile (`tuple[int, int]`):
            Height and width of a tile, no larger than the canvas.
        overlap (`int`):
            How far neighbours overlap at least, below the tile's height and width.
        multiple (`int`, *optional*, defaults to 1):
            All sizes are multiples of this, and all tiles begin at multiples of it: a UNet then halves each tile where
            it would halve the canvas.
    """

    def __init__(self, size: tuple[int, int], tile: tuple[int, int], overlap: int, multiple: int = 1) -> None:
        self.size, self.tile, self.overlap = size, tile, overlap
        self._starts = [
            [multiple * start for start in _starts(length // multiple, side // multiple, overlap // multiple)]
            for length, side in zip(size, tile)
        ]
        down, across = (_ramp(side, overlap) for side in tile)
        self._weights = down[:, None] * across[None, :]
        self._total = torch.zeros(size)
        for window in self:
            self._total[window[2:]] += self._weights

    def __len__(self) -> int:
        return len(self._starts[0]) * len(self._starts[1])

    def __iter__(self) -> Iterator[Window]:
        """The tiles' places in a tensor `(batch_size, channels, height, width)`, row by row."""
        height, width = self.tile
        for top in self._starts[0]:
            for left in self._starts[1]:
                yield (slice(None), slice(None), slice(top, top + height), slice(left, left + width))

    def blend(self, predict: Callable[[Window], torch.Tensor]) -> torch.Tensor:
        """
        The canvas that the tiles make together.

        Args:
            predict (`Callable`):
                Called with a tile's place; gives its content, of shape `(batch_size, channels, *tile)`.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, *size)`: float32.
        """
        canvas = None
        for window in self:
            content = predict(window).float()
            if canvas is None:
                canvas = content.new_zeros((*content.shape[:2], *self.size))
            canvas[window] += content * self._weights.to(content)
        assert canvas is not None
        return canvas / self._total.to(canvas)


def _starts(length: int, side: int, overlap: int) -> list[int]:
    """Starts of tiles: as few as cover the length, spread evenly."""
    if side >= length:
        return [0]
    last = -(-(length - side) // (side - overlap))
    return [number * (length - side) // last for number in range(last + 1)]


def _ramp(side: int, overlap: int) -> torch.Tensor:
    """Weights along a tile: rising over the overlap, then 1, then falling."""
    distance = torch.arange(1, side + 1, dtype=torch.float32)
    return torch.minimum(distance, distance.flip(0)).clamp(max=overlap + 1) / (overlap + 1)
