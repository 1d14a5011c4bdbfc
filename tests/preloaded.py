# SPDX-License-Identifier: Apache-2.0
"""What a server of processes of scripts imports: the scripts' own modules, which run anew, import much."""

import gc

import training_runs
from tiny_text_to_image import tiny_stable_diffusion_3
from torch.utils import tensorboard


__all__ = ["tensorboard", "tiny_stable_diffusion_3"]

for file in sorted(training_runs.SCRIPT.parent.glob("*.py")):
    training_runs.load_script(file)

# Runs ask for many collections of garbage.
gc.freeze()
