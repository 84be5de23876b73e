"""accumulate: adds the gradients of one task to its accumulator, in one launch."""

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import chunk_tables, launches, stream_of
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import Layout


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Add `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    device = accumulator.device
    with launch_tables.guard(device):
        for launch in launches(len(layout.sizes)):
            own = Layout(layout.offsets[launch], layout.sizes[launch])
            _cuda.accumulate(
                stream_of(device),
                accumulator,
                _cuda.TensorList(gradients[launch]),
                chunk_tables(own, _cuda.ACCUMULATE_CHUNK, device).chunks,
                scale,
                overwrite,
            )
