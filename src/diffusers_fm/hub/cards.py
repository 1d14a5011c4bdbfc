# SPDX-License-Identifier: Apache-2.0
"""Model cards from plain data: metadata that the Hub validates, and a text for the model's reader."""

import dataclasses
import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..paths import ConditionalPath, CosinePath, DiscreteVPPath, OTPath, VEPath, VPPath
from ..registry import full_name
from .portable import is_local, read_settings, without_local_paths


CITATION = """@inproceedings{lipman2023flow,
  title     = {Flow Matching for Generative Modeling},
  author    = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  eprint    = {2210.02747},
  archivePrefix = {arXiv}
}"""

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

METRICS_FILES = ("metrics.json", "evaluation/metrics.json")
# Settings among the numbers of an evaluation.
NO_FIGURES = ("seed", "images", "num_inference_steps")

# alpha(t) and sigma(t) in LaTeX, which the Hub renders.
EQUATIONS: dict[type[ConditionalPath], Callable[[Any], tuple[str, str]]] = {
    OTPath: lambda path: ("1 - t", "t" if path.sigma_min == 0 else f"{path.sigma_min} + (1 - {path.sigma_min})\\,t"),
    VPPath: lambda path: (
        f"\\exp\\!\\left(-\\tfrac12 \\left({path.beta_min}\\,t + \\tfrac12 ({path.beta_max} - {path.beta_min})\\,t^2"
        "\\right)\\right)",
        "\\sqrt{1 - \\alpha(t)^2}",
    ),
    VEPath: lambda path: ("1", f"{path.sigma_min}\\,({path.sigma_max} / {path.sigma_min})^t"),
    CosinePath: lambda path: ("\\cos(\\pi t / 2)", "\\sin(\\pi t / 2)"),
    DiscreteVPPath: lambda path: ("\\sqrt{\\textstyle\\prod_{i \\le t} (1 - \\beta_i)}", "\\sqrt{1 - \\alpha(t)^2}"),
}


@dataclass(frozen=True)
class Picture:
    """
    A picture by its path in the repository; one with the prompt that it shows goes to the Hub's gallery. A WAV file is
    heard in its place.
    """

    file: str
    prompt: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """
    Measured figures, for the card and for the Hub's model index.

    Args:
        metrics (`Mapping[str, float]`):
            Figures by name, such as `{"FID": 3.2}`.
        dataset_name (`str`), dataset (`str`, *optional*), split (`str`, *optional*):
            Name of the data, its Hub id and its split.
        solvers (`Sequence[Mapping[str, Any]]`, *optional*):
            Rows of a table of solvers.
    """

    metrics: Mapping[str, float]
    dataset_name: str
    dataset: str | None = None
    split: str | None = None
    solvers: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def read(cls, folder: Path) -> "Evaluation | None":
        """
        Read `metrics.json` or `evaluation/metrics.json` of a pipeline's folder, unless it is older than the pipeline:
        one object with the arguments of this class as keys, or the file that `evaluate.py` writes.
        """
        index = folder / "model_index.json"
        built = index.stat().st_mtime if index.is_file() else 0
        files = [folder / name for name in METRICS_FILES]
        file = next((file for file in files if file.is_file() and file.stat().st_mtime >= built), None)
        if file is None:
            return None
        found = without_local_paths(read_settings(file))
        if not isinstance(found, dict) or "dataset_name" not in found:
            raise ValueError(f"{str(file)!r} must hold an object with `dataset_name` and figures, got {found!r:.100}.")
        if "metrics" in found:
            return cls(**{entry.name: found[entry.name] for entry in dataclasses.fields(cls) if entry.name in found})
        rows = (found.get("solvers") or {}).get("fixed", ())
        short = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        return cls(_figures(found), found["dataset_name"], solvers=short)


