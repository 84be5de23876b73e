"""STCH: smooth Tchebycheff scalarization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_count, check_positive
from gcond_kernels.methods.loss_weighting import LossWeighting, softmax_among
from gcond_kernels.methods.method import State


@dataclass(frozen=True)
class STCH(LossWeighting):
    """Weight the tasks by the slope of a smooth maximum of their losses.

    X. Lin et al., "Smooth Tchebycheff Scalarization for Multi-Objective Optimization", ICML 2024,
    arXiv 2402.19078, of logarithms of losses relative to n, as the authors' code for multi-task
    learning and LibMTL have it: the objective is K μ log Σ_k exp(log(L_k / n_k) / μ), and so
    w_k = K softmax(log(L / n) / μ)_k / L_k. n_k is the mean loss over the first `warmup_steps`
    windows of a task, in which the objective is Σ_k log L_k, w_k = 1 / L_k. (There it is the mean
    of the one epoch that follows four such epochs.) Preferences of the paper are 1, its ideal point
    is 0. A loss times a constant leaves w_k ĝ_k as it was. What takes part, and losses that are not
    positive: see `LossWeighting`.

    Args:
        mu: μ, above 0: the smaller, the nearer to the plain maximum. With 1 weights are
            proportional to 1 / n_k.
        warmup_steps: windows of a task before it joins the maximum, 1 or more.

    Raises:
        ValueError: an option is out of its range.
    """

    mu: float = 1.0
    warmup_steps: int = 100

    shared_state: ClassVar[frozenset[str]] = frozenset({"loss_sums", "loss_counts"})

    def __post_init__(self) -> None:
        check_positive(self, "mu")
        check_count(self, "warmup_steps")

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return sums and counts of the losses of each task's first windows."""
        zeros = torch.zeros(tasks, dtype=torch.float64, device=device)
        return {"loss_sums": zeros, "loss_counts": zeros.clone()}

    def of_losses(self, losses: Tensor, takes_part: Tensor, state: State) -> Tensor:
        """Return the weights; in its first windows a task's loss is added to its sum."""
        sums, counts = state["loss_sums"], state["loss_counts"]
        positive = torch.where(takes_part, losses, 1.0)
        warm = counts >= self.warmup_steps
        joins = takes_part & warm
        relative = torch.where(joins, (positive * counts / sums).log(), 0.0)
        smooth = joins.sum() * softmax_among(relative / self.mu, joins)
        starts = takes_part & ~warm
        sums += torch.where(starts, losses, 0.0)
        counts += starts
        return torch.where(warm, smooth, 1.0) / positive
