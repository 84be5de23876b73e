"""accumulate: the gradients of one task are added to that task's accumulator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.python.blocks import blocks, in_memory_order

# What float32 holds exactly.
WIDENED = {torch.float32, torch.bfloat16, torch.float16}


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
    there = {t: gradient for t, gradient in enumerate(gradients) if gradient is not None}
    dtypes = {gradient.dtype for gradient in there.values()}
    exact = accumulator.dtype == torch.float32 and dtypes <= WIDENED
    if there and exact and isinstance(scale, float) and scale == 1.0:
        # Torch goes through the list by itself, and widens within an addition.
        targets = [accumulator[offsets[t] : offsets[t] + sizes[t]] for t in there]
        addends = [in_memory_order(gradient, 0, sizes[t]) for t, gradient in there.items()]
        (torch._foreach_copy_ if overwrite else torch._foreach_add_)(targets, addends)
        return
    for tensor, start, stop in blocks(offsets, sizes, 1, accumulator.device):
        if tensor in there:
            target = accumulator[start:stop]
            gradient = in_memory_order(there[tensor], start - offsets[tensor], stop - start)
            # Widened before it is scaled: a small bf16 or fp16 value must not underflow.
            addend = gradient.to(torch.float32)
            if not isinstance(scale, float) or scale != 1.0:
                addend = addend * scale
            if overwrite:
                target.copy_(addend)
            else:
                target.add_(addend)  # a bfloat16 accumulator is widened, added to, rounded once
