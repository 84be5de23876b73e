"""GCond: conflicts are resolved by zones of cosine similarity, with an arbitrator."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.ops.contexts import fixed_precision


@dataclass(frozen=True, kw_only=True)
class GCond(Method):
    """Settings of the GCond method (Limarenko et al., IEEE Access 2026, arXiv 2509.07252).

    The pair of tasks with the smallest cosine c is resolved first, and again until no
    cosine is below θ_weak or `max_iterations` is reached. In the critical zone
    (c ≤ θ_crit) the winner stays as it is and the loser is projected onto the complement of
    the winner; in the mild zone both give way, ever less towards θ_weak; in between the
    winner gives way less and less towards θ_crit.

    Args:
        thresholds: (θ_crit, θ_main, θ_weak), non-decreasing cosines in [-1, 1].
        remap_power: exponent of the passage through the moderate zone, > 0.
        arbitration: "smooth", or "zones", the older form: winner takes all in the critical
            zone, the loser is projected in the moderate one, both in the mild one.
        max_iterations: bound on the number of projections per step; None is 2K.
        tolerance: a pair conflicts where c < θ_weak - tolerance; keeps the rounding left by
            a full projection from counting as a conflict.
        dominance_window: a task that won this many times in a row loses the next conflict;
            0 turns that off.
        tie_breaking_weights: (stability, strength) in the winner's score.
        norm_ema_beta: decay of the moving average of each task's norm, in [0, 1).
        norm_ema_start: where that average starts; None is the first non-zero norm.
        norm_cap: gradients longer than this are shortened to it; None is no cap.
        history: what stability compares with: last step's gradient as accumulated ("raw",
            eq. 8 of the paper) or as resolved ("resolved", the published implementation). Where
            that left nothing of it but rounding, the stability is 0.
        eps: added to quotients. With `norm_ema_start` it is also the least value of the
            average; without, nothing of absolute size enters, so that the scale of the
            gradients decides nothing.

    Raises:
        ValueError: an option is out of its range; the message names it.
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

    shared_state: ClassVar[frozenset[str]] = frozenset({"history_scale"})

    def __post_init__(self) -> None:
        for name in ("thresholds", "tie_breaking_weights"):
            if isinstance(getattr(self, name), list):  # from JSON or YAML
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._require("thresholds", "three non-decreasing cosines in [-1, 1]", _are_cosines)
        self._require("remap_power", "a number above 0", _is_positive)
        self._require("arbitration", "'smooth' or 'zones'", lambda x: x in ("smooth", "zones"))
        self._require(
            "max_iterations",
            "None or a whole number, 0 or more",
            lambda x: x is None or _is_count(x),
        )
        self._require("tolerance", "a number, 0 or more", _is_not_negative)
        self._require("dominance_window", "a whole number, 0 or more", _is_count)
        self._require(
            "tie_breaking_weights",
            "two numbers, 0 or more: (stability, strength)",
            lambda x: len(x) == 2 and all(map(_is_not_negative, x)),
        )
        self._require("norm_ema_beta", "in [0, 1)", lambda x: 0.0 <= x < 1.0)
        self._require("norm_cap", "None or above 0", lambda x: x is None or _is_positive(x))
        self._require("norm_ema_start", "None or above 0", lambda x: x is None or _is_positive(x))
        self._require("history", "'raw' or 'resolved'", lambda x: x in ("raw", "resolved"))
        self._require("eps", "a number above 0", _is_positive)

    def _require(self, option: str, what: str, holds: Callable[[Any], bool]) -> None:
        value = getattr(self, option)
        try:
            fine = holds(value)
        except TypeError:  # of a type that cannot be compared, or has no length
            fine = False
        if not fine:
            raise ValueError(f"GCond: {option} must be {what}, not {value!r}")

    @classmethod
    def published(cls, **overrides: Any) -> GCond:
        """Settings that reproduce the implementation its authors published."""
        settings: dict[str, Any] = {
            "history": "resolved",
            "norm_ema_start": 1.0,
            "tolerance": 0.0,
        }
        return cls(**(settings | overrides))

    @classmethod
    def paper(cls, **overrides: Any) -> GCond:
        """Settings of the paper's experiments; there, momentum 0.9 stands on the optimizer."""
        settings: dict[str, Any] = {"dominance_window": 0, "max_iterations": 3}
        return cls(**(settings | overrides))

    @property
    def needs_history(self) -> bool:
        """Whether last step's gradients are kept: 2 bytes per parameter and task."""
        return self.tie_breaking_weights[0] > 0.0

    @fixed_precision
    def new_state(self, tasks: int, device: torch.device) -> State:
        """The state before the first step: small tensors on `device`, changed in place."""
        start = self.norm_ema_start or 0.0

        def float64(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return {
            "norm_ema": float64(tasks) + start,
            "winners": torch.full((self.dominance_window,), -1, dtype=torch.int64, device=device),
            "history_gramian": float64(tasks, tasks),
            "history_rows": torch.eye(tasks, dtype=torch.float64, device=device),
            "history_scale": float64(tasks),
        }

    def resolve(
        self,
        gramian: Tensor,
        cross: Tensor | None,
        scale: Tensor,
        state: State,
        backend: str = "auto",
        known: Known | None = None,
        chosen: Tensor | None = None,
    ) -> ops.Arbitration:
        """One weight per task from S, [K, K] or [B, K, K], the cross-Gramian with the history."""
        given: dict[str, Any] = {**state, **self.settings(gramian.shape[-1])}
        return ops.arbitrate(gramian, cross, scale, **given, backend=backend)

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """The weights where there is no history."""
        scale = gramian.new_ones(gramian.shape[-1])
        return self.resolve(gramian, None, scale, state).weights

    def settings(self, tasks: int) -> dict[str, Any]:
        """The settings of `ops.arbitrate` for K tasks, by name."""
        return {
            "thresholds": self.thresholds,
            "remap_power": self.remap_power,
            "smooth": self.arbitration == "smooth",
            "max_iterations": 2 * tasks if self.max_iterations is None else self.max_iterations,
            "tolerance": self.tolerance,
            "stability_weight": self.tie_breaking_weights[0],
            "strength_weight": self.tie_breaking_weights[1],
            "norm_ema_beta": self.norm_ema_beta,
            # An absolute floor makes sense only where the average has an absolute start.
            "norm_ema_floor": 0.0 if self.norm_ema_start is None else self.eps,
            "norm_cap": self.norm_cap,
            "resolved_history": self.history == "resolved",
            "eps": self.eps,
        }


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_not_negative(value: Any) -> bool:
    return bool(0.0 <= value < math.inf)


def _is_positive(value: Any) -> bool:
    return bool(0.0 < value < math.inf)


def _are_cosines(values: Any) -> bool:
    return len(values) == 3 and bool(-1.0 <= values[0] <= values[1] <= values[2] <= 1.0)
