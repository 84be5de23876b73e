"""IMTL-G: impartial multi-task learning, its gradient balance."""

from __future__ import annotations

from dataclasses import dataclass

from gcond_kernels.methods.host import Array, in_numpy, module_of
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized, norms, quotient
from gcond_kernels.methods.solvers import eigh, product


@dataclass(frozen=True)
class IMTLG(Method):
    """Combine the gradients so that the projections onto all are equal, with weights of sum 1.

    L. Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021 (IMTL-G). With the cosines C
    of the gradients: C β = 1, w_k = β_k / ‖ĝ_k‖, divided by their sum. Where C is singular up to
    rounding, β is the least-squares solution of least norm; where the weights sum to 0 there is no
    solution, and all are 0. Weights may be negative, and the result then has a larger norm than any
    gradient.
    """

    follows_loss_weights = False

    @in_numpy
    def weights(self, gramian: Array, state: State, known: Known) -> Array:
        """Return β / ‖ĝ‖, divided by its sum."""
        where, (beta, _) = module_of(gramian).where, equal_projections(gramian, known.rounding)
        weights = from_normalized(beta, gramian)
        total, size = weights.sum(-1)[..., None], abs(weights).sum(-1)[..., None]
        defined = abs(total) > 1e-12 * size
        return where(defined, weights / where(defined, total, 1.0), 0.0)


def equal_projections(gramian: Array, rounding: float) -> tuple[Array, Array]:
    """Return β [..., K] of C β = 1, for the cosines C, and C β.

    Of all β with the least error the one of least norm; 0 for a task without a gradient, and for
    all where normalized gradients cancel out.
    """
    where, n = module_of(gramian).where, norms(gramian)
    values, vectors = eigh(cosines(gramian))
    counted = values > rounding
    ones = where(counted, product(vectors.swapaxes(-1, -2), quotient(n, n)), 0.0)
    beta = product(vectors, ones / where(counted, values, 1.0))
    # Where they cancel out, β is 0 but for rounding.
    defined = (abs(beta) > 1e-9).any(-1)[..., None]
    return where(defined, beta, 0.0), where(defined, product(vectors, ones), 0.0)
