# SPDX-License-Identifier: Apache-2.0
"""Two real steps of each recipe of Lipman et al., at full size, on two images made for it: do they run?

    python tests/benchmarks/dry_run_recipes.py [unet-cifar10 unet-imagenet32 ...]

The training script itself is run with the recipe, a batch of one, no validation pictures and no average. Prints the
parameters, those that the recipe's README states, the losses, and the time of a step. The largest recipe needs 12 GiB.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
from safetensors.torch import load_file

from diffusers_fm.arguments import parse_arguments


ROOT = Path(__file__).parents[2]
RECIPES = ("unet-cifar10", "unet-imagenet32", "unet-imagenet64", "unet-imagenet128")
sys.path.insert(0, str(ROOT / "training_scripts"))


def dry_run(name: str) -> dict[str, object]:
    """Two steps of a recipe, in a folder that is removed."""
    import train_flow_matching

    readme = (ROOT / "pipelines" / name / "README.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"`UNet2DModel` \| ([\d,]+) \|", readme)
    recipe = json.loads((ROOT / "pipelines" / name / "training.json").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images" / "class"
        images.mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (160, 144, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(images / f"{number}.png")
        # The recipe but for its data, its length, and what is done beside the steps.
        short = {
            key: value for key, value in recipe.items() if not key.startswith("dataset") and key != "image_column"
        }
        short |= {"train_batch_size": 1, "max_train_steps": 2, "logging_steps": 1, "num_validation_images": 0}
        short |= {"dataloader_num_workers": 0, "checkpointing_steps": 100, "use_ema": False, "seed": 0}
        short |= {"pretrained_model_name_or_path": str(ROOT / "pipelines" / name), "report_to": "none"}
        config = Path(folder) / "recipe.json"
        config.write_text(json.dumps(short), encoding="utf-8")
        out = Path(folder) / "run"
        argv = ["--config", str(config), "--train_data_dir", str(images.parent), "--output_dir", str(out), "--use_cpu"]
        train_flow_matching.main(parse_arguments(train_flow_matching.ScriptArguments, argv))
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        files = (out / "unet").glob("*.safetensors")
        saved = sum(weight.numel() for file in files for weight in load_file(file).values())
    losses = [row["loss"] for row in rows if "loss" in row]
    return {
        "recipe": name,
        "stated": int(stated.replace(",", "")),
        "saved": saved,
        "losses": losses,
        "log": rows[-1],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", choices=[*RECIPES, []], default=list(RECIPES))
    recipes = parser.parse_args().recipes
    if len(recipes) == 1:
        print(json.dumps(dry_run(recipes[0])), flush=True)
    else:
        # A process each: they differ in precision, which Accelerate lets a process choose once.
        for recipe in recipes:
            subprocess.run([sys.executable, __file__, recipe], check=True)
