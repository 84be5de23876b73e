"""combine: one weighted sum of the accumulators is written as the gradient of every parameter.

All parameters in one launch, whatever their dtypes, with momentum and history in the same pass.
Momentum needs the bias correction of each tensor, and a bound the norm of all: launches on T
numbers find them first.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients
from gcond_kernels.triton_kernels.memory import (
    ALIGNED_BIT,
    NO_TENSOR,
    Storage,
    elements_of,
    load_chunk,
    pointers,
    store_float32,
    trainable_elements,
    uniform_mask,
)
from gcond_kernels.triton_kernels.plans import Plan, plan_of

CHUNK = 1024
WARPS = 4
# Up to here the loop over the tasks is unrolled, so that all loads are on their way at once.
MOST_UNROLLED = tl.constexpr(8)

# Offsets into the array of settings.
BETA, MAX_NORM = tl.constexpr(0), tl.constexpr(1)


class Update(NamedTuple):
    """What turns the accumulators of a tensor into its gradient."""

    weights_ptr: Any  # [K] float64, the tensor's weights; or None
    scale_ptr: Any  # [K] float64
    is_finite: Any  # where it is False nothing is read: zeros are written, the state stays
    beta: Any  # decay of the momentum, float32
    fresh: Any  # 1 - beta
    factor: Any  # what is written for each unit of the new momentum, float32


@triton.jit
def add_task(total, task, storage, update, elements):
    """Return total + weight · accumulator; of an active task keep the accumulator as history."""
    scale_ptr = update.scale_ptr + task
    active = (tl.load(scale_ptr) != 0.0) & update.is_finite
    weight = tl.load(update.weights_ptr + task) * tl.load(scale_ptr)
    weight = (weight * update.fresh).to(tl.float32)
    weighted = (weight != 0.0) & update.is_finite
    needed = weighted
    if storage.history_ptr is not None:
        needed = weighted | active
    task_start = tl.cast(task, tl.int64) * storage.stride
    offsets, mask = elements.offsets, elements.mask
    source_ptr = pointers(storage.accumulators_ptr, task_start, elements)
    values = tl.load(source_ptr, mask=mask & uniform_mask(needed, offsets), other=0.0)
    if storage.history_ptr is not None:
        target_ptr = pointers(storage.history_ptr, task_start, elements)
        kept = values.to(tl.float32).to(target_ptr.dtype.element_ty)
        tl.store(target_ptr, kept, mask=mask & uniform_mask(active, offsets))
    return total + tl.where(weighted, weight * values.to(tl.float32), 0.0)


@triton.jit
def write_gradient(total, chunk, storage, update, elements, TYPES):
    """Update the momentum by a sum, where there is one, and write it as the gradient."""
    offsets, mask = elements.offsets, elements.mask
    if storage.momentum_ptr is not None:
        momentum_ptr = pointers(storage.momentum_ptr, 0, elements)
        updated = mask & uniform_mask(update.is_finite & (chunk.dtype_code != NO_TENSOR), offsets)
        total += update.beta * tl.load(momentum_ptr, mask=updated, other=0.0)
    if storage.mask_ptr is not None:
        total = tl.where(trainable_elements(storage.mask_ptr, elements), total, 0.0)
    if storage.momentum_ptr is not None:
        tl.store(momentum_ptr, total, mask=updated)
    values, offsets = total * update.factor, chunk.first + offsets
    store_float32(values, chunk.address, chunk.dtype_code, offsets, mask, TYPES, elements.ALIGNED)


@triton.jit
def combine_chunk(chunk, storage, update, K, TYPES, BLOCK_SIZE, ALIGNED):
    """Write the weighted sum, history, momentum and gradient of one chunk."""
    elements = elements_of(chunk, BLOCK_SIZE, ALIGNED)
    total = tl.zeros([BLOCK_SIZE], tl.float32)
    if K <= MOST_UNROLLED:
        for task in tl.static_range(K):
            total = add_task(total, task, storage, update, elements)
    else:
        for task in range(K):
            total = add_task(total, task, storage, update, elements)
    write_gradient(total, chunk, storage, update, elements, TYPES)


@triton.jit(do_not_specialize=["weight_stride", "stride"])
def combine_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    accumulators_ptr,  # [K, N'] float32 or bfloat16
    history_ptr,  # [K, N'], written; or None
    momentum_ptr,  # [N'] float32, updated; or None
    mask_ptr,  # [⌈N' / 32⌉] int32, or None
    table_ptr,  # [T, 4] int64: address, dtype code, offset, size
    chunks_ptr,  # [C, 2] int32: tensor, number of the chunk within it
    weights_ptr,  # [T, K] float64
    scale_ptr,  # [K] float64
    finite_ptr,  # [] bool
    factors_ptr,  # [T] float64, or None
    clipping_ptr,  # [] float64, or None
    settings_ptr,  # [2] float64: BETA, MAX_NORM
    weight_stride,  # K, or 0 where all tensors have the same weights
    stride,  # N'
    K: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Write the gradient of one chunk of one tensor."""
    chunk = load_chunk(table_ptr, chunks_ptr, BLOCK_SIZE)
    is_finite = tl.load(finite_ptr) != 0
    beta = tl.load(settings_ptr + BETA)
    factor = 1.0
    if factors_ptr is not None:
        factor = tl.load(factors_ptr + chunk.tensor)
    if clipping_ptr is not None:
        factor *= tl.load(clipping_ptr)
    factor = tl.where(is_finite, factor, 0.0).to(tl.float32)
    weights_ptr += chunk.tensor * weight_stride
    stride = tl.cast(stride, tl.int64)
    storage = Storage(accumulators_ptr, history_ptr, momentum_ptr, mask_ptr, stride)
    update = Update(weights_ptr, scale_ptr, is_finite, beta.to(tl.float32), 1.0 - beta, factor)
    if chunk.is_full:
        combine_chunk(chunk, storage, update, K, TYPES, BLOCK_SIZE, True)
    else:
        combine_chunk(chunk, storage, update, K, TYPES, BLOCK_SIZE, False)


