"""The extension module that csrc/cpu is compiled to, where there is a C++ compiler.

Tensors are read through DLPack; their types and shapes are those that `gcond_kernels.ops` checks.
"""

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels.cpu._resolve import Results
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Momentum,
    Rescale,
    Settings,
    TaskGradients,
)

INTERFACE: int

class Plan:
    """How segments are divided into chunks."""

    def __init__(self, offsets: Sequence[int], sizes: Sequence[int], /) -> None: ...

def use_exchange(capsule: object, /) -> None: ...
def kernels_in_use() -> str: ...
def kernels_here() -> list[str]: ...
def use_kernels(name: str, /) -> None: ...
def accumulate(
    plan: Plan,
    accumulator: Tensor,
    gradients: Sequence[Tensor | None],
    scale: float,
    overwrite: bool,
    threads: int,
    /,
) -> None: ...
def gramian(
    plan: Plan,
    gradients: TaskGradients,
    momentum: Tensor | None,
    history_scale: Tensor | None,
    gramians: Gramians,
    threads: int,
    /,
) -> None: ...
def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
    arbitration: Arbitration,
    /,
) -> None: ...
def combine(
    plan: Plan,
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    weights: Tensor,
    finite: Tensor,
    momentum: Momentum | None,
    rescale: Rescale | None,
    threads: int,
    /,
) -> None: ...
def resolve(
    plan: Plan,
    gradients: TaskGradients,
    outputs: Sequence[Tensor | None],
    momentum: Momentum | None,
    max_norm: float | None,
    state: ArbitrationState,
    settings: Settings,
    results: Results,
    threads: int,
    /,
) -> None: ...
