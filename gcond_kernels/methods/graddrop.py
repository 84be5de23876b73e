"""GradDrop: gradient sign dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.methods.checks import check_number
from gcond_kernels.methods.method import (
    Comparison,
    Destination,
    Known,
    State,
    without_events,
)
from gcond_kernels.methods.seeded import Seeded
from gcond_kernels.ops.types import SignDropout, TaskGradients


@dataclass(frozen=True)
class GradDrop(Seeded):
    """Of every element one sign is picked at random, and gradients of the other sign are dropped.

    Z. Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
    NeurIPS 2020, arXiv 2010.06808, with f the identity: the positive sign is picked with
    probability P = (1 + Σ_k g_k / Σ_k |g_k|) / 2. It is no function of the Gramian and has no
    weights: what it does is `gcond_kernels.ops.graddrop`. Parameters of one task keep their
    gradient.

    Args:
        leak: the share of the dropped gradients that is let through, in [0, 1]: one for all tasks
            (the paper allows one for each).
        seed: of the random numbers, which are a function of it, of how many steps there were, and
            of the element's place: the same on every device and in every backend.
    """

    leak: float = 0.0
    seed: int = 0

    adds_magnitudes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number(self, "leak", 1.0)
        super().__post_init__()

    def check(self, granularity: str, sized_by: str | None) -> None:
        """Raise a ValueError where other options of the optimizer do not go with this method."""
        super().check(granularity, sized_by)
        if granularity == "tensor":
            raise ValueError(
                "granularity='tensor' does not go with GradDrop, which decides by elements"
            )
        if sized_by is not None:
            raise ValueError(
                f"{sized_by} needs the norm of a gradient before it is written, which the Gramian "
                "does not hold for GradDrop: clip between backward() and step(), e.g. with "
                "torch.nn.utils.clip_grad_norm_"
            )

    def __call__(self, gramian: Tensor, losses: Tensor | None = None) -> Tensor:
        """Raise a TypeError: there are none."""
        return self.weights(gramian, {}, Known(losses=losses))

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Raise a TypeError: there are none."""
        raise TypeError(
            "GradDrop picks signs element by element: it has no weights, and no Gramian determines "
            "its result. See gcond_kernels.ops.graddrop"
        )

    def decide(self, comparison: Comparison, state: State) -> ops.Arbitration:
        """Return weights of 1, by which elements are bounded, where all gradients are finite."""
        finite = comparison.gramian.isfinite().all()
        return without_events(torch.ones_like(comparison.scale), finite)

    def apply(
        self,
        gradients: TaskGradients,
        destination: Destination,
        weights: Tensor,
        decision: ops.Arbitration,
        state: State,
    ) -> ops.Arbitration:
        """Write the gradient by sign dropout; its weights are reported as NaN."""
        counter = state["counter"]
        ops.graddrop(
            gradients,
            destination.outputs,
            finite=decision.finite,
            dropout=SignDropout(self.seed, counter, self.leak, destination.first),
            momentum=destination.momentum,
            backend=destination.backend,
        )
        counter += decision.finite
        return decision._replace(weights=torch.full_like(decision.weights, torch.nan))
