"""ConFIG: conflict-free inverse gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gcond_kernels.methods.host import Array, in_numpy
from gcond_kernels.methods.imtl_g import equal_projections
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import from_normalized, norms, quotient


@dataclass(frozen=True)
class ConFIG(Method):
    """Take the direction with the same cosine to all gradients, and the sum of their projections.

    Q. Liu et al., "ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks",
    ICLR 2025, arXiv 2408.11104, equation 2. With the normalized gradients as the rows of U,
    x = U⁺ 1; the result is (Σ_k ĝ_k · x) x / ‖x‖². So w_k = β_k / ‖ĝ_k‖ times
    Σ_j ‖ĝ_j‖ (C β)_j / βᵀ C β, with their cosines C and C β = 1: the direction is that of `IMTLG`,
    the norm another. The scale of a loss does not change the direction.

    Where gradients depend on each other, up to rounding, β is the least-squares solution of least
    norm, as by a pseudo-inverse: then cosines are no longer equal, and may be negative. Where
    normalized gradients cancel out, as two anti-parallel ones do, there is no direction, and all
    weights are 0.
    """

    follows_loss_weights = False

    @in_numpy
    def weights(self, gramian: Array, state: State, known: Known) -> Array:
        """Return β / ‖ĝ‖, times the sum of the projections over ‖x‖²."""
        beta, along = equal_projections(gramian, known.rounding)
        projections, square = norms(gramian) * along, beta * along
        size = quotient(projections.sum(-1)[..., None], square.sum(-1)[..., None])
        return from_normalized(size * beta, gramian)
