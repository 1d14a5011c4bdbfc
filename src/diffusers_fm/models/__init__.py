# SPDX-License-Identifier: Apache-2.0
from .autoencoding import decode_latents, encode_latents, encode_moments, latents_of_moments, spatial_scale_factor
from .class_embedder import ClassEmbedder


__all__ = [
    "ClassEmbedder",
    "decode_latents",
    "encode_latents",
    "encode_moments",
    "latents_of_moments",
    "spatial_scale_factor",
]
