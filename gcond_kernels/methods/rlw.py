"""RLW: random loss weighting."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.loss_weighting import has_gradient, softmax_among
from gcond_kernels.methods.method import Known, State
from gcond_kernels.methods.seeded import Seeded
from gcond_kernels.ops.random import start_of, uniform


@dataclass(frozen=True)
class RLW(Seeded):
    """Weight the tasks at random in every step, in every tensor by the same weights.

    B. Lin et al., "Reasonable Effectiveness of Random Weighting: A Litmus Test for Multi-Task
    Learning", TMLR 2022, arXiv 2111.10603: the softmax of independent normal numbers, here times
    K, so that the mean of each weight is 1, as those of `Sum`. A task without a gradient in any
    tensor takes no part.

    Args:
        seed: of the random numbers, which are a function of it and of the number of steps: the same
            on all ranks, and after a checkpoint, and but for rounding on every device.

    Raises:
        ValueError: the seed is not an integer of 64 bits.
    """

    seed: int = 0

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return K softmax(N); the random counter is counted up."""
        present = has_gradient(gramian)
        places = present.cumsum(0) - 1  # the others have the numbers that they have alone
        normal = torch.special.ndtri(
            uniform(start_of(self.seed, state["counter"]), places).double()
        )
        state["counter"] += 1
        weights = present.sum() * softmax_among(normal, present)
        return weights.expand(gramian.shape[:-1])
