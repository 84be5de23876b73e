"""ExcessMTL: tasks that are far from their optimum get more weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_number
from gcond_kernels.methods.method import Known, Method, State


@dataclass(frozen=True)
class ExcessMTL(Method):
    """Weight tasks by how far they are from their optimum, estimated from their gradients.

    Y. He et al., "Robust Multi-Task Learning with Excess Risks", ICML 2024, arXiv 2402.02009,
    equations 6 to 9: the excess risk of a task is about ĝᵀ H⁻¹ ĝ, relative to that of its first
    step, and w_k ← w_k exp(η · risk_k), scaled so that Σ w = K (in the paper 1). The first step is
    the plain sum.

    Not the paper's estimate of H, which keeps the root of the sum of squares of each element
    (Adagrad) and is no function of the Gramian: here one number for each task stands for it,
    h_k = √(Σ_t ‖ĝ_k(t)‖²) (Adagrad-norm), so that the risk is ‖ĝ_k‖² / h_k. The two are the same
    for one shared parameter; else weights differ. A task without a gradient keeps its weight.

    Args:
        step_size: η, 0 or more.

    Raises:
        ValueError: η is out of its range.
    """

    step_size: float = 0.01

    def __post_init__(self) -> None:
        check_number(self, "step_size")

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return log w, the sums of squares, and the first risks (0: none yet), [K] float64."""
        names = ("log_weights", "square_sum", "first_risk")
        return {n: torch.zeros(tasks, dtype=torch.float64, device=device) for n in names}

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the weights after this step's gradients."""
        squares = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0.0)
        present, total, first = squares > 0.0, state["square_sum"], state["first_risk"]
        total += squares
        risk = torch.where(present, squares / torch.where(present, total, 1.0).sqrt(), 0.0)
        first.copy_(torch.where(first == 0.0, risk, first))
        grown = self.step_size * risk / torch.where(first > 0.0, first, 1.0)
        old = state["log_weights"]
        new = old + grown
        # Tasks that take part share what they had together.
        before, after = (
            torch.where(present, log, -torch.inf).logsumexp(-1, keepdim=True) for log in (old, new)
        )
        old.copy_(torch.where(present, new - after + before, old))
        return old.exp()
