# SPDX-License-Identifier: Apache-2.0
r"""Upload the folder of a finished run to the Hub, as `--push_to_hub` would have done.

    python -m diffusers_fm.push_to_hub runs/unet-digits --hub_model_id me/unet-digits

`--push_dry_run` lists the files and sends nothing.
"""

import argparse
import logging
import sys
from pathlib import Path

from .training.arguments import add_hub_arguments
from .training.publishing import Publisher


def main(argv: list[str] | None = None) -> int:
    """Upload a folder by a command line: 0 if it succeeded, 1 if not; argparse's exit 2 for a mistake in arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_fm.push_to_hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="Folder of the run: a pipeline, or LoRA weights.")
    add_hub_arguments(parser)
    parser.set_defaults(hub_strategy="end", hub_license=None)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("diffusers_fm").setLevel(logging.INFO)
    if not args.folder.is_dir():
        parser.error(f"There is no folder {str(args.folder)!r}.")
    publisher = Publisher(args, args.folder)
    try:
        if not publisher.files(args.folder):
            raise ValueError(f"The folder {str(args.folder)!r} holds no pipeline, LoRA weights or card to upload.")
        publisher.start()
    except ValueError as error:
        parser.error(str(error))
    return 0 if publisher.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
