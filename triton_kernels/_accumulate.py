"""accumulate: the gradients of one task are added to its accumulator, in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Layout
from gcond_kernels.triton_kernels.memory import (
    NO_TENSOR,
    elements_of,
    load_chunk,
    load_float32,
    pointers,
)
from gcond_kernels.triton_kernels.plans import plan_of

CHUNK = 2048
WARPS = 4


@triton.jit
def add_chunk(accumulator_ptr, chunk, scale, OVERWRITE, TYPES, BLOCK_SIZE, ALIGNED):
    """Set a chunk of a segment to scale · gradient, or add that; rounded once."""
    elements = elements_of(chunk, BLOCK_SIZE, ALIGNED)
    offsets, mask = chunk.first + elements.offsets, elements.mask
    total = load_float32(chunk.address, chunk.dtype_code, offsets, mask, TYPES, ALIGNED) * scale
    target_ptr = pointers(accumulator_ptr, 0, elements)
    if not OVERWRITE:
        total += tl.load(target_ptr, mask=mask, other=0.0).to(tl.float32)
    tl.store(target_ptr, total.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def accumulate_kernel(
    accumulator_ptr,  # [N'] float32 or bfloat16
    table_ptr,  # [T, 4] int64: address, dtype code, offset, size
    chunks_ptr,  # [C, 2] int32: tensor, number of the chunk within it
    scale,  # float32
    scale_ptr,  # [] of any floating type, which replaces `scale`; or None
    OVERWRITE: tl.constexpr,
    TYPES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """Add one chunk of one gradient to the accumulator."""
    chunk = load_chunk(table_ptr, chunks_ptr, BLOCK_SIZE)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
    # Where there is no gradient zero is written, whatever the scale is.
    scale = tl.where(chunk.dtype_code == NO_TENSOR, 0.0, scale)
    if (chunk.dtype_code != NO_TENSOR) | OVERWRITE:
        if chunk.is_full:
            add_chunk(accumulator_ptr, chunk, scale, OVERWRITE, TYPES, BLOCK_SIZE, True)
        else:
            add_chunk(accumulator_ptr, chunk, scale, OVERWRITE, TYPES, BLOCK_SIZE, False)


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Add `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    device = accumulator.device
    plan = plan_of(gradients, layout, CHUNK, device, accumulator)
    if not plan.chunks.total:
        return
    on_device = isinstance(scale, Tensor)
    with tables.guard(device):
        accumulate_kernel[(plan.chunks.total,)](
            accumulator,
            plan.table,
            plan.chunks.table,
            1.0 if on_device else float(scale),
            scale if on_device else None,
            OVERWRITE=overwrite,
            TYPES=plan.types,
            BLOCK_SIZE=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
