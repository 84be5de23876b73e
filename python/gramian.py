"""gramian: every inner product that the method needs, from one read of the accumulators."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.contexts import full_float32
from gcond_kernels.python.blocks import PARTIAL, batches, block_length, trained, whole_partials

# Elements between two rows of scratch memory: rows a multiple of 4 KB apart fall on the same lines
# of a cache.
ROW_GAP = 80

# Elements of a tensor that is worth calls of its own.
IN_PLACE = 1 << 18


def gramian(
    accumulators: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    history_scale: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gramian, cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`.

    [K, K], [K, K], [T, R, R] and [T, K, K]; without a history the cross-Gramians are [0, 0] and
    [T, 0, 0].
    """
    tasks = accumulators.shape[0]
    left = tasks + (momentum is not None)
    rows = left + (0 if history is None else tasks)
    products = torch.zeros(
        (len(sizes), left, rows), dtype=torch.float64, device=accumulators.device
    )
    if rows == tasks and mask is None and accumulators.dtype == torch.float32:
        offsets, sizes = add_in_place(products, accumulators, offsets, sizes)
    add_in_batches(products, accumulators, history, momentum, mask, offsets, sizes)

    # A task that takes no part (scale 0) may hold anything, NaN included: select, don't multiply.
    row_scale = torch.cat([scale, scale.new_ones(left - tasks)])
    weight = torch.outer(row_scale, row_scale)
    # A matrix product may round S_ij and S_ji apart: then what a projection leaves is no zero.
    square = products[:, :, :left].triu()
    square = square + square.triu(1).transpose(1, 2)
    per_tensor = torch.where(weight != 0, square * weight, 0.0)
    total = per_tensor.sum(0)[:tasks, :tasks].contiguous()
    if history is None:
        return total, total.new_empty(0, 0), per_tensor, total.new_empty(len(sizes), 0, 0)
    weight = torch.outer(scale, history_scale)
    crosses = torch.where(weight != 0, products[:, :tasks, left:] * weight, 0.0)  # X_ij = ĝ_i · h_j
    return total, crosses.sum(0), per_tensor, crosses


def add_in_place(
    products: Tensor, rows: Tensor, offsets: Sequence[int], sizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Adds the whole partial sums of each large tensor to `products`, read where they lie.

    Returns:
        Offsets and sizes of what is left: of the large ones less than a partial sum each.
    """
    wholes = [size // PARTIAL * PARTIAL if size >= IN_PLACE else 0 for size in sizes]
    for tensor, (offset, whole) in enumerate(zip(offsets, wholes, strict=True)):
        if whole:
            with full_float32():
                partial = partial_products(rows[:, offset : offset + whole], len(rows))
            products[tensor] += partial.sum(0, dtype=torch.float64)
    return (
        [offset + whole for offset, whole in zip(offsets, wholes, strict=True)],
        [size - whole for size, whole in zip(sizes, wholes, strict=True)],
    )


def add_in_batches(
    products: Tensor,
    accumulators: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
    offsets: Sequence[int],
    sizes: Sequence[int],
) -> None:
    """Adds the inner products of each tensor to `products` [T, L, R], many tensors at a time."""
    left, rows = products.shape[1:]
    device = products.device
    length = min(block_length(rows, device), sum(whole_partials(size) for size in sizes))
    # One piece of memory for all batches: fresh pages cost more than the arithmetic.
    memory = torch.empty((rows, length + ROW_GAP), dtype=torch.float32, device=device)
    for batch in batches(offsets, sizes, length):
        filled = 0
        first, last = batch[0][0], batch[-1][0]  # with the empty tensors between them
        counts = [0] * (last - first + 1)
        for tensor, start, stop in batch:
            padded = whole_partials(stop - start)
            block = memory[:, filled : filled + padded]
            fill(block, accumulators, history, momentum, mask, start, stop)
            filled += padded
            counts[tensor - first] = padded // PARTIAL
        with full_float32():
            partial = partial_products(memory[:, :filled], left)
        lengths = torch.tensor(counts, dtype=torch.int64, device=device)
        products[first : last + 1] += torch.segment_reduce(
            partial.double(), "sum", lengths=lengths, unsafe=True
        )


def fill(
    block: Tensor,
    accumulators: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
    start: int,
    stop: int,
) -> None:
    """Elements from `start` to `stop` of all rows, then zeros, into a block [R, n] of float32."""
    tasks, length = len(accumulators), stop - start
    block[:tasks, :length] = accumulators[:, start:stop]
    if momentum is not None:
        block[tasks, :length] = momentum[start:stop]
    if history is not None:
        block[-tasks:, :length] = history[:, start:stop]
    if mask is not None:  # selected, not multiplied: what is not trained may be NaN
        block[:, :length].masked_fill_(~trained(mask, start, stop), 0.0)
    if length < block.shape[1]:
        block[:, length:].zero_()


def partial_products(rows: Tensor, left: int) -> Tensor:
    """Inner products [n / PARTIAL, L, R] of the first L rows [R, n] with all, a float32 each."""
    parts = rows.view(len(rows), -1, PARTIAL).transpose(0, 1)  # [n / PARTIAL, R, PARTIAL]
    return torch.bmm(parts[:, :left], parts.transpose(1, 2))


def block_products(rows: Tensor, left: int) -> Tensor:
    """Inner products [L, R] of the first L rows [R, n] with all, float64 across partial sums."""
    whole = rows.shape[1] // PARTIAL * PARTIAL
    rest = rows[:, whole:]
    products = (rest[:left] @ rest.T).double()
    if whole:
        products += partial_products(rows[:, :whole], left).sum(0, dtype=torch.float64)
    return products
