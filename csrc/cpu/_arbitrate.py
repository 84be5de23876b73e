"""arbitrate: resolves the conflicts on K×K numbers."""

from torch import Tensor

from gcond_kernels import _cpu
from gcond_kernels.ops.types import Arbitration, ArbitrationState, Settings


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Return the weights of the tasks, and change the state; see `gcond_kernels.ops.arbitrate`."""
    result = Arbitration.empty(gramian, settings)
    _cpu.arbitrate(gramian, cross, scale, state, settings, result)
    return result
