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
    """
    Upload a folder.

    Args:
        argv (`list[str]`, *optional*):
            The command line; defaults to that of the process.

    Returns:
        `int`: 0 if all went well, 1 if not, 2 for a mistake in the arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_fm.push_to_hub",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="Folder of the run: a pipeline, or LoRA weights.")
    add_hub_arguments(parser)
    parser.set_defaults(hub_strategy="end")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("diffusers_fm").setLevel(logging.INFO)
    if not args.folder.is_dir():
        parser.error(f"There is no folder {str(args.folder)!r}.")
    publisher = Publisher(args, args.folder)
    try:
        publisher.start()
    except ValueError as error:
        parser.error(str(error))
    return 0 if publisher.finish() else 1


if __name__ == "__main__":
    sys.exit(main())
