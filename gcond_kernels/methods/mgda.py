"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, cosines, inverse_lengths, per_length
from gcond_kernels.methods.solvers import definite, nonnegative_minimum


@dataclass(frozen=True)
class MGDA(Method):
    """The shortest convex combination of the gradients: no task gets worse by a step against it.

    J.-A. Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
    Comptes Rendus Mathématique 2012; O. Sener and V. Koltun, NeurIPS 2018, arXiv 1810.04650:
    min αᵀ S α with α ≥ 0, Σ α = 1. Two tasks in closed form. More: α is proportional to the β ≥ 0
    at which ½ βᵀ S β − Σ β is smallest, a problem without the simplex, which an interior-point
    method solves to rounding, however unlike the lengths of the gradients are (Frank-Wolfe, which
    others use, gets near it slowly).
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """α."""
        if gramian.shape[-1] == 2:
            return shortest_of_two(gramian)
        C = definite(cosines(gramian), known.rounding)
        weights = per_length(nonnegative_minimum(C, -inverse_lengths(gramian)), gramian)
        # In units of the largest: there may be 1e12 between them.
        weights = weights / weights.amax(-1, keepdim=True).clamp(min=1e-300)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def shortest_of_two(gramian: Tensor) -> Tensor:
    """α of two tasks [..., 2]: where the line through both gradients is next to 0, or its end."""
    S_11, S_12, S_22 = gramian[..., 0, 0], gramian[..., 0, 1], gramian[..., 1, 1]
    # Each share by a quotient of its own: 1 minus the other would round a small one away.
    share, other = (S_22 - S_12).clamp(min=0.0), (S_11 - S_12).clamp(min=0.0)
    total = share + other
    share = torch.where(total > 0.0, share / total.clamp(min=1e-300), 0.5)
    other = torch.where(total > 0.0, other / total.clamp(min=1e-300), 0.5)
    both = (S_11 > 0.0) & (S_22 > 0.0)
    share = torch.where(both, share, (S_11 > 0.0).to(share))
    other = torch.where(both, other, (S_22 > 0.0).to(other))
    return torch.stack([share, other], dim=-1)
