"""gramian: every inner product that the method needs, from one read of the accumulators.

Two launches. In the first each program reads its chunk of all accumulators once and sums every
product in float32; in the second each product's sums are added up in float64, in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Gramians, Layout, TaskGradients
from gcond_kernels.triton_kernels.memory import (
    ALIGNED_BIT,
    Elements,
    Storage,
    load_float32,
    locate,
    pointers,
    trainable_bits,
)
from gcond_kernels.triton_kernels.plans import plan_of

WARPS = 4
SUM_BLOCK = 1024
SUM_WARPS = 4


@triton.jit
def load_gradients(loaded, base_ptr, stride, elements, trainable, COUNT):
    """Return `loaded` and the elements of `COUNT` more flat gradients, float32."""
    for index in tl.static_range(COUNT):
        source_ptr = pointers(base_ptr, index * stride, elements)
        values = tl.load(source_ptr, mask=elements.mask, other=0.0).to(tl.float32)
        if trainable is not None:  # selected here: a mask that varies makes narrow loads
            values = tl.where(trainable, values, 0.0)
        loaded = loaded + (values,)
    return loaded


@triton.jit
def load_tile(storage, start, vectors, within, mask, K, ALIGNED):
    """Return a tile of the accumulators and the momentum, and one of the history."""
    offsets = vectors + within
    elements = Elements(start, offsets, mask, ALIGNED)
    trainable = None
    if storage.mask_ptr is not None:
        if ALIGNED:  # then the elements of a vector have their bits in one word
            trainable = trainable_bits(storage.mask_ptr, start, vectors, within, True)
        else:
            trainable = trainable_bits(storage.mask_ptr, start, offsets, 0, mask)
    values = load_gradients((), storage.accumulators_ptr, storage.stride, elements, trainable, K)
    if storage.momentum_ptr is not None:
        values = load_gradients(values, storage.momentum_ptr, 0, elements, trainable, 1)
    history = ()
    if storage.history_ptr is not None:
        history = load_gradients((), storage.history_ptr, storage.stride, elements, trainable, K)
    return values, history


@triton.jit
def no_products(COUNT, LANES):
    """Return sums before the first product."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LANES], tl.float32),)
    return sums


@triton.jit
def add_products(sums, values, history, K):
    """Add each lane's products: of all pairs of gradients, then of each task and each history."""
    added = ()
    for i in tl.static_range(len(values)):
        for j in tl.static_range(i, len(values)):
            added = added + (sums[len(added)] + tl.sum(values[i] * values[j], axis=1),)
    for i in tl.static_range(K):
        for j in tl.static_range(len(history)):
            added = added + (sums[len(added)] + tl.sum(values[i] * history[j], axis=1),)
    return added


@triton.jit
def store_products(partials_ptr, chunk_count, sums):
    """Write partials[product, chunk] of this program's chunk."""
    chunk_count = tl.cast(chunk_count, tl.int64)
    for product in tl.static_range(len(sums)):
        place = product * chunk_count + tl.program_id(0)
        tl.store(partials_ptr + place, tl.sum(sums[product], axis=0))


