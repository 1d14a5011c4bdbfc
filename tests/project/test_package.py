# SPDX-License-Identifier: Apache-2.0
"""Contracts of the repository itself: metadata, dependency ranges, names, links, and the commands that are shown."""

import ast
import configparser
import re
import shlex
from collections import Counter
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import diffusers
import pytest
import yaml
from packaging.requirements import Requirement
from training_runs import load_script

import diffusers_fm
from diffusers_fm.arguments import make_parser


ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "diffusers_fm"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("pipelines/**/*.md"), *ROOT.glob("data/**/*.md")]
)

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def install_requires() -> list[Requirement]:
    lines = setup_cfg()["options"]["install_requires"].splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.strip().startswith("#")]


def code_blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [code for found, code in CODE_BLOCK.findall(text) if found == language]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    prose = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


# Metadata


def test_one_version() -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: diffusers_fm.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_fm.__version__
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == diffusers_fm.__version__


def test_version_is_a_literal() -> None:
    # setuptools reads a literal from the source; anything else would import the package, and torch, to build it.
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert [ast.literal_eval(value) for value in values] == [diffusers_fm.__version__]


def test_one_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["license"] == setup_cfg()["metadata"]["license_expression"] == "Apache-2.0"
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.parametrize("requirement", install_requires(), ids=lambda requirement: requirement.name)
def test_installed_version_is_in_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(version(requirement.name), prereleases=True)


def test_every_dependency_has_a_floor() -> None:
    floors = {
        requirement.name: [s.version for s in requirement.specifier if s.operator == ">="]
        for requirement in install_requires()
    }
    assert all(len(versions) == 1 for versions in floors.values()), floors


def test_torch_of_continuous_integration_is_in_its_range() -> None:
    pinned = re.findall(r"torch==([\d.]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8"))
    torch = next(requirement for requirement in install_requires() if requirement.name == "torch")
    assert pinned
    assert all(torch.specifier.contains(found) for found in pinned)


# Names


def test_no_room_has_the_name_of_a_stock_pipeline() -> None:
    # diffusers records a component whose module lies in such a folder under that name, and cannot load it again.
    rooms = [path.name for path in PACKAGE.rglob("*") if path.is_dir() and not path.name.startswith("__")]
    assert {"schedulers", "models", "pipelines"} <= set(rooms)
    assert [room for room in rooms if hasattr(diffusers.pipelines, room)] == []


def test_no_file_that_diffusers_would_run() -> None:
    # In a pipeline folder these names are remote code to diffusers, and a name without a dot breaks `variant=`.
    folders = sorted(path.parent for path in ROOT.glob("pipelines/*/model_index.json"))
    assert folders
    for folder in folders:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".json", ".md"}, folder


def test_public_names_exist() -> None:
    assert [name for name in diffusers_fm.__all__ if not hasattr(diffusers_fm, name)] == []


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert setup_cfg()["options.package_data"]["diffusers_fm"] == "py.typed"


def test_every_source_file_names_its_licence() -> None:
    folders = ("src", "tests", "training_scripts", "paper")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    without = [
        str(path.relative_to(ROOT))
        for path in sources
        if "# SPDX-License-Identifier: Apache-2.0" not in path.read_text(encoding="utf-8").splitlines()[:2]
    ]
    assert sources
    assert without == []


def test_contributing_has_the_floors_of_setup_cfg() -> None:
    layers = setup_cfg()["importlinter:contract:floors"]["layers"].split("\n")[1:]
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| ([^|]*) \|", text, re.MULTILINE)
    written = {int(floor): re.findall(r"`(\w+)`", rooms) for floor, rooms in rows}
    assert [written[floor] for floor in range(len(layers) - 1, -1, -1)] == [layer.split(" | ") for layer in layers]
    assert written[len(layers)] == ["__init__"]


def test_pipelines_page_lists_every_folder() -> None:
    page = (ROOT / "docs" / "pipelines.md").read_text(encoding="utf-8")
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    folders = [path.parent for path in ROOT.glob("pipelines/*/model_index.json")]
    assert [folder.name for folder in folders if f"`{folder.name}`" not in rows] == []
    assert [folder.name for folder in folders if not (folder / "README.md").exists()] == []
    sizes_alone = {folder.name for folder in folders if not (folder / "training.json").exists()}
    assert sizes_alone == {"flux-dev", "sd3-medium"}


# Documents


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    # Inside ~~~ and ``` there are no links; other hosts are not asked.
    prose = CODE_BLOCK.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(prose):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.relative_to(ROOT)} links to {link}, which does not exist"
        assert not anchor or anchor in anchors(target), f"{page.relative_to(ROOT)} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_examples_import_what_exists(page: Path) -> None:
    for code in code_blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "diffusers_fm":
                module = import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_files_and_options_that_exist(page: Path) -> None:
    for code in code_blocks(page, "bash"):
        for command in code.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            for i, word in enumerate(words):
                if word.startswith(("training_scripts/", "tests/", "paper/", ".ci/")):
                    assert (ROOT / word).exists(), f"{page.relative_to(ROOT)}: {word}"
                if word in ("--config", "--pretrained_model_name_or_path", "--dataset_name") and "/" in words[i + 1]:
                    # Not a Hub id, nor what a run leaves in runs/.
                    if (ROOT / words[i + 1].partition("/")[0]).exists() and not words[i + 1].startswith("runs/"):
                        assert (ROOT / words[i + 1]).exists(), f"{page.relative_to(ROOT)}: {words[i + 1]}"
            scripts = [word for word in words if word.startswith("training_scripts/")]
            if scripts:
                known = make_parser(load_script(ROOT / scripts[0]).ScriptArguments)._option_string_actions
                options = [word for word in words[words.index(scripts[0]) :] if word.startswith("--")]
                assert [option for option in options if option not in known] == []


def test_readme_commands_are_those_of_continuous_integration() -> None:
    commands = [code.replace("\\\n", " ") for code in code_blocks(ROOT / "README.md", "bash")]
    train, test = commands[0], commands[1].strip()
    assert "training_scripts/train_flow_matching.py" in train
    assert test in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_documentation_pages_are_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert [page for page in pages if f": {page}\n" not in navigation] == []


def test_every_room_has_a_reference_page() -> None:
    reference = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "api").glob("*.md"))
    rooms = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" and not path.stem.startswith("_")]
    rooms += [path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")]
    assert [room for room in rooms if f"::: diffusers_fm.{room}" not in reference] == []


def test_no_file_is_longer_than_600_lines() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 600} == {}


def test_nothing_stands_unused() -> None:
    kinds = (".py", ".md", ".ipynb")
    rooms = ("src", "training_scripts", "paper", "docs", "data", "pipelines")
    files = [path for room in rooms for path in (ROOT / room).rglob("*") if path.suffix in kinds]
    uses = Counter(word for path in files for word in re.findall(r"\w+", path.read_text(encoding="utf-8")))
    unused = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            names += [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
            unused += [f"{path.name}: {name}" for name in names if uses[name] < 2 and not name.startswith("__")]
    assert unused == []
