# SPDX-License-Identifier: Apache-2.0
"""Runs of the training scripts on tiny pipelines and tiny data, for their tests."""

import importlib.util
import io
import json
import re
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from tiny_pipelines import NUM_CLASSES, tiny_pipeline

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.arguments import make_parser, parse_arguments


# Tiny models gain nothing from more, and runs of several processes have one each, too.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "training_scripts" / "train_flow_matching.py"


def load_script(file: Path) -> ModuleType:
    """A training script as a module."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script(SCRIPT)


def png(image: PIL.Image.Image, **options: Any) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **options)
    return buffer.getvalue()


def make_dataset(folder: Path, side: int = 8, num_train: int = 20, num_test: int = 7) -> Path:
    """Bright blobs, a place for each class, as a folder of parquet files; returns the folder."""
    rng = np.random.default_rng(0)
    for split, num_rows in (("train", num_train), ("test", num_test)):
        labels = [row % NUM_CLASSES for row in range(num_rows)]
        images = []
        for label in labels:
            pixels = rng.integers(0, 100, (side, side), dtype=np.uint8)
            pixels[:, label * side // NUM_CLASSES] = 250
            images.append({"bytes": png(PIL.Image.fromarray(pixels)), "path": None})
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"class {i}" for i in range(NUM_CLASSES)])}
        )
        dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def save_untrained(folder: Path, kind: str, **scheduler: Any) -> Path:
    """A pipeline folder of configs alone; an autoencoder keeps its weights."""
    tiny_pipeline(kind, **scheduler).save_pretrained(folder)
    for weights in folder.glob("*/*.safetensors"):
        if weights.parent.name != "vae":
            weights.unlink()
    return folder


def command_line(pipeline: Path, data: Path, output_dir: Path, *words: object, **options: object) -> list[str]:
    """Arguments of a short run; `options` replace what is here by default, `None` takes it out."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": pipeline,
        "dataset_name": data,
        "output_dir": output_dir,
        "seed": 0,
        "train_batch_size": 8,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "num_inference_steps": 2,
        "num_validation_images": 0,
        "report_to": "none",
        "use_cpu": True,
        **options,
    }
    line = [str(word) for word in words]
    for name, value in values.items():
        if value is True:
            line.append(f"--{name}")
        elif value is not None and value is not False:
            line.append(f"--{name}={value}")
    return line


def train(pipeline: Path, data: Path, output_dir: Path, *words: object, **options: object) -> Path:
    """Train in this process; returns the output folder."""
    run_script(script, command_line(pipeline, data, output_dir, *words, **options))
    return output_dir


def run_script(module: ModuleType, line: list[str]) -> None:
    """Run a script's `main` in this process, and leave no accelerator behind."""
    try:
        module.main(parse_arguments(module.ScriptArguments, line))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def launch(line: list[str], num_processes: int = 1, file: Path = SCRIPT, config: str | None = None) -> list[str]:
    """The command that a user would type, as words; `config` is a file of `training_scripts/accelerate`."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"]
    if config is not None:
        accelerate += ["--config_file", str(SCRIPT.parent / "accelerate" / config), "--mixed_precision", "no"]
    elif num_processes > 1:
        accelerate += ["--multi_gpu"]
    if num_processes > 1:
        accelerate += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    return [*accelerate, str(file), *line]


def launch_arguments(line: list[str], **command: Any) -> Namespace:
    """What accelerate's launcher reads in the command of [`launch`]."""
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(launch(line, **command)[3:]))
    return args


def unused_arguments(file: Path, module: ModuleType) -> list[str]:
    """Arguments of a script that neither it nor the package reads."""
    text = "".join(path.read_text(encoding="utf-8") for path in [file, *(ROOT / "src").rglob("*.py")])
    used = set(re.findall(r"args\.(\w+)", text))
    used.update(word for line in text.splitlines() if "getattr" in line for word in re.findall(r"\w+", line))
    names = {action.dest for action in make_parser(module.ScriptArguments)._actions} - {"help", "config"}
    return sorted(names - used)


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    """All trained weights of a saved pipeline."""
    found = {}
    for file in sorted(output_dir.glob("*/diffusion_pytorch_model.safetensors")):
        if file.parent.name != "vae":
            found.update({f"{file.parent.name}.{name}": tensor for name, tensor in load_file(file).items()})
    assert found
    return found


def assert_same_weights(one: Path, other: Path, atol: float = 0.0) -> None:
    """Two runs ended alike: bit for bit, if no tolerance is given."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=0, atol=atol), name


def read_log(output_dir: Path, *names: str) -> list[tuple]:
    """`(step, value, ...)` of the log's lines that hold all the names."""
    lines = [json.loads(line) for line in (output_dir / "log.jsonl").read_text().splitlines()]
    return [(line["step"], *(line[name] for name in names)) for line in lines if all(name in line for name in names)]


def load(output_dir: Path) -> FlowMatchPipeline:
    """The trained pipeline, silent."""
    pipeline = FlowMatchPipeline.from_pretrained(output_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
