# SPDX-License-Identifier: Apache-2.0
"""Figures and tables of the reproduction, made of the files that its pieces left."""

import json
import math
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from objectives import OBJECTIVES
from pieces import SIZES, VIEW_CALLS, VIEW_TIMES
from problems import Checkerboard, Digits

from diffusers_fm.evaluation.distances import frechet_distance
from diffusers_fm.evaluation.report import log_axes, pyplot
from diffusers_fm.paths import make_path


COLOURS = dict(zip(OBJECTIVES, ("tab:gray", "tab:orange", "tab:red", "tab:blue", "tab:green", "tab:purple")))
ERRORS = (0.05, 0.02, 0.01)


class Results:
    """
    What the pieces found, by problem, objective and seed.

    Args:
        folder (`Path`):
            Where their files are.
        seeds (`Sequence[int]`):
            Which to read.
    """

    def __init__(self, folder: Path, seeds: Sequence[int]) -> None:
        self.folder, self.seeds = folder, list(seeds)

    @cache  # noqa: B019 - one object for one report
    def figures(self, problem: str, objective: str, seed: int, kind: str) -> dict[str, Any]:
        """Figures of one piece."""
        file = self.folder / problem / f"{objective}-{seed}" / f"{kind}.json"
        return json.loads(file.read_text(encoding="utf-8"))

    def arrays(self, problem: str, objective: str, kind: str) -> dict[str, np.ndarray]:
        """Arrays of a piece of the first seed."""
        file = self.folder / problem / f"{objective}-{self.seeds[0]}" / f"{kind}.npz"
        with np.load(file) as arrays:
            return dict(arrays)

    def over_seeds(self, problem: str, objective: str, kind: str, get: Callable[[dict[str, Any]], Any]) -> np.ndarray:
        """A figure for each seed."""
        return np.array([get(self.figures(problem, objective, seed, kind)) for seed in self.seeds], dtype=float)

    def by_calls(self, problem: str, objective: str, solver: str, column: str) -> tuple[list[int], np.ndarray]:
        """Numbers of calls, and a figure of a solver for each seed and number."""
        rows = [
            [row for row in self.figures(problem, objective, seed, "solvers")["rows"] if row["solver"] == solver]
            for seed in self.seeds
        ]
        return [row["nfe"] for row in rows[0]], np.array([[row[column] for row in one] for one in rows])

    def cpu_minutes(self) -> float:
        """CPU time of all pieces together."""
        files = self.folder.glob("*/*/*.json")
        return sum(json.loads(file.read_text(encoding="utf-8"))["cpu_seconds"] for file in files) / 60


def calls_for(calls: Sequence[int], errors: Sequence[float], error: float) -> float:
    """The calls that an error takes, interpolated in logarithms; NaN where it is not reached or always undercut."""
    for i in range(len(calls) - 1):
        if errors[i] >= error >= errors[i + 1]:
            part = math.log(errors[i] / error) / math.log(errors[i] / errors[i + 1])
            return calls[i] * (calls[i + 1] / calls[i]) ** part
    return math.nan


