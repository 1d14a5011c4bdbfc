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

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from diffusers import ClassifierFreeGuidance, ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from safetensors.torch import load_file

from .pipelines import FlowMatchPipeline
from .training.checkpoints import MODEL_FILE, damage
from .training.posthoc_ema import find_snapshots, posthoc_ema


# Name of the network in the model that is trained.
NETWORK = "denoiser."


def weaker_network(pipeline: FlowMatchPipeline, weights: dict[str, torch.Tensor]) -> ModelMixin:
    """
    The network of a pipeline with other weights.

    Args:
        pipeline ([`FlowMatchPipeline`]):
            Pipeline of the run.
        weights (`dict[str, torch.Tensor]`):
            Weights by their names in the model that was trained, such as those of a checkpoint.

    Raises:
        ValueError: if they are not those of the network.
    """
    network: Any = copy.deepcopy(unwrap_module(pipeline.denoiser))
    own = {name.removeprefix(NETWORK): each for name, each in weights.items() if name.startswith(NETWORK)}
    parameters = dict(network.named_parameters())
    fitting = parameters.keys() <= own.keys() <= network.state_dict().keys()
    if not fitting or any(own[name].shape != each.shape for name, each in parameters.items()):
        raise ValueError(f"The weights are not those of the pipeline's {type(network).__name__}.")
    network.load_state_dict(own, strict=False)
    return network


def guide(
    run: Path,
    output_dir: Path,
    guidance_scale: float,
    checkpoint: str | None = None,
    sigma_rel: float | None = None,
    step: int | None = None,
    network: Path | None = None,
) -> FlowMatchPipeline:
    """
    Save a run's pipeline with a weaker network that guides it: `weak + guidance_scale * (strong - weak)`.

    Args:
        run (`Path`):
            Output folder of the run.
        output_dir (`Path`):
            Folder of the guided pipeline; it must not hold one.
        guidance_scale (`float`):
            Scale; 1 is the pipeline itself.
        checkpoint (`str`, *optional*):
            Checkpoint whose weights the weaker network has, by its name in the run's folder.
        sigma_rel (`float`, *optional*), step (`int`, *optional*):
            Relative width of an average of the run's snapshots, and its last step.
        network (`Path`, *optional*):
            Folder of a network that is called as the pipeline's own.

    Raises:
        ValueError: if not exactly one of `checkpoint`, `sigma_rel` and `network` is given, or it is not there.
    """
    if sum(each is not None for each in (checkpoint, sigma_rel, network)) != 1:
        raise ValueError("Exactly one of --checkpoint, --sigma_rel and --network must be given.")
    if not (run / "model_index.json").is_file():
        raise ValueError(f"There is no trained pipeline in {str(run)!r}.")
    if (output_dir / "model_index.json").exists():
        raise ValueError(f"The output folder {str(output_dir)!r} holds a pipeline: choose another --output_dir.")
    pipeline = FlowMatchPipeline.from_pretrained(run)
    if network is not None:
        weaker: Any = type(unwrap_module(pipeline.denoiser)).from_pretrained(network)
    elif sigma_rel is not None:
        weaker = weaker_network(pipeline, posthoc_ema(find_snapshots(run), sigma_rel, step)[0])
    else:
        folder = run / str(checkpoint)
        fault = damage(folder)
        if fault is not None or not (folder / MODEL_FILE).is_file():
            raise ValueError(f"{str(folder)!r} is no checkpoint with whole weights: {fault or 'they are in shards'}.")
        weaker = weaker_network(pipeline, load_file(folder / MODEL_FILE))
    pipeline.register_modules(guider=ClassifierFreeGuidance(guidance_scale), guiding_network=weaker)
    pipeline.save_pretrained(output_dir)
    return pipeline


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_fm.autoguidance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="Output folder of a run.")
    parser.add_argument("--output_dir", type=Path, help="Folder of the guided pipeline; by default RUN-guided.")
    parser.add_argument("--guidance_scale", type=float, default=2.0, help="Scale; 1 is off.")
    parser.add_argument("--checkpoint", help="Checkpoint of the run, such as checkpoint-500.")
    parser.add_argument("--sigma_rel", type=float, help="Relative width of an average of the run's snapshots.")
    parser.add_argument("--step", type=int, help="Last step of that average; by default the run's.")
    parser.add_argument("--network", type=Path, help="Folder of a network.")
    args = parser.parse_args(argv)
    run = args.run.expanduser()
    output_dir = args.output_dir or run.with_name(f"{run.name}-guided")
    try:
        guide(run, output_dir, args.guidance_scale, args.checkpoint, args.sigma_rel, args.step, args.network)
    except ValueError as error:
        parser.error(str(error))
    print(f"The guided pipeline is in {output_dir}.")


if __name__ == "__main__":
    main()
