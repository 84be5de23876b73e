"""IMTL-G: impartial multi-task learning, its gradient balance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, cosines, norms, per_length
from gcond_kernels.methods.solvers import eigh


@dataclass(frozen=True)
class IMTLG(Method):
    """The combination with equal projections onto all gradients, of weights that sum to 1.

    L. Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021 (IMTL-G). On gradients at
    length 1, with cosines C: C β = 1, w_k = β_k / ‖ĝ_k‖, divided by their sum. Where C is singular,
    as far as rounding tells, β is the shortest that comes nearest; where the weights sum to 0 there
    is none, and all are 0. Weights may be negative, and the result then longer than any gradient.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """β / ‖ĝ‖, normalised."""
        present = (norms(gramian) > 0.0).to(gramian.dtype)
        values, vectors = eigh(cosines(gramian))
        counted = values > known.rounding
        inverse = torch.where(counted, 1.0 / torch.where(counted, values, 1.0), 0.0)
        components = (vectors.mT @ present[..., None])[..., 0]
        beta = (vectors @ (inverse * components)[..., None])[..., 0]
        weights = per_length(beta, gramian)
        total = weights.sum(-1, keepdim=True)
        size = weights.abs().sum(-1, keepdim=True)
        # Where the gradients at length 1 cancel out, β is 0, but for rounding.
        defined = (total.abs() > 1e-12 * size) & (beta.abs().amax(-1, keepdim=True) > 1e-9)
        return torch.where(defined, weights / torch.where(defined, total, 1.0), 0.0)
