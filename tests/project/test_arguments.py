# SPDX-License-Identifier: Apache-2.0
"""Argument groups: refusals before any work, files of arguments, help, and the end of a refused script."""

import dataclasses
import json
import math
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
from processes import make_tasks, run_tasks
from training_runs import ROOT, load_script

from diffusers_fm.arguments import (
    Arguments,
    Count,
    Fixed,
    Fraction,
    Free,
    Needs,
    Number,
    Positive,
    Range,
    make_parser,
    option,
    parse_arguments,
    run_script,
)
from diffusers_fm.training.arguments import TrainingArguments, warn_of_settings


RECIPES = sorted([*ROOT.glob("pipelines/*/training.json"), *ROOT.glob("pipelines/*/lora.json")])
SCRIPTS = sorted((ROOT / "training_scripts").glob("*.py"))


@dataclass(frozen=True, kw_only=True)
class Steps(Arguments):
    _argument_group_name = "steps"

    folder: str = option(MISSING, "A folder.")
    steps: Count = option(3, "Steps.")
    rate: Fixed[Positive] = option(0.5, "A rate of 50 % by default.")
    mean: Number | None = option(None, "A mean.")
    kind: str = option("fast", "Kind.", ["fast", "slow"])
    parts: list[Fraction] = option([0.25], "Parts.")
    names: list[str] = option([], "Names.")
    output: Free[bool] = option(False, "Whether to write.")
    width: Annotated[Positive, Needs("kind", "slow")] = option(2.0, "Width of slow.")
    files: Annotated[list[str], Needs("output", True)] = option([], "Files to write.")

    def check(self) -> None:
        if self.kind == "slow" and self.steps > 5:
            raise ValueError(f"--kind slow takes at most 5 --steps, got {self.steps}.")


