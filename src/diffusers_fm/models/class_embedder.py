# SPDX-License-Identifier: Apache-2.0
"""Class conditioning for `SD3Transformer2DModel`, which takes a token sequence and a pooled vector and no label."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn


class ClassEmbedder(ModelMixin, ConfigMixin):
    r"""
    Learned tokens and a learned pooled vector for each class and for the null class of classifier-free guidance.

    It stands where the text encoders of Stable Diffusion 3 (arXiv 2403.03206, section 4) stand: its two outputs are
    the `encoder_hidden_states` and `pooled_projections` of [`~diffusers.SD3Transformer2DModel`]. The tables keep the
    standard deviation of 1 that `nn.Embedding` starts with: with 0.02, as is usual for label tables, the classes are
    learned markedly later.

    Args:
        num_classes (`int`, *optional*, defaults to 10):
            Number of classes. Label `num_classes` is the null class; 0 leaves only that, an unconditional model.
        joint_attention_dim (`int`, *optional*, defaults to 4096):
            Width of a token, the transformer's `joint_attention_dim`.
        pooled_projection_dim (`int`, *optional*, defaults to 2048):
            Width of the pooled vector, the transformer's `pooled_projection_dim`.
        num_tokens (`int`, *optional*, defaults to 1):
            Number of tokens for each class.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 10,
        joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 2048,
        num_tokens: int = 1,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"`num_classes` must be 0 or more, got {num_classes}.")
        if num_tokens < 1:
            raise ValueError(f"`num_tokens` must be 1 or more, got {num_tokens}.")
        self.tokens = nn.Embedding(num_classes + 1, num_tokens * joint_attention_dim)
        self.pooled = nn.Embedding(num_classes + 1, pooled_projection_dim)

    def forward(self, class_labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Looks up the embeddings of a batch of labels.

        Args:
            class_labels (`torch.Tensor` of shape `(batch_size,)`):
                Integer labels in `0 .. num_classes`, the last being the null class.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: `encoder_hidden_states` of shape
            `(batch_size, num_tokens, joint_attention_dim)` and `pooled_projections` of shape
            `(batch_size, pooled_projection_dim)`.
        """
        tokens = self.tokens(class_labels).unflatten(-1, (self.config.num_tokens, self.config.joint_attention_dim))
        return tokens, self.pooled(class_labels)
