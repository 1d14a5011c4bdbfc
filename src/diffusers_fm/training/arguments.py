# SPDX-License-Identifier: Apache-2.0
"""Arguments of a script: from the command line over those of a file, written beside the weights."""

import argparse
import json
import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..losses import WEIGHTINGS
from ..timesteps import DENSITIES


logger = logging.getLogger(__name__)

# Not written to files: a secret, and where the other arguments came from.
UNSAVED = ("hub_token", "config")


def weighting_scheme(name: str) -> str:
    """
    The value of `--weighting_scheme`. diffusers' scripts mean the density of the timesteps by some of its names.

    Args:
        name (`str`):
            What was given.

    Returns:
        `str`: the same, one of `WEIGHTINGS`.

    Raises:
        argparse.ArgumentTypeError: if it is no weighting.
    """
    if name not in WEIGHTINGS and name in DENSITIES:
        raise argparse.ArgumentTypeError(
            f"{name!r} is a density of the training times, not a weight of the loss: use --timestep_density {name}."
        )
    if name not in WEIGHTINGS:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(WEIGHTINGS)}.")
    return name


def parse_arguments(parser: argparse.ArgumentParser, argv: list[str] | None = None) -> argparse.Namespace:
    """
    Parse the command line; `--config FILE` gives the arguments that are not on it.

    Args:
        parser (`argparse.ArgumentParser`):
            With a `--config` argument; a `training_args.json` of an earlier run will do.
        argv (`list[str]`, *optional*):
            The command line; defaults to that of the process.

    Returns:
        `argparse.Namespace`: all arguments.

    Raises:
        ValueError: if the file cannot be read as a JSON object, or holds an unknown argument.
    """
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", default=None)
    found, remaining = only_config.parse_known_args(argv)
    words: list[str] = [] if found.config is None else _words(parser, Path(found.config))
    args = parser.parse_args(words + remaining)
    args.config = found.config
    return args


def _words(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The contents of a file of arguments as a command line, so that types and choices are checked."""
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r} of arguments.")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"The file of arguments {str(file)!r} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"The file of arguments {str(file)!r} must hold one JSON object.")
    known = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ValueError(f"The file {str(file)!r} holds arguments that the script does not have: {unknown}.")
    words = []
    for name, value in values.items():
        if known[name].nargs == 0:
            words += [f"--{name}"] if value else []
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}={value}"]
    return words


def saved_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """
    The arguments as they are written to files.

    Args:
        args (`argparse.Namespace`):
            All arguments.

    Returns:
        `dict[str, Any]`: the same by name, sorted, without the Hub's token.
    """
    return {name: value for name, value in sorted(vars(args).items()) if name not in UNSAVED}


def compare_arguments(
    args: argparse.Namespace, saved: dict[str, Any], fixed: Collection[str] = (), free: Collection[str] = ()
) -> None:
    """
    Look at what has changed since the first part of a resumed run; what may matter is told in a warning.

    Args:
        args (`argparse.Namespace`):
            The arguments now.
        saved (`dict[str, Any]`):
            Those of the first part.
        fixed (`Collection[str]`, *optional*):
            Names of those that must not change.
        free (`Collection[str]`, *optional*):
            Names of those that may change without a word.

    Raises:
        ValueError: if a fixed one has changed.
    """
    for name, value in saved_arguments(args).items():
        if name in free or name not in saved or saved[name] == value:
            continue
        if name in fixed:
            raise ValueError(f"--{name} was {saved[name]} in the run that is resumed and cannot be {value} now.")
        logger.warning("--%s was %s in the run that is resumed and is %s now.", name, saved[name], value)
