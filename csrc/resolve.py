"""resolve: gramian, arbitrate and combine in one cooperative launch.

Between its two passes over memory all blocks wait for each other; the second pass goes through
the accumulators backwards, so that what the first read last is found in the L2 cache. It holds as
few threads as its first pass has registers for, which is no matter while that cache, or the
launches themselves, set the pace. Larger models are left to three operations of their own.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.arbitrate import Decision, new_decision
from gcond_kernels.cuda.gramian import new_sums
from gcond_kernels.cuda.launch import cut, place_of
from gcond_kernels.ops import launch_tables as tables


@functools.cache
def cache_bytes(device: torch.device) -> float:
    """The L2 cache of a GPU; on the host, where nothing is fast, no bound."""
    if device.type == "cpu":
        return float("inf")
    return torch.cuda.get_device_properties(device).L2_cache_size


def resolves_at_once(accumulators: Tensor, sizes: Sequence[int]) -> bool:
    """Whether one launch does it: few enough tasks and tensors, and rows that fit in the cache."""
    return (
        len(accumulators) <= _cuda.MOST_TASKS_IN_REGISTERS
        and len(sizes) <= _cuda.MOST_TENSORS
        and accumulators.nbytes <= cache_bytes(accumulators.device)
    )


def resolve(
    accumulators: Tensor,
    outputs: Sequence[Tensor | None],
    offsets: Sequence[int],
    sizes: Sequence[int],
    scale: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    momentum_steps: Tensor | None,
    beta: float,
    max_norm: float | None,
    parameter_norms: Tensor | None,
    trust_ratio_coef: float,
    trust_ratio_clip: float,
    state: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    mask: Tensor | None,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Decision]:
    """What `gramian` and `arbitrate` return; `outputs` are written."""
    tasks, device = len(accumulators), accumulators.device
    norms = max_norm is not None or parameter_norms is not None
    with tables.guard(device):
        which = cut(tuple(offsets), tuple(sizes), tables.chunk_length(sum(sizes)), device)
        which.keep_if_captured()
        sums = new_sums(tasks, momentum is not None and norms, history is not None, which)
        decision = new_decision(tasks, settings["max_iterations"], device)
        factors = squares = None
        if momentum is not None or norms:
            factors, squares = torch.empty((2, len(sizes)), dtype=torch.float64, device=device)
        _cuda.resolve(
            *place_of(device),
            which.pieces,
            tasks,
            accumulators,
            history,
            momentum,
            momentum is not None and norms,
            mask,
            scale,
            sums.partials,
            sums.total,
            sums.cross,
            sums.per_tensor,
            sums.crosses,
            _cuda.State(**state),
            _cuda.Settings(**settings),
            _cuda.Decision(*decision),
            _cuda.Factors(
                tasks,
                len(sizes),
                tasks + (momentum is not None),
                sums.per_tensor,
                momentum_steps,
                parameter_norms,
                factors,
                squares,
                beta,
                trust_ratio_coef,
                trust_ratio_clip,
                norms,
            ),
            beta,
            factors,
            max_norm,
            parameter_norms is not None,
            _cuda.Addresses(outputs),
        )
    return sums.returned(), decision
