"""combine: writes the weighted sum of the accumulators as the gradient of every parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import _cpu
from gcond_kernels.cpu.plans import plan_of
from gcond_kernels.ops.types import Momentum, Rescale, TaskGradients


def combine(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
) -> None:
    """Write gradients, momentum and history; see `gcond_kernels.ops.combine`."""
    plan, threads = plan_of(gradients.layout), torch.get_num_threads()
    _cpu.combine(plan, gradients, outputs, weights, finite, momentum, rescale, threads)
