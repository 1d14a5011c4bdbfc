# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the pages, from top to bottom, with tiny pipelines in the place of trained ones."""

import argparse
import importlib
import json
import logging
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import numpy as np
import PIL.Image
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMPipeline, DDPMScheduler, StableDiffusion3Pipeline
from fake_hub import User, fake_hub
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_families_2 import MORE
from tiny_pipelines import tiny_pipeline, tiny_unet
from tiny_sounds import SOUNDS, save_sounds
from tiny_stable_diffusion import tiny_stable_diffusion, tiny_stable_diffusion_xl
from tiny_text_to_image import tiny_stable_diffusion_3
from training_runs import load_script, run_script

from diffusers_fm import FlowMatchScheduler, init_pipeline
from diffusers_fm.arguments import make_parser, parse_arguments


ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if BLOCK.search(page.read_text("utf-8"))
]

# Arguments that make a command short, of those that its script has.
SHORT = {
    "max_train_steps": 1,
    "flow_steps": 0,
    "matching_steps": 1,
    "matching_known": 2,
    "num_trajectories": 8,
    "max_train_samples": 8,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 0,
    "train_batch_size": 2,
    "max_validation_samples": 4,
    "num_inference_steps": 1,
    "num_validation_images": 0,
    "use_cpu": True,
    "report_to": "none",
    "num_pairs": 4,
    "num_images": 20,
    "num_solver_images": 2,
    "num_calls": 2,
    "num_rows": 1,
    "strength": 1.0,
    "likelihood_steps": 2,
    "num_draws": 1,
    "num_samples": 2,
    "num_steps": 2,
    "rounds": 1,
    "sizes": 7,
    "seeds": 0,
    "num_drawn": 1,
    "classifier_steps": 2,
    "interpolation_steps": 2,
    "num_warmup_steps": 0,
    "num_batches": 1,
    "num_crops": 2,
    "tiny": True,
    "compile": "off",
    "batch_size": 2,
    "most_calls": 2,
    "reference_steps": 4,
    "max_runs": 1,
    "num_mixtures": 1,
    "cases": "32 x 32 PNG",
    "paths": "ot",
    "widths": 0.05,
    "videos_per_digit": 1,
}
# `pip` changes the environment of the tests. The pages' `make paper` is run by test_paper_in_small; the lines of
# `make bench`, most of which stand in pages too, have a test below.
NOT_RUN = ("pip", "make")

# Repositories of the Hub and data that nobody has here, and what is tiny in their place.
REPOSITORIES = {
    "stabilityai/stable-diffusion-3.5-medium": "runs/sd3-medium",
    "stabilityai/stable-diffusion-3-medium-diffusers": "runs/sd3-medium",
    "stabilityai/stable-diffusion-xl-base-1.0 --variant fp16": "runs/sdxl-base",
    "stabilityai/stable-audio-3-medium-base": "runs/stable-audio-tiny",
    "owner/captioned-sounds": "sounds/rows",
    "/data/paintings": "paintings",
    "/data/imagenet/train": "photos",
    "photo_crops.py --output_dir photos": "photo_crops.py --output_dir runs/photos",
    "owner/many-parquet-files": "data/digits",
    "--resolution 1024": "--resolution 16",
    "pipelines/unet-images64/": "pipelines/unet-images32/",
    "--train_data_dir my-images": "--train_data_dir photos",
    "pipelines/unet-imagenet64": "pipelines/unet-digits",
    "black-forest-labs/FLUX.1-dev": "runs/flux-tiny",
    "black-forest-labs/FLUX.1-Kontext-dev": "runs/flux-kontext --call max_area=256 _auto_resize=false",
    "/data/edits": "edits",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "runs/sd1-tiny",
}
# Numbers that make a snippet long, and the ones in their place.
TINY = {
    "range(6000)": "range(2)",
    "randn(20000, 2)": "randn(300, 2)",
    "(-5, 5, 90)": "(-5, 5, 5)",
    "reshape(90, 90)": "reshape(5, 5)",
    "checkerboard(512)": "checkerboard(5)",
    "num_inference_steps=[6, 10]": "num_inference_steps=[1]",
    "num_inference_steps=25": "num_inference_steps=2",
    "num_inference_steps=50": "num_inference_steps=2",
    'load_config("pipelines/unet-images64"': 'load_config("pipelines/unet-digits"',
    "anomaly_score(images)": "anomaly_score(images, num_steps=2)",
    'anomaly_score(digits[:100]["image"])': 'anomaly_score(digits[:20]["image"], num_steps=2)',
    "num_layers=12": "num_layers=1",
    "num_probes=4": "num_probes=2, num_steps=2",
    "num_samples=20": "num_samples=2, num_steps=2",
}


