"""GCond: conflicts are resolved by zones of cosine similarity, with an arbitrator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods.checks import check_option
from gcond_kernels.methods.method import Comparison, Destination, Known, Method, State
from gcond_kernels.ops.types import ArbitrationState, Settings, TaskGradients


@dataclass(frozen=True, kw_only=True)
class GCond(Settings, Method):
    """Resolve the smallest cosine first (Limarenko et al., IEEE Access 2026, arXiv 2509.07252).

    The pair of tasks with the smallest cosine c is resolved, until no cosine is below θ_weak or
    `max_iterations` is reached. In the critical zone (c ≤ θ_crit) the winner stays as it is and the
    loser is projected onto the complement of the winner; in the mild zone both are projected, ever
    less towards θ_weak; in between the winner is, ever less towards θ_crit.

    Args:
        history_dtype: torch.bfloat16 or torch.float32, of the last step's gradients, with which
            stability compares.

    The other arguments are those of `gcond_kernels.ops.types.Settings`: thresholds, remap_power,
    arbitration, max_iterations, tolerance, dominance_window, tie_breaking_weights, norm_ema_beta,
    norm_ema_start, norm_cap, history and eps.

    Raises:
        ValueError: an option is out of its range; the message names it.
    """

    history_dtype: torch.dtype = torch.bfloat16

    shared_state: ClassVar[frozenset[str]] = frozenset({"history_scale"})
    bounded_weights: ClassVar[bool] = True
    compares_single_task: ClassVar[bool] = True  # it keeps an average of each task's norm

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.history_dtype in (torch.bfloat16, torch.float32)
        check_option(self, "history_dtype", "torch.bfloat16 or torch.float32", holds)

    @classmethod
    def published(cls, **overrides: Any) -> GCond:
        """Return the settings that reproduce the implementation its authors published."""
        return cls(**{"history": "resolved", "norm_ema_start": 1.0, "tolerance": 0.0, **overrides})

    @classmethod
    def paper(cls, **overrides: Any) -> GCond:
        """Return the paper's settings; there, momentum 0.9 stands on the optimizer."""
        return cls(**{"dominance_window": 0, "max_iterations": 3, **overrides})

    @property
    def needs_history(self) -> bool:
        """Whether it compares with the last step's gradients: 2 bytes per parameter and task."""
        return self.tie_breaking_weights[0] > 0.0

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return the state before the first step: the fields of `ArbitrationState`, by name."""

        def float64(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return {
            "norm_ema": float64(tasks) + (self.norm_ema_start or 0.0),
            "winners": torch.full((self.dominance_window,), -1, dtype=torch.int64, device=device),
            "history_gramian": float64(tasks, tasks),
            "history_coefficients": torch.eye(tasks, dtype=torch.float64, device=device),
            "history_scale": float64(tasks),
        }

    def decide(self, comparison: Comparison, state: State) -> ops.Arbitration:
        """Return one weight per task, of one Gramian or a batch; see `ops.arbitrate`."""
        S, X, scale, _, _, backend = comparison
        kept = ArbitrationState(**state)
        if isinstance(backend, ops.Backend) and S.dim() == 2:
            return backend.arbitrate(S, X, scale, kept, self)  # the optimizer has made all of this
        return ops.arbitrate(S, X, scale, state=kept, settings=self, backend=backend)

    def resolve(
        self,
        gradients: TaskGradients,
        destination: Destination,
        state: State,
        max_norm: float | None,
    ) -> tuple[ops.Gramians, ops.Arbitration] | None:
        """Compare, decide and write in one operation; return None where there is none.

        A subclass may decide or write otherwise, and a backend may have no such operation.
        """
        own, d = type(self), destination
        accumulators = gradients.accumulators
        backend = ops.backend_for(d.backend, accumulators.device, accumulators.dtype)
        if (own.decide, own.apply, own.weights) != (GCond.decide, GCond.apply, GCond.weights):
            return None
        if not backend.resolves_at_once(gradients):
            return None
        kept = ArbitrationState(**state)
        # Without the checks of `ops.resolve`: the optimizer has made all of this.
        return backend.resolve(gradients, d.outputs, kept, self, d.momentum, max_norm)

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the weights where there is no history; `decide` does not ask it."""
        scale = gramian.new_ones(gramian.shape[-1])
        return self.decide(Comparison(gramian, None, scale), state).weights
