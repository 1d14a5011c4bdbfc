# SPDX-License-Identifier: Apache-2.0
"""A path, a density and a network of one's own, from files: trained, pushed, pulled by a fresh process."""

import json
import re
from pathlib import Path

import datasets
import torch
from fake_hub import fake_hub
from processes import check_processes, run_stock
from pull_client import TOKEN
from training_runs import ROOT, SCRIPT, command_line


def module_of(page: str, call: str) -> str:
    """The file that a page of the documentation shows."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if call in code)


READER = """
import torch
from diffusers import DiffusionPipeline
from diffusers_fm import FlowMatchPipeline

def samples(kind, name):
    pipeline = kind.from_pretrained(name)
    call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "latent"}
    return pipeline(class_labels=[0, 1], guidance_scale=2.0, **call).images

def refused(name):
    try:
        samples(FlowMatchPipeline, name)
    except ValueError as error:
        print(error)

refused("someone/own")
refused("own")
import my_network
refused("own")
import my_paths
kinds = (FlowMatchPipeline, DiffusionPipeline)
torch.save([samples(kind, name) for kind in kinds for name in ("someone/own", "own")], "samples.pt")
"""


def client(endpoint: str, folder: Path) -> dict[str, str]:
    """Variables of a client of the Hub whose cache is empty."""
    return {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder)}


def write_pipeline(folder: Path) -> None:
    """An untrained pipeline by hand, of classes that this process does not know."""
    none = [None, None]
    index = {"_class_name": "FlowMatchPipeline", "_diffusers_version": "0.42.1", "vae": none, "unet": none}
    index |= {"scheduler": ["diffusers_fm", "FlowMatchScheduler"], "transformer": ["my_network", "MyNetwork"]}
    own = {"path": "quadratic", "path_kwargs": {"power": 3.0}}
    network = {"_class_name": "MyNetwork", "in_channels": 1, "sample_size": [16], "width": 8, "num_class_embeds": 4}
    for file, values in (
        ("model_index.json", index | {"num_classes": 3}),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatchScheduler"} | own),
        ("transformer/config.json", network),
    ):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(values))


def test_own_classes_from_training_to_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "my_paths.py").write_text(module_of("paths.md", "register_path("))
    (tmp_path / "my_network.py").write_text(module_of("your_own_network.md", "@register_network"))
    write_pipeline(tmp_path / "untrained")
    waves = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)).tolist()
    rows = {"wave": waves, "label": [row % 3 for row in range(24)]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "waves")
    options = {"max_train_steps": 2, "timestep_density": "late", "array_column": "wave", "learning_rate": 0.1}
    options |= {"push_to_hub": True, "hub_model_id": "someone/own", "hub_token": TOKEN}
    line = command_line(tmp_path / "untrained", tmp_path / "waves", Path("own"), **options)
    with fake_hub() as server:
        # Of a user, in a folder that Python does not search by itself.
        line += ["--import_modules", "my_paths", "my_network"]
        check_processes(SCRIPT, line, folder=tmp_path, **client(server.endpoint, tmp_path / "trainer"))
        files = server.files("someone/own")
        card = files["README.md"].decode()
        for name in ("my_paths  # QuadraticPath", "my_network  # MyNetwork"):
            assert f"import {name}; not in this repository" in card
        assert not any(name.endswith(".py") for name in files)
        read = run_stock(READER, folder=tmp_path, **client(server.endpoint, tmp_path / "reader"))
    assert list((tmp_path / "reader").rglob("model_index.json"))
    said = [line for line in read.stdout.splitlines() if line.startswith("The ")]
    absent = "from the module 'my_network', which is not imported: import it before loading."
    assert said == [
        f"The pipeline 'someone/own' has a network of its own {absent}",
        f"The pipeline 'own' has a MyNetwork {absent}",
        "The path 'quadratic' is not registered: import the module 'my_paths' that calls `diffusers_fm.register_path"
        "('quadratic', QuadraticPath)` before loading, in a training script with --import_modules.",
    ]
    pulled, *others = torch.load(tmp_path / "samples.pt")
    for other in others:
        torch.testing.assert_close(pulled, other, rtol=0, atol=0)
    assert pulled.shape == (2, 1, 16) and pulled.std() > 0.01
