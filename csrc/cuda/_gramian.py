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
        partials, result = (
            new_partials(gradients, total),
            Gramians.empty(gradients, momentum is not None),
        )
        _cuda.gramian(
            stream_of(device), chunks, gradients, momentum, history_scale, partials, result
        )
    return result


def new_partials(gradients: TaskGradients, chunks: int) -> Tensor:
    """Return memory for the sums of every chunk, [P, C] float32.

    P counts the products with momentum and history, whether there are any or not.
    """
    K = len(gradients.scale)
    products = (K + 1) * (K + 2) // 2 + K * K
    return gradients.scale.new_empty((products, chunks), dtype=torch.float32)
