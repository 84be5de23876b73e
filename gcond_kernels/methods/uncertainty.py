"""Uncertainty weighting: a learned variance for each task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.adam import direction_of_adam
from gcond_kernels.methods.checks import check_number
from gcond_kernels.methods.loss_weighting import LossWeighting
from gcond_kernels.methods.method import State

START = -0.5  # of log σ²; LibMTL's


@dataclass(frozen=True)
class UncertaintyWeighting(LossWeighting):
    """Weight each task by 1 / (2 σ²), with a variance σ² that is learned for each.

    A. Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics", CVPR 2018, arXiv 1705.07115, eq. 7: the objective is Σ_k L_k / (2 σ_k²) + log σ_k.
    Learned is s_k = log σ_k², from −0.5 on (a weight of 0.82), by an Adam of its own along
    (1 − L_k e^{−s_k}) / 2; a step uses the s before it. (In the paper, and in LibMTL, the model's
    optimizer trains s too.) Where L_k stays the same σ_k² ends at L_k, and w_k at 1 / (2 L_k): from
    then on w_k ĝ_k does not depend on the scale of the loss. What takes part, and losses that are
    not positive, for which there is no best variance: see `LossWeighting`.

    Args:
        lr: learning rate of s, 0 or more: about how much log σ² changes in a step.

    Raises:
        ValueError: an option is out of its range.
    """

    lr: float = 1e-3

    shared_state: ClassVar[frozenset[str]] = frozenset(
        {"log_variances", "average", "square_average", "updates"}
    )

    def __post_init__(self) -> None:
        check_number(self, "lr")

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return s, and Adam's averages and counts of each task."""
        zeros = torch.zeros(tasks, dtype=torch.float64, device=device)
        return {
            "log_variances": zeros + START,
            "average": zeros,
            "square_average": zeros.clone(),
            "updates": torch.zeros(tasks, dtype=torch.int64, device=device),
        }

    def of_losses(self, losses: Tensor, takes_part: Tensor, state: State) -> Tensor:
        """Return e^{−s} / 2 as it is; then s is trained."""
        s = state["log_variances"]
        precision = (-s).exp()
        slope = torch.where(takes_part, (1.0 - losses * precision) / 2.0, 0.0)
        s -= self.lr * direction_of_adam(state, slope, takes_part)
        return precision / 2.0
