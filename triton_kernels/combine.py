"""combine: one weighted sum of the accumulators is written as the gradient of every parameter.

All parameters in one launch, whatever their types, with momentum and history in the same pass.
Where the size of a tensor's gradient must be known first (momentum, clipping, trust ratios), a
launch on T numbers goes before it.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients
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
# Up to here the loop over the tasks is unrolled, so that all rows are on their way at once.
MOST_UNROLLED = 8

# What a kernel reads must be a constant of Triton's.
TRUST_RATIO_EPS = tl.constexpr(1e-8)


@triton.jit
def add_row(
    total, accumulators, history, row, stride, start, at, inside, weights, scale, fresh, finite,
    HISTORY: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds weight · row; copies the row to the history where its task took part."""
    taking_part = (tl.load(scale + row) != 0.0) & finite
    weight = (tl.load(weights + row) * tl.load(scale + row) * fresh).to(tl.float32)
    weighted = (weight != 0.0) & finite
    needed = weighted
    if HISTORY:
        needed = weighted | taking_part
    begin = tl.cast(row, tl.int64) * stride + start
    source = at_element(accumulators, begin, WIDE)
    values = tl.load(source + at, mask=inside & throughout(needed, at), other=0.0)
    if HISTORY:
        target = at_element(history, begin, WIDE)
        kept = values.to(tl.float32).to(history.dtype.element_ty)
        tl.store(target + at, kept, mask=inside & throughout(taking_part, at))
    return total + tl.where(weighted, weight * values.to(tl.float32), 0.0)


