"""accumulate: the gradients of one task are added to that task's accumulator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.types import Layout
from gcond_kernels.python.chunks import chunk_length, chunks_of, flat

# What float32 holds exactly.
WIDENED = {torch.float32, torch.bfloat16, torch.float16}


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Add `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    targets, addends = [], []
    vectors = flat(gradients, layout)
    for vector, offset, size in zip(vectors, *layout, strict=True):
        if vector is not None:
            targets.append(accumulator[offset : offset + size])
            addends.append(vector)
        elif overwrite:
            accumulator[offset : offset + size].zero_()
    unscaled = isinstance(scale, float) and scale == 1.0
    exact = {vector.dtype for vector in addends} <= WIDENED
    if addends and unscaled and exact and accumulator.dtype == torch.float32:
        # Torch goes through the list by itself, and widens within an addition.
        (torch._foreach_copy_ if overwrite else torch._foreach_add_)(targets, addends)
        return
    for tensor, start, stop, first in chunks_of(layout, chunk_length(1, accumulator.device)):
        vector = vectors[tensor]
        if vector is None:
            continue
        # Widened before it is scaled: a small bf16 or fp16 value must not underflow.
        addend = vector[first : first + stop - start].to(torch.float32)
        if not unscaled:
            addend = addend * scale
        if overwrite:
            accumulator[start:stop] = addend
        else:
            accumulator[start:stop] += addend  # bfloat16 is widened, added to, rounded once
