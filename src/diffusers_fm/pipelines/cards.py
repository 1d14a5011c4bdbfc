# SPDX-License-Identifier: Apache-2.0
"""Card content of a pipeline, read from its components."""

import dataclasses
from collections.abc import Sequence

from torch import nn

from ..arguments import INSTALL
from ..hub.cards import CardContent
from ..registry import full_name, is_own
from ..schedulers.scheduling_flow_match import FlowMatchScheduler
from ..solvers import TABLEAUX
from .families import TAGS
from .sampling import default_steps


IMPORT = f"import diffusers_fm  # {INSTALL} in a clone of it; teaches diffusers the scheduler and the pipeline"

# Further solvers of the card's table: settings to add, and calls of the network for one of the pipeline's own. The
# first is the one that `docs/choosing_a_solver.md` recommends.
OTHER_SOLVERS = (
    ("abm3", '`sampling_path="angle"`, `timestep_spacing="graded"`', 0.4),
    ("midpoint", "", 0.4),
    ("rk4", "", 0.8),
)


def pipeline_content(
    network: nn.Module,
    scheduler: FlowMatchScheduler,
    sample_shape: Sequence[int],
    num_classes: int,
    repo_id: str,
    num_inference_steps: int,
    guidance_scale: float,
    latent: bool = False,
    scale_factor: int | None = None,
) -> CardContent:
    """Content of the card of a pipeline that generates images, or enlarges them by `scale_factor`."""
    if scale_factor is None:
        kind, imports = (
            f"{'A class-conditional' if num_classes else 'An unconditional'} image generator",
            "import torch",
        )
        shown = ", ".join(map(str, range(min(num_classes, 4))))
        words = [f"class_labels=[{shown}]" if num_classes else "batch_size=4"]
    else:
        kind, imports = f"An image upscaler, {scale_factor} times to each side,", "import PIL.Image\nimport torch"
        words = ['PIL.Image.open("low_resolution.png")', *(["class_labels=[0]"] if num_classes else [])]
    task = "unconditional-image-generation" if scale_factor is None else "image-to-image"
    words += [f"num_inference_steps={num_inference_steps}"] if num_inference_steps != default_steps(scheduler) else []
    words += [f"guidance_scale={guidance_scale:g}"] if guidance_scale != 1.0 else []
    shape = " x ".join(map(str, sample_shape))
    result = 'images = pipeline({words}).images\nimages[0].save("sample.png")'
    if len(sample_shape) != 3:
        kind = f"{kind.partition(' image')[0]} generator of arrays of {shape}"
        words += ['output_type="latent"']
        result = "arrays = pipeline({words}).images"
    return CardContent(
        repo_id=repo_id,
        summary=f"{kind} trained by flow matching with `diffusers-fm`, in diffusers' own folder format.",
        snippet=f"""
{imports}

{IMPORT}
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo_id}")
pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
{result.format(words=", ".join(words))}
""",
        scheduler=scheduler.config,
        path=scheduler.path,
        pipeline_tag=None if len(sample_shape) != 3 else task,
        tags=("class-conditional",) if num_classes else (),
        facts={
            "network": describe_network(network),
            "sample": shape + (" latents" if latent else ""),
            **({"classes": str(num_classes)} if num_classes else {}),
        },
        solvers=solver_rows(scheduler, num_inference_steps),
        own_classes=[full_name(type(network))] if is_own(type(network)) else [],
    )


def audio_content(content: CardContent, repo_id: str) -> CardContent:
    """Content of the card of a pipeline that generates sounds, from that of its spectrograms."""
    snippet = content.snippet.replace("import torch\n", "import soundfile\nimport torch\n", 1)
    snippet = snippet.replace("images = ", "audios = ").replace(").images", ").audios")
    saved = 'soundfile.write("sample.wav", audios[0, 0], pipeline.config.sampling_rate)'
    return dataclasses.replace(
        content,
        summary=content.summary.replace("image generator", "generator of sounds"),
        snippet=snippet.replace('images[0].save("sample.png")', saved),
        # The Hub has no task for sounds without a text.
        pipeline_tag="text-to-audio",
    )


def describe_network(network: nn.Module) -> str:
    """Class and size of a network."""
    return f"`{type(network).__name__}`, {sum(p.numel() for p in network.parameters()) / 1e6:.2f} M parameters"


def solver_rows(scheduler: FlowMatchScheduler, num_inference_steps: int) -> list[dict[str, str | int]]:
    """Rows of the table of solvers, the scheduler's own first, with the calls of the network that each makes."""
    config = scheduler.config
    nfe = num_inference_steps * scheduler.order
    own = {"solver": f"`{config.solver}` (as saved)", "settings": f"{config.sampling_path}, {config.timestep_spacing}"}
    rows: list[dict[str, str | int]] = [{**own, "steps": num_inference_steps, "NFE": nfe}]
    # Other solvers of a few-step model sample its flow, for which it was not saved; those of a pipeline with settings
    # that were found for it need more calls.
    others = () if config.solver == "flow_map" or config.default_num_inference_steps is not None else OTHER_SOLVERS
    for solver, settings, share in others:
        stages = TABLEAUX[solver].stages if solver in TABLEAUX else 1
        steps = max(1, round(share * nfe / stages))
        if solver != config.solver:
            rows.append({"solver": f"`{solver}`", "settings": settings, "steps": steps, "NFE": steps * stages})
    return rows


def family_tags(pipeline: type) -> tuple[str, ...]:
    """Tags of a pipeline's family on the Hub, after its folder in diffusers: `flux` and `flux-diffusers`."""
    package, _, module = pipeline.__module__.partition(".pipelines.")
    folder = module.partition(".")[0]
    name = TAGS.get(folder, folder)
    return (name, f"{name}-diffusers") if package == "diffusers" else ()
