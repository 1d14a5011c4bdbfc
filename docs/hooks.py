# SPDX-License-Identifier: Apache-2.0
"""Hooks of the documentation's build: formulas as MathML, a link to the repository, faults of pages as warnings."""

import html
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert


FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\s*(?:\\\((.*?)\\\)|\\\[(.*?)\\\])\s*</\1>',
    re.DOTALL,
)
SIGNATURE = re.compile(r'<div class="[^"]*doc-signature.*?</div>', re.DOTALL)
CODE = re.compile(r"<pre[^>]*>(.*?)</pre>", re.DOTALL)
TAG = re.compile(r"<[^>]+>")
CELL = re.compile(r"<(t[dh])\b.*?</\1>", re.DOTALL)
BREAKS = re.compile(
    r"(?<=[a-z0-9]{3})(?=[A-Z][a-z])|(?<=\w[a-z_][(.=/_])(?=\w)"
)
MATH = re.compile(r"<math.*?</math>", re.DOTALL)
# What a browser fetches to show the page; links are followed by readers alone.
FETCHED = re.compile(
    r"<(?:img|script|iframe|source)[^>]*\ssrc=\"?([^\"\s>]+)|<link[^>]*stylesheet[^>]*href=\"?([^\"\s>]+)"
)
CODE_COLUMNS = 79

log = logging.getLogger("mkdocs.hooks.site")


def on_config(config: Any) -> Any:
    """Link to the repository that this clone came from, unless `repo_url` says another."""
    if not config.repo_url:
        found = subprocess.run(
            ["git", "remote", "get-url", "origin"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
        if found.stdout.startswith("https://"):
            config.repo_url = found.stdout.strip().removesuffix(".git")
    return config


def mathml(match: re.Match[str]) -> str:
    """MathML of a formula that arithmatex found; browsers typeset it without scripts and fonts."""
    inline, block = match[2], match[3]
    formula = convert(
        html.unescape(inline or block), display="inline" if inline else "block"
    )
    return formula if inline else f'<div class="formula">{formula}</div>'


def breakable(match: re.Match[str]) -> str:
    """A cell of a table whose long names may break between their parts."""
    parts = re.split(
        r"(<math.*?</math>|<[^>]+>|&\w+;)", match[0], flags=re.DOTALL
    )
    return "".join(
        part if i % 2 else BREAKS.sub("<wbr>", part)
        for i, part in enumerate(parts)
    )


def on_page_content(content: str, **kwargs: Any) -> str:
    """Typeset the formulas of a page, and let names in tables break."""
    return CELL.sub(breakable, FORMULA.sub(mathml, content))


def faults(page: str) -> list[str]:
    """Faults of a page's HTML: raw TeX, code that is too wide, pictures without a text, files of other hosts."""
    found = []
    code = [
        html.unescape(TAG.sub("", block))
        for block in CODE.findall(SIGNATURE.sub("", page))
    ]
    for line in (
        line
        for block in code
        for line in block.splitlines()
        if len(line) > CODE_COLUMNS
    ):
        found.append(
            f"a line of code has {len(line)} columns, more than {CODE_COLUMNS}: {line.strip()}"
        )
    prose = html.unescape(
        TAG.sub(
            " ",
            CODE.sub(
                "",
                re.sub(r"<(code|script)\b.*?</\1>", "", page, flags=re.DOTALL),
            ),
        )
    )
    for tex in re.findall(
        r"\S*(?:\$[^$\n]+\$|\\[a-zA-Z(\[]+|arithmatex)\S*", prose
    ):
        found.append(f"a formula was not typeset: {tex}")
    for formula in MATH.findall(page):
        if "\\" in formula:
            found.append(
                f"a formula holds a command that is not known: {TAG.sub('', formula)}"
            )
    for picture in re.findall(r"<img[^>]*>", page):
        if not re.search(r'\salt="?[^"\s]', picture):
            found.append(f"a picture has no text: {picture}")
    for first, second in FETCHED.findall(page):
        if "//" in (first or second):
            found.append(
                f"a file of another host is needed: {first or second}"
            )
    return found


def on_post_page(output: str, page: Any, **kwargs: Any) -> str:
    """Warn of faults; with `--strict`, as in `make docs`, warnings are errors."""
    for fault in faults(output):
        log.warning("%s: %s", page.file.src_uri, fault)
    return output
