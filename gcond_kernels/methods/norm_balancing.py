"""Gradient-norm weights: all weighted gradients get the same norm, on average."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_number
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import norms, quotient

# The share of all norms that a norm counts for at the least: as in the authors' code.
SMALLEST = 1e-5


@dataclass(frozen=True)
class NormBalancing(Method):
    """Weight each gradient by the inverse of its norm, by a moving average.

    S. Wang et al., "An Expert's Guide to Training Physics-informed Neural Networks", arXiv
    2308.08468, gradient-norm weights: λ̂_k = Σ_j ‖ĝ_j‖ / ‖ĝ_k‖, λ_k ← β λ_k + (1 − β) λ̂_k, from
    λ_k = 1 on. They update λ every 1,000 steps, for it costs them a backward pass per loss; here
    norms are known in every step, and each updates λ before it uses it. A norm below 1e-5 of the
    mean counts as that, about as in their code: else one gradient that nearly vanishes would rule
    the average for long.

    Once λ follows the norms, all weighted gradients have the norm Σ_j ‖ĝ_j‖, and the result up to K
    times that: with SGD use `max_norm`, or a smaller learning rate. It balances the tasks and
    resolves no conflict. A task without a gradient keeps its λ.

    Args:
        beta: β, in [0, 1].

    Raises:
        ValueError: β is out of its range.
    """

    follows_loss_weights = False
    beta: float = 0.9

    def __post_init__(self) -> None:
        check_number(self, "beta", 1.0)

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return λ, [K] float64."""
        return {"task_weights": torch.ones(tasks, dtype=torch.float64, device=device)}

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return λ after this step's norms."""
        n, average = norms(gramian), state["task_weights"]
        total, count = n.sum(-1, keepdim=True), (n > 0.0).sum(-1, keepdim=True)
        counted = torch.maximum(n, SMALLEST * total / count.clamp(min=1))
        new = self.beta * average + (1.0 - self.beta) * quotient(total, counted)
        average.copy_(torch.where(n > 0.0, new, average))
        return average.clone()
