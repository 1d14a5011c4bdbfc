# SPDX-License-Identifier: Apache-2.0
"""Distances between two sets of features, by the names of the papers."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from ..arguments import install
from ..precision import to_float64


# Every process has all features: torchmetrics must not gather them once more.
_ALONE = {"sync_on_compute": False}


class _AsGiven(nn.Module):
    """Features in the place of the network that torchmetrics asks for."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def import_torchmetrics() -> tuple[Any, Any, Any]:
    """torchmetrics' modules of FID, Inception score and KID; a `ValueError` if it is not installed."""
    try:
        from torchmetrics.image import fid, inception, kid
    except ImportError as error:
        raise ValueError(f"torchmetrics is not installed: quality figures need {install('evaluate')}.") from error
    # All features are in memory already, which torchmetrics would warn of.
    warnings.filterwarnings("ignore", "Metric .* will save all extracted features in buffer")
    return fid, inception, kid


def _check(features: np.ndarray, reference: np.ndarray, at_least: int) -> None:
    if features.ndim != 2 or reference.ndim != 2 or features.shape[1] != reference.shape[1]:
        raise ValueError(
            "Features must be two arrays (num_images, num_features) with equally many features, got shapes"
            f" {features.shape} and {reference.shape}."
        )
    if min(len(features), len(reference)) < at_least:
        raise ValueError(
            f"At least {at_least} images of each kind are needed, got {len(features)} and {len(reference)}."
        )


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """
    The squared Wasserstein distance of two normal distributions with the means and covariances of the features
    (Heusel et al., arXiv 1706.08500, equation 6): on Inception features, the FID.

    It falls with the number of images even between two halves of one set: compare only equal numbers.

    Args:
        features (`np.ndarray` of shape `(num_images, num_features)`), reference (`np.ndarray`):
            Features of the samples, and of the data.

    Returns:
        `float`: the distance, 0 or more.

    Raises:
        ValueError: if shapes do not fit, there are fewer than 2 images, or torchmetrics is not installed.
    """
    _check(features, reference, 2)
    fid, _, _ = import_torchmetrics()
    metric = fid.FrechetInceptionDistance(feature=_AsGiven(features.shape[1]), **_ALONE).set_dtype(torch.float64)
    metric.update(torch.from_numpy(reference).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    return max(0.0, metric.compute().item())


def kernel_distance(
    features: np.ndarray, reference: np.ndarray, subset_size: int = 1000, num_subsets: int = 100, seed: int = 0
) -> tuple[float, float]:
    """
    The unbiased squared maximum mean discrepancy with the kernel `(x . y / num_features + 1)^3`, over random subsets
    (Binkowski et al., arXiv 1801.01401): on Inception features, the KID.

    Args:
        features (`np.ndarray` of shape `(num_images, num_features)`), reference (`np.ndarray`):
            Features of the samples, and of the data.
        subset_size (`int`, *optional*, defaults to 1000), num_subsets (`int`, *optional*, defaults to 100):
            Images in a subset, fewer where there are fewer, and number of subsets.
        seed (`int`, *optional*, defaults to 0):
            Seed of the subsets.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the subsets.

    Raises:
        ValueError: if shapes do not fit, there are fewer than 2 images, or torchmetrics is not installed.
    """
    _check(features, reference, 2)
    _, _, kid = import_torchmetrics()
    size = min(subset_size, len(features), len(reference))
    metric = kid.KernelInceptionDistance(
        feature=_AsGiven(features.shape[1]), subsets=num_subsets, subset_size=size, **_ALONE
    ).set_dtype(torch.float64)
    metric.update(torch.from_numpy(reference).double(), real=True)
    metric.update(torch.from_numpy(features).double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def inception_score(logits: np.ndarray, num_splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """
    The exponential of the mean information that an image gives about its class (Salimans et al., arXiv 1606.03498).

    Args:
        logits (`np.ndarray` of shape `(num_images, num_classes)`):
            Logits of the samples.
        num_splits (`int`, *optional*, defaults to 10), seed (`int`, *optional*, defaults to 0):
            Number of the parts that are scored one by one, and the seed that shares out the images.

    Returns:
        `tuple[float, float]`: mean and standard deviation over the parts, the mean from 1 to the number of classes.

    Raises:
        ValueError: if there are fewer images than parts, or torchmetrics is not installed.
    """
    if len(logits) < num_splits:
        raise ValueError(f"At least {num_splits} images are needed for {num_splits} parts, got {len(logits)}.")
    _, inception, _ = import_torchmetrics()
    metric = inception.InceptionScore(feature=_AsGiven(logits.shape[1]), splits=num_splits, **_ALONE).set_dtype(
        torch.float64
    )
    metric.update(torch.from_numpy(logits).double())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        mean, deviation = metric.compute()
    return mean.item(), deviation.item()


def precision_and_recall(features: np.ndarray, reference: np.ndarray, neighbours: int = 3) -> tuple[float, float]:
    """
    The part of the samples that lies among the data, and the part of the data that lies among the samples: within the
    distance to the `neighbours`-th nearest neighbour of some point of the other set
    (Kynkaanniemi et al., arXiv 1904.06991, equations 1 and 2).

    Args:
        features (`np.ndarray` of shape `(num_images, num_features)`), reference (`np.ndarray`):
            Features of the samples, and of the data: as many, for figures that compare with others'.
        neighbours (`int`, *optional*, defaults to 3):
            Which neighbour gives the radius of a point.

    Returns:
        `tuple[float, float]`: precision and recall, in [0, 1].

    Raises:
        ValueError: if shapes do not fit, or there are not more images than `neighbours`.
    """
    _check(features, reference, neighbours + 1)
    drawn, real = (torch.from_numpy(points).double() for points in (features, reference))
    return _covered(drawn, real, neighbours), _covered(real, drawn, neighbours)


def _covered(points: torch.Tensor, support: torch.Tensor, neighbours: int) -> float:
    """The part of the points within the radius of some point of the support."""
    # The nearest point of a set to one of its own is that point itself.
    radii = torch.cat(
        [torch.cdist(rows, support).kthvalue(neighbours + 1, dim=1).values for rows in support.split(2048)]
    )
    inside = [(torch.cdist(rows, support) <= radii).any(1) for rows in points.split(2048)]
    return to_float64(torch.cat(inside)).mean().item()


def nearest(points: np.ndarray, reference: np.ndarray, block: int = 1024) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distance of each row of `points` to the nearest row of `reference`, and the number of that row."""
    against = torch.from_numpy(reference).float()
    found = torch.cat([torch.cdist(rows.float(), against).argmin(1) for rows in torch.from_numpy(points).split(block)])
    rows = found.numpy()
    # Distances by matrix products lose small ones to rounding.
    return np.linalg.norm(points.astype(np.float64) - reference[rows], axis=1), rows
