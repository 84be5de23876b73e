"""resolve: gramian, arbitrate and combine in one cooperative launch.

Between its two passes over memory all blocks wait for each other; the second pass goes through
the accumulators backwards, so that what the first read last is found in the L2 cache. It holds as
few threads as its first pass has registers for, which is no matter while that cache, or the
launches themselves, set the pace. Larger models are left to three operations of their own.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.arbitrate import new_decision, settings_of, state_of
from gcond_kernels.cuda.gramian import new_sums
from gcond_kernels.cuda.launch import cut, place_of
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Momentum,
    Settings,
    TaskGradients,
)


@functools.cache
def cache_bytes(device: torch.device) -> float:
    """The L2 cache of a GPU; on the host, where nothing is fast, no bound."""
    if device.type == "cpu":
        return float("inf")
    return torch.cuda.get_device_properties(device).L2_cache_size


def resolves_at_once(gradients: TaskGradients) -> bool:
    """Whether one launch does it: few enough tasks and tensors, and rows that fit in the cache."""
    accumulators = gradients.accumulators
    return (
        len(accumulators) <= _cuda.MOST_TASKS_IN_REGISTERS
        and len(gradients.layout.sizes) <= _cuda.MOST_TENSORS
        and accumulators.nbytes <= cache_bytes(accumulators.device)
    )


def resolve(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    state: ArbitrationState,
    settings: Settings,
    momentum: Momentum | None,
    max_norm: float | None,
) -> tuple[Gramians, Arbitration]:
    """What `gramian` and `arbitrate` return; `outputs` are written."""
    accumulators, (offsets, sizes), scale, history, mask = gradients
    buffer, momentum_steps, beta = (None, None, 0.0) if momentum is None else momentum
    tasks, device = len(accumulators), accumulators.device
    norms = max_norm is not None
    with tables.guard(device):
        which = cut(offsets, sizes, tables.chunk_length(sum(sizes)), device)
        which.keep_if_captured()
        sums = new_sums(tasks, momentum is not None and norms, history is not None, which)
        decision = new_decision(tasks, settings.iterations(tasks), device)
        factors = squares = None
        if momentum is not None or norms:
            factors, squares = torch.empty((2, len(sizes)), dtype=torch.float64, device=device)
        _cuda.resolve(
            *place_of(device),
            which.pieces,
            tasks,
            accumulators,
            history,
            buffer,
            momentum is not None and norms,
            mask,
            scale,
            sums.partials,
            sums.total,
            sums.cross,
            sums.per_tensor,
            sums.crosses,
            state_of(state),
            settings_of(settings, tasks),
            _cuda.Decision(*decision),
            _cuda.Factors(
                tasks,
                len(sizes),
                tasks + (momentum is not None),
                sums.per_tensor,
                momentum_steps,
                None,
                factors,
                squares,
                beta,
                0.0,
                0.0,
                norms,
            ),
            beta,
            factors,
            max_norm,
            False,
            _cuda.Addresses(outputs),
        )
    products = Gramians(sums.total, sums.cross, sums.per_tensor, sums.crosses)
    return products, Arbitration(*decision)
