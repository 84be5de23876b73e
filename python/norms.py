"""Inner products of plain lists of tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.python._gramian import partial_products
from gcond_kernels.python.chunks import PARTIAL, chunk_length


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the Gramian [L, L], and that of each tensor [T, L, L], of L lists of T tensors."""
    sizes = [tensor.numel() for tensor in lists[0]]
    device = lists[0][0].device if sizes else torch.device("cpu")
    products = torch.zeros((len(sizes), len(lists), len(lists)), dtype=torch.float64, device=device)
    length = chunk_length(len(lists), device)
    for tensor, size in enumerate(sizes):
        flat = [one[tensor].as_strided((size,), (1,)) for one in lists]
        for start in range(0, size, length):
            chunk = [vector[start : start + length].to(torch.float32) for vector in flat]
            products[tensor] += dot(torch.stack(chunk))
    return products.sum(0), products


def dot(vectors: Tensor) -> Tensor:
    """Return the Gramian [L, L] float64 of vectors [L, n] float32, float64 across partial sums."""
    full = vectors.shape[1] // PARTIAL * PARTIAL
    rest = vectors[:, full:]
    with full_float32():
        sums = (rest @ rest.T).double()
        if full:
            partial = partial_products(vectors[:, :full], len(vectors))
            sums += partial.sum(0, dtype=torch.float64)
    return sums
