"""UPGrad: unconflicting projection of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized, norms
from gcond_kernels.methods.solvers import definite, identity, nonnegative_minimum


@dataclass(frozen=True)
class UPGrad(Method):
    """Project each gradient onto the cone where no task gets worse; take the mean of those.

    P. Quinton and V. Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232:
    v_i = argmin vᵀ S v subject to v ≥ e_i, w = mean of the v_i over the tasks. With v = e_i + x,
    ½ xᵀ S x + S_i x is minimized over x ≥ 0: K such problems at once. Where the gradients cancel
    out, many v_i make the same gradient; of these v_i has the least norm, up to rounding.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the mean of the v_i."""
        C, n = definite(cosines(gramian), known.rounding), norms(gramian)
        x = nonnegative_minimum(C[..., None, :, :].expand(*C.shape[:-1], *C.shape[-2:]), C)
        v = (x + identity(C)) * n[..., None]
        count = (n > 0.0).to(n).sum(-1, keepdim=True).clamp(min=1.0)
        return from_normalized(v.sum(-2), gramian) / count
