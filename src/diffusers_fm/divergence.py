# SPDX-License-Identifier: Apache-2.0
"""Divergence of a velocity: the trace of its Jacobian, exact or estimated by probes."""

from collections.abc import Callable, Iterable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


Function = Callable[[torch.Tensor], torch.Tensor]

PROBES = ("rademacher", "gaussian")
MODES = ("forward", "reverse")

# With this many products at a point, forward mode, whose first tangent is dear, costs less than reverse mode (measured
# on small convolutional and transformer networks: from between 8 and 16).
FORWARD_FROM = 16


def hutchinson_trace(
    function: Function, x: torch.Tensor, probes: torch.Tensor, mode: str = "reverse", tangents: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    An unbiased estimate of the trace of the Jacobian by each probe: `probe^T J probe` (arXiv 1810.01367).

    With S the symmetric part of the Jacobian, a Rademacher probe has the variance `2 sum_{i != j} S_ij^2`, a Gaussian
    one `2 |S|_F^2`.

    Args:
        function (`Callable`):
            Maps points to outputs of the same shape and treats samples independently.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            The points.
        probes (`torch.Tensor` of shape `(batch_size, num_probes, ...)`):
            Random vectors of unit covariance, see [`draw_probes`].
        mode (`str`, *optional*, defaults to `"reverse"`):
            `"reverse"`: one forward and `num_probes` backward passes. `"forward"`: tangents travel with the points.
        tangents (`int`, *optional*, defaults to 64):
            Forward mode: how many tangents travel together.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The output at `x`, and the estimates of shape `(batch_size, num_probes)`.
    """
    directions = probes.to(x.dtype).transpose(0, 1)
    if mode == "reverse":
        return _reverse_products(function, x, directions)
    parts = [_forward_products(function, x, part) for part in directions.split(tangents)]
    return parts[0][0], torch.cat([products for _, products in parts], 1)


def exact_trace(
    function: Function, x: torch.Tensor, mode: str = "forward", tangents: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The trace of the Jacobian, by a product with the unit vector of every dimension.

    Args:
        function (`Callable`):
            Maps points to outputs of the same shape and treats samples independently.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            The points.
        mode (`str`, *optional*, defaults to `"forward"`):
            `"forward"`: tangents travel with the points. `"reverse"`: a backward pass for each dimension.
        tangents (`int`, *optional*, defaults to 64):
            Forward mode: how many tangents travel together.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: The output at `x`, and the trace of shape `(batch_size, 1)`.
    """
    dims = x[0].numel()
    if mode == "reverse":
        output, products = _reverse_products(function, x, (_axes(x, i, i + 1)[0] for i in range(dims)))
        return output, products.sum(1, keepdim=True)
    parts = [
        _forward_products(function, x, _axes(x, first, min(first + tangents, dims)))
        for first in range(0, dims, tangents)
    ]
    return parts[0][0], torch.cat([products for _, products in parts], 1).sum(1, keepdim=True)


def choose_mode(function: Function, x: torch.Tensor, num_products: int) -> tuple[str, str]:
    """
    How to make products with the Jacobian: the way that costs less, if the function can go it.

    Args:
        function (`Callable`):
            Maps points to outputs of the same shape; tried on `x` where forward mode would cost less.
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            Points for the trial; one is enough.
        num_products (`int`):
            How many products are needed at a point.

    Returns:
        `tuple[str, str]`: `"forward"` or `"reverse"`, and why.
    """
    if num_products < FORWARD_FROM:
        return "reverse", f"fewer than {FORWARD_FROM} products at a point"
    try:
        _forward_products(function, x, _axes(x, 0, min(2, x[0].numel())))
    except (RuntimeError, NotImplementedError) as error:
        # Functions without a forward derivative, or without one under vmap, raise one of these.
        return "reverse", f"the network does not run in forward mode: {str(error).strip().splitlines()[0]}"
    return "forward", f"at least {FORWARD_FROM} products at a point"


def draw_probes(
    x: torch.Tensor, num_probes: int, probe: str = "rademacher", generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Probes for [`hutchinson_trace`], drawn on the CPU sample by sample, so that batches may be cut anywhere.

    Args:
        x (`torch.Tensor` of shape `(batch_size, ...)`):
            The points.
        num_probes (`int`):
            How many for each sample.
        probe (`str`, *optional*, defaults to `"rademacher"`):
            `"rademacher"` (-1 or 1) or `"gaussian"`.
        generator (`torch.Generator`, *optional*):
            A generator on the CPU.

    Returns:
        `torch.Tensor`: Of shape `(batch_size, num_probes, ...)`, in float32 on the device of `x`.
    """
    shape = (num_probes, *x.shape[1:])
    probes = []
    for _ in x:
        if probe == "gaussian":
            probes.append(torch.randn(shape, generator=generator, dtype=torch.float32))
        else:
            probes.append(2.0 * torch.randint(0, 2, shape, generator=generator) - 1.0)
    return torch.stack(probes).to(x.device)


def _axes(x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    """Unit vectors along the dimensions `first` to `last`, of shape `(last - first, *x.shape)`."""
    axes = torch.zeros(last - first, x[0].numel(), dtype=x.dtype, device=x.device)
    axes[torch.arange(last - first), torch.arange(first, last)] = 1
    return axes.reshape(-1, 1, *x.shape[1:]).expand(-1, *x.shape)


def _reverse_products(
    function: Function, x: torch.Tensor, directions: Iterable[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and `v^T J v` of shape `(batch_size, directions)`: one forward and a backward pass for each `v`."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        output = function(x)
    products = []
    for direction in directions:
        (gradient,) = torch.autograd.grad(output, x, direction.to(output.dtype), retain_graph=True)
        products.append((gradient * direction).flatten(1).sum(1))
    return output.detach(), torch.stack(products, 1)


def _forward_products(
    function: Function, x: torch.Tensor, directions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and `v^T J v` of shape `(batch_size, directions)`: one pass that carries a tangent for each `v`."""

    def product(direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output, tangent = torch.func.jvp(function, (x,), (direction,))[:2]
        return output, (tangent * direction).flatten(1).sum(1)

    # The fused attention kernels have no forward derivative.
    with sdpa_kernel(SDPBackend.MATH):
        outputs, products = torch.func.vmap(product)(directions)
    return outputs[0], products.transpose(0, 1)
