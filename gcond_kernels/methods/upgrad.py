"""UPGrad: unconflicting projection of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, cosines, norms, per_length
from gcond_kernels.methods.solvers import definite, identity, nonnegative_minimum


@dataclass(frozen=True)
class UPGrad(Method):
    """Each gradient is projected onto the cone where no task gets worse; the mean of those.

    P. Quinton and V. Rey, "Jacobian Descent for Multi-Objective Optimization", arXiv 2406.16232:
    v_i = argmin vᵀ S v subject to v ≥ e_i, w = mean of the v_i over the tasks. With v = e_i + x it
    is ½ xᵀ S x + S_i x over x ≥ 0 that is smallest, K such problems at once. Where the gradients
    cancel out, many v_i make the same gradient: it is the shortest of them, as far as rounding
    tells.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Mean of the v_i."""
        C, lengths = definite(cosines(gramian), known.rounding), norms(gramian)
        present = (lengths > 0.0).to(gramian.dtype)
        x = nonnegative_minimum(C[..., None, :, :].expand(*C.shape[:-1], *C.shape[-2:]), C)
        rows = (x + identity(C)) * lengths[..., None]
        count = present.sum(-1, keepdim=True).clamp(min=1.0)
        return per_length(rows.sum(-2), gramian) / count
