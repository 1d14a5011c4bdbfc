# SPDX-License-Identifier: Apache-2.0
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, DiTPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from processes import run_stock
from tiny_pipelines import KINDS, tiny_dit, tiny_pipeline, tiny_unet, tiny_vae

import diffusers_fm
from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler


def test_names_that_the_loader_looks_up() -> None:
    assert diffusers.FlowMatchPipeline is FlowMatchPipeline
    assert set(LOADABLE_CLASSES["diffusers_fm"]) == {"ModelMixin", "SchedulerMixin"}
    assert diffusers_fm.ModelMixin is diffusers.ModelMixin
    assert diffusers_fm.SchedulerMixin is diffusers.SchedulerMixin


@pytest.mark.parametrize("kind", KINDS)
def test_entries_of_model_index(kind: str, tmp_path: Path) -> None:
    pipeline = tiny_pipeline(kind)
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "FlowMatchPipeline"
    assert index["scheduler"] == ["diffusers_fm", "FlowMatchScheduler"]
    for name in ("unet", "transformer", "vae", "class_embedder"):
        model = getattr(pipeline, name)
        library = "diffusers_fm" if name == "class_embedder" else "diffusers"
        assert index[name] == ([None, None] if model is None else [library, type(model).__name__])


def test_fresh_process_imports_without_a_word_and_loads_with_the_stock_loader(tmp_path: Path) -> None:
    # Our pipelines, and stock pipelines that carry our scheduler. One process, because its imports take long.
    for kind in ("unet-classes", "sd3-vae"):
        tiny_pipeline(kind).save_pretrained(tmp_path / kind)
    DDPMPipeline(tiny_unet(), FlowMatchScheduler(solver="heun")).save_pretrained(tmp_path / "ddpm")
    dit = DiTPipeline(tiny_dit(), tiny_vae(), DDIMScheduler())
    dit.scheduler = FlowMatchScheduler.from_config(dit.scheduler.config)
    dit.save_pretrained(tmp_path / "dit")
    for name in ("ddpm", "dit"):
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers_fm", "FlowMatchScheduler"]
    code = (
        "import sys, diffusers_fm\n"
        "for stream in (sys.stdout, sys.stderr):\n"
        "    print('Imported.', file=stream)\n"
        "from diffusers import DDPMPipeline, DiffusionPipeline\n"
        "ours = [DiffusionPipeline.from_pretrained(folder) for folder in sys.argv[1:3]]\n"
        "stock = [DDPMPipeline.from_pretrained(sys.argv[3]), *map(DiffusionPipeline.from_pretrained, sys.argv[3:])]\n"
        "for pipeline in ours:\n"
        "    assert type(pipeline) is diffusers_fm.FlowMatchPipeline\n"
        "    print(pipeline(class_labels=1, num_inference_steps=1, output_type='np').images.shape)\n"
        "for pipeline in [*ours, *stock]:\n"
        "    assert type(pipeline.scheduler) is diffusers_fm.FlowMatchScheduler\n"
        "    print(type(pipeline).__name__, pipeline.scheduler.config.solver)\n"
    )
    command = [sys.executable, "-c", code, *(tmp_path / name for name in ("unet-classes", "sd3-vae", "ddpm", "dit"))]
    variables = {**os.environ, "PYTHONPATH": str(Path(diffusers_fm.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # The import itself prints nothing.
    assert done.stderr.startswith("Imported.\n")
    assert done.stdout.splitlines() == [
        "Imported.",
        "(1, 8, 8, 1)",
        "(1, 16, 16, 3)",
        "FlowMatchPipeline euler",
        "FlowMatchPipeline euler",
        "DDPMPipeline heun",
        "DDPMPipeline heun",
        "DiTPipeline euler",
    ]


def test_a_name_that_is_taken_stays(tmp_path: Path) -> None:
    tiny_pipeline("unet").save_pretrained(tmp_path)
    printed = run_stock(
        "import sys, diffusers\n"
        "from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES\n"
        "diffusers.FlowMatchPipeline = taken = type('FlowMatchPipeline', (), {})\n"
        "LOADABLE_CLASSES['diffusers_fm'] = entry = {'ModelMixin': ['save_pretrained', 'from_pretrained'],\n"
        "    'SchedulerMixin': ['save_pretrained', 'from_pretrained']}\n"
        "import diffusers_fm\n"
        "assert diffusers.FlowMatchPipeline is taken\n"
        "assert LOADABLE_CLASSES['diffusers_fm'] is entry\n"
        "print(type(diffusers_fm.FlowMatchPipeline.from_pretrained(sys.argv[1])).__module__)\n",
        tmp_path,
    ).stdout
    assert printed.strip() == "diffusers_fm.pipelines.pipeline_flow_match"


def test_registering_twice_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    before = dict(LOADABLE_CLASSES)
    diffusers_fm.register()
    assert before == LOADABLE_CLASSES
    assert diffusers.FlowMatchPipeline is FlowMatchPipeline
    assert caplog.text == ""


def test_device_map_loads_our_components(tmp_path: Path) -> None:
    tiny_pipeline("sd3").save_pretrained(tmp_path)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path, device_map="cpu")
    assert type(pipeline) is FlowMatchPipeline
    assert pipeline(1, num_inference_steps=1, output_type="latent").images.isfinite().all()