def save_lora(folder: Path) -> None:
    """Adapters of the tiny Stable Diffusion 3."""
    transformer = tiny_stable_diffusion_3().transformer
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    StableDiffusion3Pipeline.save_lora_weights(folder, get_peft_model_state_dict(transformer))


def draw(size: tuple[int, int], seed: int) -> PIL.Image.Image:
    """A picture of noise."""
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8))


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder like the root of a clone in which the pages' trainings have been run."""
    folder = tmp_path_factory.mktemp("clone")
    for room in ("pipelines", "data", "training_scripts", "tests"):
        (folder / room).symlink_to(ROOT / room)
    with pytest.MonkeyPatch.context() as patch, fake_hub() as hub:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        # Functions such as `create_repo` are methods of one client, which was made before.
        patch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        hub.users["token"] = User("me")
        patch.setenv("HF_TOKEN", "token")
        patch.setenv("HF_HOME", str(folder / "cache"))
        Path("docs/images").mkdir(parents=True)
        matplotlib.use("Agg")
        digits = ("unet-digits", "unet-digits-vp", "dit-digits", "upscale-digits")
        for name in (*digits, "flux-tiny", "unet-spoken-digits", "unet-mnist", "unet-emoji", "upscale-emoji"):
            init_pipeline(f"pipelines/{name}", seed=0).save_pretrained(f"runs/{name}")
        Path("runs/emoji-64").symlink_to(ROOT / "data" / "emoji")
        tiny_pipeline("unet").save_pretrained("runs/my-images")
        for name in ("sd3-medium", "sd3-tiny"):
            tiny_stable_diffusion_3().save_pretrained(f"runs/{name}")
        tiny_stable_diffusion().save_pretrained("runs/sd1-tiny")
        tiny_stable_diffusion_xl().save_pretrained("runs/sdxl-base")
        SOUNDS["stable_audio_3"]().pipeline.save_pretrained("runs/stable-audio-tiny")
        save_sounds(Path("sounds"))
        DDPMPipeline(tiny_unet(), DDPMScheduler()).save_pretrained("runs/ddpm-digits")
        save_lora(Path("runs/paintings-lora"))
        few = FlowMatchScheduler(solver="flow_map", flow_map={"first_block": 1, "num_inference_steps": 4})
        tiny_stable_diffusion_3(scheduler=few).save_pretrained("runs/sd3-tiny-few")
        for number, name in enumerate(["cat", "dog", "horse"]):
            Path("photos", name).mkdir(parents=True)
            draw((8, 8), number).save(f"photos/{name}/1.png")
            draw((8, 8), number + 3).save(f"photos/{name}/2.png")
            Path("paintings").mkdir(exist_ok=True)
            draw((16, 16), number).convert("RGB").save(f"paintings/{name}.png")
            Path(f"paintings/{name}.txt").write_text(f"a {name}, oil on canvas", encoding="utf-8")
        MORE["flux_kontext"]().pipeline.save_pretrained("runs/flux-kontext")
        Path("edits").mkdir()
        with open("edits/metadata.jsonl", "w", encoding="utf-8") as metadata:
            for number in range(20):
                draw((16, 16), number).convert("RGB").save(f"edits/{number}.png")
                row = {"file_name": f"{number}.png", "source_file_name": f"{19 - number}.png", "text": "make it night"}
                metadata.write(json.dumps(row) + "\n")
        draw((8, 8), 0).save("digit.png")
        draw((8, 8), 1).point(lambda level: 255 * (level > 127)).save("mask.png")
        draw((4, 4), 2).save("small.png")
        draw((16, 16), 3).convert("RGB").save("cat.png")
        # Seed, steps and batch of the classifier that tells features.
        patch.setattr("diffusers_fm.evaluation.features.train_classifier.__defaults__", (0, 2, 8))
        # Points and tolerances of the flow that figures are measured by.
        patch.setattr("diffusers_fm.evaluation.sampling.trajectories.__defaults__", (3, 1))
        patch.setattr("diffusers_fm.evaluation.measures.REFERENCE_TOLERANCE", 0.1)
        patch.setattr("diffusers_fm.evaluation.measures.TOLERANCES", (0.1,))
        yield folder


def run_snippet(block: re.Match[str], page: Path, names: dict[str, Any]) -> None:
    """A Python snippet, with the line numbers of its page."""
    code = "\n" * block.string.count("\n", 0, block.start(2)) + block[2]
    for written, ours in (REPOSITORIES | TINY).items():
        code = code.replace(written, ours)
    exec(compile(code, str(page), "exec"), names)


