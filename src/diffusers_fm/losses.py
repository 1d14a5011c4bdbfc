# SPDX-License-Identifier: Apache-2.0
"""The conditional flow matching loss and its weightings, all multiples of one squared error."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .paths import ConditionalPath, lift, refuse_without_limit


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
    weight_clip: float = 0.0,
    contrastive_weight: float = 0.0,
) -> torch.Tensor:
    """
    The conditional flow matching loss of each sample (arXiv 2210.02747, equation 9), weighted.

    With a `contrastive_weight` w the squared error of the target of another sample of the batch is subtracted w times
    (contrastive flow matching, arXiv 2506.05350, equation 6). The minimiser is then not the velocity but
    `(E[target | x_t] - w E[other target]) / (1 - w)`, which [`undo_contrastive`] turns back.

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
        weight_clip (`float`, *optional*, defaults to 0.0):
            Least time of the straight coordinates, in [0, 1), at which the weight is taken; before it, it is that of
            this time. A network that predicts the data has the weight `1 / t^2` on OT, and JiT clips t at 0.05 (arXiv
            2511.13720, appendix A).
        contrastive_weight (`float`, *optional*, defaults to 0.0):
            In [0, 1).

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: Mean squared error over each sample times its weight, in float32.

    Raises:
        ValueError: If a name is unknown, a number is out of range, a batch of one sample has no other one, or the
            target or weight has no limit at one of the times.
    """
    for name, value in (("weight_clip", weight_clip), ("contrastive_weight", contrastive_weight)):
        if not 0 <= value < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {value!r}.")
    if not model_output.shape == data.shape == noise.shape:
        shapes = [tuple(tensor.shape) for tensor in (model_output, data, noise)]
        raise ValueError(f"`model_output`, `data` and `noise` must have one shape, got {shapes}.")

    def distance(data: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        target = path.target(data.float(), noise.float(), t, prediction_type)
        return F.mse_loss(model_output.float(), target, reduction="none").reshape(len(data), -1).mean(1)

    error = distance(data, noise)
    if contrastive_weight:
        if len(data) == 1:
            raise ValueError("`contrastive_weight` needs batches of at least 2 samples, got 1.")
        error = error - contrastive_weight * distance(data.roll(1, 0), noise.roll(1, 0))
    if SPACES.get(weighting) == prediction_type:
        return error
    if weight_clip > path.ratio_min:
        t = path.time_at(path.ratio(t).clamp(min=weight_clip))
    return loss_weight(path, t, prediction_type, weighting, snr_gamma).to(error) * error


def undo_contrastive(
    path: ConditionalPath,
    prediction: torch.Tensor,
    t: torch.Tensor,
    mean: torch.Tensor,
    contrastive_weight: float,
    prediction_type: str = "flow_prediction",
) -> torch.Tensor:
    """
    Prediction of plain flow matching from that of a network that was trained with a `contrastive_weight` w.

    The other sample of [`flow_matching_loss`] does not depend on the condition, so that its mean target is that of the
    mean of the data without noise: `(1 - w) prediction + w E[other target]`. A guided prediction, whose weights sum to
    1, is turned back alike.

    Args:
        path (`ConditionalPath`):
            The path.
        prediction (`torch.Tensor` of shape `(batch_size, ...)`):
            Answer of the network.
        t (`torch.Tensor` of shape `(batch_size,)` or `()`):
            Time, 0 = data, 1 = noise.
        mean (`torch.Tensor` of shape `(...)`):
            Mean of all data.
        contrastive_weight (`float`):
            Weight in training.
        prediction_type (`str`, *optional*, defaults to `"flow_prediction"`):
            What the network answers.

    Returns:
        `torch.Tensor` of the shape of `prediction`.
    """
    mean = mean.to(prediction).expand_as(prediction)
    other = path.target(mean, torch.zeros_like(mean), t, prediction_type)
    return (1 - contrastive_weight) * prediction + contrastive_weight * other


def slowed_sample(
    path: ConditionalPath, data: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, slowing: torch.Tensor
) -> torch.Tensor:
    """
    Point with more noise than its time says, for MixFlow (arXiv 2512.19311): of the time `s + slowing (1 - s)` in the
    straight coordinates, where s is that of t, in the scale of the path at t.

    Args:
        path (`ConditionalPath`):
            The path.
        data, noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Clean samples, and their noise.
        t (`torch.Tensor` of shape `(batch_size,)`):
            Time that the network is given, 0 = data, 1 = noise.
        slowing (`torch.Tensor` of shape `(batch_size,)`):
            In [0, 1]; 0 gives `path.sample`.

    Returns:
        `torch.Tensor` of the shape of `data`.
    """
    s = path.ratio(t)
    s = s + slowing.to(s) * (path.ratio_max - s)
    scale = path.alpha(t) + path.sigma(t)
    return (lift(scale * (1 - s), data) * data + lift(scale * s, noise) * noise).to(data.dtype)


def normalize_patches(features: torch.Tensor, mean_share: float) -> torch.Tensor:
    """
    Features less a share of their mean over the patches, over their deviation there (iREPA, arXiv 2512.10794).

    Args:
        features (`torch.Tensor` of shape `(batch_size, channels, rows, columns)`):
            Features of patches.
        mean_share (`float`):
            Share of the mean that is subtracted.

    Returns:
        `torch.Tensor` of the same shape.
    """
    patches = features.flatten(2)
    centred = patches - mean_share * patches.mean(2, keepdim=True)
    return (centred / (patches.std(2, correction=0, keepdim=True) + 1e-6)).view_as(features)


def alignment_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """
    Misalignment of two maps of features: minus the mean cosine of their angle at each patch (REPA, arXiv 2410.06940,
    equation 8).

    Args:
        projected (`torch.Tensor` of shape `(batch_size, channels, rows, columns)`):
            Projected hidden states of the network.
        features (`torch.Tensor` of shape `(batch_size, channels, *, *)`):
            Features to align with, brought to the rows and columns of the other by area.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: in [-1, 1], float32.
    """
    target = features.to(projected.device, torch.float32)
    if target.shape[-2:] != projected.shape[-2:]:
        target = F.interpolate(target, projected.shape[-2:], mode="bilinear", antialias=True)
    return -F.cosine_similarity(projected.float(), target, dim=1).flatten(1).mean(1)
