"""UPGrad: unconflicting projection of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from gcond_kernels.methods.host import Array, in_numpy, module_of
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized, norms, quotient
from gcond_kernels.methods.solvers import definite, identity, nonnegative_minima


@dataclass(frozen=True)
class UPGrad(Method):
    """Project each gradient onto the cone where no task gets worse; take the mean of those.

    P. Quinton and V. Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232:
    v_i = argmin vᵀ S v subject to v ≥ e_i, w = mean of the v_i over the tasks. With v = e_i + x,
    ½ xᵀ S x + S_i x is minimized over x ≥ 0: K such problems at once. Where the gradients cancel
    out, many v_i make the same gradient; of these v_i has the least norm, up to rounding.
    """

    @in_numpy
    def weights(self, gramian: Array, state: State, known: Known) -> Array:
        """Return the mean of the v_i."""
        if gramian.shape[-1] == 2:
            return weights_of_two(gramian, known.rounding)
        C, n = definite(cosines(gramian), known.rounding), norms(gramian)
        v = (nonnegative_minima(C, C) + identity(C)) * n[..., None]
        return from_normalized(quotient(v.sum(-2), (n > 0.0).sum(-1)[..., None]), gramian)


def weights_of_two(gramian: Array, rounding: float) -> Array:
    """Return the weights of two tasks: each gradient is projected onto the other's complement.

    The smaller eigenvalue of the cosines, 1 − |c|, is raised to `rounding`, as by `definite`.
    """
    module, n = module_of(gramian), norms(gramian)
    where, other = module.where, module.flip(n, (-1,))
    conflict = quotient(quotient(-gramian[..., 0, 1, None], n), other)
    conflict = where(conflict > 0.0, conflict, 0.0)
    raised = where(conflict > 1.0 - rounding, (conflict - 1.0 + rounding) / 2.0, 0.0)
    conflict = (conflict - raised) / (1.0 + raised)
    count = (n > 0.0).sum(-1)[..., None]
    return quotient(quotient(n + conflict * other, n), count)
