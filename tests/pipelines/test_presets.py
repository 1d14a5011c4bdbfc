# SPDX-License-Identifier: Apache-2.0
"""The untrained pipelines of the repository: what their folders hold, and that they are what their READMEs say."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from training_runs import load_script

import diffusers_fm
from diffusers_fm import FlowMatchPipeline, FlowMatchScheduler, init_pipeline
from diffusers_fm.arguments import parse_arguments


ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"
# path, prediction, classes, null class, shape of what the network sees
PRESETS = {
    "unet-digits": ("ot", "flow_prediction", 10, 10, (1, 8, 8)),
    "unet-digits-vp": ("vp", "flow_prediction", 10, 10, (1, 8, 8)),
    "unet-digits-ve": ("ve", "v_prediction", 10, 10, (1, 8, 8)),
    "dit-digits": ("ot", "flow_prediction", 10, 10, (1, 8, 8)),
    "jit-digits": ("ot", "sample", 10, 10, (1, 8, 8)),
    "sd3-digits": ("ot", "flow_prediction", 10, 10, (1, 8, 8)),
    "dit-emoji": ("ot", "flow_prediction", 10, 10, (3, 32, 32)),
    "unet-emoji": ("ot", "flow_prediction", 10, 10, (3, 32, 32)),
    "unet-mnist": ("ot", "flow_prediction", 10, 10, (1, 28, 28)),
    "unet-cifar10": ("ot", "flow_prediction", 0, None, (3, 32, 32)),
    "unet-cifar10-vp": ("vp", "flow_prediction", 0, None, (3, 32, 32)),
    "unet-cifar10-ve": ("ve", "v_prediction", 0, None, (3, 32, 32)),
    "unet-images32": ("ot", "flow_prediction", 0, None, (3, 32, 32)),
    "unet-images64": ("ot", "flow_prediction", 0, None, (3, 64, 64)),
    "unet-imagenet32": ("ot", "flow_prediction", 0, None, (3, 32, 32)),
    "unet-imagenet64": ("ot", "flow_prediction", 0, None, (3, 64, 64)),
    "unet-imagenet128": ("ot", "flow_prediction", 0, None, (3, 128, 128)),
    "dit-imagenet256": ("ot", "flow_prediction", 1000, 1000, (4, 32, 32)),
    "jit-imagenet256": ("ot", "sample", 1000, 1000, (3, 256, 256)),
    "sd3-imagenet256": ("ot", "flow_prediction", 1000, 1000, (16, 32, 32)),
}
# Table 3 of Lipman et al.: channels, blocks, multipliers, sides with attention; batch, GPUs, steps; rate, warm-up
TABLE_3 = {
    "unet-cifar10": (256, 2, (1, 2, 2, 2), {16}, 256, 2, 391_000, 5e-4, 45_000),
    "unet-imagenet32": (256, 3, (1, 2, 2, 2), {16, 8}, 1024, 4, 250_000, 1e-4, 20_000),
    "unet-imagenet64": (192, 3, (1, 2, 3, 4), {32, 16, 8}, 2048, 16, 157_000, 1e-4, None),
    "unet-imagenet128": (256, 3, (1, 1, 2, 3, 4), {32, 16, 8}, 1536, 32, 500_000, 1e-4, 20_000),
}
DIGITS = [name for name in PRESETS if name.endswith("digits") or "-digits-" in name]


def model_index(name: str) -> dict:
    return json.loads((PIPELINES / name / "model_index.json").read_text(encoding="utf-8"))


def build_on_meta(name: str) -> FlowMatchPipeline:
    """The pipeline without memory for its weights; fails on a key that a class does not know."""
    components = {}
    index = model_index(name)
    for component in FlowMatchPipeline._optional_components:
        library, class_name = index[component]
        if library is None:
            continue
        model_class = getattr(importlib.import_module(library), class_name)
        config = json.loads((PIPELINES / name / component / "config.json").read_text(encoding="utf-8"))
        assert config["_class_name"] == class_name
        with init_empty_weights():
            model, unknown = model_class.from_config(config, return_unused_kwargs=True)
        assert [key for key in unknown if not key.startswith("_")] == []
        components[component] = model
    scheduler, unknown = FlowMatchScheduler.from_pretrained(PIPELINES / name / "scheduler", return_unused_kwargs=True)
    assert [key for key in unknown if not key.startswith("_")] == []
    return FlowMatchPipeline(scheduler, **components, num_classes=index["num_classes"], id2label=index["id2label"])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The training script as a module."""
    return load_script(ROOT / "training_scripts" / "train_flow_matching.py")


