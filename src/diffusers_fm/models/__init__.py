# SPDX-License-Identifier: Apache-2.0
from .autoencoding import decode_latents, encode_latents, encode_moments, latents_of_moments, spatial_scale_factor
from .class_embedder import ClassEmbedder
from .interval import IntervalConditioning, IntervalEmbedding
from .pixel_autoencoder import can_be_identity, set_identity
from .velocity_unets import VelocityUNet2DConditionModel, VelocityUNet2DModel
from .widening import widen_input


__all__ = [
    "ClassEmbedder",
    "IntervalConditioning",
    "IntervalEmbedding",
    "VelocityUNet2DConditionModel",
    "VelocityUNet2DModel",
    "can_be_identity",
    "decode_latents",
    "encode_latents",
    "encode_moments",
    "latents_of_moments",
    "set_identity",
    "spatial_scale_factor",
    "widen_input",
]
