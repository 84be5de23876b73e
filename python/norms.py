"""Inner products of plain lists of tensors."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.ops.types import Layout
from gcond_kernels.python._gramian import inner_products
from gcond_kernels.python.chunks import chunks_of, computed_in, flattened


@full_float32()
def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the Gramian [L, L], and that of each tensor [T, L, L], of L lists of T tensors."""
    L, sizes = len(lists), [tensor.numel() for tensor in lists[0]]
    device = lists[0][0].device if sizes else torch.device("cpu")
    products = torch.zeros((len(sizes), L, L), dtype=torch.float64, device=device)
    for tensor, own, _ in chunks_of(Layout.of([0] * len(sizes), sizes)):
        of_one = [tensors[tensor] for tensors in lists]
        wide = computed_in(functools.reduce(torch.promote_types, (one.dtype for one in of_one)))
        chunk = [flattened(one)[own].to(wide) for one in of_one]
        vectors = torch.stack(chunk)
        products[tensor] += inner_products(vectors, vectors)
    return products.sum(0), products
