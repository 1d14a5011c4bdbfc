# SPDX-License-Identifier: Apache-2.0
"""Couplings of noise and data in training: independent, or by optimal transport, in each batch or to all data."""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


COUPLINGS = ("independent", "minibatch_ot")

# Of the fit of a semidiscrete coupling: noise in a step, and share of the steps whose potentials are averaged.
FIT_BATCH_SIZE = 2048
AVERAGED_SHARE = 0.25


def minibatch_ot(data: torch.Tensor, noise: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """
    The pairing of a batch's noise with its data that has the least mean of `|data - noise|^2` (arXiv 2302.00482 and
    2304.14772), as a permutation: each noise is used once, so that data and noise are distributed as before.

    The squares of data and noise are the same for every permutation, so that the greatest sum of the products
    `data . noise` is sought. Hence the pairing is also the best for `|a data - b noise|^2` with any `a, b > 0`: it is
    the same on every path.

    Args:
        data (`torch.Tensor` of shape `(batch_size, ...)`):
            Clean samples.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            As many samples of noise, of the same shape.
        labels (`torch.Tensor` of shape `(batch_size,)`, *optional*):
            Label of each sample that the network is given. Noise is then exchanged within a label alone: otherwise its
            distribution would depend on the label, and a model that starts from standard normal noise for each of them
            would be biased.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: int64 on the CPU, `noise[permutation]` goes with `data`.

    Raises:
        ValueError: if the shapes differ.
    """
    if data.shape != noise.shape:
        raise ValueError(f"Data and noise must have one shape, got {tuple(data.shape)} and {tuple(noise.shape)}.")
    size = data.shape[0]
    if labels is not None and labels.shape != (size,):
        raise ValueError(f"There must be one label for each of {size} samples, got the shape {tuple(labels.shape)}.")
    # Noise is assigned to data: its rows are alike, those of images differ in size, and take the solver twice as long.
    products = (noise.reshape(size, -1).float() @ data.reshape(size, -1).float().T).cpu().numpy()
    kinds = np.zeros(size) if labels is None else labels.cpu().numpy()
    permutation = np.arange(size)
    for kind in np.unique(kinds):
        members = np.flatnonzero(kinds == kind)
        data_of_noise = linear_sum_assignment(products[np.ix_(members, members)], maximize=True)[1]
        permutation[members[data_of_noise]] = members
    return torch.from_numpy(permutation)


def semidiscrete_assignment(data: torch.Tensor, noise: torch.Tensor, potentials: torch.Tensor) -> torch.Tensor:
    """
    Data to which noise belongs in a semidiscrete coupling: the one of least `|data - noise|^2 - potential`.

    Args:
        data (`torch.Tensor` of shape `(num_samples, ...)`):
            All data.
        noise (`torch.Tensor` of shape `(batch_size, ...)`):
            Noise, of the shape of the samples.
        potentials (`torch.Tensor` of shape `(num_samples,)`):
            Potentials of [`fit_semidiscrete`].

    Returns:
        `torch.Tensor` of shape `(batch_size,)`: int64, a row of `data` for each noise.
    """
    rows = data.flatten(1)
    return torch.addmm(potentials - rows.square().sum(1), noise.flatten(1), rows.T, alpha=2.0).argmax(1)


def _in_span(data: torch.Tensor) -> torch.Tensor:
    """Rows of data in orthonormal coordinates of their span, where it has fewer: noise is standard normal in these."""
    rows = data.flatten(1)
    return rows if len(rows) >= rows.shape[1] else torch.linalg.qr(rows.T, mode="r").R.T


def fit_semidiscrete(
    data: torch.Tensor, generator: torch.Generator | None = None, num_steps: int = 1000
) -> torch.Tensor:
    """
    Potentials of the optimal transport of standard normal noise to a finite data set (arXiv 2509.25519).

    They maximise `E min_j (|data_j - noise|^2 - potential_j) + mean potential`, by ascent along the stochastic
    gradient `1 / num_samples - share of the noise that belongs to j` with a falling rate and an average of the last
    steps. At the maximum each sample gets an equal share of the noise, so that the marginal of the data is kept;
    before it, it is not: measure it with [`cell_masses`].

    Args:
        data (`torch.Tensor` of shape `(num_samples, ...)`):
            All data, at least 1 sample.
        generator (`torch.Generator`, *optional*):
            Generator of the noise, on the device of the data.
        num_steps (`int`, *optional*, defaults to 1000):
            Steps, each with `FIT_BATCH_SIZE` samples of noise.

    Returns:
        `torch.Tensor` of shape `(num_samples,)`: the potentials, of mean 0.

    Raises:
        ValueError: if there is no data or no step.
    """
    if len(data) < 1 or num_steps < 1:
        raise ValueError(f"There must be data and at least 1 step, got {len(data)} samples and {num_steps} steps.")
    data = _in_span(data)
    potentials = torch.zeros(len(data), dtype=data.dtype, device=data.device)
    # A difference of potentials moves a wall between cells; the spread of the data gives its unit.
    rate = len(data) ** 0.5 * 2 * data.std(0, correction=0).norm().item()
    first_kept = min(math.ceil((1 - AVERAGED_SHARE) * num_steps), num_steps - 1)
    kept = torch.zeros_like(potentials)
    for step in range(num_steps):
        noise = torch.randn(FIT_BATCH_SIZE, data.shape[1], generator=generator, dtype=data.dtype, device=data.device)
        found = semidiscrete_assignment(data, noise, potentials).bincount(minlength=len(data))
        fall = (1 + 20 * step / num_steps) ** -1
        potentials += rate * fall * (1 / len(data) - found / FIT_BATCH_SIZE)
        if step >= first_kept:
            kept += potentials / (num_steps - first_kept)
    return kept - kept.mean()


def share_variance(counts: torch.Tensor) -> float:
    """
    Mean of `(share - 1)^2` beyond that of chance, about zero if the marginal of the data is kept.

    Args:
        counts (`torch.Tensor` of shape `(num_samples,)`):
            Noise that each sample got, integers; the shares are these over their mean.
    """
    num_samples, total = len(counts), counts.sum().item()
    return num_samples * counts.square().sum().item() / total**2 - 1 - (num_samples - 1) / total


def cell_masses(
    data: torch.Tensor, potentials: torch.Tensor, num_noise: int, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, float]:
    """
    Share of the noise that each sample of a semidiscrete coupling gets, times the number of samples: 1 for each if the
    marginal of the data is kept.

    Args:
        data, potentials, generator:
            As for [`fit_semidiscrete`].
        num_noise (`int`):
            Samples of noise, best many for each sample of the data.

    Returns:
        `tuple[torch.Tensor, float]`: shares of shape `(num_samples,)`, and their [`share_variance`].
    """
    data = _in_span(data)
    counts = torch.zeros(len(data), dtype=torch.int64, device=data.device)
    for start in range(0, num_noise, FIT_BATCH_SIZE):
        size = (min(FIT_BATCH_SIZE, num_noise - start), data.shape[1])
        noise = torch.randn(size, generator=generator, dtype=data.dtype, device=data.device)
        counts += semidiscrete_assignment(data, noise, potentials).bincount(minlength=len(data))
    return counts.to(data.dtype) * len(data) / num_noise, share_variance(counts)
