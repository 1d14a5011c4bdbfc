# SPDX-License-Identifier: Apache-2.0
"""Table of the flow matching pipelines of the installed diffusers: `python -m diffusers_fm.families`."""

import inspect
import typing

import diffusers
from diffusers.loaders import PeftAdapterMixin

from .pipelines.families import CHECKED, REFUSED, by_name


FLOW_SCHEDULERS = ("FlowMatch", "UniPC", "DPMSolverMultistep", "EulerAncestralRF", "FlowMap", "HeliosScheduler")


def table() -> list[tuple[str, str, str, str]]:
    """
    What is known of every flow matching pipeline class of diffusers, by name, without building one.

    Returns:
        `list[tuple[str, str, str, str]]`: The class; its network; whether it is a velocity field: `checked` by the
        tests of this package, `asked` when it is used, or why it is refused; and the format of LoRA weights: the
        `pipeline`'s own, the `network`'s adapter, or none.
    """
    rows = []
    for name in dir(diffusers):
        if not name.endswith("Pipeline"):
            continue
        pipeline = getattr(diffusers, name)
        if not pipeline.__module__.startswith("diffusers."):
            continue
        parameters = inspect.signature(pipeline.__init__).parameters
        scheduler = str(parameters["scheduler"].annotation) if "scheduler" in parameters else ""
        if "transformer" not in parameters or not any(kind in scheduler for kind in FLOW_SCHEDULERS):
            continue
        network = parameters["transformer"].annotation
        network = getattr(diffusers, network) if isinstance(network, str) else network
        kinds = [kind for kind in typing.get_args(network) or (network,) if isinstance(kind, type)]
        adapters = any(issubclass(kind, PeftAdapterMixin) for kind in kinds)
        lora = "pipeline" if "save_lora_weights" in dir(pipeline) else "network" if adapters else "none"
        reason = by_name(REFUSED, pipeline)
        checked = "checked" if name.removesuffix("Pipeline") in CHECKED else "asked"
        names = " or ".join(kind.__name__ for kind in kinds if kind is not type(None))
        rows.append((name, names, f"refused: {reason}" if reason else checked, lora))
    return rows


def main() -> None:
    """Print the table in Markdown."""
    print(f"diffusers {diffusers.__version__}\n")
    print("| pipeline | network | velocity field | LoRA |\n| --- | --- | --- | --- |")
    for row in table():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
