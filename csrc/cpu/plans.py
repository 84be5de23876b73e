"""How the segments of a layout are divided into chunks."""

import functools

from gcond_kernels import _cpu
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import Layout


@functools.lru_cache(maxsize=launch_tables.REMEMBERED)
def plan_of(layout: Layout) -> _cpu.Plan:
    """Return the chunks of a layout."""
    return _cpu.Plan(*layout)
