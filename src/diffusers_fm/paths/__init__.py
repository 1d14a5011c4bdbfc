# SPDX-License-Identifier: Apache-2.0
"""
Gaussian conditional probability paths (Lipman et al., arXiv 2210.02747, section 4), in one time direction.

Every path is `x_t = alpha(t) * data + sigma(t) * noise` with `t` in [0, 1], 0 = data and 1 = noise (the paper's time
is `1 - t`). A path that gives `alpha` and `sigma` has everything else: derivatives, samples, velocities, conversions
between the quantities a network may predict, and the straight coordinates in which each path becomes the optimal
transport one.
"""

import inspect
from typing import Any

import torch

from ..registry import add_entry, is_own
from .conditional import PREDICTION_TYPES, ConditionalPath, lift, refuse_without_limit
from .gaussian import CosinePath, DiscreteVPPath, LevelPath, OTPath, VEPath, VPPath


__all__ = [
    "PATHS",
    "PREDICTION_TYPES",
    "ConditionalPath",
    "CosinePath",
    "DiscreteVPPath",
    "LevelPath",
    "OTPath",
    "VEPath",
    "VPPath",
    "lift",
    "make_path",
    "refuse_without_limit",
    "register_path",
]

PATHS: dict[str, type[ConditionalPath]] = {
    "ot": OTPath,
    "vp": VPPath,
    "ve": VEPath,
    "cosine": CosinePath,
    "vp_discrete": DiscreteVPPath,
}


def register_path(name: str, path_class: type[ConditionalPath]) -> None:
    """
    Give a path of one's own a name, by which schedulers make, save and load it.

    The call belongs into the module that defines the class: a saved scheduler names the class, and whoever loads it
    has to import that module first.

    Args:
        name (`str`):
            What `path` is called in `scheduler_config.json`.
        path_class (`type[ConditionalPath]`):
            A subclass of [`ConditionalPath`] with `alpha` and `sigma`; `path_kwargs` are the arguments of its
            constructor, plain numbers, strings and lists.

    Raises:
        ValueError: If the name is taken, or the class is not one of a path.
    """
    if not (isinstance(path_class, type) and issubclass(path_class, ConditionalPath)):
        raise ValueError(f"A path must be a subclass of ConditionalPath, got {path_class!r}.")
    add_entry(PATHS, name, path_class, "path")


def make_path(name: str, **path_kwargs: Any) -> ConditionalPath:
    """
    Build a path by its name in `scheduler_config.json`.

    Args:
        name (`str`):
            One of `PATHS`: `ot`, `vp`, `ve`, `cosine`, `vp_discrete`, and those of [`register_path`].
        path_kwargs: The parameters of that path's class.

    Returns:
        `ConditionalPath`: The path.

    Raises:
        ValueError: If the name or a parameter is unknown or out of range, or `sigma / (alpha + sigma)` of a path that
            was registered does not rise with t.
    """
    if not isinstance(name, str) or name not in PATHS:
        raise ValueError(f"`path` must be one of {list(PATHS)}, got {name!r}.")
    accepted = list(inspect.signature(PATHS[name]).parameters)
    unknown = sorted(set(path_kwargs) - set(accepted))
    if unknown:
        raise ValueError(f"`path_kwargs` of the {name!r} path may hold {accepted}, got {unknown}.")
    path = PATHS[name](**path_kwargs)
    if is_own(PATHS[name]):
        _check_ratio(name, path)
    return path


def _check_ratio(name: str, path: ConditionalPath) -> None:
    """Raise a `ValueError` if the ratio of a path does not rise with t from 0 or more to 1 or less."""
    t = torch.linspace(0, 1, 65, dtype=torch.float64)
    ratio = path.ratio(t)
    rises = (ratio >= 0) & (ratio <= 1)
    rises[1:] &= ratio.diff() > 0
    if not bool(rises.all()):
        at = int(rises.int().argmin())
        raise ValueError(
            f"sigma / (alpha + sigma) of the path {name!r} must rise with t within [0, 1], but at"
            f" t = {t[at].item():g} it is {ratio[at].item():g} after {ratio[max(at - 1, 0)].item():g}."
        )
