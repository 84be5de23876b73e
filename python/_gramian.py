"""gramian: every inner product that a method needs, from one read of the accumulators."""

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.types import Gramians, Layout, TaskGradients
from gcond_kernels.python.chunks import PARTIAL, Batch, batches, chunk_length

# Elements between two lines of scratch memory: where they are a multiple of 4 KB apart they fall on
# the same lines of a cache.
GAP = 80

# Elements of a tensor that is worth calls of its own.
IN_PLACE = 1 << 18


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Return Gramian and cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    accumulators, layout, scale, history, mask = gradients
    K, T = len(accumulators), len(layout.sizes)
    R = K + (momentum is not None)
    count = R + (0 if history is None else K)
    products = torch.zeros((T, R, count), dtype=torch.float64, device=accumulators.device)
    if count == K and mask is None and accumulators.dtype == torch.float32:
        layout = add_in_place(products, accumulators, layout)
    add_in_batches(products, gradients._replace(layout=layout), momentum)

    # A task that takes no part (scale 0) may hold anything, NaN included: select, don't multiply.
    scales = torch.cat([scale, scale.new_ones(R - K)])
    factors = torch.outer(scales, scales)
    # A matrix product may round S_ij and S_ji apart: then what a projection leaves is no zero.
    square = products[:, :, :R].triu()
    square = square + square.triu(1).transpose(1, 2)
    per_tensor = torch.where(factors != 0, square * factors, 0.0)
    total = per_tensor.sum(0)[:K, :K].contiguous()
    if history is None or history_scale is None:
        return Gramians(total, None, per_tensor, None)
    factors = torch.outer(scale, history_scale)
    crosses = torch.where(factors != 0, products[:, :K, R:] * factors, 0.0)  # X_ij = g_i · h_j
    return Gramians(total, crosses.sum(0), per_tensor, crosses)


def add_in_place(products: Tensor, accumulators: Tensor, layout: Layout) -> Layout:
    """Add the full partial sums of large tensors to `products`; return the layout of the rest."""
    lengths = [size // PARTIAL * PARTIAL if size >= IN_PLACE else 0 for size in layout.sizes]
    for tensor, (offset, length) in enumerate(zip(layout.offsets, lengths, strict=True)):
        if length:
            with full_float32():
                part = partial_products(accumulators[:, offset : offset + length], len(products[0]))
            products[tensor] += part.sum(0, dtype=torch.float64)
    offsets = [offset + length for offset, length in zip(layout.offsets, lengths, strict=True)]
    sizes = [size - length for size, length in zip(layout.sizes, lengths, strict=True)]
    return Layout.of(offsets, sizes)


def add_in_batches(products: Tensor, gradients: TaskGradients, momentum: Tensor | None) -> None:
    """Add the inner products of each tensor to `products` [T, R, C], many tensors at a time."""
    (_, R, count), device = products.shape, products.device
    length, in_order = batches(gradients.layout, chunk_length(count, device))
    # The same memory for all batches: fresh pages cost more than the arithmetic.
    memory = torch.empty((count, length + GAP), dtype=torch.float32, device=device)
    for batch in in_order:
        filled = fill(memory, batch, gradients, momentum)
        with full_float32():
            partial = partial_products(filled, R)
        lengths = torch.tensor(batch.partials, dtype=torch.int64, device=device)
        products[batch.first : batch.last + 1] += torch.segment_reduce(
            partial.double(), "sum", lengths=lengths, unsafe=True
        )


def fill(memory: Tensor, batch: Batch, gradients: TaskGradients, momentum: Tensor | None) -> Tensor:
    """Return a batch of all C vectors as float32 in `memory` [C, n], each chunk padded by zeros."""
    accumulators, _, _, history, mask = gradients
    K, until = len(accumulators), 0
    for start, stop, filled, until in batch.places:
        end = filled + stop - start
        memory[:K, filled:end] = accumulators[:, start:stop]
        if momentum is not None:
            memory[K, filled:end] = momentum[start:stop]
        if history is not None:
            memory[-K:, filled:end] = history[:, start:stop]
        if mask is not None:  # selected, not multiplied: what is not trained may be NaN
            memory[:, filled:end].masked_fill_(~trainable(mask, start, stop), 0.0)
        if end < until:
            memory[:, end:until].zero_()
    return memory[:, :until]


def partial_products(vectors: Tensor, count: int) -> Tensor:
    """Return inner products [n / PARTIAL, R, C] of the first R of C vectors [C, n] with all."""
    parts = vectors.view(len(vectors), -1, PARTIAL).transpose(0, 1)  # [n / PARTIAL, C, PARTIAL]
    return torch.bmm(parts[:, :count], parts.transpose(1, 2))
