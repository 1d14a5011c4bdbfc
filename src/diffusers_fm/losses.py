# SPDX-License-Identifier: Apache-2.0
"""The conditional flow matching loss and its weightings, all multiples of one squared error."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .paths import ConditionalPath, refuse_without_limit


# A weighting that measures errors in the space of a prediction type is 1 for a network that predicts it.
SPACES = {"none": "flow_prediction", "epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction"}


def _in_space(space: str) -> Callable[[ConditionalPath, torch.Tensor, str, float], torch.Tensor]:
    def weight(path: ConditionalPath, t: torch.Tensor, prediction_type: str, snr_gamma: float) -> torch.Tensor:
        return path.error_scale(t, prediction_type, space).square()

    return weight


def _likelihood(path: ConditionalPath, t: torch.Tensor, prediction_type: str, snr_gamma: float) -> torch.Tensor:
    # g^2 |score error|^2, where g^2 = 2 (sigma sigma' - sigma^2 alpha' / alpha) is the diffusion of the path's SDE.
    sigma = path.sigma(t)
    diffusion = 2 * (path.sigma_d_sigma(t) - sigma.square() * path.d_alpha(t) / path.alpha(t))
    return diffusion * path.error_scale(t, prediction_type, "score").square()


def _sigma_sqrt(path: ConditionalPath, t: torch.Tensor, prediction_type: str, snr_gamma: float) -> torch.Tensor:
    return path.error_scale(t, prediction_type, "flow_prediction").square() / path.sigma(t).square()


def _cosmap(path: ConditionalPath, t: torch.Tensor, prediction_type: str, snr_gamma: float) -> torch.Tensor:
    # With the densities' cosmap as a weight on uniform times: 2 / (pi (1 - 2 s + 2 s^2)), s the straight time.
    s = path.ratio(t)
    density = 2 / (math.pi * (1 - 2 * s + 2 * s.square()))
    return density * path.error_scale(t, prediction_type, "flow_prediction").square()


def _min_snr(path: ConditionalPath, t: torch.Tensor, prediction_type: str, snr_gamma: float) -> torch.Tensor:
    snr = (path.alpha(t) / path.sigma(t)).square()
    return snr.clamp(max=snr_gamma) * path.error_scale(t, prediction_type, "sample").square()


WEIGHTINGS: dict[str, Callable[[ConditionalPath, torch.Tensor, str, float], torch.Tensor]] = {
    **{name: _in_space(space) for name, space in SPACES.items()},
    "likelihood": _likelihood,
    "sigma_sqrt": _sigma_sqrt,
    "cosmap": _cosmap,
    "min_snr": _min_snr,
}
"""
Weights of the squared error of a network's answer, by name, each a function of the path, `t` and the answer's
type.
"""


def loss_weight(
    path: ConditionalPath,
    t: torch.Tensor,
    prediction_type: str = "flow_prediction",
    weighting: str = "none",
    snr_gamma: float = 5.0,
) -> torch.Tensor:
    """
    What the squared error of a network's answer is multiplied by.

    At one `x_t` the errors of all prediction types are multiples of each other (`ConditionalPath.error_scale`), so the
    objective is set by the weighting alone, whatever the network predicts:

    - `none`: the velocity's error, flow matching (arXiv 2210.02747, equation 9);
    - `epsilon`: the noise's error, DDPM (arXiv 2006.11239, equation 14), and score matching with weight sigma^2;
    - `sample`, `v_prediction`: the error of the data and of `v` (arXiv 2202.00512);
    - `likelihood`: the score's error times the squared diffusion of the path's SDE, ScoreFlow (arXiv 2101.09258);
    - `sigma_sqrt`, `cosmap`: the velocity's error over sigma^2, and times the cosmap density (arXiv 2403.03206);
    - `min_snr`: the data's error times `min(SNR, snr_gamma)` (arXiv 2303.09556).

    Args:
        path (`ConditionalPath`):
            The path.
        t (`torch.Tensor` of shape `(batch_size,)`):
            Time, 0 = data, 1 = noise.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network answers.
        weighting (`str`, *optional*, defaults to `"none"`):
            One of `WEIGHTINGS`.
        snr_gamma (`float`, *optional*, defaults to 5.0):
            For `min_snr`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: The weights.

    Raises:
        ValueError: If a name is unknown, or the weight has no limit at one of the times.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"`weighting` must be one of {list(WEIGHTINGS)}, got {weighting!r}.")
    if not (snr_gamma > 0 and math.isfinite(snr_gamma)):
        raise ValueError(f"`snr_gamma` must be a number above 0, got {snr_gamma!r}.")
    weight = WEIGHTINGS[weighting](path, t, prediction_type, snr_gamma)
    refuse_without_limit(~torch.isfinite(weight), t, "The weight %r of a %r on %s", weighting, prediction_type, path)
    return weight


def flow_matching_loss(
    path: ConditionalPath,
    model_output: torch.Tensor,
    data: torch.Tensor,
    noise: torch.Tensor,
    t: torch.Tensor,
    prediction_type: str = "flow_prediction",
    weighting: str = "none",
    snr_gamma: float = 5.0,
) -> torch.Tensor:
    """
    The conditional flow matching loss of each sample (arXiv 2210.02747, equation 9), weighted.

    Args:
        path (`ConditionalPath`):
            The path that made `x_t`.
        model_output (`torch.Tensor` of shape `(batch_size, ...)`):
            The network's answer at `x_t`.
        data (`torch.Tensor` of shape `(batch_size, ...)`):
            Clean samples.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            The noise in `x_t`.
        t (`torch.Tensor` of shape `(batch_size,)`):
            Time, 0 = data, 1 = noise; best on the CPU in float64.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network answers.
        weighting (`str`, *optional*, defaults to `"none"`):
            One of `WEIGHTINGS` (see [`loss_weight`]).
        snr_gamma (`float`, *optional*, defaults to 5.0):
            For `min_snr`.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: Mean squared error over each sample times its weight, in float32.

    Raises:
        ValueError: If a name is unknown, or the target or weight has no limit at one of the times.
    """
    if not model_output.shape == data.shape == noise.shape:
        shapes = [tuple(tensor.shape) for tensor in (model_output, data, noise)]
        raise ValueError(f"`model_output`, `data` and `noise` must have one shape, got {shapes}.")
    target = path.target(data.float(), noise.float(), t, prediction_type)
    error = F.mse_loss(model_output.float(), target, reduction="none").reshape(len(data), -1).mean(1)
    if SPACES.get(weighting) == prediction_type:
        return error
    return loss_weight(path, t, prediction_type, weighting, snr_gamma).to(error) * error
