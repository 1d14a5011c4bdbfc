# SPDX-License-Identifier: Apache-2.0
"""train_text_to_image_sd3.py as it is launched, with notes in the output folder of the batches of each process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from training_runs import ROOT, load_script

from diffusers_fm.arguments import parse_arguments


script = load_script(ROOT / "training_scripts" / "train_text_to_image_sd3.py")
latents_of_batch = script.latents_of_batch


def noted(pipeline: Any, batch: dict[str, Any], device: Any, part: Any = None, offload: bool = False) -> Any:
    latents = latents_of_batch(pipeline, batch, device, part, offload)
    if part is not None:
        line = {"step": part.step, "size": list(latents.shape[2:]), "captions": batch["captions"]}
        with (Path(args.output_dir) / f"batches-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return latents


if __name__ == "__main__":
    args = parse_arguments(script.ScriptArguments, sys.argv[1:])
    script.latents_of_batch = noted
    script.main(args)
