"""gramian: every inner product that the method needs, from one read of the accumulators.

Two launches. In the first each block reads its chunk of all accumulators once and sums every
product in float32; in the second the sums of the chunks are added up in float64, in a fixed order.
"""

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import chunk_tables, stream_of
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import Gramians, TaskGradients


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Return Gramian, cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    device, sizes = gradients.accumulators.device, gradients.layout.sizes
    with launch_tables.guard(device):
        length = launch_tables.chunk_length(sum(sizes))
        chunks, total, _ = chunk_tables(gradients.layout, length, device)
        partials, gramians = new_gramians(gradients, momentum is not None, total)
        _cuda.gramian(
            stream_of(device), chunks, gradients, momentum, history_scale, partials, gramians
        )
    return gramians


def new_gramians(gradients: TaskGradients, momentum: bool, chunks: int) -> tuple[Tensor, Gramians]:
    """Return memory for the sums of every chunk, [P, C] float32, and for the Gramians.

    P counts the products with momentum and history, whether there are any or not.
    """
    device, tensors = gradients.accumulators.device, len(gradients.layout.sizes)
    K = len(gradients.accumulators)
    R, products = K + momentum, (K + 1) * (K + 2) // 2 + K * K
    partials = torch.empty((products, chunks), dtype=torch.float32, device=device)
    total = torch.empty((K, K), dtype=torch.float64, device=device)
    per_tensor = total.new_empty((tensors, R, R))
    if gradients.history is None:
        return partials, Gramians(total, None, per_tensor, None)
    cross = torch.empty_like(total)
    return partials, Gramians(total, cross, per_tensor, total.new_empty((tensors, K, K)))
