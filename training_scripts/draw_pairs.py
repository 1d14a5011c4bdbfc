# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["diffusers-fm[train]"]
# ///
r"""Draw pairs of noise and sample from a trained pipeline, as a data set for reflow (arXiv 2209.03003).

Trained on such pairs by train_flow_matching.py, a flow has straighter trajectories and needs fewer calls. Guidance, if
any, and the errors of the pipeline are in the samples, and so in what is trained on them.

    accelerate launch training_scripts/draw_pairs.py \
      --pretrained_model_name_or_path runs/dit-digits --output_dir runs/dit-digits-pairs --num_pairs 10000 \
      --solver abm3 --num_inference_steps 12

The folder is a data set of parquet files with the columns `noise`, `sample` (pixels in [-1, 1], or latents) and, for a
model with classes, `label`. Interrupted, the same command goes on where it was. Processes share the files; every pair
has a seed of its own, so pairs do not depend on the number of processes.
"""

import logging
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
import torch

from diffusers_fm import FlowMatchPipeline
from diffusers_fm.arguments import Arguments, Count, ModuleArguments, NotNegative, Size, option, run_script
from diffusers_fm.data.cache import model_fingerprint
from diffusers_fm.data.pairs import missing_shards, write_shard
from diffusers_fm.evaluation.sampling import ModelArguments, Sampler
from diffusers_fm.schedulers.sampling_plan import SOLVERS
from diffusers_fm.training.distributed import make_accelerator


logger = logging.getLogger("diffusers_fm.draw_pairs")


# Pairs do not depend on these, or are named by their weights.
FREE = (
    "pretrained_model_name_or_path",
    "revision",
    "variant",
    "output_dir",
    "eval_batch_size",
    "use_cpu",
    "import_modules",
)


@dataclass(frozen=True, kw_only=True)
class DrawArguments(Arguments):
    """Pairs to draw."""

    _argument_group_name = "pairs"

    output_dir: str = option(MISSING, "Folder of the data set.")
    num_pairs: Count = option(50_000, "Pairs to draw, of all classes in turn.")
    shard_size: Count = option(1000, "Pairs in a file.")
    seed: Size = option(0, "Seed of the noise.")
    num_inference_steps: Count | None = option(None, "Steps of the solver; by default the pipeline's own number.")
    solver: str | None = option(None, "Solver; by default the pipeline's own.", SOLVERS)
    guidance_scale: NotNegative = option(1.0, "Guidance that the samples hold; 1 is off.")
    eval_batch_size: Count = option(64, "Samples of a process at once.")
    mixed_precision: str | None = option(None, "Precision of the network's arithmetic.", ["no", "fp16", "bf16"])
    use_cpu: bool = option(False, "Use the CPU although there is an accelerator.")


@dataclass(frozen=True, kw_only=True)
class ScriptArguments(ModelArguments, DrawArguments, ModuleArguments):
    """Arguments of this script."""


def main(args: ScriptArguments) -> None:
    """Draw."""
    output_dir = Path(args.output_dir)
    accelerator = make_accelerator(
        output_dir, mixed_precision=args.mixed_precision, report_to="none", use_cpu=args.use_cpu
    )
    logging.basicConfig(format="%(message)s")
    logging.getLogger("diffusers_fm").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)

    # 1. Pipeline
    with accelerator.main_process_first():
        pipeline: FlowMatchPipeline = FlowMatchPipeline.from_pretrained(
            args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant
        ).to(accelerator.device)
    labels = np.arange(pipeline.num_classes) if pipeline.num_classes else None
    sampler = Sampler(pipeline, labels, args.seed, args.guidance_scale)
    models = [model for model in pipeline.components.values() if isinstance(model, torch.nn.Module)]

    # 2. Pairs, file by file
    fingerprint = {name: value for name, value in args.saved().items() if name not in FREE}
    fingerprint |= {"weights": model_fingerprint(*models), "scheduler": pipeline.scheduler.to_json_string()}
    for file, numbers in missing_shards(accelerator, output_dir, fingerprint):
        samples = []
        for start in range(numbers.start, numbers.stop, args.eval_batch_size):
            batch = range(start, min(start + args.eval_batch_size, numbers.stop))
            with accelerator.autocast():
                options = {"num_inference_steps": args.num_inference_steps, "solver": args.solver}
                samples.append(sampler.draw(batch, output_type="latent", **options).images.cpu())
        names = pipeline.config.id2label
        write_shard(file, sampler.noise(numbers), torch.cat(samples), sampler.labels(numbers), names)
        logger.info("%s holds the pairs %d to %d.", file.name, numbers.start, numbers.stop - 1)
    accelerator.wait_for_everyone()
    logger.info("%d pairs are in %s.", args.num_pairs, output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main, ScriptArguments, __doc__)
