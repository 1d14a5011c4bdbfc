# SPDX-License-Identifier: Apache-2.0
"""train_text_to_image.py as it is launched, with notes in the output folder of the batches of each process."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from training_runs import ROOT, load_script

from diffusers_fm.arguments import parse_arguments


script = load_script(ROOT / "training_scripts" / "train_text_to_image.py")
encode = script.TrainedField.encode


def noted(field: Any, batch: dict[str, Any], device: Any, part: Any = None) -> Any:
    states = encode(field, batch, device, part)
    if part is not None:
        size = [side // field.factor for side in field.size_of(batch)]
        line = {"step": part.step, "size": size, "captions": batch["captions"]}
        with (Path(args.output_dir) / f"batches-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
    return states


if __name__ == "__main__":
    args = parse_arguments(script.ScriptArguments, sys.argv[1:])
    script.TrainedField.encode = noted
    script.main(args)
