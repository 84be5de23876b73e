"""What the methods have in common that weight the tasks by the values of their losses."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.positive_losses import PositiveLosses


@dataclass(frozen=True)
class LossWeighting(Method):
    """Weight the tasks by their losses alone, in every tensor by the same weights.

    L_k is the mean loss of a window, without the loss weight λ_k, which multiplies as ever: ĝ_k
    holds it. A task without a micro-batch, or without a gradient in any tensor, takes no part:
    the others are weighted as if it were not there, and what is kept of it stays.

    Losses must be positive (but a loss of 0 without a gradient is that of a task that takes no
    part). On a CPU a ValueError names the task, before any state has changed; on a GPU, which is
    not synchronized with, the step is skipped and a later one raises it. A loss that is not finite
    skips the step.
    """

    _positive: PositiveLosses = field(
        default_factory=PositiveLosses, init=False, repr=False, compare=False
    )

    needs_losses: ClassVar[bool] = True

    @abstractmethod
    def of_losses(self, losses: Tensor, takes_part: Tensor, state: State) -> Tensor:
        """Return the weights [K] of losses [K]; the state is changed in place.

        The losses of tasks that take part are finite and positive. Of the others neither loss nor
        weight counts.
        """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the weights by the losses, the same for every Gramian.

        Raises:
            ValueError: the losses are missing, or one is not positive.
        """
        losses = known.losses
        if losses is None:
            raise ValueError(f"{type(self).__name__}: losses must be given, one for each task")
        present = has_gradient(gramian)
        at_fault = self._positive.check(self, known, ignored=~present & (losses == 0.0))
        takes_part = present & (losses > 0.0) & losses.isfinite()
        weights = self.of_losses(losses, takes_part, state)
        weights = torch.where(takes_part, weights, 0.0)
        # NaN skips the step.
        unknown = at_fault | (present & ~takes_part)
        weights = torch.where(unknown, torch.nan, weights)
        return weights.expand(gramian.shape[:-1])


def has_gradient(gramian: Tensor) -> Tensor:
    """Return whether each task has a gradient in any of the Gramians [..., K, K]: [K] bool."""
    K = gramian.shape[-1]
    return (gramian.diagonal(0, -2, -1) > 0.0).reshape(-1, K).any(0)


def softmax_among(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the softmax over the chosen ones of values [K], and 0 elsewhere."""
    return torch.where(chosen, torch.where(chosen, values, -torch.inf).softmax(-1), 0.0)
