"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import (
    Known,
    Method,
    State,
    check_number,
    cosines,
    inverse_lengths,
    mean_weights,
    norms,
    per_length,
)
from gcond_kernels.methods.solvers import best_for_the_worst, definite


@dataclass(frozen=True)
class CAGrad(Method):
    """Of all vectors near the mean gradient the one that is best for the worst-off task.

    B. Liu et al., "Conflict-Averse Gradient Descent for Multi-task Learning", NeurIPS 2021, arXiv
    2110.14048. With g0 the mean gradient: the g within c ‖g0‖ of g0 whose smallest g·ĝ_k is the
    largest. Its dual is u on the simplex that minimises g_u·g0 + c ‖g0‖ ‖g_u‖, g_u = Σ_k u_k ĝ_k,
    and then g = g0 + c ‖g0‖ g_u / ‖g_u‖. Found exactly, by following a path of some K turns.

    Args:
        c: radius of the ball around the mean gradient, relative to its length, 0 or more.
        rescale: 0 leaves the result as it is (as TorchJD does), 1 divides it by 1 + c², 2 by 1 + c
            (LibMTL's options; its default is 1).
    """

    c: float = 0.5
    rescale: int = 0

    def __post_init__(self) -> None:
        check_number(self, "c", self.c, 0.0, float("inf"))
        if type(self.rescale) is not int or self.rescale not in (0, 1, 2):
            raise ValueError(f"CAGrad: rescale must be 0, 1 or 2, not {self.rescale!r}")

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """1/K + c ‖g0‖ u / ‖g_u‖."""
        mean = mean_weights(gramian)
        weights = (
            mean if self.c == 0.0 else mean + self.towards_the_worst(gramian, mean, known.rounding)
        )
        return weights / (1.0, 1.0 + self.c**2, 1.0 + self.c)[self.rescale]

    def towards_the_worst(self, gramian: Tensor, mean: Tensor, rounding: float) -> Tensor:
        """What is added to the mean, c ‖g0‖ u / ‖g_u‖.

        Found for gradients at length 1, and in units of ‖g0‖.
        """
        C, lengths = definite(cosines(gramian), rounding), norms(gramian)
        present = lengths > 0.0
        mean_at_1 = mean * lengths  # weights of the gradients at length 1
        products = (C @ mean_at_1[..., None])[..., 0]  # g0 · ĝ_k / ‖ĝ_k‖
        length = (mean_at_1 * products).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
        slope = products / length.clamp(min=1e-300)
        inverse = torch.where(present, inverse_lengths(gramian), 1.0)
        # A task without a gradient is never the one that is worst off.
        slope = torch.where(present, slope.clamp(-1.0, 1.0), 10.0 * (1.0 + self.c))
        y = best_for_the_worst(C, slope, inverse, self.c)
        return length * per_length(y, gramian)
