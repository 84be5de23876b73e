"""Inner products of plain tensor lists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.python.blocks import blocks
from gcond_kernels.python.gramian import block_products


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Gramian per tensor of L lists; see `gcond_kernels.ops`.

    Args:
        lists: L lists of T flat tensors each; the t-th tensors of all lists have the same size.

    Returns:
        [T, L, L] float64: entry (t, i, j) is the inner product of `lists[i][t]` and `lists[j][t]`.
    """
    sizes = [tensor.numel() for tensor in lists[0]]
    device = lists[0][0].device if lists[0] else None
    products = torch.zeros((len(sizes), len(lists), len(lists)), dtype=torch.float64, device=device)
    for t, start, stop in blocks([0] * len(sizes), sizes, rows=len(lists)):
        rows = torch.stack([tensors[t][start:stop].to(torch.float32) for tensors in lists])
        products[t] += block_products(rows, len(lists))
    return products
