# SPDX-License-Identifier: Apache-2.0
"""
Registration with diffusers' loader; the only module that touches names diffusers does not publish.

`DiffusionPipeline.from_pretrained` looks a pipeline's class up in the `diffusers` module, and a component's library in
`LOADABLE_CLASSES`. Without an entry there, diffusers writes a component's full module path into `model_index.json`,
which no download from the Hub accepts.
"""

import logging
from typing import TypeVar

import diffusers
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from .models.networks import add_network
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


NetworkClass = TypeVar("NetworkClass", bound=type[ModelMixin])

METHODS = ["save_pretrained", "from_pretrained"]


def register_network(network_class: NetworkClass) -> NetworkClass:
    """
    Make a network of one's own one that [`FlowMatchPipeline`], the training scripts and the Hub take; a decorator.

    A pipeline has it as its `transformer` or `unet`, and names its module and class in `model_index.json`. Whoever
    loads the pipeline has to import that module first. The class is a `ModelMixin` and a `ConfigMixin`;

    - its configuration has `in_channels` and `sample_size`, the size of a sample: `[length]`, `[height, width]`,
      `[depth, height, width]`, or an `int` for squares; if it takes classes itself, `num_class_embeds`, the number of
      rows of its table (one more than the pipeline's `num_classes`, if the last row is the null class); perhaps
      `out_channels`, and `patch_size`, of which sizes must be multiples;
    - its `forward` takes first the sample, of shape `(batch_size, in_channels, *sample_size)`, and by name `timestep`,
      float32 of shape `(batch_size,)` from 0 (data) to `num_train_timesteps` (noise); then, if it has arguments of
      these names, `class_labels`, int64 of shape `(batch_size,)`, or the pipeline's [`ClassEmbedder`]'s
      `encoder_hidden_states` and `pooled_projections`; and `return_dict=False`;
    - it returns what the scheduler's `prediction_type` says, of the sample's shape, alone or first in a tuple.

    Args:
        network_class (`type[ModelMixin]`):
            The class.

    Returns:
        `type[ModelMixin]`: The same.

    Raises:
        ValueError: If the class does not do this, as far as its signatures show.
    """
    add_network(network_class)
    module = network_class.__module__
    if module.partition(".")[0] not in LOADABLE_CLASSES:
        LOADABLE_CLASSES[module] = {"ModelMixin": METHODS}
    return network_class


def register() -> None:
    """
    Adds the package to the libraries of components that diffusers knows, and its pipelines to the `diffusers` module.

    A name that is taken stays as it is: `DiffusionPipeline.from_pretrained` then means that other class, and this
    package's own class still loads with its own `from_pretrained`.
    """
    LOADABLE_CLASSES.setdefault(
        "diffusers_fm",
        {"ModelMixin": METHODS, "SchedulerMixin": METHODS},
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
