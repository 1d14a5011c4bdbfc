# SPDX-License-Identifier: Apache-2.0
"""Every Python snippet of the pages, from top to bottom, with tiny pipelines in the place of trained ones."""

import json
import re
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
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from fake_hub import User, fake_hub
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from stock_pipelines import stable_diffusion
from tiny_pipelines import tiny_pipeline
from tiny_text_to_image import _clip as tiny_clip
from tiny_text_to_image import clip_tokenizer, tiny_stable_diffusion_3
from training_runs import load_script, run_script

from diffusers_fm import FlowMatchScheduler, init_pipeline
from diffusers_fm.adapt_pipeline import main as adapt
from diffusers_fm.arguments import parse_arguments


ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [
    page for page in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))] if BLOCK.search(page.read_text("utf-8"))
]

SCRIPT = "training_scripts/train_flow_matching.py"
SHORT = ["--max_train_steps=1", "--train_batch_size=4", "--max_validation_samples=4", "--num_inference_steps=1"]
SHORT += ["--num_validation_images=0", "--use_cpu", "--report_to=none"]

# Several processes, a large network, a loop of the shell, and what needs the results of other commands.
NOT_RUN = ["--multi_gpu", "unet-images64", "$", "--ema_profile", "runs/dit-digits"]

# Repositories of the Hub, and the tiny pipelines in their place.
REPOSITORIES = {
    "stabilityai/stable-diffusion-3.5-medium": "runs/sd3-tiny",
    "stabilityai/stable-diffusion-3-medium-diffusers": "runs/sd3-tiny",
    "black-forest-labs/FLUX.1-dev": "runs/flux-tiny",
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
    "num_probes=4": "num_probes=2, num_steps=2",
    "num_samples=20": "num_samples=2, num_steps=2",
}


def save_variant(folder: Path) -> None:
    """What posthoc_ema writes."""
    pipeline = init_pipeline("pipelines/unet-digits", seed=0)
    pipeline.save_pretrained(folder)
    pipeline.save_pretrained(folder, variant="ema-0_100")


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
        matplotlib.use("Agg")
        for name in ("unet-digits", "upscale-digits", "flux-tiny", "unet-spoken-digits", "unet-emoji"):
            init_pipeline(f"pipelines/{name}", seed=0).save_pretrained(f"runs/{name}")
        tiny_pipeline("unet").save_pretrained("runs/my-images")
        tiny_stable_diffusion_3().save_pretrained("runs/sd3-tiny")
        parts = stable_diffusion()[0].pipeline.components
        parts |= {"text_encoder": tiny_clip(16, 0), "tokenizer": clip_tokenizer(), "requires_safety_checker": False}
        StableDiffusionPipeline(**parts).save_pretrained("runs/sd1-tiny")
        save_lora(Path("runs/paintings-lora"))
        few = FlowMatchScheduler(solver="flow_map", flow_map={"first_block": 1, "num_inference_steps": 4})
        tiny_stable_diffusion_3(scheduler=few).save_pretrained("runs/sd3-tiny-few")
        for number, name in enumerate(["cat", "dog", "horse"]):
            Path("photos", name).mkdir(parents=True)
            draw((8, 8), number).save(f"photos/{name}/1.png")
            draw((8, 8), number + 3).save(f"photos/{name}/2.png")
        save_variant(Path("runs/unet-digits-power"))
        draw((8, 8), 0).save("digit.png")
        draw((8, 8), 1).point(lambda level: 255 * (level > 127)).save("mask.png")
        draw((4, 4), 2).save("small.png")
        draw((16, 16), 3).convert("RGB").save("cat.png")
        yield folder


def run_snippet(block: re.Match[str], page: Path, names: dict[str, Any]) -> None:
    """A Python snippet, with the line numbers of its page."""
    code = "\n" * block.string.count("\n", 0, block.start(2)) + block[2]
    for written, ours in (REPOSITORIES | TINY).items():
        code = code.replace(written, ours)
    exec(compile(code, str(page), "exec"), names)


def train(command: str) -> None:
    """A training of `train_flow_matching.py` in one step; other tests run the other scripts."""
    words = shlex.split(command, comments=True)
    if "diffusers_fm.adapt_pipeline" in words:
        shutil.rmtree(words[-1], ignore_errors=True)
        assert adapt(words[3:]) == 0
    if SCRIPT not in words or any(word in command for word in NOT_RUN):
        return
    script = load_script(ROOT / SCRIPT)
    line = words[words.index(SCRIPT) + 1 :] + SHORT
    shutil.rmtree(parse_arguments(script.ScriptArguments, line).output_dir, ignore_errors=True)
    run_script(script, line)


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
            for command in block[2].replace("\\\n", " ").splitlines():
                train(command)


def test_the_notebook_has_the_code_of_its_page() -> None:
    cells = json.loads((ROOT / "docs" / "plane.ipynb").read_text(encoding="utf-8"))["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    page = (ROOT / "docs" / "plane.md").read_text(encoding="utf-8")
    assert code == [block[2].rstrip("\n") for block in BLOCK.finditer(page)]
    assert sum(bool(line.strip()) for cell in code for line in cell.splitlines()) <= 34
