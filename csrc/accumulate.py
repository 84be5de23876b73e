"""accumulate: the gradients of one task are added to its accumulator, in one launch."""

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import cut, parts, place_of
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Layout


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Adds `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    (offsets, sizes), device = layout, accumulator.device
    number, tensor = (1.0, scale) if isinstance(scale, Tensor) else (float(scale), None)
    with tables.guard(device):
        for part in parts(len(sizes)):
            which = cut(offsets[part], sizes[part], _cuda.ACCUMULATE_CHUNK, device)
            which.keep_if_captured()
            _cuda.accumulate(
                *place_of(device),
                accumulator,
                _cuda.Addresses(gradients[part]),
                which.pieces,
                number,
                tensor,
                overwrite,
            )
