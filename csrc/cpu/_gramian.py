"""gramian: every inner product that the method needs, from one read of the accumulators."""

import torch
from torch import Tensor

from gcond_kernels import _cpu
from gcond_kernels.cpu.plans import plan_of
from gcond_kernels.ops.types import Gramians, TaskGradients


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Return Gramian, cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    result = Gramians.empty(gradients, momentum is not None)
    plan, threads = plan_of(gradients.layout), torch.get_num_threads()
    _cpu.gramian(plan, gradients, momentum, history_scale, result, threads)
    return result
