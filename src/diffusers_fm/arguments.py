# SPDX-License-Identifier: Apache-2.0
"""Argument groups: frozen dataclasses that check themselves, read from a command line over a JSON file."""

import argparse
import dataclasses
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser

from .registry import import_module


T = TypeVar("T")
A = TypeVar("A", bound="Arguments")

# No package index has this package yet.
INSTALL = "pip install -e ."

# Arguments that may name what a recipe's folder lies beside.
INPUTS = ("pretrained_model_name_or_path", "vae_name_or_path", "dataset_name", "train_data_dir")

# Policies for a resumed run: a fixed argument must keep its value, a free one changes no result. Every other argument
# takes effect from the checkpoint on, and its change is logged.
Fixed = Annotated[T, "fixed"]
Free = Annotated[T, "free"]


@dataclass(frozen=True)
class Range:
    """Accepted numbers: finite, from `low` to `high`, the ends included unless `open_low` or `open_high`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return "a number" if math.isinf(self.low) else f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


@dataclass(frozen=True)
class Needs:
    """Another argument of the group, and the value without which the annotated one has no effect."""

    name: str
    value: Any

    def __str__(self) -> str:
        return self.name if self.value is True else f"{self.name} {self.value}"


Count = Annotated[int, Range(1)]
Size = Annotated[int, Range(0)]
Number = Annotated[float, Range()]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


def option(default: Any, help: str, choices: Sequence[str] | None = None, source: str | None = None) -> Any:
    """
    A field of an argument group.

    Args:
        default (`Any`):
            Default value; `dataclasses.MISSING` for a required argument.
        help (`str`):
            Text of `--help`.
        choices (`Sequence[str]`, *optional*):
            Accepted values.
        source (`str`, *optional*):
            Where the default comes from.

    Returns:
        `Any`: a `dataclasses.field`.
    """
    if source is not None:
        help = f"{help} Default of {source}."
    # argparse reads `metavar`; the choices are checked by the group, with the sentence of every other refusal.
    metadata = {"help": help.replace("%", "%%"), "metavar": None if choices is None else f"{{{','.join(choices)}}}"}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """
    Base of argument groups. A group names itself by `_argument_group_name` and may refuse values in `check`; a script
    joins groups by inheritance, and gives its own defaults to their fields.

    Raises:
        ValueError: naming the argument, its value, and what is accepted.
    """

    def __post_init__(self) -> None:
        for field, annotations in annotated_fields(type(self)):
            values = getattr(self, field.name)
            choices = field.metadata.get("metavar")
            for value in values if isinstance(values, list) else [values]:
                if value is None:
                    continue
                if choices is not None and value not in choices[1:-1].split(","):
                    accepted = ", ".join(choices[1:-1].split(","))
                    raise ValueError(f"--{field.name} must be one of {accepted}, got {value!r}.")
                for annotation in annotations:
                    if isinstance(annotation, Range) and value not in annotation:
                        raise ValueError(f"--{field.name} must be {annotation}, got {values}.")
        for group in reversed(type(self).__mro__):
            if "check" in vars(group):
                group.check(self)

    def check(self) -> None:
        """Refuse values that do not go together. Every group's own `check` is called once."""

    def without_effect(self) -> list[str]:
        """Arguments that are not at their default and have no effect, a sentence each."""
        sentences = []
        for field, annotations in annotated_fields(type(self)):
            value = getattr(self, field.name)
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            for needs in annotations:
                if isinstance(needs, Needs) and value != default and getattr(self, needs.name) != needs.value:
                    sentences.append(f"--{field.name} {value} has no effect without --{needs}.")
        return sentences

    def resume_changes(self, saved: Mapping[str, Any]) -> list[str]:
        """Sentences on arguments that change a resumed run from its checkpoint on; a `ValueError` for fixed ones."""
        changes = []
        for field, annotations in annotated_fields(type(self)):
            name, value = field.name, getattr(self, field.name)
            if name not in saved or saved[name] == value or "free" in annotations or name == "hub_token":
                continue
            change = f"--{name} was {saved[name]} in the run that is resumed and"
            if "fixed" in annotations:
                raise ValueError(f"{change} cannot be {value} now.")
            changes.append(f"{change} is {value} now.")
        return changes

    def saved(self) -> dict[str, Any]:
        """The arguments by name, sorted, for files: without the Hub's token and the file that they came from."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: values[name] for name in sorted(values) if name != "hub_token"}


@dataclass(frozen=True, kw_only=True)
class ModuleArguments(Arguments):
    """Modules of one's own."""

    _argument_group_name = "modules"

    import_modules: Free[list[str]] = option(
        [],
        "Modules to import first, from the working folder too: such as register a path, a density or a network.",
    )


