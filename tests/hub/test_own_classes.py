# SPDX-License-Identifier: Apache-2.0
"""A path and a density of one's own, from a file: trained by the script, pushed, pulled by a fresh process."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from fake_hub import fake_hub
from pull_client import TOKEN
from training_runs import ROOT, SCRIPT, command_line, environment, make_dataset, save_untrained


# The file that docs/paths.md shows.
PAGE = (ROOT / "docs" / "paths.md").read_text(encoding="utf-8")
MODULE = next(code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "register_path(" in code)

READER = """
import sys
import torch
from diffusers import DiffusionPipeline
import diffusers_fm

def images(name):
    pipeline = DiffusionPipeline.from_pretrained(name)
    call = {"generator": torch.Generator().manual_seed(0), "num_inference_steps": 3, "output_type": "pt"}
    return pipeline(batch_size=2, **call).images

try:
    images("someone/own")
except ValueError as error:
    print(error)
import my_paths
torch.save([images(name) for name in ("someone/own", "own")], "images.pt")
"""


def run(folder: Path, endpoint: str, *words: str) -> subprocess.CompletedProcess[str]:
    """A process of a user, in a folder that Python does not search by itself."""
    hub = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "cache")}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env={**environment(), **hub}, capture_output=True, text=True)


def test_a_path_and_a_density_of_ones_own_from_training_to_a_fresh_process(tmp_path: Path) -> None:
    (tmp_path / "my_paths.py").write_text(MODULE)
    pipeline = save_untrained(tmp_path / "untrained", "unet")
    file = pipeline / "scheduler" / "scheduler_config.json"
    own = {"path": "quadratic", "path_kwargs": {"power": 3.0}}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    options = {"max_train_steps": 2, "num_validation_images": 1, "timestep_density": "late"}
    options |= {"push_to_hub": True, "hub_model_id": "someone/own", "hub_token": TOKEN}
    line = command_line(pipeline, make_dataset(tmp_path / "data"), Path("own"), **options)
    with fake_hub() as server:
        trained = run(tmp_path, server.endpoint, str(SCRIPT), *line, "--import_modules", "my_paths")
        assert trained.returncode == 0, trained.stderr
        card = server.files("someone/own")["README.md"].decode()
        assert "import my_paths  # QuadraticPath; not in this repository" in card
        assert not any(name.endswith(".py") for name in server.files("someone/own"))
        read = run(tmp_path, server.endpoint, "-c", READER)
    assert read.returncode == 0, read.stderr
    assert "The path 'quadratic' is not registered: import the module 'my_paths' that calls" in read.stdout
    pulled, saved = torch.load(tmp_path / "images.pt")
    torch.testing.assert_close(pulled, saved, rtol=0, atol=0)
    assert pulled.std() > 0.01
