"""The extension module that csrc/ is compiled to, where it was asked for.

Every call takes the number of a GPU, or -1 for the driver on the host, and the handle of a stream.
Tensors are read through DLPack; their types and shapes are those that `gcond_kernels.ops` checks.
"""

from collections.abc import Sequence

from torch import Tensor

MOST_TENSORS: int
MOST_TASKS: int
MOST_TASKS_IN_REGISTERS: int
ACCUMULATE_CHUNK: int
COMBINE_CHUNK: int
ARCHITECTURES: str

class Addresses:
    """Where up to MOST_TENSORS tensors lie, and their types. The tensors must outlive it."""

    def __init__(self, tensors: Sequence[Tensor | None], /) -> None: ...

class Pieces:
    """How tensors are cut into pieces. It holds addresses: the tables must outlive it."""

    def __init__(
        self,
        segments: Tensor,
        chunks: Tensor,
        first: Tensor,
        tensors: int,
        count: int,
        length: int,
        /,
    ) -> None: ...

class Settings:
    """What a resolution goes by; see `gcond_kernels.ops.arbitrate`."""

    def __init__(
        self,
        *,
        thresholds: Sequence[float],
        remap_power: float,
        smooth: bool,
        max_iterations: int,
        tolerance: float,
        stability_weight: float,
        strength_weight: float,
        norm_ema_beta: float,
        norm_ema_floor: float,
        norm_cap: float | None,
        resolved_history: bool,
        eps: float,
    ) -> None: ...

class State:
    """What is carried from step to step, changed in place."""

    def __init__(
        self,
        *,
        norm_ema: Tensor,
        winners: Tensor,
        history_gramian: Tensor,
        history_rows: Tensor,
        history_scale: Tensor,
    ) -> None: ...

class Decision:
    """What a resolution writes."""

    def __init__(
        self, weights: Tensor, rows: Tensor, events: Tensor, finite: Tensor, /
    ) -> None: ...

class Factors:
    """What multiplies the momentum of each tensor, or its sign, and what that takes."""

    def __init__(
        self,
        tasks: int,
        tensors: int,
        rows: int,
        per_tensor: Tensor,
        momentum_steps: Tensor | None,
        parameter_norms: Tensor | None,
        factors: Tensor | None,
        squares: Tensor | None,
        beta: float,
        trust_ratio_coef: float,
        trust_ratio_clip: float,
        norms: bool,
        /,
    ) -> None: ...

def use_exchange(capsule: object, /) -> None: ...
def problem_on(device: int, /) -> str: ...
def accumulate(
    device: int,
    stream: int,
    accumulator: Tensor,
    gradients: Addresses,
    pieces: Pieces,
    scale: float,
    scale_tensor: Tensor | None,
    overwrite: bool,
    /,
) -> None: ...
def gramian(
    device: int,
    stream: int,
    pieces: Pieces,
    tasks: int,
    accumulators: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    history_scale: Tensor,
    partials: Tensor,
    total: Tensor,
    cross: Tensor | None,
    per_tensor: Tensor,
    crosses: Tensor | None,
    /,
) -> None: ...
def lists(
    device: int,
    stream: int,
    pieces: Pieces,
    count: int,
    tensors: Addresses,
    partials: Tensor,
    total: Tensor,
    per_tensor: Tensor,
    /,
) -> None: ...
def arbitrate(
    device: int,
    stream: int,
    batch: int,
    tasks: int,
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: State,
    settings: Settings,
    decision: Decision,
    /,
) -> None: ...
def factors(
    device: int,
    stream: int,
    arguments: Factors,
    weights: Tensor,
    finite: Tensor,
    outputs: Addresses,
    /,
) -> None: ...
def clipping(
    device: int, stream: int, squares: Tensor, tensors: int, max_norm: float, factor: Tensor, /
) -> None: ...
def combine(
    device: int,
    stream: int,
    pieces: Pieces,
    tasks: int,
    accumulators: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    factors: Tensor | None,
    beta: float,
    signs: bool,
    weights: Tensor,
    finite: Tensor,
    clipping: Tensor | None,
    outputs: Addresses,
    /,
) -> None: ...
def graddrop(
    device: int,
    stream: int,
    pieces: Pieces,
    tasks: int,
    accumulators: Tensor,
    momentum: Tensor | None,
    mask: Tensor | None,
    scale: Tensor,
    factors: Tensor | None,
    beta: float,
    leak: float,
    seed: int,
    draws: Tensor,
    first: int,
    finite: Tensor,
    outputs: Addresses,
    /,
) -> None: ...
def resolve(
    device: int,
    stream: int,
    pieces: Pieces,
    tasks: int,
    accumulators: Tensor,
    history: Tensor | None,
    momentum: Tensor | None,
    momentum_products: bool,
    mask: Tensor | None,
    scale: Tensor,
    partials: Tensor,
    total: Tensor,
    cross: Tensor | None,
    per_tensor: Tensor,
    crosses: Tensor | None,
    state: State,
    settings: Settings,
    decision: Decision,
    factors: Factors,
    beta: float,
    found_factors: Tensor | None,
    max_norm: float | None,
    signs: bool,
    outputs: Addresses,
    /,
) -> None: ...
