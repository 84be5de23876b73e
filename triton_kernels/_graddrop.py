"""graddrop: of every element one sign is picked, and only gradients of that sign are added up.

All parameters in one launch, as in `combine`, and to the same bits as the reference: what is picked
is a matter of rounding where a purity is close to its random number, so no product is fused into a
sum.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops import random
from gcond_kernels.ops.types import Momentum, SignDropout, TaskGradients
from gcond_kernels.triton_kernels._combine import (
    BETA,
    MOST_UNROLLED,
    Update,
    factors_of,
    write_gradient,
)
from gcond_kernels.triton_kernels.memory import (
    NO_TENSOR,
    Storage,
    elements_of,
    load_chunk,
    pointers,
    uniform_mask,
)
from gcond_kernels.triton_kernels.plans import plan_of

CHUNK = 1024
WARPS = 4

# What a kernel reads must be a constant of Triton's.
GAMMA = tl.constexpr(random.GAMMA)
FIRST_FACTOR = tl.constexpr(random.FIRST_FACTOR)
SECOND_FACTOR = tl.constexpr(random.SECOND_FACTOR)
UNUSED_BITS = tl.constexpr(64 - random.RANDOM_BITS)
RANDOM_RANGE = tl.constexpr(2**random.RANDOM_BITS)
RANDOM_UNIT = tl.constexpr(2.0**-random.RANDOM_BITS)


@triton.jit
def mixed(bits):
    """Return SplitMix64's finalizer of uint64 numbers, whose products wrap."""
    bits = (bits ^ (bits >> 30)) * FIRST_FACTOR
    bits = (bits ^ (bits >> 27)) * SECOND_FACTOR
    return bits ^ (bits >> 31)


@triton.jit
def random_cosines(dropout, elements):
    """Return 2 U - 1 for the random number U of each element: float32, all of them exact."""
    origin = mixed(tl.load(dropout.counter).to(tl.uint64) * GAMMA + dropout.seed.to(tl.uint64))
    origin += (dropout.first + elements.start + 1).to(tl.uint64) * GAMMA
    bits = mixed(origin + elements.offsets.to(tl.uint64) * GAMMA) >> UNUSED_BITS
    return (2 * bits.to(tl.int32) + 1 - RANDOM_RANGE).to(tl.float32) * RANDOM_UNIT


@triton.jit
def scaled_gradient(task, storage, update, elements):
    """Return scale · accumulator; zeros, and nothing is read, of a task that takes no part."""
    scale = tl.load(update.scale_ptr + task).to(tl.float32)
    active = (scale != 0.0) & update.is_finite
    source_ptr = pointers(
        storage.accumulators_ptr, tl.cast(task, tl.int64) * storage.stride, elements
    )
    mask = elements.mask & uniform_mask(active, elements.offsets)
    values = tl.load(source_ptr, mask=mask, other=0.0)
    return tl.where(active, values.to(tl.float32) * scale, 0.0)


@triton.jit
def let_through(value, total, bar, leak):
    """Return the value where its sign is the one picked, and the leak of it elsewhere."""
    kept = ((total > bar) & (value > 0.0)) | ((total < bar) & (value < 0.0))
    return tl.where(kept, value, value * leak)


@triton.jit
def graddrop_chunk(chunk, storage, update, dropout, K, TYPES, BLOCK_SIZE, ALIGNED):
    """Write the sum of what is let through of one chunk, in the order of the tasks."""
    elements = elements_of(chunk, BLOCK_SIZE, ALIGNED)
    total, size = tl.zeros([BLOCK_SIZE], tl.float32), tl.zeros([BLOCK_SIZE], tl.float32)
    result = tl.zeros([BLOCK_SIZE], tl.float32)
    # The purity P = (1 + total / size) / 2 is above the random U where total > (2 U - 1) size.
    if K <= MOST_UNROLLED:
        values = ()
        for task in tl.static_range(K):
            values = values + (scaled_gradient(task, storage, update, elements),)
        for task in tl.static_range(K):
            total += values[task]
            size += tl.abs(values[task])
        bar = random_cosines(dropout, elements) * size
        for task in tl.static_range(K):
            result += let_through(values[task], total, bar, dropout.leak)
    else:  # the accumulators are read again, from a cache
        for task in range(K):
            value = scaled_gradient(task, storage, update, elements)
            total += value
            size += tl.abs(value)
        bar = random_cosines(dropout, elements) * size
        for task in range(K):
            value = scaled_gradient(task, storage, update, elements)
            result += let_through(value, total, bar, dropout.leak)
    if storage.momentum_ptr is not None:
        result = update.fresh * result
    write_gradient(result, chunk, storage, update, elements, TYPES)


