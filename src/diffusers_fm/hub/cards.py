# SPDX-License-Identifier: Apache-2.0
"""Model cards: metadata that the Hub validates, and what a reader of the model wants to know, from plain data."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..paths import ConditionalPath, CosinePath, DiscreteVPPath, OTPath, VEPath, VPPath
from .portable import without_local_paths


CITATION = """@inproceedings{lipman2023flow,
  title     = {Flow Matching for Generative Modeling},
  author    = {Lipman, Yaron and Chen, Ricky T. Q. and Ben-Hamu, Heli and Nickel, Maximilian and Le, Matt},
  booktitle = {International Conference on Learning Representations},
  year      = {2023},
  eprint    = {2210.02747},
  archivePrefix = {arXiv}
}"""

METRICS_FILES = ("metrics.json", "evaluation/metrics.json")
# Numbers of an evaluation that say how it was done, not what was found.
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
    A picture in the repository.

    Args:
        file (`str`):
            Its path there.
        prompt (`str`, *optional*):
            The prompt that it was made from; pictures with one go to the Hub's gallery.
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
        dataset_name (`str`):
            What they were measured on.
        dataset (`str`, *optional*):
            Its id on the Hub.
        split (`str`, *optional*):
            Its split.
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
        The figures in a folder.

        Args:
            folder (`Path`):
                Of a pipeline.

        Returns:
            [`Evaluation`] or `None`: what is in its `metrics.json` or `evaluation/metrics.json`, unless that is older
            than the pipeline: one object with the arguments of this class as keys, or what `evaluate.py` writes.

        Raises:
            ValueError: if the file holds something else.
        """
        index = folder / "model_index.json"
        built = index.stat().st_mtime if index.is_file() else 0
        files = [folder / name for name in METRICS_FILES]
        file = next((file for file in files if file.is_file() and file.stat().st_mtime >= built), None)
        if file is None:
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or "dataset_name" not in found:
            raise ValueError(f"{str(file)!r} must hold an object with `dataset_name` and figures, got {found!r:.100}.")
        if "metrics" in found:
            return cls(**{entry.name: found[entry.name] for entry in dataclasses.fields(cls) if entry.name in found})
        solvers = found.get("solvers") or {}
        return cls(_figures(found), found["dataset_name"], solvers=[_short(row) for row in solvers.get("fixed", ())])


def _figures(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers by name, without the settings of the evaluation."""
    figures: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            figures |= _figures(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name not in NO_FIGURES:
            figures[f"{prefix}{name}"] = value
    return figures


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in row.items()}


@dataclass(frozen=True)
class CardContent:
    """
    What a card says. Everything but the first four may be left out.

    Args:
        repo_id (`str`):
            Where the model is; the title of the card is its last part.
        summary (`str`):
            What the model is, in a sentence.
        snippet (`str`):
            Python that loads and samples it.
        scheduler (`Mapping[str, Any]`):
            The scheduler's configuration.
        path (`ConditionalPath`, *optional*):
            Its path.
        pipeline_tag (`str`, *optional*):
            The task, by the Hub's name.
        tags (`Sequence[str]`, *optional*):
            Tags beside `diffusers-fm` and `flow-matching`.
        license (`str`, *optional*):
            The Hub's identifier of a licence, such as `apache-2.0`.
        datasets (`Sequence[str]`, *optional*):
            Ids on the Hub of what was trained on.
        base_model (`str`, *optional*):
            Id on the Hub of what was fine-tuned.
        instance_prompt (`str`, *optional*):
            The prompt that brings out what a LoRA has learned.
        pictures (`Sequence[Picture]`, *optional*):
            Samples.
        facts (`Mapping[str, str]`, *optional*):
            Rows of a table: network, size of the images, data, length of the training.
        solvers (`Sequence[Mapping[str, Any]]`, *optional*):
            Rows of the table of solvers, by column.
        losses_by_time (`Sequence[float | None]`, *optional*):
            Held-out losses of equal parts of [0, 1], from data to noise.
        evaluation ([`Evaluation`], *optional*):
            Measured figures.
        arguments (`Mapping[str, Any]`, *optional*):
            Arguments of the training script.
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


def model_card(content: CardContent) -> ModelCard:
    """
    The card of a model.

    Args:
        content ([`CardContent`]):
            What it says.

    Returns:
        `ModelCard`: the card; `save` writes it.
    """
    sections = [f"# {content.repo_id.rpartition('/')[2]}", content.summary, _pictures(content), _trigger(content)]
    sections += [
        "## Use",
        f"```python\n{content.snippet.strip()}\n```",
        _table(content.solvers),
        _facts(content.facts),
    ]
    sections += [_path(content), _losses(content.losses_by_time), _evaluation(content.evaluation)]
    if content.arguments:
        arguments = json.dumps(without_local_paths(dict(content.arguments)), indent=2)
        sections += ["## Training arguments", _folded("All arguments", arguments)]
    sections += ["## Citation", f"```bibtex\n{CITATION}\n```"]
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{_metadata(content).to_yaml()}\n---\n\n{text}\n")


def with_evaluation(card: ModelCard, evaluation: Evaluation) -> ModelCard:
    """
    A card with measured figures, in place of those that it had.

    Args:
        card (`ModelCard`):
            The card.
        evaluation ([`Evaluation`]):
            The figures.

    Returns:
        `ModelCard`: another card.
    """
    data = ModelCardData(**card.data.to_dict())
    results = _results(evaluation, data.pipeline_tag)
    title = re.search(r"^# (.+)$", card.text, re.MULTILINE)
    data.model_name = data.model_name or (title[1].strip() if title else "model")
    data.eval_results, data.metrics = results, [result.metric_type for result in results]
    text = re.sub(r"\n## Evaluation\n.*?(?=\n## |\Z)", "", card.text, flags=re.DOTALL)
    before, citation, after = text.partition("\n## Citation\n")
    text = f"{before.rstrip()}\n\n{_evaluation(evaluation)}\n{citation}{after}"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n{text}")


def _results(evaluation: Evaluation, pipeline_tag: str | None) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=pipeline_tag or "unconditional-image-generation",
            dataset_type=evaluation.dataset or evaluation.dataset_name,
            dataset_name=evaluation.dataset_name,
            dataset_split=evaluation.split,
            metric_type=name.lower().replace(" ", "_"),
            metric_name=name,
            metric_value=value,
        )
        for name, value in evaluation.metrics.items()
    ]