def _figures(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by name, without the settings of the evaluation."""
    figures: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            figures |= _figures(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NO_FIGURES:
            figures[f"{prefix}{name}"] = value
    return figures


@dataclass(frozen=True)
class CardContent:
    """
    Content of a card.

    Args:
        repo_id (`str`), summary (`str`), snippet (`str`):
            Hub id or folder, a sentence on the model, and Python that loads and samples it.
        scheduler (`Mapping[str, Any]`), path (`ConditionalPath`, *optional*):
            The scheduler's configuration and its path.
        pipeline_tag (`str`, *optional*), tags (`Sequence[str]`, *optional*), license (`str`, *optional*):
            The task and the licence by the Hub's names, and further tags than `diffusers-fm` and `flow-matching`.
        datasets (`Sequence[str]`, *optional*), base_model (`str`, *optional*):
            Hub ids of the data and of the model that was fine-tuned.
        instance_prompt (`str`, *optional*), pictures (`Sequence[Picture]`, *optional*):
            The prompt that brings out a LoRA, and samples.
        facts (`Mapping[str, str]`, *optional*), solvers (`Sequence[Mapping[str, Any]]`, *optional*):
            Rows of the table of the model, such as its network and data, and of the table of solvers, by column.
        losses_by_time (`Sequence[float | None]`, *optional*):
            Held-out losses of equal parts of [0, 1], from data to noise.
        evaluation ([`Evaluation`], *optional*), arguments (`Mapping[str, Any]`, *optional*):
            Measured figures, and arguments of the training script.
        own_classes (`Sequence[str]`, *optional*):
            Classes of the user's by module and name, such as `my_network.MyNetwork`, besides that of the path.
    """

    repo_id: str
    summary: str
    snippet: str
    scheduler: Mapping[str, Any]
    path: ConditionalPath | None = None
    pipeline_tag: str | None = None
    tags: Sequence[str] = ()
    license: str | None = None
    datasets: Sequence[str] = ()
    base_model: str | None = None
    instance_prompt: str | None = None
    pictures: Sequence[Picture] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    solvers: Sequence[Mapping[str, Any]] = ()
    losses_by_time: Sequence[float | None] = ()
    evaluation: Evaluation | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    own_classes: Sequence[str] = ()


def model_card(content: CardContent) -> ModelCard:
    """Render a card; its `save` writes it."""
    plain = [f"![Samples]({picture.file})" for picture in content.pictures if picture.prompt is None]
    players = [
        f'{html.escape(str(sound.prompt))}: <audio controls src="{sound.file}"></audio>'
        for sound in content.pictures
        if sound.file.endswith(".wav")
    ]
    gallery = ["<Gallery />"] if len(plain) + len(players) < len(content.pictures) else []
    sections = [f"# {content.repo_id.rpartition('/')[2]}", content.summary, *gallery, *players, *plain]
    if content.instance_prompt is not None:
        sections += [f"## Trigger words\n\nUse `{content.instance_prompt}` to bring out what it has learned."]
    sections += [f"## Use\n\n```python\n{_own_imports(content)}{content.snippet.strip()}\n```"]
    if content.solvers:
        sections += [
            "Solvers to choose from, by `FlowMatchScheduler.from_config(pipeline.scheduler.config, solver=...)`. NFE"
            f" is the number of calls of the network, the cost of sampling.\n\n{_table(content.solvers)}"
        ]
    if content.facts:
        rows = "\n".join(f"| {name} | {value} |" for name, value in content.facts.items())
        sections += [f"## Model\n\n| | |\n|---|---|\n{rows}"]
    if content.path is not None:
        sections += [_path(content.path, content.scheduler)]
    if any(loss is not None for loss in content.losses_by_time):
        bins = len(content.losses_by_time)
        table = [
            {"t": f"{i / bins:.1f} to {(i + 1) / bins:.1f}", "loss": "" if loss is None else f"{loss:.4f}"}
            for i, loss in enumerate(content.losses_by_time)
        ]
        sections += [f"## Held-out loss by time\n\n0 = data, 1 = noise.\n\n{_table(table)}"]
    if content.evaluation is not None:
        sections += [_evaluation(content.evaluation)]
    if content.arguments:
        sections += [f"## Training arguments\n\n{_folded('All arguments', content.arguments)}"]
    sections += [f"## Citation\n\n```bibtex\n{CITATION}\n```"]
    text = "\n\n".join(sections)
    return ModelCard(f"---\n{_metadata(content).to_yaml()}\n---\n\n{text}\n")


def hub_id(name: str | None) -> str | None:
    """A name that is an id on the Hub, `None` for a folder: its name means nothing there and is refused in a card."""
    return name if name is not None and HUB_ID.fullmatch(name) and not is_local(name) else None


def with_evaluation(card: ModelCard, evaluation: Evaluation) -> ModelCard:
    """Another card, with measured figures in place of those that it had."""
    data = ModelCardData(**card.data.to_dict())
    results = _results(evaluation, data.pipeline_tag)
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    data.model_name = data.model_name or (title[1].strip() if title else "model")
    data.eval_results, data.metrics = results, [result.metric_type for result in results]
    text = re.sub(r"\n## Evaluation\n.*?(?=\n## |\Z)", "", card.text, flags=re.DOTALL)
    before, citation, after = text.partition("\n## Citation\n")
    text = f"{before.rstrip()}\n\n{_evaluation(evaluation)}\n{citation}{after}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _results(evaluation: Evaluation, task: str | None) -> list[EvalResult]:
    task, name = task or "unconditional-image-generation", evaluation.dataset_name
    more = {"dataset_split": evaluation.split}
    return [
        EvalResult(
            task, evaluation.dataset or name, name, metric.lower().replace(" ", "_"), value, metric_name=metric, **more
        )
        for metric, value in evaluation.metrics.items()
    ]


def _metadata(content: CardContent) -> ModelCardData:
    results = [] if content.evaluation is None else _results(content.evaluation, content.pipeline_tag)
    shown = [{"text": p.prompt, "output": {"url": p.file}} for p in content.pictures if p.prompt is not None]
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=content.pipeline_tag,
        tags=["diffusers-fm", "flow-matching", *content.tags],
        license=content.license,
        datasets=list(content.datasets) or None,
        base_model=content.base_model,
        metrics=[result.metric_type for result in results] or None,
        model_name=content.repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        instance_prompt=content.instance_prompt,
        widget=shown or None,
    )


def _own_imports(content: CardContent) -> str:
    """Lines that import the user's own classes, without which the model cannot be loaded."""
    lines = []
    for name in filter(None, [content.scheduler.get("_path_class"), *content.own_classes]):
        module, _, class_name = name.rpartition(".")
        is_script = module == "__main__"
        line = (
            f"# Define {class_name} first."
            if is_script
            else f"import {module}  # {class_name}; not in this repository"
        )
        lines += [f"{line}\n"]
    return "".join(lines)


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows by column; a cell that a row lacks is empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _path(path: ConditionalPath, scheduler: Mapping[str, Any]) -> str:
    """The path as a formula, and the configuration that carries it."""
    equations, shape = EQUATIONS.get(type(path)), ""
    if equations is not None:
        alpha, sigma = equations(path)
        shape = f",\\qquad \\alpha(t) = {alpha},\\quad \\sigma(t) = {sigma}"
    formula = f"$$ x_t = \\alpha(t)\\,\\text{{data}} + \\sigma(t)\\,\\text{{noise}}{shape} $$"
    if equations is None:
        formula += f"\n\nof the path `{full_name(type(path))}`, `path_kwargs` {scheduler.get('path_kwargs') or {}}"
    config = {key: value for key, value in scheduler.items() if not key.startswith("_")}
    return (
        f"## Path\n\n{formula}\n\nat the time t in [0, 1], 0 = data and 1 = noise. The network answers"
        f" `{config.get('prediction_type', 'flow_prediction')}`.\n\n{_folded('scheduler_config.json', config)}"
    )


def _evaluation(evaluation: Evaluation) -> str:
    rows = [{"metric": name, "value": f"{value:.6g}"} for name, value in evaluation.metrics.items()]
    split = f", split `{evaluation.split}`" if evaluation.split else ""
    solvers = f"\n\n{_table(evaluation.solvers)}" if evaluation.solvers else ""
    return f"## Evaluation\n\nMeasured on {evaluation.dataset_name}{split}.\n\n{_table(rows)}{solvers}"


def _folded(title: str, settings: Mapping[str, Any]) -> str:
    text = json.dumps(without_local_paths(dict(settings)), indent=2)
    return f"<details>\n<summary>{title}</summary>\n\n```json\n{text}\n```\n\n</details>"
