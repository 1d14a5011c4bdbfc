# SPDX-License-Identifier: Apache-2.0
r"""Convert a trained diffusion pipeline, such as DDPM or Stable Diffusion 1.5 and XL, to a flow on the path `ot`.

    python -m diffusers_fm.convert_diffusion runs/ddpm-digits \
      --output runs/ddpm-digits-ot

The weights stay as they are: the network is called at another scale and time, and answers with the velocity
(Diff2Flow, CVPR 2025). `training_scripts/train_flow_matching.py` trains it further, and
`training_scripts/train_text_to_image.py --network unet` where it reads text.
"""

import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from .arguments import Arguments, option, run_command
from .hub.push import hub_reason
from .pipelines import with_velocity


@dataclass(frozen=True, kw_only=True)
class ConvertArguments(Arguments):
    """Pipeline and output."""

    _argument_group_name = "convert"

    pretrained_model_name_or_path: str = option(MISSING, "Folder or Hub id of a trained diffusion pipeline.")
    output: str = option(MISSING, "Folder to write; it must not exist.")
    clip_sample: bool = option(False, "Clip data estimates as the pipeline's scheduler does, by Euler alone.")
    revision: str | None = option(None, "Branch, tag or commit of a pipeline on the Hub.")
    variant: str | None = option(None, "Variant of the weights to read, such as fp16; float32 is written.")

    def check(self) -> None:
        if Path(self.output).exists():
            raise ValueError(f"{self.output!r} exists already: give a new folder.")


def convert(args: ConvertArguments) -> None:
    """
    Write the converted pipeline.

    Raises:
        ValueError: if there is no pipeline, or it is not one that [`with_velocity`] takes.
    """
    name = args.pretrained_model_name_or_path
    try:
        pipeline = DiffusionPipeline.from_pretrained(name, revision=args.revision, variant=args.variant)
    except OSError as error:
        raise ValueError(f"The pipeline {name!r} cannot be loaded: {hub_reason(error.__cause__ or error)}.") from error
    converted: Any = with_velocity(pipeline, args.clip_sample)
    converted.save_pretrained(args.output)
    unet = converted.unet
    path = unet.diffusion_path
    print(
        f"{args.output}: {type(converted).__name__} with a {type(unet).__name__} that predicted"
        f" {unet.diffusion_prediction}, trained at times {path.ratio_min:.3f} to {path.ratio_max:.3f} of the new path."
    )


def main(argv: list[str] | None = None) -> int:
    """Convert a pipeline by a command line: 0 if it succeeded; 2, and a sentence, if not."""
    return run_command("convert_diffusion", convert, ConvertArguments, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
