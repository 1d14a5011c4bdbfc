# SPDX-License-Identifier: Apache-2.0
r"""Lipman et al., Flow Matching for Generative Modeling (arXiv 2210.02747), reproduced in small.

    python paper/in_small.py --output_dir runs/paper

Trains the five objectives of the paper, and the exploding path besides, on handwritten digits and on the checkerboard,
with three seeds, measures the models, and writes figures and tables: under an hour on two CPU cores. Each finished
piece is a file in the output folder; interrupted, the same command goes on. `--page FILE` puts the tables into a page
between its marks, the figures into `images/` beside it.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from pieces import SIZES, Piece, Size, all_pieces, load_problem
from report import write_report


def check_settings(folder: Path, sizes: dict[str, Size]) -> None:
    """Raises a `ValueError` if the folder holds results of other settings."""
    settings = json.loads(json.dumps({name: dataclasses.asdict(size) for name, size in sizes.items()}))
    file = folder / "settings.json"
    if file.is_file():
        if json.loads(file.read_text(encoding="utf-8")) != settings:
            raise ValueError(f"{folder} holds results of other settings, in settings.json: choose another folder.")
        return
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def work(piece: Piece, deadline: float | None) -> bool:
    """Do a piece, on one core, if it is not done and there is time; says whether it is done."""
    torch.set_num_threads(1)
    if not piece.done and (deadline is None or time.time() < deadline):
        piece.run()
        print(piece.stem.relative_to(piece.folder), flush=True)
    return piece.done


def run(folder: Path, seeds: list[int], sizes: dict[str, Size], num_workers: int, max_minutes: float | None) -> bool:
    """Do what is not done yet; says whether all is done."""
    deadline = None if max_minutes is None else time.time() + 60 * max_minutes
    if "digits" in sizes:
        load_problem("digits", folder).extractor  # noqa: B018 - trained before there are processes
    with contextlib.ExitStack() as stack:
        run_all = map
        if num_workers > 1:
            context = multiprocessing.get_context("spawn")
            run_all = stack.enter_context(ProcessPoolExecutor(num_workers, context)).map
        for stage in all_pieces(folder, seeds, sizes):
            left = [piece for piece in stage if not piece.done]
            if not all(list(run_all(work, left, [deadline] * len(left)))):
                return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="Where results are kept.")
    parser.add_argument("--page", type=Path, help="Page to write tables and figures into; else they are kept there.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--problems", nargs="+", choices=list(SIZES), default=list(SIZES), help="What to do now.")
    parser.add_argument("--num_workers", type=int, default=2, help="Processes, a core for each.")
    parser.add_argument("--max_minutes", type=float, help="Begin no piece after this time.")
    args = parser.parse_args()
    check_settings(args.output_dir, SIZES)
    sizes = {problem: SIZES[problem] for problem in args.problems}
    if not run(args.output_dir, args.seeds, sizes, args.num_workers, args.max_minutes):
        print("Not all is done: the same command goes on.")
    elif sizes == SIZES:
        write_report(args.output_dir, args.seeds, args.page)


if __name__ == "__main__":
    main()
