# SPDX-License-Identifier: Apache-2.0
"""Couplings of noise and data in training: independent, or by optimal transport in each batch."""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


COUPLINGS = ("independent", "minibatch_ot")


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
