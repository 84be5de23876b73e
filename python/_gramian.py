"""gramian: every inner product that a method needs, from one read of the accumulators."""

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.types import Gramians, TaskGradients
from gcond_kernels.python.chunks import CHUNK, PARTIAL, chunks_of, computed_in


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Return Gramian and cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    K, scale = len(gradients.scale), gradients.scale
    R = K + (momentum is not None)
    products = products_per_tensor(gradients, momentum, R)

    # A task that takes no part (scale 0) may hold anything, NaN included: select, don't multiply.
    scales = torch.cat([scale, scale.new_ones(R - K)])
    factors = torch.outer(scales, scales)
    # A matrix product may round S_ij and S_ji apart: then what a projection leaves is no zero.
    upper = products[:, :, :R].triu()
    symmetric = upper + upper.triu(1).transpose(1, 2)
    per_tensor = torch.where(factors != 0, symmetric * factors, 0.0)
    total = per_tensor.sum(0)[:K, :K].contiguous()
    if history_scale is None or gradients.history is None:
        return Gramians(total, None, per_tensor, None)
    factors = torch.outer(scale, history_scale)
    crosses = torch.where(factors != 0, products[:, :K, R:] * factors, 0.0)  # X_ij = g_i · h_j
    return Gramians(total, crosses.sum(0), per_tensor, crosses)


@full_float32()
def products_per_tensor(gradients: TaskGradients, momentum: Tensor | None, R: int) -> Tensor:
    """Return inner products [T, R, C]: of accumulators and momentum, with these and history."""
    accumulators, layout, _, history, mask = gradients
    storages = [accumulators, None if momentum is None else momentum[None], history]
    given = [storage for storage in storages if storage is not None]
    C, T, device = sum(map(len, given)), len(layout.sizes), accumulators.device
    products = torch.zeros((T, R, C), dtype=torch.float64, device=device)
    scratch = torch.empty((C, CHUNK), dtype=computed_in(accumulators.dtype), device=device)
    for tensor, own, flat in chunks_of(layout):
        vectors = scratch[:, : own.stop - own.start]
        torch.cat([storage[:, flat] for storage in given], out=vectors)
        if mask is not None:  # selected, not multiplied: what is not trained may be NaN
            vectors.masked_fill_(~trainable(mask, flat.start, flat.stop), 0.0)
        products[tensor] += inner_products(vectors[:R], vectors)
    return products


def inner_products(left: Tensor, right: Tensor) -> Tensor:
    """Return the inner products [R, C] float64 of vectors [R, n] and [C, n], float32 or float64.

    They are summed in their own type over `PARTIAL` elements, and in float64 across these sums.
    """
    count = left.shape[1] // PARTIAL
    if count == 0:
        return (left @ right.T).double()
    full = count * PARTIAL
    a, b = (v[:, :full].view(len(v), count, PARTIAL).transpose(0, 1) for v in (left, right))
    partial = torch.bmm(a, b.transpose(1, 2))  # [count, R, C]
    return partial.sum(0, dtype=torch.float64) + inner_products(left[:, full:], right[:, full:])