# Annotated, so that one variant serves numbers of any size.
@triton.jit(do_not_specialize=["seed", "first", "stride"])
def graddrop_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    accumulators_ptr,  # [K, N'] float32 or bfloat16
    momentum_ptr,  # [N'] float32, updated; or None
    mask_ptr,  # [⌈N' / 32⌉] int32, or None
    table_ptr,  # [T, 4] int64: address, dtype code, offset, size
    chunks_ptr,  # [C, 2] int32: tensor, number of the chunk within it
    scale_ptr,  # [K] float64
    finite_ptr,  # [] bool
    counter_ptr,  # [] int64
    factors_ptr,  # [T] float64, read where there is momentum
    settings_ptr,  # [2] float64: BETA, -; read where there is momentum
    leak,  # float32
    seed: tl.int64,
    first: tl.int64,  # place of the accumulators' first element
    stride,  # N'
    K: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write the gradient of one chunk of one tensor, if it has one."""
    chunk = load_chunk(table_ptr, chunks_ptr, BLOCK_SIZE)
    is_finite = tl.load(finite_ptr) != 0
    beta, fresh, factor = 0.0, 1.0, 1.0
    if momentum_ptr is not None:
        beta = tl.load(settings_ptr + BETA).to(tl.float32)
        fresh = (1.0 - tl.load(settings_ptr + BETA)).to(tl.float32)
        factor = tl.load(factors_ptr + chunk.tensor).to(tl.float32)
    stride = tl.cast(stride, tl.int64)
    storage = Storage(accumulators_ptr, None, momentum_ptr, mask_ptr, stride)
    update = Update(None, scale_ptr, is_finite, beta, fresh, factor)
    # Interpreted they are of as many bits as their values need.
    seed, first = tl.cast(seed, tl.int64), tl.cast(first, tl.int64)
    dropout = SignDropout(seed, counter_ptr, leak, first)
    if chunk.dtype_code != NO_TENSOR:
        if chunk.is_full:
            graddrop_chunk(chunk, storage, update, dropout, K, TYPES, BLOCK_SIZE, True)
        else:
            graddrop_chunk(chunk, storage, update, dropout, K, TYPES, BLOCK_SIZE, False)


def graddrop(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    finite: Tensor,
    dropout: SignDropout,
    momentum: Momentum | None,
) -> None:
    """Write gradients and momentum; see `gcond_kernels.ops.graddrop`."""
    accumulators, layout, scale, _, mask = gradients
    if not layout.sizes:
        return
    buffer = None if momentum is None else momentum.buffer
    device = accumulators.device
    plan = plan_of(outputs, layout, CHUNK, device, accumulators, buffer)
    with tables.guard(device):
        settings, factors, _ = factors_of(
            plan, scale.expand(len(layout.sizes), -1), finite, momentum, None
        )
        if not plan.chunks.total:
            return
        graddrop_kernel[(plan.chunks.total,)](
            accumulators,
            buffer,
            mask,
            plan.table,
            plan.chunks.table,
            scale,
            finite,
            dropout.counter,
            factors,
            settings,
            dropout.leak,
            random.signed(dropout.seed % (1 << 64)),
            dropout.first,
            accumulators.stride(0),
            K=len(scale),
            TYPES=plan.types,
            BLOCK_SIZE=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
