"""arbitrate: the resolution itself, on K×K numbers, by one block that never asks the host.

Of a batch every resolution has a block of its own, in the same launch.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import place_of
from gcond_kernels.ops import launch_tables as tables

Decision = tuple[Tensor, Tensor, Tensor, Tensor]


def new_decision(
    tasks: int, max_iterations: int, device: torch.device, batch: Sequence[int] = ()
) -> Decision:
    """Memory for weights [K], rows [K, K], events [max_iterations, 5] and finite [].

    Of a batch [B] each has that as its leading dimension.
    """
    return (
        torch.empty((*batch, tasks), dtype=torch.float64, device=device),
        torch.empty((*batch, tasks, tasks), dtype=torch.float64, device=device),
        torch.empty((*batch, max_iterations, 5), dtype=torch.float64, device=device),
        torch.empty(tuple(batch), dtype=torch.bool, device=device),
    )


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    norm_ema: Tensor,
    winners: Tensor,
    history_gramian: Tensor,
    history_rows: Tensor,
    history_scale: Tensor,
    **settings: Any,
) -> Decision:
    """Weights of the tasks, and the new state in place; see `gcond_kernels.ops.arbitrate`."""
    batch, tasks, device = gramian.shape[:-2], gramian.shape[-1], gramian.device
    if tasks > _cuda.MOST_TASKS:
        raise ValueError(
            f"backend='cuda' arbitrates up to {_cuda.MOST_TASKS} tasks, not {tasks}: "
            "use backend='python'"
        )
    decision = new_decision(tasks, settings["max_iterations"], device, batch)
    with tables.guard(device):
        _cuda.arbitrate(
            *place_of(device),
            batch.numel(),
            tasks,
            gramian,
            cross,
            scale,
            _cuda.State(
                norm_ema=norm_ema,
                winners=winners,
                history_gramian=history_gramian,
                history_rows=history_rows,
                history_scale=history_scale,
            ),
            _cuda.Settings(**settings),
            _cuda.Decision(*decision),
        )
    return decision
