"""arbitrate: resolves the conflicts on K×K numbers, by one block, without synchronization.

Every entry of a batch has a block of its own, in the same launch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import stream_of
from gcond_kernels.ops import launch_tables
from gcond_kernels.ops.types import Arbitration, ArbitrationState, Settings


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Return the weights of the tasks, and change the state; see `gcond_kernels.ops.arbitrate`."""
    batch, tasks, device = gramian.shape[:-2], gramian.shape[-1], gramian.device
    if tasks > _cuda.MAX_TASKS:
        raise ValueError(
            f"backend='cuda' arbitrates up to {_cuda.MAX_TASKS} tasks, not {tasks}: "
            "use backend='python'"
        )
    result = new_arbitration(tasks, settings.iterations(tasks), device, batch)
    with launch_tables.guard(device):
        _cuda.arbitrate(stream_of(device), gramian, cross, scale, state, settings, result)
    return result


def new_arbitration(
    tasks: int, max_iterations: int, device: torch.device, batch: Sequence[int] = ()
) -> Arbitration:
    """Return memory for the result, of a batch [B] with that as the leading dimension."""
    weights = torch.empty((*batch, tasks), dtype=torch.float64, device=device)
    return Arbitration(
        weights,
        weights.new_empty((*batch, tasks, tasks)),
        weights.new_empty((*batch, max_iterations, 5)),
        weights.new_empty(tuple(batch), dtype=torch.bool),
    )