@dataclass(frozen=True, kw_only=True)
class Script(Steps):
    steps: Count = option(4, "Steps.")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--steps=0"], "--steps must be at least 1, got 0."),
        (["--rate=0"], "--rate must be above 0, got 0.0."),
        (["--rate=nan"], "--rate must be above 0, got nan."),
        (["--rate=inf"], "--rate must be above 0, got inf."),
        (["--mean=nan"], "--mean must be a number, got nan."),
        (["--kind=medium"], "--kind must be one of fast, slow, got 'medium'."),
        (["--parts", "0.5", "1.5"], r"--parts must be in \[0, 1\], got \[0.5, 1.5\]."),
        (["--kind=slow", "--steps=6"], "--kind slow takes at most 5 --steps, got 6."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_values_are_refused_before_any_work(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        parse_arguments(Script, ["--folder=x", *words])


def test_modules_are_imported_before_values_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_densities.py").write_text(
        "import diffusers_fm\ndiffusers_fm.register_density('late', lambda u: u)\n"
    )
    (tmp_path / "my_faults.py").write_text("import my_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", sys.path.copy())
    words = ["--pretrained_model_name_or_path=x", "--dataset_name=x", "--timestep_density=late"]
    with pytest.raises(ValueError, match=r"^--timestep_density must be one of uniform, .*, u_shaped, got 'late'\.$"):
        parse_arguments(TrainingArguments, words)
    args = parse_arguments(TrainingArguments, [*words, "--import_modules", "my_densities"])
    (tmp_path / "args.json").write_text(json.dumps(args.saved()))
    assert parse_arguments(TrainingArguments, ["--config", "args.json"]) == args
    for name in ("my_density", "my_densities.py"):
        with pytest.raises(ValueError, match=rf"^There is no module '{name}' to import: .*without \.py\.$"):
            parse_arguments(TrainingArguments, [*words, "--import_modules", name])
    with pytest.raises(ModuleNotFoundError, match="my_dependency"):
        parse_arguments(TrainingArguments, [*words, "--import_modules", "my_faults"])


@pytest.mark.parametrize(
    ("option", "ours"), [("num_epochs", "--num_train_epochs"), ("save_images_epochs=3", "--validation_steps")]
)
def test_names_of_other_scripts_are_answered(option: str, ours: str) -> None:
    words = ["--pretrained_model_name_or_path=x", "--dataset_name=x", f"--{option}"]
    with pytest.raises(ValueError, match=rf"^--{option.partition('=')[0]} of diffusers' examples is here {ours}"):
        parse_arguments(TrainingArguments, words)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lr_scheduler": "cosine"}, ["The warm-up of 500 steps is not over when the run ends after 400"]),
        ({}, ["The learning rate does not fall with --lr_scheduler constant"]),
        ({"lr_scheduler": "cosine", "lr_warmup_steps": 20}, []),
        ({"use_ema": True, "train_batch_size": 32}, ["An epoch has 1.88 steps: 60 samples, 32 in a step"]),
    ],
)
def test_doubtful_settings_are_said_before_training(
    options: dict[str, Any], said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    args = TrainingArguments(pretrained_model_name_or_path="x", dataset_name="x", **options)
    warn_of_settings(args, 400, 60, args.train_batch_size if "train_batch_size" in options else 4)
    assert [message[: len(start)] for message, start in zip(caplog.messages, said, strict=True)] == said


def test_arguments_without_effect_are_said() -> None:
    def said(*words: str) -> list[str]:
        return parse_arguments(Script, ["--folder=x", *words]).without_effect()

    assert said("--width=2") == said("--width=3", "--kind=slow", "--output", "--files", "a") == []
    assert said("--width=3", "--files", "a") == [
        "--width 3.0 has no effect without --kind slow.",
        "--files ['a'] has no effect without --output.",
    ]


def test_ranges() -> None:
    assert 0 in Range(0) and math.nan not in Range() and math.inf not in Range(0)
    assert 1 not in Range(0, 1, open_high=True) and 0 not in Range(0, open_low=True)
    assert str(Range(0, 1, open_high=True)) == "in [0, 1)"


def test_a_script_has_its_own_defaults_and_nothing_changes_them() -> None:
    args = parse_arguments(Script, ["--folder=x", "--output"])
    assert (args.steps, args.parts, args.output) == (4, [0.25], True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        args.steps = 5  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_of_arguments_with_a_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    args = parse_arguments(Script, ["--folder=ü", "--rate=0.25", "--parts", "0.5", "1", "--output"])
    file.write_text(json.dumps(args.saved(), ensure_ascii=False), encoding=encoding)
    assert parse_arguments(Script, ["--config", str(file)]) == args
    assert parse_arguments(Script, ["--config", str(file), "--steps=2"]).steps == 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_recipes_work_from_any_folder(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kinds = {"lora.json": "_text_to_image_lora", "upscale": "_upscale", "text_encoder": "_text_to_image"}
    parts = [recipe.name, recipe.parent.name.partition("-")[0], *(folder.name for folder in recipe.parent.iterdir())]
    kind = next((kind for part, kind in kinds.items() if part in parts), "_flow_matching")
    script = load_script(ROOT / "training_scripts" / f"train{kind}.py")
    written = json.loads(recipe.read_text())
    data = [] if "dataset_name" in written else ["--dataset_name=own"]
    args = parse_arguments(script.ScriptArguments, ["--config", str(recipe), "--output_dir=run", *data])
    for name in ("pretrained_model_name_or_path", "dataset_name"):
        if name in written and (ROOT / written[name]).exists():
            assert Path(getattr(args, name)) == ROOT / written[name]
    assert args.output_dir == "run"


def test_lists_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "arguments.json"
    file.write_text(json.dumps({"folder": "x", "names": ["-dog", "a cat"], "parts": [1]}))
    args = parse_arguments(Script, ["--config", str(file)])
    assert (args.names, args.parts) == (["-dog", "a cat"], [1.0])
    assert parse_arguments(Script, ["--config", str(file), "--names", "a"]).names == ["a"]
    file.write_text(json.dumps({"folder": "x", "parts": [2]}))
    with pytest.raises(ValueError, match=r"--parts must be in \[0, 1\], got \[2.0\]"):
        parse_arguments(Script, ["--config", str(file)])


def test_changes_on_resume() -> None:
    saved = parse_arguments(Script, ["--folder=x"]).saved()
    now = parse_arguments(Script, ["--folder=x", "--steps=2", "--output"])
    assert now.resume_changes(saved) == ["--steps was 4 in the run that is resumed and is 2 now."]
    with pytest.raises(ValueError, match=r"--rate was 0\.5 in the run that is resumed and cannot be 1\.0 now"):
        parse_arguments(Script, ["--folder=x", "--rate=1"]).resume_changes(saved)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_help_shows_groups_choices_and_defaults(file: Path) -> None:
    text = make_parser(load_script(file).ScriptArguments).format_help()
    assert text.startswith("usage:")
    assert text.split("\n")[0].endswith("[--config FILE] [options]")
    assert "(default: 64)" in text or "(default: 16)" in text
    assert "--mixed_precision {no,fp16,bf16}" in text
    assert "--mixed-precision" not in text
    parser = make_parser(load_script(file).ScriptArguments)
    for action in parser._actions[1:]:
        said = parser._get_formatter()._expand_help(action)
        assert action.required or "default" in said, action.dest
    groups = [{action.dest for action in group._group_actions} for group in parser._action_groups]
    assert sum(any(name.startswith(("hub_", "push_")) for name in group) for group in groups) <= 1


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_refused_script_ends_with_one_sentence(file: Path, tmp_path: Path) -> None:
    words = ["--pretrained_model_name_or_path=x", f"--output_dir={tmp_path / 'run'}", "--eval_batch_size=0"]
    (ended,) = run_tasks(make_tasks(file, words))
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.strip().splitlines()[-1] == f"{file.name}: --eval_batch_size must be at least 1, got 0."
    assert not (tmp_path / "run").exists()


def test_an_error_that_is_no_refusal_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def main(args: Script) -> None:
        json.loads("{")

    monkeypatch.setattr(sys, "argv", ["script", "--folder=x"])
    with pytest.raises(ValueError, match="Expecting property name"):
        run_script(main, Script, None)
