"""accumulate: adds the gradients of one task to its accumulator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import _cpu
from gcond_kernels.cpu.plans import plan_of
from gcond_kernels.ops.types import Layout


def accumulate(
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    layout: Layout,
    scale: float | Tensor,
    overwrite: bool,
) -> None:
    """Add `scale · gradient` to each gradient's segment; see `gcond_kernels.ops.accumulate`."""
    threads = torch.get_num_threads()
    _cpu.accumulate(plan_of(layout), accumulator, gradients, float(scale), overwrite, threads)
