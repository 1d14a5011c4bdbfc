# SPDX-License-Identifier: Apache-2.0
"""Tables of built-in entries, to which users add their own by name, and modules of the user's."""

import importlib
import sys
from pathlib import Path
from typing import Any, TypeVar


T = TypeVar("T")

LIBRARIES = (__name__.partition(".")[0], "diffusers")


def full_name(entry: Any) -> str:
    """Module and name of a class, a function or the class of another object, such as `my_paths.QuadraticPath`."""
    return f"{entry.__module__}.{getattr(entry, '__name__', type(entry).__name__)}"


def is_own(entry: Any) -> bool:
    """Return whether a class is from outside this package and diffusers."""
    return entry.__module__.partition(".")[0] not in LIBRARIES


def add_entry(table: dict[str, T], name: str, entry: T, what: str) -> None:
    """Put an entry of the user's into a table; the same one may come again, as when a module is reloaded."""
    if not isinstance(name, str) or not name.replace(".", "").isidentifier():
        raise ValueError(f"The name of a {what} must be of letters, digits, dots and underscores, got {name!r}.")
    if name in table and full_name(table[name]) != full_name(entry):
        raise ValueError(f"The name {name!r} of a {what} is taken by {full_name(table[name])}: choose another one.")
    table[name] = entry


def import_module(name: str) -> None:
    """Import a module of the user's, from the working folder too, as `python -m` does; a `ValueError` if none."""
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # What the module itself imports is its own affair.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"There is no module {name!r} to import: give the name of a file of Python in the working folder or of an"
            " installed package, without .py."
        ) from error
