"""graddrop: of every element one sign is picked, and only gradients of that sign are added up.

All parameters in one launch, as in `combine`, and to the same bits as the reference: the picks are
a matter of rounding where a purity is close to its random number, so no product is fused into a
sum.
"""

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops import random
from gcond_kernels.ops.types import Momentum, SignDropout, TaskGradients
from gcond_kernels.triton_kernels.combine import factors_of
from gcond_kernels.triton_kernels.memory import (
    ALIGNED,
    NO_TENSOR,
    at_element,
    locate,
    plan_of,
    throughout,
    trained_of_piece,
    write,
)

CHUNK = 1024
WARPS = 4
# Up to here all rows stay in registers; of more tasks they are read again, from a cache.
MOST_UNROLLED = 8

# What a kernel reads must be a constant of Triton's.
GAMMA = tl.constexpr(random.GAMMA)
FIRST_FACTOR = tl.constexpr(random.FIRST_FACTOR)
SECOND_FACTOR = tl.constexpr(random.SECOND_FACTOR)
UNUSED_BITS = tl.constexpr(64 - random.RANDOM_BITS)
RANDOM_RANGE = tl.constexpr(2**random.RANDOM_BITS)
RANDOM_UNIT = tl.constexpr(2.0**-random.RANDOM_BITS)


@triton.jit
def mixed(bits):
    """SplitMix64's finalizer of uint64 numbers, whose products wrap."""
    bits = (bits ^ (bits >> 30)) * FIRST_FACTOR
    bits = (bits ^ (bits >> 27)) * SECOND_FACTOR
    return bits ^ (bits >> 31)


@triton.jit
def random_cosines(seed, draws, place, at):
    """2 U - 1 for the random numbers U of places `place + at`: float32, each of them exact."""
    origin = mixed(tl.load(draws).to(tl.uint64) * GAMMA + seed.to(tl.uint64))
    origin += (place + 1).to(tl.uint64) * GAMMA
    bits = (mixed(origin + at.to(tl.uint64) * GAMMA) >> UNUSED_BITS).to(tl.int32)
    return (2 * bits + 1 - RANDOM_RANGE).to(tl.float32) * RANDOM_UNIT


@triton.jit
def scaled_row(accumulators, row, stride, start, at, inside, scale, finite, WIDE: tl.constexpr):
    """A row times its scale; zeros, and nothing is read, where the task takes no part."""
    share = tl.load(scale + row).to(tl.float32)
    taking_part = (share != 0.0) & finite
    source = at_element(accumulators, tl.cast(row, tl.int64) * stride + start, WIDE)
    values = tl.load(source + at, mask=inside & throughout(taking_part, at), other=0.0)
    return tl.where(taking_part, values.to(tl.float32) * share, 0.0)


@triton.jit
def let_through(value, total, bar, leak):
    """The value where its sign is the one picked, and the leak of it elsewhere."""
    kept = ((total > bar) & (value > 0.0)) | ((total < bar) & (value < 0.0))
    return tl.where(kept, value, value * leak)


