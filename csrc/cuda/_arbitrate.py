"""arbitrate: resolves the conflicts on K×K numbers, by one block, without synchronization.

Every entry of a batch has a block of its own, in the same launch.
"""

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
    tasks, device = gramian.shape[-1], gramian.device
    if tasks > _cuda.MAX_TASKS:
        raise ValueError(
            f"backend='cuda' arbitrates up to {_cuda.MAX_TASKS} tasks, not {tasks}: "
            "use backend='python'"
        )
    result = Arbitration.empty(gramian, settings)
    with launch_tables.guard(device):
        _cuda.arbitrate(stream_of(device), gramian, cross, scale, state, settings, result)
    return result