def annotated_fields(group: type[Arguments]) -> Iterator[tuple[dataclasses.Field, list[Any]]]:
    """The fields of a group, with what `Annotated` says of each."""

    def metadata(hint: Any) -> Iterator[Any]:
        if get_origin(hint) is Annotated:
            yield from hint.__metadata__
        for argument in get_args(hint):
            yield from metadata(argument)

    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        yield field, list(metadata(hints[field.name]))


# Options of diffusers' example scripts, and how they are said here.
FOREIGN = {
    "num_epochs": "--num_train_epochs",
    "save_images_epochs": "--validation_steps, in steps",
    "save_model_epochs": "--checkpointing_steps, in steps",
    "validation_epochs": "--validation_steps, in steps",
    "num_train_timesteps": "`num_train_timesteps` in the pipeline's scheduler_config.json",
    "ddpm_num_steps": "`num_train_timesteps` in the pipeline's scheduler_config.json",
    "ddpm_num_inference_steps": "--num_inference_steps",
    "ddpm_beta_schedule": "`path` and `path_kwargs` in the pipeline's scheduler_config.json",
    "prediction_type": "`prediction_type` in the pipeline's scheduler_config.json",
    "model_config_name_or_path": "--pretrained_model_name_or_path, a folder of a pipeline",
    "logger": "--report_to",
    "use_8bit_adam": "--optimizer adamw8bit",
    "non_ema_revision": "--revision",
    "noise_offset": "nothing: the flow ends in pure noise",
    "enable_xformers_memory_efficient_attention": "nothing: torch's attention is used",
    "instance_data_dir": "--train_data_dir",
    "validation_prompt": "--validation_prompts",
    "precondition_outputs": "`prediction_type` in the pipeline's scheduler_config.json",
}