@triton.jit
def picked(
    accumulators, stride, start, at, inside, scale, finite, leak, seed, draws, place,
    K: tl.constexpr, MOST_UNROLLED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ_k of what is let through of scale_k · row_k; added up in the order of the tasks."""
    total, size = tl.zeros(at.shape, tl.float32), tl.zeros(at.shape, tl.float32)
    result = tl.zeros(at.shape, tl.float32)
    # The purity P = (1 + total / size) / 2 is above the random U where total > (2 U - 1) size.
    if K <= MOST_UNROLLED:
        values = ()
        for row in tl.static_range(K):
            value = scaled_row(accumulators, row, stride, start, at, inside, scale, finite, WIDE)
            values = values + (value,)
        for row in tl.static_range(K):
            total += values[row]
            size += tl.abs(values[row])
        bar = random_cosines(seed, draws, place, at) * size
        for row in tl.static_range(K):
            result += let_through(values[row], total, bar, leak)
    else:
        for row in range(0, K):
            value = scaled_row(accumulators, row, stride, start, at, inside, scale, finite, WIDE)
            total += value
            size += tl.abs(value)
        bar = random_cosines(seed, draws, place, at) * size
        for row in range(0, K):
            value = scaled_row(accumulators, row, stride, start, at, inside, scale, finite, WIDE)
            result += let_through(value, total, bar, leak)
    return result


@triton.jit
def graddrop_chunk(
    accumulators, momentum, mask, address, kind, offset, first, size, scale, factor, beta, fresh,
    finite, leak, seed, draws, first_place, stride,
    K: tl.constexpr, MOST_UNROLLED: tl.constexpr, MOMENTUM: tl.constexpr, MASK: tl.constexpr,
    TYPES: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Picked sum, momentum and output of one piece of a tensor."""
    at = tl.arange(0, CHUNK)
    inside = True if WIDE else at < size - first
    start = offset + first
    total = picked(
        accumulators, stride, start, at, inside, scale, finite, leak, seed, draws,
        first_place + start, K, MOST_UNROLLED, WIDE,
    )  # fmt: skip
    if MOMENTUM:
        average = at_element(momentum, start, WIDE) + at
        updated = inside & throughout(finite, at)
        total = beta * tl.load(average, mask=updated, other=0.0) + fresh * total
    if MASK:
        total = tl.where(trained_of_piece(mask, start, at, inside, CHUNK, WIDE), total, 0.0)
    if MOMENTUM:
        tl.store(average, total, mask=updated)
    write(address, kind, first + at, total * factor, inside, TYPES, WIDE)


# Annotated, so that one variant serves numbers of any size.
@triton.jit(do_not_specialize=["seed", "first_place", "stride"])
def graddrop_kernel(
    accumulators,  # [K, N'] float32 or bfloat16
    momentum,  # [N'] float32, updated where MOMENTUM
    mask,  # [N' / 32] int32, read where MASK
    table,  # [T, 4] int64: address, kind, offset, size
    chunks,  # [C, 2] int32: tensor, piece
    scale,  # [K] float64
    finite,  # [] bool
    draws,  # [] int64
    factors,  # [T] float64; read where MOMENTUM
    settings,  # [1] float64, β; read where MOMENTUM
    leak,  # float32
    seed: tl.int64,
    first_place: tl.int64,  # of the rows' first element
    stride,  # N'
    K: tl.constexpr,
    MOST_UNROLLED: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MASK: tl.constexpr,
    TYPES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One piece of one tensor; of a tensor that is not written nothing is read either."""
    tensor, first = locate(chunks, CHUNK)
    address, kind = tl.load(table + 4 * tensor), tl.load(table + 4 * tensor + 1)
    offset, size = tl.load(table + 4 * tensor + 2), tl.load(table + 4 * tensor + 3)
    aligned, kind = kind & ALIGNED, kind & (ALIGNED - 1)
    # Interpreted they are of as many bits as their values need.
    seed, first_place = tl.cast(seed, tl.int64), tl.cast(first_place, tl.int64)
    stride = tl.cast(stride, tl.int64)
    # Where a gradient was not finite nothing is read: zeros are written, the momentum is kept.
    is_finite = tl.load(finite) != 0
    beta, fresh, factor = 0.0, 1.0, 1.0
    if MOMENTUM:
        beta = tl.load(settings).to(tl.float32)
        fresh = (1.0 - tl.load(settings)).to(tl.float32)
        factor = tl.load(factors + tensor).to(tl.float32)
    if kind != NO_TENSOR:
        if (aligned != 0) & (size - first >= CHUNK):
            graddrop_chunk(
                accumulators, momentum, mask, address, kind, offset, first, size, scale, factor,
                beta, fresh, is_finite, leak, seed, draws, first_place, stride,
                K, MOST_UNROLLED, MOMENTUM, MASK, TYPES, CHUNK, True,
            )  # fmt: skip
        else:
            graddrop_chunk(
                accumulators, momentum, mask, address, kind, offset, first, size, scale, factor,
                beta, fresh, is_finite, leak, seed, draws, first_place, stride,
                K, MOST_UNROLLED, MOMENTUM, MASK, TYPES, CHUNK, False,
            )  # fmt: skip


def graddrop(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    finite: Tensor,
    dropout: SignDropout,
    momentum: Momentum | None,
) -> None:
    """Writes gradients and momentum; see `gcond_kernels.ops.graddrop`."""
    accumulators, (offsets, sizes), scale, _, mask = gradients
    buffer, momentum_steps, beta = (None, None, 0.0) if momentum is None else momentum
    seed, draws, leak, first = dropout
    K, device = accumulators.shape[0], accumulators.device
    if not sizes:
        return
    plan = plan_of(
        tables.keys_of(outputs),
        offsets,
        sizes,
        tables.is_aligned(accumulators, buffer),
        CHUNK,
        device,
    )
    settings = tables.settings_tensor((float(beta), math.inf, 0.0, 0.0), device)
    tables.keep_if_captured(plan.rows, plan.chunks.table, settings)
    with tables.guard(device):
        factors, _ = factors_of(
            plan, scale, scale, finite, momentum_steps, None, settings, clip=False
        )
        if not plan.chunks.total:
            return
        graddrop_kernel[(plan.chunks.total,)](
            accumulators,
            accumulators if buffer is None else buffer,
            plan.chunks.table if mask is None else mask,
            plan.rows,
            plan.chunks.table,
            scale,
            finite,
            draws,
            scale if factors is None else factors,
            settings,
            leak,
            random.signed(seed % (1 << 64)),
            first,
            accumulators.stride(0),
            K=K,
            MOST_UNROLLED=MOST_UNROLLED,
            MOMENTUM=momentum is not None,
            MASK=mask is not None,
            TYPES=plan.types,
            CHUNK=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