def short_arguments(parser: argparse.ArgumentParser, line: list[str]) -> list[str]:
    """The arguments of `SHORT` that a parser has and a command line admits."""
    known = {action.dest for action in parser._actions}
    if "validation_prompts" in known:
        # Prompts ask for pictures.
        known.discard("num_validation_images")
    if {"--streaming", "--noise_column", "--array_column"} & set(line):
        known.discard("max_train_samples")
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in SHORT.items() if name in known]


def run_file(file: Path, line: list[str], patch: pytest.MonkeyPatch, only_parsed: bool = False) -> None:
    """A script without argument groups, shortened when it reads its command line, or ended there."""
    parse = argparse.ArgumentParser.parse_known_args

    with patch.context() as inner:

        def parse_short(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> tuple[argparse.Namespace, list[str]]:
            # What the script reads by other parsers is its own affair.
            inner.setattr("argparse.ArgumentParser.parse_known_args", parse)
            found = parse(parser, [*line, *short_arguments(parser, line)])
            if only_parsed:
                sys.exit(0)
            return found

        inner.setattr("argparse.ArgumentParser.parse_known_args", parse_short)
        inner.setattr("sys.argv", [str(file), *line])
        inner.syspath_prepend(file.parent)
        text = file.read_text(encoding="utf-8")
        if "digits_judge" in text:
            judge = importlib.import_module("digits_judge")
            few = {name: [part[:100] for part in judge.load_split(name)] for name in ("train", "test")}
            inner.setattr(judge, "load_split", few.get)
        # Some refuse to run beside this package, to show that stock diffusers alone reads what it wrote.
        if "was imported" in text:
            for name in [name for name in sys.modules if name.startswith("diffusers_fm")]:
                inner.delitem(sys.modules, name)
        try:
            runpy.run_path(str(file), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finally:
            logging.disable(logging.NOTSET)
            AcceleratorState._reset_state(reset_partial_state=True)


def run_command(command: str, patch: pytest.MonkeyPatch) -> None:
    """A command in this process, shortened."""
    for written, ours in REPOSITORIES.items():
        command = command.replace(written, ours)
    words = shlex.split(command, comments=True)
    if not words or words[0] in NOT_RUN or "pytest" in words:
        return
    if "-m" in words:
        module = importlib.import_module(words[words.index("-m") + 1])
        line = words[words.index("-m") + 2 :]
        if "--output" in line:
            shutil.rmtree(line[line.index("--output") + 1], ignore_errors=True)
        assert (module.main(line) if line else module.main()) in (0, None)
        return
    name = next(word for word in words if word.endswith(".py"))
    line = words[words.index(name) + 1 :]
    if not name.startswith("training_scripts/"):
        run_file(ROOT / name, line, patch)
        return
    script = load_script(ROOT / name)
    line += short_arguments(make_parser(script.ScriptArguments), line)
    if "train" in Path(name).stem:
        shutil.rmtree(parse_arguments(script.ScriptArguments, line).output_dir, ignore_errors=True)
    run_script(script, line)


def commands(block: str) -> Iterator[str]:
    """Commands of a block of the shell, a loop's once for each of its values."""
    block = block.replace("\\\n", " ").replace(" && ", "\n")
    for loop in re.finditer(r"for (\w+) in (.*?); do\n(.*?)^done$", block, re.DOTALL | re.MULTILINE):
        turns = "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())
        block = block.replace(loop[0], turns)
    yield from block.splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    text = page.read_text(encoding="utf-8")
    # A module that can be imported, by the name that the page gives to it: diffusers looks for classes there.
    named = re.search(r"say `(\w+)\.py`", text)
    module = ModuleType(named[1] if named else f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in BLOCK.finditer(text):
        if block[1] == "python":
            run_snippet(block, page, module.__dict__)
        else:
            for command in commands(block[2]):
                run_command(command, monkeypatch)


def test_scripts_take_the_arguments_of_the_makefile(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = re.findall(r"^\t.*python (\S+\.py)(.*)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(scripts) > 10
    for name, line in scripts:
        run_file(ROOT / name, shlex.split(line), monkeypatch, only_parsed=True)


def test_the_notebook_has_the_code_of_its_page() -> None:
    cells = json.loads((ROOT / "docs" / "plane.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    page = (ROOT / "docs" / "plane.md").read_text(encoding="utf-8")
    assert code == [block[2].rstrip("\n") for block in BLOCK.finditer(page)]
    assert sum(bool(line.strip()) for cell in code for line in cell.splitlines()) <= 34
