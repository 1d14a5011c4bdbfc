# SPDX-License-Identifier: Apache-2.0
"""
Registration with diffusers' loader; the only module that touches names diffusers does not publish.

`DiffusionPipeline.from_pretrained` looks a pipeline's class up in the `diffusers` module, and a component's library in
`LOADABLE_CLASSES`. Without an entry there, diffusers writes a component's full module path into `model_index.json`,
which no download from the Hub accepts.
"""

import logging

import diffusers
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .pipelines.pipeline_flow_match import FlowMatchPipeline
from .pipelines.pipeline_flow_match_audio import FlowMatchAudioPipeline
from .pipelines.pipeline_flow_match_edit import FlowMatchEditPipeline
from .pipelines.pipeline_flow_match_inverse import FlowMatchInversePipeline
from .pipelines.pipeline_flow_match_upscale import FlowMatchUpscalePipeline
from .pipelines.pipeline_stable_diffusion_3_edit import StableDiffusion3EditPipeline


logger = logging.getLogger(__name__)

PIPELINES = (
    FlowMatchPipeline,
    FlowMatchAudioPipeline,
    FlowMatchUpscalePipeline,
    FlowMatchInversePipeline,
    FlowMatchEditPipeline,
    StableDiffusion3EditPipeline,
)


def register() -> None:
    """
    Adds the package to the libraries of components that diffusers knows, and its pipelines to the `diffusers` module.

    A name that is taken stays as it is: `DiffusionPipeline.from_pretrained` then means that other class, and this
    package's own class still loads with its own `from_pretrained`.
    """
    LOADABLE_CLASSES.setdefault(
        "diffusers_fm",
        {
            "ModelMixin": ["save_pretrained", "from_pretrained"],
            "SchedulerMixin": ["save_pretrained", "from_pretrained"],
        },
    )
    for pipeline in PIPELINES:
        if not hasattr(diffusers, pipeline.__name__):
            setattr(diffusers, pipeline.__name__, pipeline)
        elif getattr(diffusers, pipeline.__name__) is not pipeline:
            logger.warning(
                "diffusers has a %s of its own: load pipelines with diffusers_fm.%s.from_pretrained.",
                pipeline.__name__,
                pipeline.__name__,
            )
