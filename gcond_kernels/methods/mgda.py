"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized, inverse_norms, quotient
from gcond_kernels.methods.solvers import definite, nonnegative_minimum


@dataclass(frozen=True)
class MGDA(Method):
    """Take the convex combination of least norm: a step against it makes no task worse.

    J.-A. Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
    Comptes Rendus Mathématique 2012; O. Sener and V. Koltun, NeurIPS 2018, arXiv 1810.04650:
    min αᵀ S α with α ≥ 0, Σ α = 1. Two tasks in closed form. More: α is proportional to the β ≥ 0
    at which ½ βᵀ S β − Σ β is smallest, a problem without the simplex, which an interior-point
    method solves to rounding, however different the norms of the gradients are (Frank-Wolfe, which
    others use, converges slowly).
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return α."""
        if gramian.shape[-1] == 2:
            return shortest_of_two(gramian)
        C = definite(cosines(gramian), known.rounding)
        weights = from_normalized(nonnegative_minimum(C, -inverse_norms(gramian)), gramian)
        # Relative to the largest first: weights may differ by 1e12.
        weights = weights / weights.amax(-1, keepdim=True).clamp(min=1e-300)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def shortest_of_two(gramian: Tensor) -> Tensor:
    """Return α of two tasks [..., 2]: the point next to 0 on the line between both gradients."""
    squares, product = gramian.diagonal(dim1=-2, dim2=-1), gramian[..., 0, 1, None]
    # Each weight from a difference of its own: 1 minus the other would round a small one away.
    weights = (squares.flip(-1) - product).clamp(min=0.0)
    total = weights.sum(-1, keepdim=True)
    weights = torch.where(total > 0.0, quotient(weights, total), 0.5)
    present = squares > 0.0
    return torch.where(present.all(-1, keepdim=True), weights, present.to(weights))