def refuse_foreign(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Raise a `ValueError` at an option of diffusers' example scripts that is called otherwise here."""
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name in FOREIGN and word.partition("=")[0] not in parser._option_string_actions:
            raise ValueError(f"--{name} of diffusers' examples is here {FOREIGN[name]}.")


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One name for each option, choices and default beside its help."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        if action.nargs == 0 or action.const is True:
            return name
        return f"{name} {action.metavar or ''}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if action.required or default == argparse.SUPPRESS or (default is None and "default" in text):
            return text
        shown = "off" if default is False else "none" if default in (None, []) else "%(default)s"
        return f"{text} (default: {shown})"


def make_parser(arguments: type[Arguments], description: str | None = None) -> HfArgumentParser:
    """
    The parser of a script's arguments, in the groups that it joins. Names may not be shortened.

    Args:
        arguments (`type[Arguments]`):
            The script's class of arguments.
        description (`str`, *optional*):
            The script's docstring.

    Returns:
        `HfArgumentParser`: with `--config` besides.
    """
    groups = [group for group in arguments.__mro__ if "_argument_group_name" in vars(group)]
    parser = HfArgumentParser(
        groups,
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [options]",
    )
    parser.add_argument("--config", help="JSON file of arguments, such as a run's training_args.json.")
    own = {field.name: field.default for field in dataclasses.fields(arguments)}
    parser.set_defaults(**{name: value for name, value in own.items() if value is not dataclasses.MISSING})
    return parser


def parse_arguments(arguments: type[A], argv: Sequence[str] | None = None, description: str | None = None) -> A:
    """
    Read a script's arguments. The command line wins over the file of `--config`.

    Args:
        arguments (`type[Arguments]`):
            The script's class of arguments.
        argv (`Sequence[str]`, *optional*):
            The command line; defaults to that of the process.
        description (`str`, *optional*):
            The script's docstring, for `--help`.

    Returns:
        `Arguments`: checked, and never changed again.

    Raises:
        ValueError: if a value is refused, the file is not a JSON object of known arguments, or there is no module of
            a name in `--import_modules`, all of which are imported before values are checked.
    """
    parser = make_parser(arguments, description)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config")
    found, words = config.parse_known_args(argv)
    if found.config is not None:
        words = _words(parser, Path(found.config).expanduser()) + words
    refuse_foreign(parser, words)
    given = parser.parse_args(words)
    for name in getattr(given, "import_modules", ()):
        import_module(name)
    values = vars(given)
    del values["config"]
    # A shell expands no `--output_dir=~/run`.
    paths = {name: value for name, value in values.items() if isinstance(value, str) and value.startswith("~/")}
    return arguments(**values | {name: str(Path(value).expanduser()) for name, value in paths.items()})


def _words(parser: argparse.ArgumentParser, file: Path) -> list[str]:
    """The contents of a file of arguments as a command line, so that types are checked."""
    if not file.is_file():
        raise ValueError(f"There is no file {str(file)!r} of arguments.")
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
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
        if isinstance(value, list):
            # Not by the command line, where an element that begins with a dash would be an option.
            kind: Any = known[name].type
            parser.set_defaults(**{name: [kind(str(element)) for element in value]})
        elif value is not None:
            words.append(f"--{name}={_find_input(value, file) if name in INPUTS else value}")
    return words


def _find_input(value: str, file: Path) -> str:
    """A relative path in a file of arguments, from the working folder or else from a folder above the file."""
    if "/" not in value or Path(value).expanduser().exists():
        return value
    return next((str(folder / value) for folder in file.resolve().parents if (folder / value).exists()), value)


def install(extra: str) -> str:
    """The command that installs what an extra needs, for messages."""
    return f'`{INSTALL[:-1]}".[{extra}]"` in a clone of diffusers-fm'


def run_script(main: Callable[[A], None], arguments: type[A], description: str | None) -> None:
    """
    Run a script. What the package or the script refuses is one sentence on the console and exit status 2; any other
    error keeps its traceback.

    Args:
        main (`Callable`):
            The script's function.
        arguments (`type[Arguments]`):
            Its class of arguments.
        description (`str`, *optional*):
            Its docstring, for `--help`.
    """
    rank = os.environ.get("RANK", "0")
    try:
        parsed = parse_arguments(arguments, description=description)
        if rank == "0":
            for sentence in parsed.without_effect():
                print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr)
        main(parsed)
    except ValueError as error:
        frames = [frame.f_globals["__name__"] for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames[-1].split(".")[0] not in ("__main__", "diffusers_fm"):
            raise
        print(f"{Path(sys.argv[0]).name}{'' if rank == '0' else f' (process {rank})'}: {error}", file=sys.stderr)
        sys.exit(2)


def run_command(
    name: str, work: Callable[[A], None], arguments: type[A], description: str | None, argv: list[str] | None
) -> int:
    """
    Run a command of the package, `python -m diffusers_fm.NAME FOLDER ...`.

    Args:
        name (`str`):
            Its name.
        work (`Callable`):
            The command's function.
        arguments (`type[Arguments]`):
            Its class of arguments; a first word without a dash is the first of them.
        description (`str`, *optional*):
            Its docstring, for `--help`.
        argv (`list[str]`, *optional*):
            The command line; defaults to that of the process.

    Returns:
        `int`: 0 if it succeeded; 2, and a sentence on the console, if something was refused.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words = [f"--{dataclasses.fields(arguments)[0].name}", *words]
    try:
        work(parse_arguments(arguments, words, description))
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
