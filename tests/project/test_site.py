# SPDX-License-Identifier: Apache-2.0
"""The built documentation, without a browser; tests/benchmarks/site_in_browser.py looks at it in one."""

import html
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config


ROOT = Path(__file__).parents[2]
GUIDES = [file.stem for file in ROOT.glob("docs/*.md") if file.stem != "index"]
REPOSITORY = "https://example.org/me/diffusers-fm"


def hooks() -> ModuleType:
    """The hooks of the build, as mkdocs loads them."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation but for the reference, whose docstrings `make docs` reads."""
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), repo_url=REPOSITORY, plugins=["search"]))
    return folder


def read(site: Path, page: str) -> str:
    return (site / page / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["", *GUIDES], ids=lambda page: page or "index")
def test_pages_have_no_fault(site: Path, page: str) -> None:
    text = read(site, page)
    assert hooks().faults(text) == []
    assert text.count("<h1") == 1
    assert REPOSITORY in text
    for link in re.findall(r'\s(?:href|src)="?([^"\s>]+)', text):
        path, _, anchor = html.unescape(link).partition("#")
        if "//" in path or path.startswith(("mailto:", "data:")):
            continue
        target = (site / page / path).resolve()
        target = target / "index.html" if target.is_dir() else target
        assert target.exists(), link
        if anchor and target.suffix == ".html" and "api" not in target.parts:
            assert re.search(rf'\sid="?{re.escape(anchor)}["\s>]', target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", GUIDES)
def test_guides_lead_to_their_neighbours(site: Path, page: str) -> None:
    text = read(site, page)
    assert "md-footer__link--prev" in text
    assert "md-footer__link--next" in text


def test_formulas_are_typeset(site: Path) -> None:
    assert read(site, "concepts").count("<math") > 30


@pytest.mark.parametrize(
    ("page", "fault"),
    [
        ("<p>the path $x_t$</p>", "a formula was not typeset: $x_t$"),
        (r"<p>\(x_t\)</p>", r"a formula was not typeset: \(x_t\)"),
        (r"<p><math><mtext>\foo</mtext></math></p>", r"a formula holds a command that is not known: \foo"),
        (f"<pre><code>{'<b>x</b>' * 80}</code></pre>", f"a line of code has 80 columns, more than 79: {'x' * 80}"),
        ("<img src=a.png>", "a picture has no text: <img src=a.png>"),
        ("<script src=https://b.org/c.js>", "a file of another host is needed: https://b.org/c.js"),
    ],
)
def test_faults_are_found(page: str, fault: str) -> None:
    assert fault in hooks().faults(page)


@pytest.mark.parametrize(
    "page",
    [
        "<p><code>$HOME</code> and <a href=https://b.org>b</a></p>",
        f"<pre><code>{'<b>x</b>' * 79}</code></pre>",
        f'<div class="language-python doc-signature highlight"><pre><code>{"x" * 80}</code></pre></div>',
        "<img src=a.png alt=a>",
    ],
)
def test_sound_pages_have_no_fault(page: str) -> None:
    assert hooks().faults(page) == []