def test_every_folder_is_listed_here() -> None:
    folders = {
        path.name for path in PIPELINES.iterdir() if model_index(path.name)["_class_name"] == "FlowMatchPipeline"
    }
    assert folders == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_folder_holds_what_its_index_names(name: str) -> None:
    index = model_index(name)
    assert index["_class_name"] == "FlowMatchPipeline"
    assert index["scheduler"] == ["diffusers_fm", "FlowMatchScheduler"]
    expected = {"model_index.json", "README.md", "training.json", "scheduler/scheduler_config.json"}
    expected |= {f"{part}/config.json" for part in FlowMatchPipeline._optional_components if index[part][0]}
    folder = PIPELINES / name
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == expected


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_its_readme_says(name: str) -> None:
    pipeline = build_on_meta(name)
    path, prediction_type, num_classes, null_class, sample_shape = PRESETS[name]
    assert pipeline.scheduler.config.path == path
    assert pipeline.scheduler.config.prediction_type == prediction_type
    assert (pipeline.num_classes, pipeline.null_class) == (num_classes, null_class)
    assert pipeline.sample_shape == sample_shape

    readme = (PIPELINES / name / "README.md").read_text(encoding="utf-8")
    assert readme.startswith(f"# {name}\n")
    stated = {
        component: (class_name, int(count.replace(",", "")))
        for component, class_name, count in re.findall(r"^\| `(\w+)` \| `(\w+)` \| ([\d,]+) \|$", readme, re.MULTILINE)
    }
    built = {
        component: (type(model).__name__, sum(weight.numel() for weight in model.parameters()))
        for component, model in pipeline.components.items()
        if isinstance(model, torch.nn.Module)
    }
    assert stated == built


@pytest.mark.parametrize("name", PRESETS)
def test_readme_shows_the_command_of_the_recipe(name: str) -> None:
    readme = (PIPELINES / name / "README.md").read_text(encoding="utf-8")
    assert f"--config pipelines/{name}/training.json" in readme
    assert "## Expected figures" in readme


@pytest.mark.parametrize("name", PRESETS)
def test_recipe_is_understood_by_the_training_script(
    name: str, script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    argv = ["--config", f"pipelines/{name}/training.json"]
    if "-image" in name:
        argv += ["--train_data_dir", "/data/images"]
    args = parse_arguments(script.ScriptArguments, argv)
    assert args.pretrained_model_name_or_path == f"pipelines/{name}"
    recipe = json.loads((PIPELINES / name / "training.json").read_text(encoding="utf-8"))
    assert {key: getattr(args, key) for key in recipe} == recipe


@pytest.mark.parametrize("name", TABLE_3)
def test_recipes_of_the_founding_paper(name: str) -> None:
    channels, blocks, multipliers, attention, batch, gpus, steps, rate, warmup = TABLE_3[name]
    unet = json.loads((PIPELINES / name / "unet" / "config.json").read_text(encoding="utf-8"))
    recipe = json.loads((PIPELINES / name / "training.json").read_text(encoding="utf-8"))
    readme = (PIPELINES / name / "README.md").read_text(encoding="utf-8")
    assert unet["block_out_channels"] == [channels * multiplier for multiplier in multipliers]
    assert (unet["layers_per_block"], unet["attention_head_dim"], unet["dropout"]) == (blocks, 64, 0.0)
    sides = [unet["sample_size"] >> level for level in range(len(multipliers))]
    assert {side for side, block in zip(sides, unet["down_block_types"]) if block.startswith("Attn")} == attention
    assert [block.replace("Up", "Down") for block in reversed(unet["up_block_types"])] == unet["down_block_types"]
    assert f"--num_processes {gpus} " in readme
    assert recipe["train_batch_size"] * gpus == batch
    assert (recipe["max_train_steps"], recipe["learning_rate"]) == (steps, rate)
    assert recipe.get("lr_warmup_steps") == warmup
    assert (recipe["lr_scheduler"], recipe.get("lr_power")) == (("polynomial", 1.0) if warmup else ("constant", None))
    assert recipe["mixed_precision"] == ("bf16" if unet["sample_size"] > 32 else "no")
    assert (recipe["adam_weight_decay"], recipe["adam_epsilon"]) == (0.0, 1e-8)
    assert (recipe["timestep_density"], recipe["weighting_scheme"]) == ("uniform", "none")


@pytest.mark.parametrize("name", DIGITS)
def test_digits_pipelines_run_untrained(name: str) -> None:
    pipeline = init_pipeline(PIPELINES / name, seed=0)
    pipeline.set_progress_bar_config(disable=True)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    assert pipeline.predict(x, torch.tensor([1.0, 999.0]), labels).abs().max() == 0
    output = pipeline([3, 9], guidance_scale=2.0, num_inference_steps=2)
    assert output.nfe == 2
    assert [(image.size, image.mode) for image in output.images] == [((8, 8), "L")] * 2


@pytest.mark.parametrize("name", PRESETS)
def test_stock_classes_only_where_diffusers_has_them(name: str) -> None:
    for component in FlowMatchPipeline._optional_components:
        library, class_name = model_index(name)[component]
        if library == "diffusers":
            assert hasattr(diffusers, class_name)
        elif library is not None:
            assert library == "diffusers_fm"
            assert hasattr(diffusers_fm, class_name)
            assert not hasattr(diffusers, class_name)


def test_presets_of_a_family_differ_in_the_scheduler_alone() -> None:
    for family in ("unet-digits", "unet-cifar10"):
        for suffix in ("-vp", "-ve"):
            assert model_index(family) == model_index(family + suffix)
            one, other = (PIPELINES / name / "unet" / "config.json" for name in (family, family + suffix))
            assert one.read_text() == other.read_text()
