"""resolve: gramian, arbitrate and combine in one call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import _cpu
from gcond_kernels.cpu.plans import plan_of
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Momentum,
    Settings,
    TaskGradients,
)


class Results(NamedTuple):
    """What a resolution returns."""

    gramians: Gramians
    arbitration: Arbitration


def resolves_at_once(_gradients: TaskGradients) -> bool:
    """Return whether `resolve` serves these: it serves all."""
    return True


def resolve(
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    state: ArbitrationState,
    settings: Settings,
    momentum: Momentum | None,
    max_norm: float | None,
) -> tuple[Gramians, Arbitration]:
    """Write the outputs, and return what was found; see `gcond_kernels.ops.resolve`."""
    gramians = Gramians.empty(gradients, momentum is not None and max_norm is not None)
    results = Results(gramians, Arbitration.empty(gramians.total, settings))
    _cpu.resolve(
        plan_of(gradients.layout),
        gradients,
        outputs,
        momentum,
        max_norm,
        state,
        settings,
        results,
        torch.get_num_threads(),
    )
    return results
