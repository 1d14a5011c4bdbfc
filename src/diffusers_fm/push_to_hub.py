# SPDX-License-Identifier: Apache-2.0
r"""Upload the folder of a finished run to the Hub, as `--push_to_hub` would have done.

    python -m diffusers_fm.push_to_hub runs/unet-digits \
      --hub_model_id me/unet-digits

`--push_dry_run` lists the files and sends nothing.
"""

import argparse
import logging
import sys
from pathlib import Path

from transformers import HfArgumentParser

from .hub.publisher import HubArguments, Publisher


def main(argv: list[str] | None = None) -> int:
    """Upload a folder by a command line: 0 if it succeeded, 1 if not; argparse's exit 2 for a mistake in arguments."""
    parser = HfArgumentParser(
        HubArguments,
        prog="python -m diffusers_fm.push_to_hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="Folder of the run: a pipeline, or LoRA weights.")
    try:
        args, words = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("diffusers_fm").setLevel(logging.INFO)
    if not words.folder.is_dir():
        parser.error(f"There is no folder {str(words.folder)!r}.")
    if args.hub_license is not None or args.hub_strategy != "end":
        parser.error("--hub_license and --hub_strategy are for the training; a licence stands in the README.md here.")
    publisher = Publisher(args, words.folder)
    try:
        if not publisher.files(words.folder):
            raise ValueError(f"The folder {str(words.folder)!r} holds no pipeline, LoRA weights or card to upload.")
        publisher.start()
    except ValueError as error:
        parser.error(str(error))
    return 0 if publisher.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