# Not specialized: a variant for a count of 1, and one for multiples of 16, would gain nothing.
@triton.jit(do_not_specialize=["stride", "chunk_count"])
def products_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    accumulators_ptr,  # [K, N'] float32 or bfloat16
    history_ptr,  # [K, N'], or None
    momentum_ptr,  # [N'] float32, or None
    mask_ptr,  # [⌈N' / 32⌉] int32, or None
    table_ptr,  # [T, 4] int64: -, dtype code, offset, size
    chunks_ptr,  # [C, 2] int32: tensor, number of the chunk within it
    partials_ptr,  # [P, C] float32
    stride,  # N'
    chunk_count,  # C
    K: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sum all products over one chunk of one tensor."""
    tensor, first = locate(chunks_ptr, BLOCK_SIZE)
    aligned = (tl.load(table_ptr + 4 * tensor + 1) & ALIGNED_BIT) != 0
    start = tl.load(table_ptr + 4 * tensor + 2) + first
    length = tl.minimum(tl.load(table_ptr + 4 * tensor + 3) - first, BLOCK_SIZE).to(tl.int32)
    stride = tl.cast(stride, tl.int64)
    storage = Storage(accumulators_ptr, history_ptr, momentum_ptr, mask_ptr, stride)
    vectors, within = tl.arange(0, LANES)[:, None] * VECTOR, tl.arange(0, VECTOR)[None, :]
    TILE: tl.constexpr = LANES * VECTOR
    R: tl.constexpr = K + (momentum_ptr is not None)

    sums = no_products(R * (R + 1) // 2 + K * K * (history_ptr is not None), LANES)
    full = tl.where(aligned, length // TILE * TILE, 0)
    for tile in range(0, full, TILE):
        values, history = load_tile(storage, start + tile, vectors, within, True, K, True)
        sums = add_products(sums, values, history, K)
    for tile in range(full, length, TILE):
        mask = tile + vectors + within < length
        values, history = load_tile(storage, start + tile, vectors, within, mask, K, False)
        sums = add_products(sums, values, history, K)
    store_products(partials_ptr, chunk_count, sums)


@triton.jit
def load_lists(entry_ptr, stride, offsets, mask, LISTS, TYPES, ALIGNED):
    """Return elements of the tensor of each list, float32; their entries lie `stride` apart."""
    values = ()
    for number in tl.static_range(LISTS):
        list_ptr = entry_ptr + number * stride
        dtype_code = tl.load(list_ptr + 1) & (ALIGNED_BIT - 1)
        values = values + (
            load_float32(tl.load(list_ptr), dtype_code, offsets, mask, TYPES, ALIGNED),
        )
    return values


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def list_products_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    table_ptr,  # [L · T, 4] int64: address, dtype code, -, size
    chunks_ptr,  # [C, 2] int32: tensor, number of the chunk within it
    partials_ptr,  # [P, C] float32
    tensors,  # T
    chunk_count,  # C
    LISTS: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sum all products over one chunk of the tensors of one place in each list."""
    tensor, first = locate(chunks_ptr, BLOCK_SIZE)
    entry_ptr, stride = table_ptr + 4 * tensor, 4 * tl.cast(tensors, tl.int64)
    aligned = True
    for number in tl.static_range(LISTS):
        aligned = aligned & ((tl.load(entry_ptr + number * stride + 1) & ALIGNED_BIT) != 0)
    length = tl.minimum(tl.load(entry_ptr + 3) - first, BLOCK_SIZE).to(tl.int32)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    TILE: tl.constexpr = LANES * VECTOR

    sums = no_products(LISTS * (LISTS + 1) // 2, LANES)
    full = tl.where(aligned, length // TILE * TILE, 0)
    for tile in range(0, full, TILE):
        values = load_lists(entry_ptr, stride, first + tile + offsets, True, LISTS, TYPES, True)
        sums = add_products(sums, values, (), LISTS)
    for tile in range(full, length, TILE):
        mask = tile + offsets < length
        values = load_lists(entry_ptr, stride, first + tile + offsets, mask, LISTS, TYPES, False)
        sums = add_products(sums, values, (), LISTS)
    store_products(partials_ptr, chunk_count, sums)


@triton.jit
def pair_of(product, R):
    """Return row and column of an entry of the upper triangle, counted row by row."""
    row = product * 0
    rest = product
    for r in tl.static_range(R - 1):
        beyond = (row == r) & (rest >= R - r)
        rest = tl.where(beyond, rest - (R - r), rest)
        row = tl.where(beyond, row + 1, row)
    return row, row + rest


@triton.jit(do_not_specialize=["tensors", "chunk_count"])
def sum_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    partials_ptr,  # [P, C] float32
    first_ptr,  # [T + 1] int32: the first chunk of each tensor
    scale_ptr,  # [K] float64, or None
    history_scale_ptr,  # [K] float64; read where there are cross products
    total_ptr,  # [K, K] float64, written like all that follow
    cross_ptr,  # [K, K] float64
    per_tensor_ptr,  # [T, R, R] float64
    cross_per_tensor_ptr,  # [T, K, K] float64
    tensors,  # T
    chunk_count,  # C
    K: tl.constexpr,
    R: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Sum one product of one tensor; the last program of each product sums those of all tensors."""
    tensor, product = tl.program_id(0), tl.program_id(1)
    PAIRS: tl.constexpr = R * (R + 1) // 2
    begin = tl.load(first_ptr + tensor, mask=tensor < tensors, other=0)
    end = tl.load(first_ptr + tl.minimum(tensor + 1, tensors))
    partials_ptr += product * tl.cast(chunk_count, tl.int64)
    sums = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(begin, end, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        sums += tl.load(partials_ptr + offsets, mask=offsets < end, other=0.0).to(tl.float64)
    total = tl.sum(sums, axis=0)

    # A task that takes no part may hold anything, NaN included: select.
    if product < PAIRS:
        i, j = pair_of(product, R)
        if scale_ptr is not None:  # the momentum has none
            scale_i = tl.load(scale_ptr + i, mask=i < K, other=1.0)
            weight = scale_i * tl.load(scale_ptr + j, mask=j < K, other=1.0)
            total = tl.where(weight != 0.0, total * weight, 0.0)
        per_tensor_ptr += tensor.to(tl.int64) * R * R
        tl.store(per_tensor_ptr + i * R + j, total, mask=tensor < tensors)
        tl.store(per_tensor_ptr + j * R + i, total, mask=tensor < tensors)
        mask = (tensor == tensors) & (i < K) & (j < K)
        tl.store(total_ptr + i * K + j, total, mask=mask)
        tl.store(total_ptr + j * K + i, total, mask=mask)
    elif cross_ptr is not None:
        i, j = (product - PAIRS) // K, (product - PAIRS) % K
        weight = tl.load(scale_ptr + i) * tl.load(history_scale_ptr + j)
        total = tl.where(weight != 0.0, total * weight, 0.0)
        cross_per_tensor_ptr += tensor.to(tl.int64) * K * K
        tl.store(cross_per_tensor_ptr + i * K + j, total, mask=tensor < tensors)
        tl.store(cross_ptr + i * K + j, total, mask=tensor == tensors)


def vector_elements(products: int) -> int:
    """Return how many consecutive elements of each gradient a thread holds.

    With six tasks or more, or five and momentum, the products leave no registers for eight: then
    four, so that two-byte dtypes are read 8 bytes a thread at a time, float32 still 16.
    """
    return 8 if products <= 40 else 4


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Return Gramian, cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    accumulators, layout, scale, history, mask = gradients
    K, device = len(scale), accumulators.device
    R = K + (momentum is not None)
    products = R * (R + 1) // 2 + (K * K if history is not None else 0)
    length = tables.chunk_length(sum(layout.sizes))
    plan = plan_of(None, layout, length, device, accumulators, history, momentum)
    chunks = plan.chunks
    partials = torch.empty((products, chunks.total), dtype=torch.float32, device=device)
    with tables.guard(device):
        if chunks.total:
            products_kernel[(chunks.total,)](
                accumulators,
                history,
                momentum,
                mask,
                plan.table,
                chunks.table,
                partials,
                accumulators.stride(0),
                chunks.total,
                K=K,
                BLOCK_SIZE=length,
                LANES=32 * WARPS,
                VECTOR=vector_elements(products),
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        return add_up(partials, chunks, scale, None if history is None else history_scale, R)


def add_up(
    partials: Tensor,
    chunks: tables.Chunks,
    scale: Tensor | None,
    history_scale: Tensor | None,
    R: int,
) -> Gramians:
    """Return the sums of [P, C] partial sums, times the scales."""
    (products, total), tensors, device = partials.shape, len(chunks.first) - 1, partials.device
    K = R if scale is None else len(scale)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device=device)

    crosses = history_scale is not None
    gramians = Gramians(
        total=empty(K, K),
        cross=empty(K, K) if crosses else None,
        per_tensor=empty(tensors, R, R),
        cross_per_tensor=empty(tensors, K, K) if crosses else None,
    )
    sum_kernel[(tensors + 1, products)](
        partials,
        chunks.first,
        scale,
        history_scale,
        *gramians,
        tensors,
        total,
        K=K,
        R=R,
        BLOCK_SIZE=SUM_BLOCK,
        num_warps=SUM_WARPS,
        enable_fp_fusion=False,
    )
    return gramians


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Return Gramian, and Gramian per tensor, of L lists; see `gcond_kernels.python.norms`."""
    count = len(lists)
    tensors = [tensor for one in lists for tensor in one]
    device = tensors[0].device if tensors else torch.device("cpu")
    sizes = tuple([tensor.numel() for tensor in lists[0]])
    length = tables.chunk_length(sum(sizes))
    plan = plan_of(tensors, Layout((0,) * len(tensors), sizes * count), length, device)
    chunks = tables.chunk_table(sizes, length, device)  # the plan's would be of all lists
    tables.keep_if_captured(chunks.table, chunks.first)
    shape = (count * (count + 1) // 2, chunks.total)
    partials = torch.empty(shape, dtype=torch.float32, device=device)
    with tables.guard(device):
        if chunks.total:
            list_products_kernel[(chunks.total,)](
                plan.table,
                chunks.table,
                partials,
                len(sizes),
                chunks.total,
                LISTS=count,
                TYPES=plan.types,
                BLOCK_SIZE=length,
                LANES=32 * WARPS,
                VECTOR=8,
                num_warps=WARPS,
                enable_fp_fusion=True,
            )
        gramians = add_up(partials, chunks, None, None, count)
    return gramians.total, gramians.per_tensor
