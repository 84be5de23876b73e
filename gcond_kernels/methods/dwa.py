"""DWA: dynamic weight averaging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_count, check_positive
from gcond_kernels.methods.loss_weighting import LossWeighting, softmax_among
from gcond_kernels.methods.method import State


@dataclass(frozen=True)
class DWA(LossWeighting):
    """Weight a task the more, the less its loss has fallen from one epoch to the next.

    S. Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019, arXiv 1803.10704,
    eq. 7: w = K softmax(r / T) with r_k = L_k(e−1) / L_k(e−2), of the mean losses of the last two
    epochs; 1 in the first two. An epoch is `steps_per_epoch` resolutions: losses of single windows
    would be compared by their noise. Tasks without a loss in one of the two epochs have r_k = 1.
    Only ratios of a loss to itself count, so weights do not depend on the scale of a loss, and are
    between 0 and K. What takes part, and losses that are not positive: see `LossWeighting`.

    Args:
        steps_per_epoch: resolutions that a loss is averaged over, 1 or more; best as many as an
            epoch has.
        temperature: T, above 0: the larger, the more even the weights.

    Raises:
        ValueError: an option is out of its range.
    """

    steps_per_epoch: int = 100
    temperature: float = 2.0

    shared_state: ClassVar[frozenset[str]] = frozenset(
        {"loss_sums", "loss_counts", "last_means", "means_before", "steps"}
    )

    def __post_init__(self) -> None:
        check_count(self, "steps_per_epoch")
        check_positive(self, "temperature")

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return sums and counts of this epoch's losses, means of the last two, and steps."""
        names = ("loss_sums", "loss_counts", "last_means", "means_before")  # a mean of 0: none yet
        zeros = torch.zeros(tasks, dtype=torch.float64, device=device)
        steps = torch.zeros((), dtype=torch.int64, device=device)
        return {**{name: zeros.clone() for name in names}, "steps": steps}

    def of_losses(self, losses: Tensor, takes_part: Tensor, state: State) -> Tensor:
        """Return K softmax(r / T) of the last two epochs; the losses are added to this one's."""
        last, before = state["last_means"], state["means_before"]
        known = (last > 0.0) & (before > 0.0)
        ratio = torch.where(known, last / torch.where(known, before, 1.0), 1.0)
        weights = takes_part.sum() * softmax_among(ratio / self.temperature, takes_part)
        self.note(torch.where(takes_part, losses, 0.0), takes_part, state)
        return weights

    def note(self, losses: Tensor, takes_part: Tensor, state: State) -> None:
        """Add losses to those of this epoch; where it ends, begin another one."""
        sums, counts, last = state["loss_sums"], state["loss_counts"], state["last_means"]
        sums += losses
        counts += takes_part
        state["steps"] += 1
        ends = state["steps"] % self.steps_per_epoch == 0
        mean = torch.where(counts > 0.0, sums / counts.clamp(min=1.0), 0.0)
        state["means_before"].copy_(torch.where(ends, last, state["means_before"]))
        last.copy_(torch.where(ends, mean, last))
        sums.masked_fill_(ends, 0.0)
        counts.masked_fill_(ends, 0.0)
