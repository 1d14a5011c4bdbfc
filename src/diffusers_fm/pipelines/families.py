# SPDX-License-Identifier: Apache-2.0
"""Exceptions of model families that a velocity field cannot find out: the one place where families have names."""

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.guiders import ClassifierFreeGuidance
from torch import nn


# Pipelines whose step is no function of one state and one time for each sample, by the start of their class's name.
REFUSED = {
    "AnyFlow": "it learns flow maps between two times, not a velocity",
    "Helios": "it denoises chunks of a history on a pyramid of sizes",
    "OmniGen": "its network always gets two or three copies of the batch, guided or not",
    "PRXPixel": "it computes the velocity outside the network with one time for the batch",
    "SanaSprint": "its network is trained on the trigonometric flow",
    "SkyReelsV2DiffusionForcing": "each frame has a time of its own",
    "LTX2": "it steps video and sound together",
    "PixArt": "its network predicts noise and a variance, not a velocity",
    "Cosmos2TextToImage": "its network is preconditioned by the noise level outside of it",
    "Cosmos2VideoToWorld": "its network is preconditioned by the noise level outside of it",
    "StableAudioPipeline": "its network is a diffusion model's",
}

# Scales at which guidance is off, where they are not 1.
GUIDANCE_OFF = {"ZImage": 0.0, "Krea2": 0.0}

# Arguments of a call that lists of prompts need an entry of for each prompt.
PER_PROMPT = {"AceStep": {"lyrics": ""}}

# Ends of the names of layers that LoRA adapts.
LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LORA_LAYERS_OF = {
    "Flux2": (*LORA_LAYERS, "to_qkv_mlp_proj", "to_out"),
    "Kandinsky5": ("to_query", "to_key", "to_value", "out_layer"),
    "PRX": ("img_qkv_proj", "txt_kv_proj", "to_out.0"),
}

# Names of families in Hub tags, where they are not those of their folders in diffusers.
TAGS = {"stable_diffusion_3": "sd3", "z_image": "z-image"}

# Pipelines that this package's tests check against their stock steps; what is not here may work, and is asked.
CHECKED = """
AceStep AuraFlow BriaFibo Bria ChromaImg2Img Chroma CogView4 ErnieImage Flux2Klein Flux2 FluxControl FluxFill
FluxImg2Img FluxKontext Flux HiDreamImage HunyuanImage HunyuanVideo15 HunyuanVideo Kandinsky5T2I Kandinsky5T2V Krea2
LTXImageToVideo LTX LongCatAudioDiT LongCatImage Lumina2 Lumina Mochi MotifVideo OvisImage PRX QwenImageImg2Img
QwenImage SanaPAG Sana SanaVideo SkyReelsV2 StableAudio3 StableDiffusion3ControlNet StableDiffusion3Img2Img
StableDiffusion3 WanImageToVideo Wan ZImageImg2Img ZImage
""".split()


def by_name(table: dict[str, Any], pipeline: type, default: Any = None) -> Any:
    """The entry of a table whose key is the longest start of the class's name."""
    keys = [key for key in table if pipeline.__name__.startswith(key)]
    return table[max(keys, key=len)] if keys else default


def without_guidance(pipeline: DiffusionPipeline, names: set[str], embedded: bool) -> dict[str, Any]:
    """Arguments of the call with which the network is called once for each sample.

    A scale that is `embedded` in the network stays the caller's choice.
    """
    if "true_cfg_scale" in names:
        return {"true_cfg_scale": 1.0}
    if "guidance_scale" in names and not embedded:
        return {"guidance_scale": by_name(GUIDANCE_OFF, type(pipeline), 1.0)}
    return {}


def guider_off() -> ClassifierFreeGuidance:
    """Guider of the pipelines that have one, at scale 1."""
    return ClassifierFreeGuidance(guidance_scale=1.0)


def lora_layers(pipeline: DiffusionPipeline, network: nn.Module) -> list[str]:
    """Names of the linear layers of a pipeline's network that LoRA adapts."""
    ends = by_name(LORA_LAYERS_OF, type(pipeline), LORA_LAYERS)
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    return [name for name in names if any(name.endswith(f".{end}") for end in ends)]
