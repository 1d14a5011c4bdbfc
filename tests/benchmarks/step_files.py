# SPDX-License-Identifier: Apache-2.0
"""Files of the package that one training step visits: what a reader of the loop has to open.

    python tests/benchmarks/step_files.py                    # the digits recipe
    python tests/benchmarks/step_files.py --recipe sd3-tiny  # text to image

Runs the recipe's script for three steps in this process and notes the files of the calls in the third.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any


sys.path.insert(0, str(Path(__file__).parents[1]))

from training_runs import ROOT, load_script, run_script

import diffusers_fm
from diffusers_fm.training.run import TrainingRun


SCRIPTS = {"unet-digits": "train_flow_matching", "sd3-tiny": "train_text_to_image"}
PACKAGE = Path(diffusers_fm.__file__).parent


def files_of_step(script: ModuleType, line: list[str]) -> list[str]:
    """Files of the package, by their path in it, in which a function is called in the third step of a run."""
    seen: set[str] = set()
    after_step = TrainingRun._after_step

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            seen.add(file.relative_to(PACKAGE).as_posix())

    def after(run: TrainingRun[Any], done: int, learning_rate: float) -> None:
        sys.setprofile(None)
        after_step(run, done, learning_rate)
        if done == 2:
            sys.setprofile(note)

    TrainingRun._after_step = after
    try:
        run_script(script, line)
    finally:
        sys.setprofile(None)
        TrainingRun._after_step = after_step
    return sorted(seen)


def files_of_recipe(recipe: str, output_dir: Path) -> list[str]:
    """The same for a recipe under `pipelines`."""
    line = ["--config", str(ROOT / "pipelines" / recipe / "training.json"), "--output_dir", str(output_dir)]
    line += [
        f"--pretrained_model_name_or_path={ROOT / 'pipelines' / recipe}",
        f"--dataset_name={ROOT / 'data/digits'}",
    ]
    line += [
        "--max_train_steps=3",
        "--num_validation_images=1",
        "--num_inference_steps=1",
        "--report_to=none",
        "--use_cpu",
    ]
    line += ["--max_train_samples=64", "--max_validation_samples=8", "--train_batch_size=4", "--lr_warmup_steps=1"]
    return files_of_step(load_script(ROOT / "training_scripts" / f"{SCRIPTS[recipe]}.py"), line)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", choices=SCRIPTS, default="unet-digits")
    with tempfile.TemporaryDirectory() as folder:
        files = files_of_recipe(parser.parse_args().recipe, Path(folder))
    print(*files, f"{len(files)} files", sep="\n")
