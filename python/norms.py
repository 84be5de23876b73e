"""Inner products of plain lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.ops.types import Layout
from gcond_kernels.python._gramian import inner_products
from gcond_kernels.python.chunks import chunks_of, flattened


@full_float32()
def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the Gramian [L, L], and that of each tensor [T, L, L], of L lists of T tensors."""
    L, sizes = len(lists), [tensor.numel() for tensor in lists[0]]
    device = lists[0][0].device if sizes else torch.device("cpu")
    products = torch.zeros((len(sizes), L, L), dtype=torch.float64, device=device)
    for tensor, own, _ in chunks_of(Layout.of([0] * len(sizes), sizes)):
        chunk = [flattened(tensors[tensor])[own].to(torch.float32) for tensors in lists]
        vectors = torch.stack(chunk)
        products[tensor] += inner_products(vectors, vectors)
    return products.sum(0), products
