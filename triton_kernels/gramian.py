"""gramian: every inner product that the method needs, from one read of the accumulators.

Two launches. In the first each program reads its piece of all rows once and sums every product
in float32; in the second each product's sums are added up in float64, in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Gramians, TaskGradients
from gcond_kernels.python.gramian import gramian as gramian_by_matrix_products
from gcond_kernels.triton_kernels.memory import ALIGNED, at_element, locate, plan_of, read, trained

WARPS = 4
# One product of every pair of rows must stay in registers: beyond this many rows they do not,
# and a matrix product is the better tool.
MOST_TASKS = 8

SUM_BLOCK = 1024
SUM_WARPS = 4


@triton.jit
def read_rows(
    rows, base, stride, start, at, inside, kept,
    COUNT: tl.constexpr, MASK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`rows` and `COUNT` more: elements `start + at` of each row of a matrix, as float32."""
    for row in tl.static_range(COUNT):
        source = at_element(base, row * stride + start, WIDE)
        values = tl.load(source + at, mask=inside, other=0.0).to(tl.float32)
        if MASK:  # selected here, for a mask that differs from lane to lane makes narrow loads
            values = tl.where(kept, values, 0.0)
        rows = rows + (values,)
    return rows


@triton.jit
def read_tile(
    accumulators, momentum, history, mask, stride, start, lane, element, inside,
    K: tl.constexpr, HISTORY: tl.constexpr, MOMENTUM: tl.constexpr, MASK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of all rows: those of the tasks and the momentum, and those of the history."""
    at = lane + element
    kept = inside
    if MASK:
        # What a thread holds of a vector boundary on lies within one word.
        if WIDE:
            kept = trained(mask, start, lane, element, True)
        else:
            kept = trained(mask, start, at, 0, inside)
    rows = read_rows((), accumulators, stride, start, at, inside, kept, K, MASK, WIDE)
    rows = read_rows(rows, momentum, 0, start, at, inside, kept, MOMENTUM, MASK, WIDE)
    others = read_rows((), history, stride, start, at, inside, kept, K * HISTORY, MASK, WIDE)
    return rows, others


@triton.jit
def no_products(COUNT: tl.constexpr, LANES: tl.constexpr):
    """Sums before the first product."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    return sums


@triton.jit
def add_products(sums, rows, others, TASKS: tl.constexpr):
    """Adds each thread's products: of all pairs of rows, then of each task and each other row."""
    added = ()
    for i in tl.static_range(len(rows)):
        for j in tl.static_range(i, len(rows)):
            added = added + (sums[len(added)] + tl.sum(rows[i] * rows[j], axis=1),)
    for i in tl.static_range(TASKS):
        for j in tl.static_range(len(others)):
            added = added + (sums[len(added)] + tl.sum(rows[i] * others[j], axis=1),)
    return added


@triton.jit
def store_products(partials, chunk_count, sums):
    """partials[product, piece] of this program's piece."""
    chunk_count = tl.cast(chunk_count, tl.int64)
    for product in tl.static_range(len(sums)):
        place = product * chunk_count + tl.program_id(0)
        tl.store(partials + place, tl.sum(sums[product], axis=0))


# Not specialized: a variant for a count of 1, and one for multiples of 16, would gain nothing.
@triton.jit(do_not_specialize=["stride", "chunk_count"])
def products_kernel(
    accumulators,  # [K, N'] float32 or bfloat16
    history,  # [K, N']; read where HISTORY
    momentum,  # [N'] float32; read where MOMENTUM
    mask,  # [N' / 32] int32; read where MASK
    table,  # [T, 4] int64: -, kind, offset, size
    chunks,  # [C, 2] int32: tensor, piece
    partials,  # [P, C] float32
    stride,  # N'
    chunk_count,  # C
    K: tl.constexpr,
    HISTORY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MASK: tl.constexpr,
    LENGTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums of all products over one piece of one tensor."""
    tensor, first = locate(chunks, LENGTH)
    aligned = (tl.load(table + 4 * tensor + 1) & ALIGNED) != 0
    start = tl.load(table + 4 * tensor + 2) + first
    length = tl.minimum(tl.load(table + 4 * tensor + 3) - first, LENGTH).to(tl.int32)
    stride = tl.cast(stride, tl.int64)
    lane, element = tl.arange(0, LANES)[:, None] * VECTOR, tl.arange(0, VECTOR)[None, :]
    TILE: tl.constexpr = LANES * VECTOR
    ROWS: tl.constexpr = K + MOMENTUM
    COUNT: tl.constexpr = ROWS * (ROWS + 1) // 2 + K * K * HISTORY

    sums = no_products(COUNT, LANES)
    whole = tl.where(aligned, length // TILE * TILE, 0)
    for tile in range(0, whole, TILE):
        rows, others = read_tile(
            accumulators, momentum, history, mask, stride, start + tile, lane, element, True,
            K, HISTORY, MOMENTUM, MASK, True,
        )  # fmt: skip
        sums = add_products(sums, rows, others, K)
    for tile in range(whole, length, TILE):
        inside = tile + lane + element < length
        rows, others = read_tile(
            accumulators, momentum, history, mask, stride, start + tile, lane, element, inside,
            K, HISTORY, MOMENTUM, MASK, False,
        )  # fmt: skip
        sums = add_products(sums, rows, others, K)
    store_products(partials, chunk_count, sums)


@triton.jit
def read_lists(table, tensor, tensors, first, at, inside, LISTS, TYPES, WIDE):
    """Elements `first + at` of the tensor of each list, as float32."""
    rows = ()
    for number in tl.static_range(LISTS):
        entry = table + 4 * (number * tl.cast(tensors, tl.int64) + tensor)
        kind = tl.load(entry + 1) & (ALIGNED - 1)
        rows = rows + (read(tl.load(entry), kind, first + at, inside, TYPES, WIDE),)
    return rows


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def list_products_kernel(
    table,  # [L · T, 4] int64: address, kind, -, size
    chunks,  # [C, 2] int32: tensor, piece
    partials,  # [P, C] float32
    tensors,  # T
    chunk_count,  # C
    LISTS: tl.constexpr,
    TYPES: tl.constexpr,
    LENGTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The same for tensors that lie anywhere."""
    tensor, first = locate(chunks, LENGTH)
    aligned = True
    for number in tl.static_range(LISTS):
        entry = table + 4 * (number * tl.cast(tensors, tl.int64) + tensor)
        aligned = aligned & ((tl.load(entry + 1) & ALIGNED) != 0)
    length = tl.minimum(tl.load(table + 4 * tensor + 3) - first, LENGTH).to(tl.int32)
    at = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    TILE: tl.constexpr = LANES * VECTOR

    sums = no_products(LISTS * (LISTS + 1) // 2, LANES)
    whole = tl.where(aligned, length // TILE * TILE, 0)
    for tile in range(0, whole, TILE):
        rows = read_lists(table, tensor, tensors, first + tile, at, True, LISTS, TYPES, True)
        sums = add_products(sums, rows, (), LISTS)
    for tile in range(whole, length, TILE):
        inside = tile + at < length
        rows = read_lists(table, tensor, tensors, first + tile, at, inside, LISTS, TYPES, False)
        sums = add_products(sums, rows, (), LISTS)
    store_products(partials, chunk_count, sums)


@triton.jit
def pair_of(product, ROWS: tl.constexpr):
    """Row and column of an entry of the upper triangle, counted row by row."""
    row = product * 0
    rest = product
    for r in tl.static_range(ROWS - 1):
        beyond = (row == r) & (rest >= ROWS - r)
        rest = tl.where(beyond, rest - (ROWS - r), rest)
        row = tl.where(beyond, row + 1, row)
    return row, row + rest


@triton.jit
def row_scale(scale, row, K: tl.constexpr):
    """The scale of a row; the row of the momentum has none."""
    return tl.load(scale + row, mask=row < K, other=1.0)


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def sum_kernel(
    partials,  # [P, C] float32
    first,  # [T + 1] int32: the first piece of each tensor
    scale,  # [K] float64; read where SCALED
    history_scale,  # [K] float64; read where there are cross products
    per_tensor,  # [T, R, R] float64
    gramian,  # [K, K] float64
    cross,  # [K, K] float64
    cross_per_tensor,  # [T, K, K] float64
    tensors,  # T
    chunk_count,  # C
    K: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One product of one tensor; the last program of each product sums those of all tensors."""
    tensor, product = tl.program_id(0), tl.program_id(1)
    PAIRS: tl.constexpr = ROWS * (ROWS + 1) // 2
    begin = tl.load(first + tensor, mask=tensor < tensors, other=0)
    end = tl.load(first + tl.minimum(tensor + 1, tensors))
    source = partials + product * tl.cast(chunk_count, tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(source + at, mask=at < end, other=0.0).to(tl.float64)
    total = tl.sum(sums, axis=0)

    # A task that takes no part may hold anything, NaN included: select.
    if product < PAIRS:
        i, j = pair_of(product, ROWS)
        if SCALED:
            weight = row_scale(scale, i, K) * row_scale(scale, j, K)
            total = tl.where(weight != 0.0, total * weight, 0.0)
        place = per_tensor + tensor.to(tl.int64) * ROWS * ROWS
        tl.store(place + i * ROWS + j, total, mask=tensor < tensors)
        tl.store(place + j * ROWS + i, total, mask=tensor < tensors)
        inside = (tensor == tensors) & (i < K) & (j < K)
        tl.store(gramian + i * K + j, total, mask=inside)
        tl.store(gramian + j * K + i, total, mask=inside)
    else:
        i, j = (product - PAIRS) // K, (product - PAIRS) % K
        weight = tl.load(scale + i) * tl.load(history_scale + j)
        total = tl.where(weight != 0.0, total * weight, 0.0)
        place = cross_per_tensor + tensor.to(tl.int64) * K * K
        tl.store(place + i * K + j, total, mask=tensor < tensors)
        tl.store(cross + i * K + j, total, mask=tensor == tensors)


def vector_elements(products: int) -> int:
    """Elements of a row that a thread holds.

    With six tasks or more, or five and momentum, the products leave no registers for eight: then
    four, and rows of two bytes are read 8 bytes a thread at a time, float32 rows still 16.
    """
    return 8 if products <= 40 else 4


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Gramian, cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    accumulators, (offsets, sizes), scale, history, mask = gradients
    K, device = accumulators.shape[0], accumulators.device
    if K > MOST_TASKS:
        return gramian_by_matrix_products(gradients, history_scale, momentum)
    rows = K + (momentum is not None)
    pairs, crosses = rows * (rows + 1) // 2, K * K if history is not None else 0
    length = tables.chunk_length(sum(sizes))
    plan = plan_of(
        tables.no_keys(len(sizes)),
        offsets,
        sizes,
        tables.is_aligned(accumulators, history, momentum),
        length,
        device,
    )
    chunks = plan.chunks
    tables.keep_if_captured(plan.rows, chunks.table, chunks.first)
    partials = torch.empty((pairs + crosses, chunks.total), dtype=torch.float32, device=device)
    vector = vector_elements(pairs + crosses)
    with tables.guard(device):
        if chunks.total:
            products_kernel[(chunks.total,)](
                accumulators,
                accumulators if history is None else history,
                accumulators if momentum is None else momentum,
                chunks.table if mask is None else mask,
                plan.rows,
                chunks.table,
                partials,
                accumulators.stride(0),
                chunks.total,
                K=K,
                HISTORY=int(history is not None),
                MOMENTUM=int(momentum is not None),
                MASK=mask is not None,
                LENGTH=length,
                LANES=32 * WARPS,
                VECTOR=vector,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        total, cross, per_tensor, cross_per_tensor = add_up(
            partials, chunks, scale, history_scale, K, rows, crosses
        )
    if history is None:
        return Gramians(total, None, per_tensor, None)
    return Gramians(total, cross, per_tensor, cross_per_tensor)


def add_up(
    partials: Tensor,
    chunks: tables.Chunks,
    scale: Tensor | None,
    history_scale: Tensor | None,
    K: int,
    rows: int,
    crosses: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums [P, C] partial sums to [K, K] and [K, K], and of each tensor [T, R, R] and [T, K, K].

    Without cross products the second is [0, 0] and the last [T, 0, 0].
    """
    tensors, device = len(chunks.first) - 1, partials.device
    per_tensor = torch.empty((tensors, rows, rows), dtype=torch.float64, device=device)
    total = torch.empty((K, K), dtype=torch.float64, device=device)
    crossed = K if crosses else 0
    cross = torch.empty((crossed, crossed), dtype=torch.float64, device=device)
    cross_per_tensor = torch.empty((tensors, crossed, crossed), dtype=torch.float64, device=device)
    sum_kernel[(tensors + 1, rows * (rows + 1) // 2 + crosses)](
        partials,
        chunks.first,
        total if scale is None else scale,
        total if history_scale is None else history_scale,
        per_tensor,
        total,
        cross,
        cross_per_tensor,
        tensors,
        chunks.total,
        K=K,
        ROWS=rows,
        SCALED=scale is not None,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
    return total, cross, per_tensor, cross_per_tensor


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Gramian, and Gramian per tensor, of L lists; see `gcond_kernels.python.norms`."""
    count = len(lists)
    tensors = [tensor for one in lists for tensor in one]
    device = tensors[0].device if tensors else torch.device("cpu")
    sizes = tuple([tensor.numel() for tensor in lists[0]])
    length = tables.chunk_length(sum(sizes))
    plan = plan_of(
        tables.keys_of(tensors), (0,) * len(tensors), sizes * count, True, length, device
    )
    chunks = tables.chunk_table(sizes, length, device)  # the plan's would be of all lists
    tables.keep_if_captured(plan.rows, chunks.table, chunks.first)
    shape = (count * (count + 1) // 2, chunks.total)
    partials = torch.empty(shape, dtype=torch.float32, device=device)
    with tables.guard(device):
        if chunks.total:
            list_products_kernel[(chunks.total,)](
                plan.rows,
                chunks.table,
                partials,
                len(sizes),
                chunks.total,
                LISTS=count,
                TYPES=plan.types,
                LENGTH=length,
                LANES=32 * WARPS,
                VECTOR=8,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        total, _, per_tensor, _ = add_up(partials, chunks, None, None, count, count, 0)
    return total, per_tensor
