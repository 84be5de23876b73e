"""resolve: gramian, arbitrate and combine in one cooperative launch.

Between its two passes over memory all blocks wait for each other; the second pass goes through
the accumulators backwards, so that what the first read last is found in the L2 cache. It holds as
few threads as its first pass has registers for, which does not matter while that cache, or the
launches themselves, set the pace. Larger models are left to the three operations.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda._gramian import new_partials
from gcond_kernels.cuda.launch import chunk_tables, stream_of
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Momentum,
    Settings,
    TaskGradients,
)


class Results(NamedTuple):
    """The memory of a resolution.

    Attributes:
        partials: [P, C] float32, the sums of every chunk.
        gramians: returned.
        arbitration: returned.
        factors: [T] float64, factors of the tensors; None where all are 1.
        squares: [T] float64, squared norms of the tensors; goes with `factors`.
    """

    partials: Tensor
    gramians: Gramians
    arbitration: Arbitration
    factors: Tensor | None = None
    squares: Tensor | None = None


@functools.cache
def _cache_bytes(device: torch.device) -> float:
    """Return the size of a GPU's L2 cache; on the host, where nothing is fast, no bound."""
    if device.type == "cpu":
        return float("inf")
    return torch.cuda.get_device_properties(device).L2_cache_size


def resolves_at_once(gradients: TaskGradients) -> bool:
    """Return whether `resolve` serves these: few tasks and tensors, which fit in the cache."""
    accumulators = gradients.accumulators
    return (
        len(accumulators) <= _cuda.MAX_TASKS_IN_REGISTERS
        and len(gradients.layout.sizes) <= _cuda.MAX_TENSORS
        and accumulators.nbytes <= _cache_bytes(accumulators.device)
    )


def resolve(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    state: ArbitrationState,
    settings: Settings,
    momentum: Momentum | None,
    max_norm: float | None,
) -> tuple[Gramians, Arbitration]:
    """Write the outputs, and return what was found; see `gcond_kernels.ops.resolve`."""
    device, layout = gradients.accumulators.device, gradients.layout
    needs_norms = max_norm is not None
    with launch_tables.guard(device):
        length = launch_tables.chunk_length(sum(layout.sizes))
        chunks, total, _ = chunk_tables(layout, length, device)
        gramians = Gramians.empty(gradients, momentum is not None and needs_norms)
        arbitration = Arbitration.empty(gramians.total, settings)
        results = Results(new_partials(gradients, total), gramians, arbitration)
        if momentum is not None or needs_norms:
            factors, squares = gramians.total.new_empty((2, len(layout.sizes)))
            results = results._replace(factors=factors, squares=squares)
        _cuda.resolve(
            stream_of(device),
            chunks,
            gradients,
            _cuda.TensorList(outputs),
            momentum,
            max_norm,
            state,
            settings,
            results,
        )
    return gramians, arbitration
