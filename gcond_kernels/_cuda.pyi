"""The extension module that csrc/cuda is compiled to, where that is asked for.

A stream is the number of a GPU and the handle of one of its streams, or (-1, 0) for the host.
Tensors are read through DLPack; their types and shapes are those that `gcond_kernels.ops` checks.
"""

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels.cuda._combine import Resolution
from gcond_kernels.cuda._resolve import Results
from gcond_kernels.ops.types import (
    Arbitration,
    ArbitrationState,
    Gramians,
    Momentum,
    Settings,
    TaskGradients,
)

MAX_TENSORS: int
MAX_TASKS: int
MAX_TASKS_IN_REGISTERS: int
ACCUMULATE_CHUNK: int
COMBINE_CHUNK: int
ARCHITECTURES: str

Stream = tuple[int, int]

class TensorList:
    """Addresses and types of up to MAX_TENSORS tensors, which must outlive it."""

    def __init__(self, tensors: Sequence[Tensor | None], /) -> None: ...

class Chunks:
    """How segments are divided into chunks: addresses of the tables, which must outlive it."""

    def __init__(
        self,
        segments: Tensor,
        entries: Tensor,
        first: Tensor,
        tensors: int,
        count: int,
        length: int,
        /,
    ) -> None: ...

def use_exchange(capsule: object, /) -> None: ...
def device_problem(device: int, /) -> str: ...
def accumulate(
    stream: Stream,
    accumulator: Tensor,
    gradients: TensorList,
    chunks: Chunks,
    scale: float | Tensor,
    overwrite: bool,
    /,
) -> None: ...
def gramian(
    stream: Stream,
    chunks: Chunks,
    gradients: TaskGradients,
    momentum: Tensor | None,
    history_scale: Tensor | None,
    partials: Tensor,
    gramians: Gramians,
    /,
) -> None: ...
def arbitrate(
    stream: Stream,
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
    arbitration: Arbitration,
    /,
) -> None: ...
def find_factors(
    stream: Stream,
    outputs: TensorList,
    resolution: Resolution,
    momentum: Momentum | None,
    per_tensor: Tensor | None,
    factors: Tensor,
    squares: Tensor,
    /,
) -> None: ...
def find_clip_factor(
    stream: Stream, squares: Tensor, max_norm: float, factor: Tensor, /
) -> None: ...
def combine(
    stream: Stream,
    chunks: Chunks,
    gradients: TaskGradients,
    outputs: TensorList,
    resolution: Resolution,
    momentum: Momentum | None,
    factors: Tensor | None,
    /,
) -> None: ...
def resolve(
    stream: Stream,
    chunks: Chunks,
    gradients: TaskGradients,
    outputs: TensorList,
    momentum: Momentum | None,
    max_norm: float | None,
    state: ArbitrationState,
    settings: Settings,
    results: Results,
    /,
) -> None: ...
