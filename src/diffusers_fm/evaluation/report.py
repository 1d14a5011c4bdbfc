# SPDX-License-Identifier: Apache-2.0
"""Figures as files: JSON, tables, plots, pictures."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from ..arguments import install
from ..files import replace_text
from ..training.validation import make_grid


METRICS_FILE = "metrics.json"


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> Path:
    """Write `metrics.json`."""
    file = folder / METRICS_FILE
    replace_text(file, json.dumps(metrics, indent=2) + "\n")
    return file


def write_table(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV, a column for each name that occurs."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, names)
        writer.writeheader()
        writer.writerows(rows)


def flat_rows(metrics: Mapping[str, Any], prefix: str = "") -> list[dict[str, Any]]:
    """Nested figures as rows of `metric` and `value`; lists have tables of their own and are left out."""
    rows = []
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            rows += flat_rows(value, f"{prefix}{name}/")
        elif not isinstance(value, (list, tuple)):
            rows.append({"metric": prefix + name, "value": value})
    return rows


def picture_grid(images: np.ndarray, columns: int) -> PIL.Image.Image:
    """Picture of uint8 images `(num_images, channels, height, width)` in rows."""
    pictures = [PIL.Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in images]
    return make_grid([pictures[i : i + columns] for i in range(0, len(pictures), columns)])


def pyplot() -> Any:
    """matplotlib's pyplot that draws to files; a `ValueError` if matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError(f"matplotlib is not installed: plots need {install('evaluate')}.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3, "figure.dpi": 120, "legend.fontsize": 8})
    return plt


def log_axes(axes: Any, **labels: str) -> None:
    """Label logarithmic axes, with ticks at 1, 2 and 5 of each decade, or at powers of ten if there are many."""
    from matplotlib import ticker

    axes.set(xscale="log", yscale="log", **labels)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = np.log10(axis.get_view_interval())
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if high - low < 2 else (1.0,)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(ticker.NullFormatter())


def plot_solvers(file: Path, rows: Sequence[Mapping[str, Any]], column: str, label: str) -> None:
    """Plot a column of rows with `solver` and `nfe` against the calls of the network, a line for each solver."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 4))
    for number, solver in enumerate(dict.fromkeys(row["solver"] for row in rows)):
        points = sorted((row["nfe"], row[column]) for row in rows if row["solver"] == solver)
        # Ten colours come round again as dashes.
        style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
        axes.plot(*zip(*points), marker="o", markersize=3, label=solver, **style)
    log_axes(axes, xlabel="calls of the network", ylabel=label)
    axes.legend()
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def plot_loss_by_time(file: Path, losses: Sequence[float | None]) -> None:
    """Plot the held-out loss in equal parts of the time, from data to noise; `None` where there is none."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6, 3))
    centres = (np.arange(len(losses)) + 0.5) / len(losses)
    values = [np.nan if loss is None else loss for loss in losses]
    axes.bar(centres, values, width=0.9 / len(losses))
    axes.set(xlabel="straight time (0 = data, 1 = noise)", ylabel="squared error of the velocity")
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)


def plot_trajectories(file: Path, points: np.ndarray, shown: int = 24) -> None:
    """Plot points `(batch_size, num_points, num_values)` in the plane in which their ends are spread most."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5, 5))
    ends = points[:, [0, -1]].reshape(-1, points.shape[-1])
    plane = np.linalg.svd(ends - ends.mean(0), full_matrices=False)[2][:2]
    for line in (points[:shown] - ends.mean(0)) @ plane.T:
        axes.plot(*line.T, linewidth=0.8, color="tab:blue", alpha=0.7)
        axes.plot(*line[0], "o", color="tab:gray", markersize=3)
        axes.plot(*line[-1], "o", color="tab:red", markersize=3)
    axes.set(xlabel="first principal direction", ylabel="second", title="noise (grey) to data (red)")
    figure.savefig(file, bbox_inches="tight")
    plt.close(figure)
