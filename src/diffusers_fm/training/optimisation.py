# SPDX-License-Identifier: Apache-2.0
"""The trainable part of a pipeline, and its optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from ..pipelines.base import FlowMatchPipelineBase


class TrainableModel(nn.Module):
    """
    All trainable models of a pipeline as one, for `accelerator.prepare`: the network and, where there is one, the
    class embedder. A call is the pipeline's own `predict`.

    Args:
        pipeline ([`FlowMatchPipelineBase`]):
            Whose models are trained in place.
    """

    def __init__(self, pipeline: FlowMatchPipelineBase) -> None:
        super().__init__()
        self.denoiser = pipeline.denoiser
        self.class_embedder = pipeline.class_embedder
        # In a tuple because a pipeline is no part of a module: its autoencoder is not trained.
        self._predict = (pipeline.predict,)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor | None) -> torch.Tensor:
        """
        The network's answer at x_t.

        Args:
            sample (`torch.Tensor` of shape `(batch_size, channels, height, width)`):
                x_t, float32.
            timestep (`torch.Tensor` of shape `(batch_size,)`):
                `timestep_scale * t`, continuous.
            conditions (`torch.Tensor`, *optional*):
                What the pipeline's `predict` takes besides, such as labels of shape `(batch_size,)`.

        Returns:
            `torch.Tensor` of the shape of `sample`: of the scheduler's `prediction_type`.
        """
        return self._predict[0](sample, timestep, *conditions)


def make_optimizer(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 1e-2,
    epsilon: float = 1e-8,
    use_8bit_adam: bool = False,
) -> torch.optim.Optimizer:
    """
    AdamW.

    Args:
        parameters (`Iterable[nn.Parameter]` or `Iterable[dict]`):
            What is trained, in float32; in groups, where some have settings of their own.
        learning_rate (`float`):
            Its step size.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of its two averages.
        weight_decay (`float`, *optional*, defaults to 0.01):
            Decoupled weight decay.
        epsilon (`float`, *optional*, defaults to 1e-8):
            Added to the denominator.
        use_8bit_adam (`bool`, *optional*, defaults to `False`):
            Keep its state in 8 bits, with bitsandbytes.

    Returns:
        `torch.optim.Optimizer`: the optimizer.

    Raises:
        ValueError: if bitsandbytes is wanted and not installed.
    """
    if use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                'bitsandbytes is not installed: --use_8bit_adam needs `pip install "diffusers-fm[8bit]"`.'
            ) from error
        return AdamW8bit(parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon)
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, weight_decay=weight_decay, eps=epsilon, fused=True
    )


def clip_gradients(accelerator: Accelerator, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
    """
    Clip the gradient of all parameters together, over all processes.

    Args:
        accelerator (`Accelerator`):
            What prepared the model.
        parameters (`list[nn.Parameter]`):
            What is trained.
        max_norm (`float`):
            The norm to clip to; infinity for none.

    Returns:
        `torch.Tensor` of shape `()`: the norm before clipping, on the device, the same in every process.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_norm)
    if isinstance(norm, DTensor):
        return norm.full_tensor()
    # DeepSpeed clips by itself, and tells the norm as a number or, before its first step, not at all.
    return norm if isinstance(norm, torch.Tensor) else torch.tensor(0.0 if norm is None else float(norm))
