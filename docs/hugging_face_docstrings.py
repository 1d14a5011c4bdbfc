# SPDX-License-Identifier: Apache-2.0
"""Shows Hugging Face docstrings without the types and defaults, which mkdocstrings reads off the signature."""

import re
from typing import Any

import griffe


ARGUMENT = re.compile(
    r"^(\s+\*{0,2}\w+) \(([`*\[].*?)\):(?=\s|$)", re.MULTILINE
)
# Several parameters of one description, `a, b (type):`, perhaps on several lines.
COMBINED = re.compile(
    r"^( +)((?:\*{0,2}\w+,\s+)+\*{0,2}\w+)((?: \([^\n]*\))?):((?:[^\n]*)(?:\n(?:\1 +[^\n]*|[ ]*(?=\n)))*)",
    re.MULTILINE,
)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\]")


def _argument(match: re.Match[str]) -> str:
    # The annotation tells a tensor, and only the docstring its shape.
    shape = re.search(r"of shape .*?(?=, \*optional\*|$)", match[2])
    return (
        f"{match[1]}: {shape[0][0].upper()}{shape[0][1:]}."
        if shape
        else f"{match[1]}:"
    )


def _combined(match: re.Match[str]) -> str:
    indent, names, types, description = match.groups()
    return "\n".join(
        f"{indent}{name}{types}:{description}"
        for name in re.split(r",\s+", names)
    )


def _reference(match: re.Match[str]) -> str:
    return f"`{match[2].rpartition('.')[2] if match[1] else match[2]}`"


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = REFERENCE.sub(
                _reference,
                ARGUMENT.sub(
                    _argument, COMBINED.sub(_combined, obj.docstring.value)
                ),
            )
