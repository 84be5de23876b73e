"""IMTL-G: impartial multi-task learning, its gradient balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized, norms
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

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return β / ‖ĝ‖, divided by its sum."""
        present = (norms(gramian) > 0.0).to(gramian.dtype)
        values, vectors = eigh(cosines(gramian))
        counted = values > known.rounding
        inverse = torch.where(counted, 1.0 / torch.where(counted, values, 1.0), 0.0)
        beta = product(vectors, inverse * product(vectors.mT, present))
        weights = from_normalized(beta, gramian)
        total = weights.sum(-1, keepdim=True)
        size = weights.abs().sum(-1, keepdim=True)
        # Where the normalized gradients cancel out, β is 0 but for rounding.
        defined = (total.abs() > 1e-12 * size) & (beta.abs().amax(-1, keepdim=True) > 1e-9)
        return torch.where(defined, weights / torch.where(defined, total, 1.0), 0.0)
