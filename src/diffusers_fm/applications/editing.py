# SPDX-License-Identifier: Apache-2.0
"""Editing without inversion: FlowEdit (Kulikov et al., arXiv 2412.08629), on every Gaussian path."""

from collections.abc import Callable, Iterator, Sequence

import torch

from ..coordinates import Coordinates
from ..paths import ConditionalPath, lift


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def flow_edit(
    source: Predict,
    target: Predict,
    data: torch.Tensor,
    path: ConditionalPath,
    ratios: Sequence[float],
    draw_noise: Callable[[], torch.Tensor],
    *,
    prediction_type: str = "flow_prediction",
    num_averages: int = 1,
    num_free_steps: int = 0,
) -> Iterator[torch.Tensor]:
    """
    Carry data from the flow of a source condition to that of a target condition (arXiv 2412.08629, algorithm 1).

    The edited data moves by the difference of two velocities: that of the target at a noisy version of the edited
    data, and that of the source at a version of the original with the same noise. Equal conditions have a difference
    of exactly zero. Everything happens in the straight coordinates, in which each path is the one of the paper; the
    original is never carried to noise.

    Args:
        source (`Callable`):
            The network under the condition that describes the data, with guidance if any: `source(x_t, t)` with `t` of
            shape `()`, 0 = data, 1 = noise.
        target (`Callable`):
            The same under the condition that describes what is wanted.
        data (`torch.Tensor` of shape `(batch_size, ...)`):
            The originals.
        path (`ConditionalPath`):
            The path on which the network was trained.
        ratios (`Sequence[float]`):
            Falling times of the straight coordinates, in `[0, path.ratio_max]`. The lower the first one, the more of
            the original stays.
        draw_noise (`Callable`):
            Gives standard normal noise of the shape of `data` at each call.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network predicts, one of `PREDICTION_TYPES`.
        num_averages (`int`, *optional*, defaults to 1):
            How many draws of noise a difference is averaged over (`n_avg` of the paper).
        num_free_steps (`int`, *optional*, defaults to 0):
            How many of the last steps follow the target alone (`n_min` of the paper), which lets details change.

    Yields:
        `torch.Tensor`: After each step the edited data so far; during free steps, that with noise.

    Raises:
        ValueError: If the times do not fall, a number is out of range, or the network's prediction does not determine
            the velocity at one of the times.
    """
    _check(path, ratios, num_averages, num_free_steps)
    times = path.time_at(torch.tensor(ratios, dtype=torch.float64))
    coordinates = Coordinates(path, "ot")
    scales = coordinates.scale_at(times)
    # The last time is where the data is: no velocity is asked for there.
    on_sample, on_output = coordinates.coefficients(times[:-1], prediction_type)

    def velocity(predict: Predict, point: torch.Tensor, i: int) -> torch.Tensor:
        x_t = point * lift(scales[i], point)
        return lift(on_sample[i], x_t) * x_t + lift(on_output[i], x_t) * predict(x_t, times[i])

    edited_from = len(ratios) - 1 - num_free_steps
    offset = torch.zeros_like(data)
    for i in range(edited_from):
        difference = torch.zeros_like(data)
        for _ in range(num_averages):
            noisy = (1 - ratios[i]) * data + ratios[i] * draw_noise()
            # The offset is added to the very point of the source, so that an offset of zero changes no bit.
            difference += velocity(target, noisy + offset, i) - velocity(source, noisy, i)
        offset = offset + (ratios[i + 1] - ratios[i]) / num_averages * difference
        yield data + offset

    if num_free_steps > 0:
        start = ratios[edited_from]
        point = (1 - start) * data + start * draw_noise() + offset
        for i in range(edited_from, len(ratios) - 1):
            point = point + (ratios[i + 1] - ratios[i]) * velocity(target, point, i)
            yield point


def _check(path: ConditionalPath, ratios: Sequence[float], num_averages: int, num_free_steps: int) -> None:
    falling = all(later < earlier for earlier, later in zip(ratios[:-1], ratios[1:]))
    if len(ratios) < 2 or not falling or ratios[-1] < 0 or ratios[0] > path.ratio_max + 1e-6:
        raise ValueError(
            f"`ratios` must be at least two falling times in [0, {path.ratio_max:g}], got {list(ratios[:3])}..."
        )
    if not isinstance(num_averages, int) or num_averages < 1:
        raise ValueError(f"`num_averages` must be at least 1, got {num_averages!r}.")
    if not isinstance(num_free_steps, int) or not 0 <= num_free_steps < len(ratios):
        raise ValueError(
            f"`num_free_steps` must be from 0 to the {len(ratios) - 1} steps made, got {num_free_steps!r}."
        )
