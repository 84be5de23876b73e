"""gramian: every inner product that the method needs, from one read of the accumulators."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gcond_kernels.python.blocks import PARTIAL, blocks, trained


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
    # One piece of memory for all blocks: fresh pages cost more than the arithmetic.
    pieces = list(blocks(offsets, sizes, rows, accumulators.device))
    longest = max((stop - start for _, start, stop in pieces), default=0)
    memory = torch.empty(rows * longest, dtype=torch.float32, device=accumulators.device)
    for tensor, start, stop in pieces:
        block = memory[: rows * (stop - start)].view(rows, stop - start)
        block[:tasks] = accumulators[:, start:stop]
        if momentum is not None:
            block[tasks] = momentum[start:stop]
        if history is not None:
            block[left:] = history[:, start:stop]
        if mask is not None:  # selected, not multiplied: what is not trained may be NaN
            block[:left].masked_fill_(~trained(mask, start, stop), 0.0)
            block[left:].masked_fill_(~trained(mask, start, stop), 0.0)
        with full_float32():
            products[tensor] += block_products(block, left)

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


def block_products(rows: Tensor, left: int) -> Tensor:
    """Inner products [L, R] of the first L rows [R, n] with all, float64 across partial sums."""
    whole = rows.shape[1] // PARTIAL * PARTIAL
    rest = rows[:, whole:]
    products = (rest[:left] @ rest.T).double()
    if whole:
        # [n / PARTIAL, R, PARTIAL]
        parts = rows[:, :whole].view(len(rows), -1, PARTIAL).transpose(0, 1)
        products += torch.bmm(parts[:, :left], parts.transpose(1, 2)).sum(0, dtype=torch.float64)
    return products


@contextmanager
def full_float32() -> Iterator[None]:
    """Keeps matrix products out of TF32 and bfloat16, which the user may have allowed for his own.

    There are an older and a newer interface, and torch refuses to go on where they disagree: both
    are set, and set back.
    """
    units = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [unit.fp32_precision for unit in units]
    if not set(before) & {"tf32", "bf16"}:
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # only the newer interface was used: the older knows of no change
        legacy = None
    for unit in units:
        unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for unit, precision in zip(units, before, strict=True):
            unit.fp32_precision = precision
