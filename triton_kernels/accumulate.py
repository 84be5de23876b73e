"""accumulate: the gradients of one task are added to its accumulator, in one launch."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Layout
from gcond_kernels.triton_kernels.memory import (
    ALIGNED,
    NO_TENSOR,
    at_element,
    locate,
    plan_of,
    read,
)

CHUNK = 2048
WARPS = 4


@triton.jit
def add_chunk(
    accumulator, offset, address, kind, first, size, scale, OVERWRITE, TYPES, CHUNK, WIDE
):
    """Sets a piece of a segment to scale · gradient, or adds that; rounded once."""
    lanes = tl.arange(0, CHUNK)
    inside = True if WIDE else lanes < size - first
    target = at_element(accumulator, offset + first, WIDE)
    total = read(address, kind, first + lanes, inside, TYPES, WIDE) * scale
    if not OVERWRITE:
        total += tl.load(target + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(target + lanes, total.to(target.dtype.element_ty), mask=inside)


@triton.jit
def accumulate_kernel(
    accumulator,  # [N'] float32 or bfloat16
    table,  # [T, 4] int64: address, kind, offset, size
    chunks,  # [C, 2] int32: tensor, piece
    scale,  # float32
    scale_tensor,  # [] of any floating type; read where SCALE_TENSOR
    SCALE_TENSOR: tl.constexpr,
    OVERWRITE: tl.constexpr,
    TYPES: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One piece of one tensor."""
    tensor, first = locate(chunks, CHUNK)
    address, kind = tl.load(table + 4 * tensor), tl.load(table + 4 * tensor + 1)
    offset, size = tl.load(table + 4 * tensor + 2), tl.load(table + 4 * tensor + 3)
    aligned, kind = kind & ALIGNED, kind & (ALIGNED - 1)
    if SCALE_TENSOR:
        scale = tl.load(scale_tensor).to(tl.float32)
    # Where there is no gradient zero is written, whatever the scale is.
    scale = tl.where(kind == NO_TENSOR, 0.0, scale)
    if (kind != NO_TENSOR) | OVERWRITE:
        if (aligned != 0) & (size - first >= CHUNK):
            add_chunk(
                accumulator, offset, address, kind, first, size, scale,
                OVERWRITE, TYPES, CHUNK, True,
            )  # fmt: skip
        else:
            add_chunk(
                accumulator, offset, address, kind, first, size, scale,
                OVERWRITE, TYPES, CHUNK, False,
            )  # fmt: skip


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Adds `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    device = accumulator.device
    plan = plan_of(
        tables.keys_of(gradients),
        layout.offsets,
        layout.sizes,
        accumulator.data_ptr() % tables.VECTOR_BYTES == 0,
        CHUNK,
        device,
    )
    if not plan.chunks.total:
        return
    tables.keep_if_captured(plan.rows, plan.chunks.table)
    on_device = isinstance(scale, Tensor)
    with tables.guard(device):
        accumulate_kernel[(plan.chunks.total,)](
            accumulator,
            plan.rows,
            plan.chunks.table,
            1.0 if on_device else float(scale),
            scale if on_device else accumulator,
            SCALE_TENSOR=on_device,
            OVERWRITE=overwrite,
            TYPES=plan.types,
            CHUNK=CHUNK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
