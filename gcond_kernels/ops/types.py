"""The arguments and results that the operations share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

# Elements per word of a mask: bit e % 32 of word e // 32 is 1 where element e is trained.
WORD_BITS = 32

# A resolved gradient is a difference of task gradients whose inner products are sums of
# float32 partial sums. Where its square falls below their rounding, relative to the square
# that its terms would have without cancelling, what is left is noise: it counts as zero.
RESIDUE = 2.0**-23


class Layout(NamedTuple):
    """Where each parameter tensor's segment lies in flat storage; between segments that is zero.

    Attributes:
        offsets: T starts of the segments, in elements.
        sizes: T lengths of the segments, in elements.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, offsets: Sequence[int], sizes: Sequence[int]) -> Layout:
        """Return the layout of any two sequences of integers."""
        return cls(tuple(offsets), tuple(sizes))


def within_range(accumulators: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a history of that type keeps of accumulators, float64 ones within its range."""
    if accumulators.dtype != torch.float64:
        return accumulators
    largest = torch.finfo(dtype).max  # an infinity would have every later step skipped
    return accumulators.clamp(-largest, largest)


class TaskGradients(NamedTuple):
    """The accumulated gradients of K tasks, g_k = scale[k] · accumulators[k].

    A task whose scale is 0 takes no part, whatever its accumulator holds. Where bit e % 32 of the
    mask's word e // 32 is 0, element e is not trained: it counts as zero and its gradient is 0.

    Attributes:
        accumulators: [K, N'] float32, bfloat16 or float64.
        layout: where each tensor's segment lies in an accumulator.
        scale: [K] float64.
        history: [K, N'] float32, bfloat16 or float16: the last accumulators.
        mask: [⌈N' / 32⌉] int32.
    """

    accumulators: Tensor
    layout: Layout
    scale: Tensor
    history: Tensor | None = None
    mask: Tensor | None = None


class Momentum(NamedTuple):
    """A moving average of the resolved gradient: m ← β m + (1-β) g, read as m / (1 - β^t).

    Attributes:
        buffer: [N'] float32, or float64 as the accumulators are: m; changed in place.
        steps: [T] int64: t of each tensor; counted up.
        beta: β in (0, 1).
    """

    buffer: Tensor
    steps: Tensor
    beta: float


class Rescale(NamedTuple):
    """A bound of the norm of what is written to all outputs together.

    The norm comes from the Gramians, without a pass over memory.

    Attributes:
        max_norm: above 0.
        per_tensor: [T, R, R] as `gramian` returns it; with momentum that is its last row.
    """

    max_norm: float
    per_tensor: Tensor


class SignDropout(NamedTuple):
    """The random numbers of GradDrop: a function of seed, counter and an element's place alone.

    Attributes:
        seed: its lower 64 bits count.
        counter: [] int64: how many steps there were; not read by the host.
        leak: fraction of the dropped sign that is let through, in [0, 1].
        first: place of the accumulators' first element, where they are a shard.
    """

    seed: int
    counter: Tensor
    leak: float = 0.0
    first: int = 0


class ArbitrationState(NamedTuple):
    """What `arbitrate` keeps from step to step; each tensor is changed in place.

    For a batch of Gramians all but `history_scale` have a leading dimension [B].

    Attributes:
        norm_ema: [K] float64: moving average of each task's norm; 0 is "not started".
        winners: [W] int64: the last winners, oldest first; -1 where there is none yet.
        history_gramian: [K, K] float64: S of the last step that a task took part in.
        history_coefficients: [K, K] float64: h_i = Σ_j coefficients_ij · (last step's g_j).
        history_scale: [K] float64: the scale of each task's history.
    """

    norm_ema: Tensor
    winners: Tensor
    history_gramian: Tensor
    history_coefficients: Tensor
    history_scale: Tensor


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The numbers of GCond (Limarenko et al., IEEE Access 2026, arXiv 2509.07252).

    Args:
        thresholds: (θ_crit, θ_main, θ_weak), non-decreasing cosines in [-1, 1].
        remap_power: exponent of the transition through the moderate zone, > 0.
        arbitration: "smooth", or "zones", the older form: winner takes all in the critical
            zone, the loser is projected in the moderate one, both in the mild one.
        max_iterations: bound on the number of projections per step; None is 2K.
        tolerance: a pair conflicts where its cosine is below θ_weak - tolerance; keeps the rounding
            left by a full projection from counting as a conflict.
        dominance_window: a task that won this many times in a row loses the next conflict;
            0 turns that off.
        tie_breaking_weights: (stability, strength) in the winner's score.
        norm_ema_beta: decay of the moving average of each task's norm, in [0, 1).
        norm_ema_start: where that average starts; None is the first non-zero norm.
        norm_cap: gradients of a larger norm are scaled down to it; None is no cap.
        history: what stability compares with: last step's gradient as accumulated ("raw",
            eq. 8 of the paper) or as resolved ("resolved", the published implementation). Where
            that left nothing of it but rounding, the stability is 0.
        eps: added to quotients. With `norm_ema_start` it is also the least value of the
            average; without, the scale of the gradients decides nothing.
    """

    thresholds: tuple[float, float, float] = (-0.8, -0.5, 0.0)
    remap_power: float = 2.0
    arbitration: Literal["smooth", "zones"] = "smooth"
    max_iterations: int | None = None
    tolerance: float = 1e-6
    dominance_window: int = 3
    tie_breaking_weights: tuple[float, float] = (0.8, 0.2)
    norm_ema_beta: float = 0.95
    norm_ema_start: float | None = None
    norm_cap: float | None = None
    history: Literal["raw", "resolved"] = "raw"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("thresholds", "tie_breaking_weights"):
            if isinstance(getattr(self, name), list):  # from JSON or YAML
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, (what, holds) in _RANGES.items():
            value = getattr(self, name)
            try:
                fine = holds(value)
            except TypeError:  # of a type that cannot be compared, or has no length
                fine = False
            if not fine:
                raise ValueError(f"{type(self).__name__}: {name} must be {what}, not {value!r}")

    @property
    def norm_ema_floor(self) -> float:
        """Least value of the average of norms: absolute only where it has an absolute start."""
        return 0.0 if self.norm_ema_start is None else self.eps

    def iterations(self, tasks: int) -> int:
        """Return the bound on the number of projections for K tasks."""
        return 2 * tasks if self.max_iterations is None else self.max_iterations


class Gramians(NamedTuple):
    """Inner products of the scaled task gradients. All tensors are float64.

    Attributes:
        total: [K, K]: S_ij = g_i · g_j.
        cross: [K, K]: X_ij = g_i · h_j; None without history.
        per_tensor: [T, R, R]: S of each tensor; R = K, or K + 1 with momentum as the last.
        cross_per_tensor: [T, K, K]: X of each tensor; None without history.
    """

    total: Tensor
    cross: Tensor | None
    per_tensor: Tensor
    cross_per_tensor: Tensor | None

    @classmethod
    def empty(cls, gradients: TaskGradients, momentum: bool) -> Gramians:
        """Return memory for the Gramians of these, and of the momentum where there is one."""
        K, T, new = len(gradients.scale), len(gradients.layout.sizes), gradients.scale.new_empty
        R = K + momentum
        if gradients.history is None:
            return cls(new((K, K)), None, new((T, R, R)), None)
        return cls(new((K, K)), new((K, K)), new((T, R, R)), new((T, K, K)))


class Arbitration(NamedTuple):
    """What a resolution decided, on the Gramian's device; [B, ...] for a batch of Gramians.

    An event is one resolved conflict: i, j, cosine, winner (-1: none was chosen), zone (0 mild,
    1 moderate, 2 critical). Where a gradient held a NaN or an infinity `finite` is False, the
    weights are zero, and no state has changed.

    Attributes:
        weights: [K] float64: the resolved gradient is Σ_k weights[k] · g_k.
        coefficients: [K, K] float64: those of entry i make the resolved gradient of task i.
        events: [max_iterations, 5] float64: NaN after the last.
        finite: [] bool.
    """

    weights: Tensor
    coefficients: Tensor
    events: Tensor
    finite: Tensor

    @classmethod
    def empty(cls, gramian: Tensor, settings: Settings) -> Arbitration:
        """Return memory for what is decided from a Gramian [K, K], or from a batch [B, K, K]."""
        *batch, K, _columns = gramian.shape
        return cls(
            gramian.new_empty((*batch, K)),
            gramian.new_empty((*batch, K, K)),
            gramian.new_empty((*batch, settings.iterations(K), 5)),
            gramian.new_empty(tuple(batch), dtype=torch.bool),
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


_POSITIVE = ("a number above 0", lambda x: 0.0 < x < math.inf)
_POSITIVE_OR_NONE = ("None or above 0", lambda x: x is None or 0.0 < x < math.inf)
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "thresholds": (
        "three non-decreasing cosines in [-1, 1]",
        lambda x: len(x) == 3 and -1.0 <= x[0] <= x[1] <= x[2] <= 1.0,
    ),
    "remap_power": _POSITIVE,
    "arbitration": ("'smooth' or 'zones'", lambda x: x in ("smooth", "zones")),
    "max_iterations": ("None or a whole number, 0 or more", lambda x: x is None or _is_count(x)),
    "tolerance": ("a number, 0 or more", lambda x: 0.0 <= x < math.inf),
    "dominance_window": ("a whole number, 0 or more", _is_count),
    "tie_breaking_weights": (
        "two numbers, 0 or more: (stability, strength)",
        lambda x: len(x) == 2 and all(0.0 <= weight < math.inf for weight in x),
    ),
    "norm_ema_beta": ("in [0, 1)", lambda x: 0.0 <= x < 1.0),
    "norm_ema_start": _POSITIVE_OR_NONE,
    "norm_cap": _POSITIVE_OR_NONE,
    "history": ("'raw' or 'resolved'", lambda x: x in ("raw", "resolved")),
    "eps": _POSITIVE,
}
