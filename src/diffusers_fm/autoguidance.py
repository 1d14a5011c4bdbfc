# SPDX-License-Identifier: Apache-2.0
r"""Autoguidance: guide a trained pipeline by a weaker network of the same run (arXiv 2406.02507).

The weaker network has the weights of a checkpoint, those of an earlier average, or is saved in a folder, such as the
`internal_network` that `--internal_block` leaves:

    python -m diffusers_fm.autoguidance runs/dit-digits \
      --checkpoint checkpoint-500 --guidance_scale 2

    python -m diffusers_fm.autoguidance runs/dit-digits \
      --sigma_rel 0.1 --step 500

    python -m diffusers_fm.autoguidance runs/dit-digits \
      --network runs/dit-digits/internal_network

The result, by default in `runs/dit-digits-guided`, is a pipeline with `guider` and `guiding_network`.
"""

import copy
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import load_file

from .arguments import Arguments, option, run_command
from .pipelines import FlowMatchPipeline
from .training.checkpoints import MODEL_FILE, damage
from .training.posthoc_ema import find_snapshots, posthoc_ema


# Name of the network in the model that is trained.
NETWORK = "denoiser."


def weaker_network(pipeline: FlowMatchPipeline, weights: dict[str, torch.Tensor]) -> ModelMixin:
    """Network of a pipeline with weights of the model that was trained; a `ValueError` if they are of another."""
    network: Any = copy.deepcopy(unwrap_module(pipeline.denoiser))
    own = {name.removeprefix(NETWORK): each for name, each in weights.items() if name.startswith(NETWORK)}
    parameters = dict(network.named_parameters())
    fitting = parameters.keys() <= own.keys() <= network.state_dict().keys()
    if not fitting or any(own[name].shape != each.shape for name, each in parameters.items()):
        raise ValueError(f"The weights are not those of the pipeline's {type(network).__name__}.")
    network.load_state_dict(own, strict=False)
    return network


@dataclass(frozen=True, kw_only=True)
class GuideArguments(Arguments):
    """Run and weaker network."""

    _argument_group_name = "guide"

    run: str = option(MISSING, "Output folder of a run.")
    output_dir: str | None = option(None, "Folder of the guided pipeline; by default RUN-guided.")
    guidance_scale: float = option(2.0, "Scale; 1 is off.")
    checkpoint: str | None = option(None, "Checkpoint whose weights the network has, such as checkpoint-500.")
    sigma_rel: float | None = option(None, "Relative width of an average of the run's snapshots, for the weights.")
    step: int | None = option(None, "Last step of that average; by default the run's.")
    network: str | None = option(None, "Folder of a network that is called as the pipeline's own.")

    def check(self) -> None:
        if sum(each is not None for each in (self.checkpoint, self.sigma_rel, self.network)) != 1:
            raise ValueError("Exactly one of --checkpoint, --sigma_rel and --network must be given.")


def guide(args: GuideArguments) -> None:
    """
    Save a run's pipeline with a weaker network that guides it: `weak + guidance_scale * (strong - weak)`.

    Raises:
        ValueError: if there is no pipeline or no such network, or the output folder holds a pipeline.
    """
    run = Path(args.run).expanduser()
    output_dir = run.with_name(f"{run.name}-guided") if args.output_dir is None else Path(args.output_dir)
    if not (run / "model_index.json").is_file():
        raise ValueError(f"There is no trained pipeline in {str(run)!r}.")
    if (output_dir / "model_index.json").exists():
        raise ValueError(f"The output folder {str(output_dir)!r} holds a pipeline: choose another --output_dir.")
    pipeline = FlowMatchPipeline.from_pretrained(run)
    if args.network is not None:
        weaker: Any = type(unwrap_module(pipeline.denoiser)).from_pretrained(args.network)
    elif args.sigma_rel is not None:
        weaker = weaker_network(pipeline, posthoc_ema(find_snapshots(run), args.sigma_rel, args.step)[0])
    else:
        folder = run / str(args.checkpoint)
        fault = damage(folder)
        if fault is not None or not (folder / MODEL_FILE).is_file():
            raise ValueError(f"{str(folder)!r} is no checkpoint with whole weights: {fault or 'they are in shards'}.")
        weaker = weaker_network(pipeline, load_file(folder / MODEL_FILE))
    pipeline.register_modules(guider=ClassifierFreeGuidance(args.guidance_scale), guiding_network=weaker)
    pipeline.save_pretrained(output_dir)
    print(f"The guided pipeline is in {output_dir}.")


def main(argv: list[str] | None = None) -> int:
    """Guide a pipeline by a command line: 0 if it succeeded; 2, and a sentence, if not."""
    return run_command("autoguidance", guide, GuideArguments, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
