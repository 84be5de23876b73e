"""FAMO: fast adaptive multitask optimization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.adam import direction_of_adam
from gcond_kernels.methods.checks import check_number
from gcond_kernels.methods.loss_weighting import LossWeighting, softmax_among
from gcond_kernels.methods.method import State


@dataclass(frozen=True)
class FAMO(LossWeighting):
    """Weight the tasks so that the logarithms of their losses fall at similar rates.

    B. Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, arXiv 2306.03792,
    algorithm 1: with z = softmax(ξ) the weights are w_k = c z_k / L_k, Σ w = 1; then ξ descends
    along Jᵀ δ + γ ξ by Adam, where J is the Jacobian of the softmax and δ_k = log L_k(t) −
    log L_k(t+1). The published code evaluates the losses of the same batch once more after the
    step. Here L(t+1) are those of the next window, which are there anyway: another batch, so δ
    holds the noise of the batches too (larger windows have less of it). Losses are compared with
    0, their least value. The weights depend on the scale of a loss as 1 / L_k does, so that w_k ĝ_k
    does not, but for the common factor c. What takes part, and losses that are not positive: see
    `LossWeighting`.

    Args:
        lr: learning rate of ξ, 0 or more.
        gamma: γ, 0 or more, the decay of ξ; the larger, the more even is z.

    Raises:
        ValueError: an option is out of its range.
    """

    lr: float = 0.025
    gamma: float = 1e-3

    shared_state: ClassVar[frozenset[str]] = frozenset(
        {"logits", "average", "square_average", "updates", "last_losses"}
    )

    def __post_init__(self) -> None:
        check_number(self, "lr")
        check_number(self, "gamma")

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return ξ, Adam's averages and counts of each task, and the losses of last windows."""
        names = ("logits", "average", "square_average", "last_losses")  # a loss of 0: none yet
        zeros = torch.zeros(tasks, dtype=torch.float64, device=device)
        updates = torch.zeros(tasks, dtype=torch.int64, device=device)
        return {**{name: zeros.clone() for name in names}, "updates": updates}

    def of_losses(self, losses: Tensor, takes_part: Tensor, state: State) -> Tensor:
        """Return c z / L, after ξ is trained by how the losses have changed."""
        logits, last = state["logits"], state["last_losses"]
        logarithms = torch.where(takes_part, losses, 1.0).log()
        learns = takes_part & (last > 0.0)
        fallen = torch.where(learns, torch.where(learns, last, 1.0).log() - logarithms, 0.0)
        z = softmax_among(logits, learns)
        slope = z * (fallen - (z * fallen).sum()) + self.gamma * logits
        logits -= self.lr * direction_of_adam(state, slope, learns)
        last.copy_(torch.where(takes_part, losses, last))
        return softmax_among(logits - logarithms, takes_part)  # z / L, normalized
