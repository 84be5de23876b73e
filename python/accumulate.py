"""accumulate: the gradients of one task are added to that task's accumulator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.types import Layout
from gcond_kernels.python.chunks import chunk_length, chunks, in_memory_order

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
    present = []
    for gradient, offset, size in zip(gradients, *layout, strict=True):
        if gradient is not None:
            present.append((gradient, accumulator[offset : offset + size]))
        elif overwrite:
            accumulator[offset : offset + size].zero_()
    unscaled = isinstance(scale, float) and scale == 1.0
    exact = {gradient.dtype for gradient, _ in present} <= WIDENED
    if present and unscaled and exact and accumulator.dtype == torch.float32:
        # Torch goes through the list by itself, and widens within an addition.
        targets = [target for _, target in present]
        addends = [gradient.detach().as_strided(target.shape, (1,)) for gradient, target in present]
        (torch._foreach_copy_ if overwrite else torch._foreach_add_)(targets, addends)
        return
    for tensor, start, stop, first in chunks(layout, chunk_length(1, accumulator.device)):
        gradient, target = gradients[tensor], accumulator[start:stop]
        if gradient is None:
            continue
        # Widened before it is scaled: a small bf16 or fp16 value must not underflow.
        addend = in_memory_order(gradient, first, stop - start).to(torch.float32)
        if not unscaled:
            addend = addend * scale
        if overwrite:
            target.copy_(addend)
        else:
            target.add_(addend)  # a bfloat16 accumulator is widened, added to, rounded once