@triton.jit
def combine_chunk(
    accumulators, history, momentum, mask, address, kind, offset, first, size, weights, scale,
    factor, beta, fresh, finite, stride,
    K: tl.constexpr, MOST_UNROLLED: tl.constexpr, HISTORY: tl.constexpr, MOMENTUM: tl.constexpr,
    MASK: tl.constexpr, SIGNS: tl.constexpr, TYPES: tl.constexpr, CHUNK: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Weighted sum, history, momentum and output of one piece of a tensor."""
    at = tl.arange(0, CHUNK)
    inside = True if WIDE else at < size - first
    start = offset + first
    total = tl.zeros([CHUNK], tl.float32)
    if K <= MOST_UNROLLED:
        for row in tl.static_range(K):
            total = add_row(
                total, accumulators, history, row, stride, start, at, inside, weights, scale,
                fresh, finite, HISTORY, WIDE,
            )  # fmt: skip
    else:
        for row in range(0, K):
            total = add_row(
                total, accumulators, history, row, stride, start, at, inside, weights, scale,
                fresh, finite, HISTORY, WIDE,
            )  # fmt: skip
    if MOMENTUM:
        average = at_element(momentum, start, WIDE) + at
        updated = inside & throughout(finite & (kind != NO_TENSOR), at)
        total += beta * tl.load(average, mask=updated, other=0.0)
    if MASK:
        total = tl.where(trained_of_piece(mask, start, at, inside, CHUNK, WIDE), total, 0.0)
    if MOMENTUM:
        tl.store(average, total, mask=updated)
    if SIGNS:
        total = tl.where(total > 0.0, 1.0, tl.where(total < 0.0, -1.0, 0.0))
    total = total * factor
    write(address, kind, first + at, total, inside, TYPES, WIDE)


@triton.jit(do_not_specialize=["weight_stride", "stride"])
def combine_kernel(
    accumulators,  # [K, N'] float32 or bfloat16
    history,  # [K, N'], written where HISTORY
    momentum,  # [N'] float32, updated where MOMENTUM
    mask,  # [N' / 32] int32, read where MASK
    table,  # [T, 4] int64: address, kind, offset, size
    chunks,  # [C, 2] int32: tensor, piece
    weights,  # [K] float64, or [T, K]
    scale,  # [K] float64
    finite,  # [] bool
    factors,  # [T] float64; read where FACTORS
    clipping,  # [] float64; read where CLIP
    settings,  # [4] float64: β, the bound of the norm, trust ratio coefficient and clip
    weight_stride,  # 0, or K
    stride,  # N'
    K: tl.constexpr,
    MOST_UNROLLED: tl.constexpr,
    HISTORY: tl.constexpr,
    MOMENTUM: tl.constexpr,
    MASK: tl.constexpr,
    FACTORS: tl.constexpr,
    CLIP: tl.constexpr,
    SIGNS: tl.constexpr,
    TYPES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One piece of one tensor."""
    tensor, first = locate(chunks, CHUNK)
    address, kind = tl.load(table + 4 * tensor), tl.load(table + 4 * tensor + 1)
    offset, size = tl.load(table + 4 * tensor + 2), tl.load(table + 4 * tensor + 3)
    aligned, kind = kind & ALIGNED, kind & (ALIGNED - 1)
    weights += tensor * weight_stride
    stride = tl.cast(stride, tl.int64)
    # Where a gradient was not finite nothing is read: zeros are written, the rest is kept.
    is_finite = tl.load(finite) != 0
    beta = tl.load(settings)
    fresh = 1.0 - beta
    factor = fresh * 0.0 + 1.0
    if FACTORS:
        factor = tl.load(factors + tensor)
    if CLIP:
        factor *= tl.load(clipping)
    factor = tl.where(is_finite, factor, 0.0).to(tl.float32)
    beta = beta.to(tl.float32)
    if (aligned != 0) & (size - first >= CHUNK):
        combine_chunk(
            accumulators, history, momentum, mask, address, kind, offset, first, size, weights,
            scale, factor, beta, fresh, is_finite, stride,
            K, MOST_UNROLLED, HISTORY, MOMENTUM, MASK, SIGNS, TYPES, CHUNK, True,
        )  # fmt: skip
    else:
        combine_chunk(
            accumulators, history, momentum, mask, address, kind, offset, first, size, weights,
            scale, factor, beta, fresh, is_finite, stride,
            K, MOST_UNROLLED, HISTORY, MOMENTUM, MASK, SIGNS, TYPES, CHUNK, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["weight_stride"])
def factor_kernel(
    table,  # [T, 4] int64: -, kind, -, -
    per_tensor,  # [T, R, R] float64, read where NORMS
    weights,  # [K] float64, or [T, K]; read where NORMS
    finite,  # [] bool
    momentum_steps,  # [T] int64, counted up where MOMENTUM
    parameter_norms,  # [T] float64, read where SIGNS
    settings,  # as in combine_kernel
    factors,  # [T] float64, written: what multiplies m, or its sign
    squares,  # [T] float64, written where NORMS and not SIGNS: ‖m̂‖²
    weight_stride,  # 0, or K
    K: tl.constexpr,
    RP: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NORMS: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """The factor of one tensor; with v = (1-β) w, and β for the old momentum, ‖m‖² = vᵀ G v."""
    tensor = tl.program_id(0).to(tl.int64)
    kind = tl.load(table + 4 * tensor + 1) & (ALIGNED - 1)
    written = (kind != NO_TENSOR) & (tl.load(finite) != 0)
    beta = tl.load(settings)
    factor = beta * 0.0 + 1.0
    if MOMENTUM:
        steps = tl.load(momentum_steps + tensor) + written.to(tl.int64)
        tl.debug_barrier()  # no thread may read the count after another has written it
        tl.store(momentum_steps + tensor, steps, mask=written)
        # A tensor that never had a gradient has t = 0 and is not written: any factor will do.
        power = tl.exp(tl.maximum(steps, 1).to(tl.float64) * tl.log(beta))
        factor = 1.0 / (1.0 - power)
    if NORMS:
        R: tl.constexpr = K + MOMENTUM
        row = tl.arange(0, RP)
        own = weights + tensor * weight_stride
        v = (1.0 - beta) * tl.load(own + row, mask=row < K, other=0.0)
        if MOMENTUM:
            v = tl.where(row == K, beta, v)
        inside = (row[:, None] < R) & (row[None, :] < R)
        at = per_tensor + tensor * R * R + row[:, None] * R + row[None, :]
        G = tl.load(at, mask=inside, other=0.0)
        square = tl.sum(tl.sum(G * v[None, :], axis=1) * v, axis=0)
        square = tl.maximum(square, 0.0) * factor * factor
        if SIGNS:
            norm, length = tl.sqrt(square), tl.load(parameter_norms + tensor)
            tiny = (norm < TRUST_RATIO_EPS) | (length < TRUST_RATIO_EPS)
            ratio = tl.minimum(length / tl.where(tiny, 1.0, norm), tl.load(settings + 3))
            factor = tl.load(settings + 2) * tl.where(tiny, 1.0, ratio)
        else:
            tl.store(squares + tensor, tl.where(written, square, 0.0))
    tl.store(factors + tensor, factor)


@triton.jit(do_not_specialize=["tensors"])
def clipping_kernel(
    squares,  # [T] float64
    settings,  # as in combine_kernel
    clipping,  # [] float64, written: min(1, max_norm / ‖m̂‖)
    tensors,  # T
    BLOCK: tl.constexpr,
):
    """The factor that shortens all gradients together to a norm."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tensors, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(squares + at, mask=at < tensors, other=0.0)
    norm = tl.sqrt(tl.sum(total, axis=0))
    bound = tl.load(settings + 1)
    shortened = norm > bound
    tl.store(clipping, tl.where(shortened, bound / tl.where(shortened, norm, 1.0), 1.0))


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Writes gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    accumulators, (offsets, sizes), scale, history, mask = gradients
    buffer, momentum_steps, beta = (None, None, 0.0) if momentum is None else momentum
    max_norm, per_tensor = (None, scale.new_empty(len(sizes), 0, 0)) if rescale is None else rescale
    K, device = accumulators.shape[0], accumulators.device
    if not sizes:
        return
    plan = plan_of(
        tables.keys_of(outputs),
        offsets,
        sizes,
        tables.is_aligned(accumulators, history, buffer),
        CHUNK,
        device,
    )
    bound = math.inf if max_norm is None else max_norm
    settings = tables.settings_tensor((float(beta), float(bound), 0.0, 0.0), device)
    tables.keep_if_captured(plan.rows, plan.chunks.table, settings)
    with tables.guard(device):
        factors, clipping = factors_of(
            plan, per_tensor, weights, finite, momentum_steps, None, settings,
            max_norm is not None,
        )  # fmt: skip
        if not plan.chunks.total:
            return
        combine_kernel[(plan.chunks.total,)](
            accumulators,
            accumulators if history is None else history,
            accumulators if buffer is None else buffer,
            plan.chunks.table if mask is None else mask,
            plan.rows,
            plan.chunks.table,
            weights,
            scale,
            finite,
            weights if factors is None else factors,
            weights if clipping is None else clipping,
            settings,
            weight_stride(weights),
            accumulators.stride(0),
            K=K,
            MOST_UNROLLED=MOST_UNROLLED,
            HISTORY=history is not None,
            MOMENTUM=momentum is not None,
            MASK=mask is not None,
            FACTORS=factors is not None,
            CLIP=clipping is not None,
            SIGNS=False,
            TYPES=plan.types,
            CHUNK=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def weight_stride(weights: Tensor) -> int:
    """From the weights of one tensor to those of the next: 0 where all have the same."""
    return weights.stride(0) if weights.dim() == 2 else 0


def factors_of(
    plan: tables.Plan,
    per_tensor: Tensor,
    weights: Tensor,
    finite: Tensor,
    momentum_steps: Tensor | None,
    parameter_norms: Tensor | None,
    settings: Tensor,
    clip: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """[T] factors of the tensors and the factor [] of all; None where there is none."""
    if momentum_steps is None and parameter_norms is None and not clip:
        return None, None
    tensors, K = plan.rows.shape[0], weights.shape[-1]
    factors, squares = torch.empty((2, tensors), dtype=torch.float64, device=weights.device)
    rows = K + (momentum_steps is not None)
    factor_kernel[(tensors,)](
        plan.rows,
        per_tensor.contiguous(),
        weights,
        finite,
        factors if momentum_steps is None else momentum_steps,
        factors if parameter_norms is None else parameter_norms,
        settings,
        factors,
        squares,
        weight_stride(weights),
        K=K,
        RP=triton.next_power_of_2(rows),
        MOMENTUM=int(momentum_steps is not None),
        NORMS=clip or parameter_norms is not None,
        SIGNS=parameter_norms is not None,
        num_warps=1,
        enable_fp_fusion=False,
    )
    if not clip:
        return factors, None
    clipping = torch.empty((), dtype=torch.float64, device=weights.device)
    clipping_kernel[(1,)](
        squares, settings, clipping, tensors, BLOCK=1024, num_warps=4, enable_fp_fusion=False
    )
    return factors, clipping
