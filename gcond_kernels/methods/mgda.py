"""MGDA: the multiple-gradient descent algorithm."""

from __future__ import annotations

from dataclasses import dataclass

from gcond_kernels.methods.host import Array, in_numpy, module_of
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

    follows_loss_weights = False

    @in_numpy
    def weights(self, gramian: Array, state: State, known: Known) -> Array:
        """Return α."""
        if gramian.shape[-1] == 2:
            return shortest_of_two(gramian)
        C = definite(cosines(gramian), known.rounding)
        weights = from_normalized(nonnegative_minimum(C, -inverse_norms(gramian)), gramian)
        # Relative to the largest first: weights may differ by 1e12.
        weights = quotient(weights, module_of(weights).amax(weights, -1)[..., None])
        return quotient(weights, weights.sum(-1)[..., None])


def shortest_of_two(gramian: Array) -> Array:
    """Return α of two tasks [..., 2]: the point next to 0 on the line between both gradients."""
    module = module_of(gramian)
    squares, product = gramian.diagonal(0, -2, -1), gramian[..., 0, 1, None]
    # Each weight from a difference of its own: 1 minus the other would round a small one away.
    weights = module.flip(squares, (-1,)) - product
    weights = module.where(weights > 0.0, weights, 0.0)
    total = weights.sum(-1)[..., None]
    weights = module.where(total > 0.0, quotient(weights, total), 0.5)
    present = squares > 0.0
    return module.where(present.all(-1)[..., None], weights, quotient(squares, squares))
