"""GCond: conflicts are resolved by zones of cosine similarity, with an arbitrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.ops.types import ArbitrationState, Settings


@dataclass(frozen=True, kw_only=True)
class GCond(Settings, Method):
    """GCond (Limarenko et al., IEEE Access 2026, arXiv 2509.07252).

    The pair of tasks with the smallest cosine c is resolved first, and again until no
    cosine is below θ_weak or `max_iterations` is reached. In the critical zone
    (c ≤ θ_crit) the winner stays as it is and the loser is projected onto the complement of
    the winner; in the mild zone both give way, ever less towards θ_weak; in between the
    winner gives way less and less towards θ_crit.

    The arguments are those of `Settings`.
    """

    shared_state: ClassVar[frozenset[str]] = frozenset({"history_scale"})

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
            "history_coefficients": torch.eye(tasks, dtype=torch.float64, device=device),
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
        return ops.arbitrate(
            gramian, cross, scale, state=ArbitrationState(**state), settings=self, backend=backend
        )

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """The weights where there is no history."""
        scale = gramian.new_ones(gramian.shape[-1])
        return self.resolve(gramian, None, scale, state).weights