def _metadata(content: CardContent) -> ModelCardData:
    results = [] if content.evaluation is None else _results(content.evaluation, content.pipeline_tag)
    widget = [{"text": p.prompt, "output": {"url": p.file}} for p in content.pictures if p.prompt is not None]
    optional = {
        "license": content.license,
        "datasets": list(content.datasets) or None,
        "base_model": content.base_model,
        "instance_prompt": content.instance_prompt,
        "widget": widget or None,
        "metrics": [result.metric_type for result in results] or None,
    }
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag=content.pipeline_tag,
        tags=["diffusers-fm", "flow-matching", *content.tags],
        model_name=content.repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
        **{key: value for key, value in optional.items() if value is not None},
    )


def _pictures(content: CardContent) -> str:
    plain = [f"![Samples]({picture.file})" for picture in content.pictures if picture.prompt is None]
    gallery = ["<Gallery />"] if len(plain) < len(content.pictures) else []
    return "\n\n".join(gallery + plain)


def _trigger(content: CardContent) -> str:
    if content.instance_prompt is None:
        return ""
    return f"## Trigger words\n\nUse `{content.instance_prompt}` to bring out what it has learned."


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"## Model\n\n| | |\n|---|---|\n{rows}"


def _solvers(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    return (
        "Solvers to choose from, by `FlowMatchScheduler.from_config(pipeline.scheduler.config, solver=...)`. NFE is"
        f" the number of calls of the network, what sampling costs.\n\n{_table(rows)}"
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows by column; a cell that a row lacks is empty."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([row.get(name, "") for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def _path(content: CardContent) -> str:
    """The path as a formula, and the configuration that carries it."""
    if content.path is None:
        return ""
    equations = EQUATIONS.get(type(content.path))
    shape = ""
    if equations is not None:
        alpha, sigma = equations(content.path)
        shape = f",\\qquad \\alpha(t) = {alpha},\\quad \\sigma(t) = {sigma}"
    formula = f"$$ x_t = \\alpha(t)\\,\\text{{data}} + \\sigma(t)\\,\\text{{noise}}{shape} $$"
    if equations is None:
        formula += f"\n\nof the path `{type(content.path).__name__}`, {dataclasses.asdict(content.path)}"
    config = {key: value for key, value in content.scheduler.items() if not key.startswith("_")}
    return (
        "## Path\n\n"
        f"{formula}\n\nat the time t in [0, 1], 0 = data and 1 = noise. The network answers"
        f" `{config.get('prediction_type', 'flow_prediction')}`.\n\n"
        + _folded("scheduler_config.json", json.dumps(without_local_paths(config), indent=2))
    )


def _losses(by_time: Sequence[float | None]) -> str:
    if not any(loss is not None for loss in by_time):
        return ""
    bins = len(by_time)
    rows = [
        {"t": f"{i / bins:.1f} to {(i + 1) / bins:.1f}", "loss": "" if loss is None else f"{loss:.4f}"}
        for i, loss in enumerate(by_time)
    ]
    return f"## Held-out loss by time\n\n0 = data, 1 = noise.\n\n{_table(rows)}"


def _evaluation(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    rows = [{"metric": name, "value": f"{value:.6g}"} for name, value in evaluation.metrics.items()]
    split = f", split `{evaluation.split}`" if evaluation.split else ""
    solvers = f"\n\n{_table(evaluation.solvers)}" if evaluation.solvers else ""
    return f"## Evaluation\n\nMeasured on {evaluation.dataset_name}{split}.\n\n{_table(rows)}{solvers}"


def _folded(title: str, text: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n```json\n{text}\n```\n\n</details>"
