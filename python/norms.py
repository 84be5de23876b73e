"""Inner products of plain lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.ops.types import Layout
from gcond_kernels.python.chunks import PARTIAL, chunk_length, chunks, in_memory_order
from gcond_kernels.python.gramian import partial_products


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the Gramian, and that of each tensor, of L lists.

    Args:
        lists: L lists of T tensors each, without gaps in memory; the t-th tensors of all lists
            have the same size and memory order.

    Returns:
        [L, L] and [T, L, L] float64: entry (t, i, j) is the inner product of `lists[i][t]` and
        `lists[j][t]`; the first is their sum over t.
    """
    sizes = tuple([tensor.numel() for tensor in lists[0]])
    device = lists[0][0].device if lists[0] else torch.device("cpu")
    products = torch.zeros((len(sizes), len(lists), len(lists)), dtype=torch.float64, device=device)
    layout = Layout((0,) * len(sizes), sizes)
    for tensor, start, stop, _ in chunks(layout, chunk_length(len(lists), device)):
        parts = [in_memory_order(one[tensor], start, stop - start) for one in lists]
        vectors = torch.stack([part.to(torch.float32) for part in parts])
        full = (stop - start) // PARTIAL * PARTIAL
        rest = vectors[:, full:]
        with full_float32():
            sums = (rest @ rest.T).double()
            if full:
                partial = partial_products(vectors[:, :full], len(lists))
                sums += partial.sum(0, dtype=torch.float64)
        products[tensor] += sums
    return products.sum(0), products