def spread(values: np.ndarray, digits: int) -> str:
    """Mean and standard deviation over the seeds."""
    if len(values) < 2:
        return f"{values.mean():.{digits}f}"
    return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    lines = [f"| {' | '.join(header)} |", "|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def main_table(results: Results) -> str:
    """The small counterpart of Table 1."""
    rows = []
    for name, objective in OBJECTIVES.items():
        digits, board = (
            {
                "nll": results.over_seeds(problem, name, "likelihood", lambda x, get=get: get(x["bits_per_dim"])),
                "distance": results.over_seeds(problem, name, "samples", lambda x: x["distance"]),
                "nfe": results.over_seeds(problem, name, "samples", lambda x: x["nfe"]),
            }
            for problem, get in (("digits", lambda bits: bits["20"]), ("checkerboard", lambda bits: bits))
        )
        rows.append(
            [objective.label]
            + [spread(digits["nll"], 3), spread(digits["distance"], 1), spread(digits["nfe"], 0)]
            + [spread(board["nll"], 3), spread(board["distance"], 3), spread(board["nfe"], 0)]
        )
    header = ["", "digits: NLL", "Fréchet", "NFE", "checkerboard: NLL", "distance", "NFE"]
    return table(header, rows)


def draws_table(results: Results) -> str:
    """The small counterpart of Table 4."""
    rows = []
    for name, objective in OBJECTIVES.items():
        bits = {
            k: results.over_seeds("digits", name, "likelihood", lambda x, k=k: x["bits_per_dim"][k])
            for k in ("1", "5", "20")
        }
        rows.append(
            [objective.label, *(spread(values, 3) for values in bits.values()), spread(bits["1"] - bits["20"], 3)]
        )
    return table(["", "K = 1", "K = 5", "K = 20", "1 less 20"], rows)


def order_table(results: Results) -> str:
    """Places of the objectives for each seed, best first."""
    short = {name: objective.label.replace(" path", "") for name, objective in OBJECTIVES.items()}
    measures = (
        ("digits, NLL at K = 20", "digits", "likelihood", lambda x: x["bits_per_dim"]["20"]),
        ("digits, Fréchet", "digits", "samples", lambda x: x["distance"]),
        ("digits, NFE", "digits", "samples", lambda x: x["nfe"]),
        ("checkerboard, NLL", "checkerboard", "likelihood", lambda x: x["bits_per_dim"]),
        ("checkerboard, distance", "checkerboard", "samples", lambda x: x["distance"]),
        ("checkerboard, NFE", "checkerboard", "samples", lambda x: x["nfe"]),
    )
    rows = []
    for label, problem, kind, get in measures:
        values = {name: results.over_seeds(problem, name, kind, get) for name in OBJECTIVES}
        places = np.argsort(np.argsort(np.stack(list(values.values())), axis=0), axis=0) + 1
        best = sorted(zip(OBJECTIVES, places), key=lambda item: item[1].mean())
        rows.append([label, *(f"{short[name]} ({'/'.join(map(str, place))})" for name, place in best)])
    return table(["", "1", "2", "3", "4", "5", "6"], rows)


def calls_table(results: Results) -> str:
    """Calls on OT relative to the diffusion path at equal errors, as in Figure 7."""
    rows = []
    for problem in SIZES:
        for solver in ("euler", "midpoint", "rk4"):
            cells = []
            for error in ERRORS:
                ratios, shown = [], {}
                for name in ("fm-ot", "fm-diffusion"):
                    calls, found = results.by_calls(problem, name, solver, "error")
                    shown[name] = np.array([calls_for(calls, one, error) for one in found])
                ratios = shown["fm-ot"] / shown["fm-diffusion"]
                reached = np.isfinite(ratios)
                if not reached.any():
                    cells.append("-")
                    continue
                ot, vp = (np.nanmean(shown[name][reached]) for name in ("fm-ot", "fm-diffusion"))
                low, high = ratios[reached].min(), ratios[reached].max()
                missing = "" if reached.all() else f", {reached.sum()} of {len(reached)} seeds"
                cells.append(
                    f"{ratios[reached].mean():.2f} ({low:.2f} to {high:.2f}; {ot:.0f} against {vp:.0f}{missing})"
                )
            rows.append([f"{problem}, {solver}", *cells])
    return table(["", *(f"error {error:g}" for error in ERRORS)], rows)


def ways_table(results: Results) -> str:
    """Straightness of the trajectories, in each path's own coordinates."""
    rows = []
    for name, objective in OBJECTIVES.items():
        cells = [
            spread(results.over_seeds(problem, name, "ways", lambda x, figure=figure: x[figure]), 3)
            for problem in SIZES
            for figure in ("path_length_ratio", "curvature")
        ]
        rows.append([objective.label, *cells])
    return table(["", *(f"{problem}: {figure}" for problem in SIZES for figure in ("length", "curvature"))], rows)


def board_floor(count: int) -> float:
    """The distance that points of the board itself have from it, for their number: what no model undercuts."""
    generator = torch.Generator().manual_seed(0)
    board = Checkerboard(Path())
    return float(np.mean([board.distance(board.draw(count, generator)) for _ in range(10)]))


def floors(results: Results) -> str:
    """Bounds of the figures in the tables."""
    digits = Digits(results.folder)
    held_out = digits.extractor((digits.load("test") * 255 / 16).round().byte())[0]
    distance, points = frechet_distance(held_out, digits.reference), SIZES["checkerboard"].num_samples
    return (
        f"The board itself has 1.5 bits per dimension, and {points:,} of its points a distance of"
        f" {board_floor(points):.3f} from it; the 297 held-out digits have a Fréchet distance of"
        f" {distance:.1f} from the training digits. All pieces took {results.cpu_minutes():.0f} minutes of one core."
    )


def show_counts(axes: Any, counts: np.ndarray) -> None:
    """A histogram of the plane."""
    axes.imshow(
        counts.T,
        origin="lower",
        cmap="magma",
        vmax=max(1.0, np.quantile(counts[counts > 0], 0.98)) if counts.any() else 1.0,
    )
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def plot_board(results: Results, file: Path, kind: str, columns: dict[str, str]) -> None:
    """Histograms of the checkerboard, a row for each objective."""
    plt = pyplot()
    figure, grid = plt.subplots(
        len(OBJECTIVES), len(columns), figsize=(1.35 * len(columns) + 0.4, 1.35 * len(OBJECTIVES))
    )
    for line, (name, objective) in zip(grid, OBJECTIVES.items()):
        arrays = results.arrays("checkerboard", name, kind)
        for axes, (key, title) in zip(line, columns.items()):
            show_counts(axes, arrays[key])
            if name == next(iter(OBJECTIVES)):
                axes.set_title(title, fontsize=8)
        line[0].set_ylabel(objective.label, fontsize=7)
    figure.tight_layout(pad=0.4)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_board_ways(results: Results, file: Path, shown: int = 60) -> None:
    """Ways from noise (grey) to data (red)."""
    plt = pyplot()
    names = ("fm-ot", "fm-diffusion", "ve")
    figure, grid = plt.subplots(1, len(names), figsize=(9.6, 3.3))
    for axes, name in zip(grid, names):
        for way in results.arrays("checkerboard", name, "ways")["ways"].swapaxes(0, 1)[:shown]:
            axes.plot(*way.T, linewidth=0.6, color="tab:blue", alpha=0.6)
            axes.plot(*way[0], "o", color="tab:gray", markersize=2)
            axes.plot(*way[-1], "o", color="tab:red", markersize=2)
        limit = 60 if name == "ve" else 3.2
        axes.set(title=OBJECTIVES[name].label, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def line_over_seeds(axes: Any, x: Sequence[float], values: np.ndarray, **style: Any) -> None:
    """The mean, and the range of the seeds as a band."""
    (line,) = axes.plot(x, values.mean(0), marker="o", markersize=3, **style)
    axes.fill_between(x, values.min(0), values.max(0), alpha=0.15, color=line.get_color(), linewidth=0)


def plot_training(results: Results, file: Path, column: str, labels: dict[str, str]) -> None:
    """A figure over the steps of training, for both problems."""
    plt = pyplot()
    figure, grid = plt.subplots(1, 2, figsize=(9.6, 3.5))
    for axes, (problem, label) in zip(grid, labels.items()):
        for name, objective in OBJECTIVES.items():
            looks = [results.figures(problem, name, seed, "training")["looks"] for seed in results.seeds]
            steps = [row["step"] for row in looks[0]]
            values = np.array([[row[column] for row in rows] for rows in looks])
            line_over_seeds(axes, steps, values, label=objective.label, color=COLOURS[name])
        log_axes(axes, xlabel="steps of training", ylabel=label, title=problem)
    grid[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_solvers(results: Results, file: Path) -> None:
    """Error and distance by calls on OT (whole lines) and on the diffusion path (dashed)."""
    plt = pyplot()
    figure, grid = plt.subplots(2, 2, figsize=(9.6, 6.6))
    labels = {"error": "relative error", "distance": "distance from data"}
    for row, (column, label) in zip(grid, labels.items()):
        for axes, problem in zip(row, SIZES):
            for solver, colour in (("euler", "tab:blue"), ("midpoint", "tab:orange"), ("rk4", "tab:green")):
                for name, style in (("fm-ot", "-"), ("fm-diffusion", "--")):
                    calls, values = results.by_calls(problem, name, solver, column)
                    title = f"{solver}, {'OT' if name == 'fm-ot' else 'diffusion'}"
                    line_over_seeds(axes, calls, values, color=colour, linestyle=style, label=title)
            log_axes(axes, xlabel="calls of the network", ylabel=label, title=problem)
    grid[0, 0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_emergence(results: Results, file: Path) -> None:
    """Error of the data estimate on a trajectory, by time."""
    plt = pyplot()
    figure, grid = plt.subplots(1, 2, figsize=(9.6, 3.3))
    for axes, problem in zip(grid, SIZES):
        for name, objective in OBJECTIVES.items():
            found = [results.figures(problem, name, seed, "ways")["error_of_data_by_time"] for seed in results.seeds]
            times = [float(time) for time in found[0]]
            values = np.array([list(one.values()) for one in found])
            line_over_seeds(axes, times, values, label=objective.label, color=COLOURS[name])
        axes.invert_xaxis()
        axes.set(xlabel="t, from noise to data", ylabel="error of the data prediction", title=problem, ylim=(0, 1.6))
    grid[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_digits_ways(results: Results, file: Path) -> None:
    """Digits on their way from noise, at equal times."""
    plt = pyplot()
    names = ("fm-ot", "fm-diffusion", "ve")
    figure, grid = plt.subplots(len(names), 11, figsize=(9.6, 2.9))
    for line, name in zip(grid, names):
        arrays = results.arrays("digits", name, "ways")
        for axes, at in zip(line, range(0, 21, 2)):
            image = arrays["ways"][at, 5, 0]
            # As the network sees it: on the exploding path x_t would be a picture of its largest values.
            t = torch.tensor(arrays["times"][at])
            scale = make_path(OBJECTIVES[name].path).input_scale(t).item()
            axes.imshow(scale * image, cmap="gray", vmin=-1.5, vmax=1.5)
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            if name == names[0]:
                axes.set_title(f"t = {arrays['times'][at]:.1f}", fontsize=7)
        line[0].set_ylabel(OBJECTIVES[name].label, fontsize=6)
    figure.tight_layout(pad=0.3)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def plot_digits(results: Results, file: Path) -> None:
    """Samples of each objective, of the same noise."""
    plt = pyplot()
    figure, grid = plt.subplots(2, 3, figsize=(9.6, 4.4))
    for axes, (name, objective) in zip(grid.flat, OBJECTIVES.items()):
        images = results.arrays("digits", name, "samples")["images"][:32, 0]
        picture = np.zeros((4 * 9 + 1, 8 * 9 + 1), dtype=np.uint8)
        for number, image in enumerate(images):
            row, column = divmod(number, 8)
            picture[9 * row + 1 : 9 * row + 9, 9 * column + 1 : 9 * column + 9] = image
        axes.imshow(picture, cmap="gray")
        axes.set(title=objective.label, xticks=[], yticks=[])
        axes.grid(False)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)


def write_report(folder: Path, seeds: Sequence[int], page: Path | None) -> None:
    """
    Draw figures and write tables.

    Args:
        folder (`Path`):
            With the files of all pieces.
        seeds (`Sequence[int]`):
            Which to report.
        page (`Path`, *optional*):
            A page of Markdown with marks `<!-- table: NAME -->` and `<!-- end -->` around each table; figures go into
            `images/` beside it. Without it, tables go into `tables.md` of the folder and figures beside.
    """
    results = Results(folder, seeds)
    images = folder if page is None else page.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    times = {f"time-{time}": f"t = {time:g}" for time in VIEW_TIMES}
    steps = {f"step-{step}": f"{step} steps" for step in SIZES["checkerboard"].looks}
    calls = {f"calls-{number}": f"NFE = {number}" for number in VIEW_CALLS}
    plot_board(results, images / "paper_board_times.png", "ways", times)
    plot_board(results, images / "paper_board_training.png", "training", steps)
    plot_board(results, images / "paper_board_calls.png", "ways", calls)
    plot_board_ways(results, images / "paper_board_ways.png")
    distances = {"digits": "Fréchet distance", "checkerboard": "distance from the board"}
    plot_training(results, images / "paper_training_distance.png", "distance", distances)
    plot_training(results, images / "paper_training_calls.png", "nfe", dict.fromkeys(SIZES, "calls of dopri5"))
    plot_solvers(results, images / "paper_solvers.png")
    plot_emergence(results, images / "paper_emergence.png")
    plot_digits_ways(results, images / "paper_digits_ways.png")
    plot_digits(results, images / "paper_digits.png")

    tables = {
        "main": main_table(results),
        "draws": draws_table(results),
        "order": order_table(results),
        "calls": calls_table(results),
        "ways": ways_table(results),
        "floors": floors(results),
    }
    (folder / "tables.md").write_text("\n\n".join(tables.values()) + "\n", encoding="utf-8")
    if page is not None:
        text = page.read_text(encoding="utf-8")
        for name, content in tables.items():
            mark = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
            text, found = re.subn(mark, lambda match, new=content: f"{match[1]}{new}\n{match[2]}", text, flags=re.S)
            if found != 1:
                raise ValueError(
                    f"{page} must have one mark <!-- table: {name} --> with its <!-- end -->, not {found}."
                )
        page.write_text(text, encoding="utf-8")
