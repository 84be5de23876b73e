"""accumulate: the gradients of one task are added to that task's accumulator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.python.blocks import blocks, in_memory_order


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Adds `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    if overwrite:
        for gradient, offset, size in zip(gradients, offsets, sizes, strict=True):
            if gradient is None:
                accumulator[offset : offset + size].zero_()
    for tensor, start, stop in blocks(offsets, sizes, 1, accumulator.device):
        gradient = gradients[tensor]
        if gradient is None:
            continue
        target = accumulator[start:stop]
        # Widened before it is scaled: a small bf16 or fp16 value must not underflow.
        addend = in_memory_order(gradient, start - offsets[tensor], stop - start).to(torch.float32)
        if not isinstance(scale, float) or scale != 1.0:
            addend = addend * scale
        if overwrite:
            target.copy_(addend)
        else:
            target.add_(addend)  # a bfloat16 accumulator is widened, added to, rounded once