@triton.jit(do_not_specialize=["weight_stride"])
def factor_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    table_ptr,  # [T, 4] int64: -, dtype code, -, -
    per_tensor_ptr,  # [T, R, R] float64, read where there are squares
    weights_ptr,  # [T, K] float64, read where there are squares
    finite_ptr,  # [] bool
    steps_ptr,  # [T] int64, counted up; None without momentum
    settings_ptr,  # as in combine_kernel
    factors_ptr,  # [T] float64, written: what multiplies m
    squares_ptr,  # [T] float64, written: ‖m̂‖²; or None
    weight_stride,  # K, or 0 where all tensors have the same weights
    K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Find the factor of one tensor; with v = (1-β) w, and β for the momentum, ‖m‖² = vᵀ G v."""
    tensor = tl.program_id(0).to(tl.int64)
    dtype_code = tl.load(table_ptr + 4 * tensor + 1) & (ALIGNED_BIT - 1)
    written = (dtype_code != NO_TENSOR) & (tl.load(finite_ptr) != 0)
    beta = tl.load(settings_ptr + BETA)
    factor = tl.full([], 1.0, tl.float64)
    if steps_ptr is not None:
        steps = tl.load(steps_ptr + tensor) + written.to(tl.int64)
        tl.debug_barrier()  # no thread may read the count after another has written it
        tl.store(steps_ptr + tensor, steps, mask=written)
        # A tensor that never had a gradient has t = 0 and is not written: any factor will do.
        power = tl.exp(tl.maximum(steps, 1).to(tl.float64) * tl.log(beta))
        factor = 1.0 / (1.0 - power)
    if squares_ptr is not None:
        R: tl.constexpr = K + (steps_ptr is not None)
        row, column = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
        task = tl.arange(0, BLOCK_R)
        weights_ptr += tensor * weight_stride
        v = (1.0 - beta) * tl.load(weights_ptr + task, mask=task < K, other=0.0)
        if steps_ptr is not None:
            v = tl.where(task == K, beta, v)
        G_ptr = per_tensor_ptr + tensor * R * R + row * R + column
        G = tl.load(G_ptr, mask=(row < R) & (column < R), other=0.0)
        square = tl.sum(tl.sum(G * v[None, :], axis=1) * v, axis=0)
        square = tl.maximum(square, 0.0) * factor * factor
        tl.store(squares_ptr + tensor, tl.where(written, square, 0.0))
    tl.store(factors_ptr + tensor, factor)


@triton.jit(do_not_specialize=["tensors"])
def clipping_kernel(
    squares_ptr,  # [T] float64
    settings_ptr,  # as in combine_kernel
    clipping_ptr,  # [] float64, written: min(1, max_norm / ‖m̂‖)
    tensors,  # T
    BLOCK_SIZE: tl.constexpr,
):
    """Find the factor that scales all gradients together down to a norm."""
    total = tl.zeros([BLOCK_SIZE], tl.float64)
    for start in range(0, tensors, BLOCK_SIZE):
        offsets = start + tl.arange(0, BLOCK_SIZE)
        total += tl.load(squares_ptr + offsets, mask=offsets < tensors, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    bound = tl.load(settings_ptr + MAX_NORM)
    exceeded = norm > bound
    tl.store(clipping_ptr, tl.where(exceeded, bound / tl.where(exceeded, norm, 1.0), 1.0))


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Write gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    accumulators, layout, scale, history, mask = gradients
    if not layout.sizes:
        return
    buffer = None if momentum is None else momentum.buffer
    device = accumulators.device
    plan = plan_of(outputs, layout, CHUNK, device, accumulators, history, buffer)
    weights = weights.expand(len(layout.sizes), -1)
    with tables.guard(device):
        settings, factors, clipping = factors_of(plan, weights, finite, momentum, rescale)
        if not plan.chunks.total:
            return
        combine_kernel[(plan.chunks.total,)](
            accumulators,
            history,
            buffer,
            mask,
            plan.table,
            plan.chunks.table,
            weights,
            scale,
            finite,
            factors,
            clipping,
            settings,
            weights.stride(0),
            accumulators.stride(0),
            K=len(scale),
            TYPES=plan.types,
            BLOCK_SIZE=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def factors_of(
    plan: Plan,
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the settings, [T] factors of the tensors, with weights [T, K], and the factor of all.

    None stands for factors that are all 1. The steps of the momentum are counted up.
    """
    beta = 0.0 if momentum is None else float(momentum.beta)
    bound = math.inf if rescale is None else float(rescale.max_norm)
    settings = tables.settings_tensor((beta, bound), weights.device)
    tables.keep_if_captured(settings)
    if momentum is None and rescale is None:
        return settings, None, None
    tensors, K = weights.shape
    factors, squares = torch.empty((2, tensors), dtype=torch.float64, device=weights.device)
    factor_kernel[(tensors,)](
        plan.table,
        None if rescale is None else rescale.per_tensor.contiguous(),
        weights,
        finite,
        None if momentum is None else momentum.steps,
        settings,
        factors,
        None if rescale is None else squares,
        weights.stride(0),
        K=K,
        BLOCK_R=triton.next_power_of_2(K + (momentum is not None)),
        num_warps=1,
        enable_fp_fusion=False,
    )
    if rescale is None:
        return settings, factors, None
    clipping = torch.empty((), dtype=torch.float64, device=weights.device)
    clipping_kernel[(1,)](
        squares, settings, clipping, tensors, BLOCK_SIZE=1024, num_warps=4, enable_fp_fusion=False
    )
    return settings, factors, clipping
