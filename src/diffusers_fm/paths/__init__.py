# SPDX-License-Identifier: Apache-2.0
"""
Gaussian conditional probability paths (Lipman et al., arXiv 2210.02747, section 4), in one time direction.

Every path is `x_t = alpha(t) * data + sigma(t) * noise` with `t` in [0, 1], 0 = data and 1 = noise (the paper's time
is `1 - t`). A path that gives `alpha` and `sigma` has everything else: derivatives, samples, velocities, conversions
between the quantities a network may predict, and the straight coordinates in which each path becomes the optimal
transport one.
"""

from dataclasses import fields
from typing import Any

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
]

PATHS: dict[str, type[ConditionalPath]] = {
    "ot": OTPath,
    "vp": VPPath,
    "ve": VEPath,
    "cosine": CosinePath,
    "vp_discrete": DiscreteVPPath,
}


def make_path(name: str, **path_kwargs: Any) -> ConditionalPath:
    """
    Build a path by its name in `scheduler_config.json`.

    Args:
        name (`str`):
            One of `PATHS`: `ot`, `vp`, `ve`, `cosine`, `vp_discrete`.
        path_kwargs: The parameters of that path's class.

    Returns:
        `ConditionalPath`: The path.

    Raises:
        ValueError: If the name or a parameter is unknown or out of range.
    """
    if not isinstance(name, str) or name not in PATHS:
        raise ValueError(f"`path` must be one of {list(PATHS)}, got {name!r}.")
    accepted = [field.name for field in fields(PATHS[name])]  # type: ignore[arg-type]
    unknown = sorted(set(path_kwargs) - set(accepted))
    if unknown:
        raise ValueError(f"`path_kwargs` of the {name!r} path may hold {accepted}, got {unknown}.")
    return PATHS[name](**path_kwargs)
