"""accumulate: the gradients of one task are added to that task's accumulator."""

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels.ops.types import Layout
from gcond_kernels.python.chunks import chunks_of, computed_in, flattened


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Add `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    wide = computed_in(accumulator.dtype)
    for tensor, own, flat in chunks_of(layout):
        gradient, segment = gradients[tensor], accumulator[flat]
        if overwrite:
            segment.zero_()
        if gradient is not None:
            # Widened before it is scaled: a small bf16 or fp16 value must not underflow.
            segment += flattened(gradient)[own].to(wide) * scale
