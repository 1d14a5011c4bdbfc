# SPDX-License-Identifier: Apache-2.0
"""What a server of processes that know nothing of this package imports."""

import peft
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    UNet2DModel,
)


__all__ = [
    "AutoencoderKL",
    "DDPMPipeline",
    "DiTPipeline",
    "FlowMatchEulerDiscreteScheduler",
    "StableDiffusion3Pipeline",
    "UNet2DModel",
    "peft",
]

torch.set_num_threads(1)
