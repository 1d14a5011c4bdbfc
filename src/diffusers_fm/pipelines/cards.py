# SPDX-License-Identifier: Apache-2.0
"""What a model card says of a pipeline, read from the pipeline itself."""

from typing import TYPE_CHECKING

from ..hub.cards import CardContent
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..solvers import TABLEAUX


if TYPE_CHECKING:
    from .base import FlowMatchPipelineBase

# What the table of solvers has beside the pipeline's own: solver, what to set beside it, its calls of the network for
# one of the pipeline's own. The first is the one that `docs/choosing_a_solver.md` recommends.
OTHER_SOLVERS = (
    ("abm3", '`sampling_path="angle"`, `timestep_spacing="graded"`', 0.4),
    ("midpoint", "", 0.4),
    ("rk4", "", 0.8),
)


def pipeline_content(
    pipeline: "FlowMatchPipelineBase", repo_id: str, num_inference_steps: int = 50, guidance_scale: float = 1.0
) -> CardContent:
    """
    The content of a card of a pipeline.

    Args:
        pipeline (`FlowMatchPipelineBase`):
            The pipeline.
        repo_id (`str`):
            Where it is.
        num_inference_steps (`int`, *optional*, defaults to 50):
            Steps of the samples.
        guidance_scale (`float`, *optional*, defaults to 1.0):
            Their guidance; 1 is off.

    Returns:
        [`CardContent`]: what the pipeline says of itself; `dataclasses.replace` adds to it.
    """
    classes, scheduler = pipeline.num_classes, pipeline.scheduler
    channels, height, width = pipeline.sample_shape
    network = pipeline.denoiser
    parameters = sum(parameter.numel() for parameter in network.parameters())
    factor = pipeline.config.get("scale_factor")
    kind = f"{'A class-conditional' if classes else 'An unconditional'} image generator"
    if factor is not None:
        kind = f"An image upscaler, {factor} times to each side,"
        words = ['PIL.Image.open("low_resolution.png")', *(["class_labels=[0]"] if classes else [])]
    else:
        words = [f"class_labels=[{', '.join(map(str, range(min(classes, 4))))}]" if classes else "batch_size=4"]
    imports = "import torch" if factor is None else "import PIL.Image\nimport torch"
    words += [f"num_inference_steps={num_inference_steps}"]
    words += [f"guidance_scale={guidance_scale:g}"] if guidance_scale != 1.0 else []
    return CardContent(
        repo_id=repo_id,
        summary=f"{kind} trained by flow matching with `diffusers-fm`, in diffusers' own folder format.",
        snippet=f"""
{imports}

import diffusers_fm  # pip install diffusers-fm; teaches diffusers the scheduler and the pipeline
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
images = pipeline({", ".join(words)}).images
images[0].save("sample.png")
""",
        scheduler=scheduler.config,
        path=scheduler.path,
        pipeline_tag="unconditional-image-generation" if factor is None else "image-to-image",
        tags=("class-conditional",) if classes else (),
        facts={
            "network": f"`{type(network).__name__}`, {parameters / 1e6:.2f} M parameters",
            "sample": f"{channels} x {height} x {width}" + ("" if pipeline.vae is None else " latents"),
            **({"classes": str(classes)} if classes else {}),
        },
        solvers=solver_rows(scheduler, num_inference_steps),
    )


def solver_rows(scheduler: FlowMatchScheduler, num_inference_steps: int) -> list[dict[str, str | int]]:
    """
    Solvers to choose from, and the calls of the network that they make.

    Args:
        scheduler ([`FlowMatchScheduler`]):
            The scheduler of a pipeline, whose own solver comes first.
        num_inference_steps (`int`):
            Its number of steps.

    Returns:
        `list[dict[str, str | int]]`: rows with `solver`, `beside it`, `steps` and `NFE`.
    """
    config = scheduler.config
    own = f"{config.sampling_path}, {config.timestep_spacing}"
    nfe = num_inference_steps * scheduler.order
    rows: list[dict[str, str | int]] = [
        {"solver": f"`{config.solver}` (as saved)", "beside it": own, "steps": num_inference_steps, "NFE": nfe}
    ]
    for solver, beside, share in OTHER_SOLVERS:
        stages = TABLEAUX[solver].stages if solver in TABLEAUX else 1
        steps = max(1, round(share * nfe / stages))
        if solver != config.solver:
            rows.append({"solver": f"`{solver}`", "beside it": beside, "steps": steps, "NFE": steps * stages})
    return rows
