"""Inner products of plain tensor lists."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.python.blocks import blocks, in_memory_order
from gcond_kernels.python.gramian import block_products


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Gramian, and Gramian per tensor, of L lists; see `gcond_kernels.ops`.

    Args:
        lists: L lists of T tensors each, without gaps in memory; the t-th tensors of all lists
            have the same size and memory order.

    Returns:
        [L, L] and [T, L, L] float64: entry (t, i, j) is the inner product of `lists[i][t]` and
        `lists[j][t]`; the first is their sum over t.
    """
    sizes = [tensor.numel() for tensor in lists[0]]
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    products = torch.zeros((len(sizes), len(lists), len(lists)), dtype=torch.float64, device=device)
    for t, start, stop in blocks([0] * len(sizes), sizes, len(lists), products.device):
        rows = torch.stack(
            [in_memory_order(one[t], start, stop - start).to(torch.float32) for one in lists]
        )
        with full_float32():
            products[t] += block_products(rows, len(lists))
    return products.sum(0), products
