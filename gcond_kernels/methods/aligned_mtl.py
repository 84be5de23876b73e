"""Aligned-MTL: independent components of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, mean_weights, norms
from gcond_kernels.methods.solvers import eigh, product


@dataclass(frozen=True)
class AlignedMTL(Method):
    """Bring the principal components of the gradients to the size of the smallest.

    D. Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, arXiv
    2305.19000. With S = V Λ Vᵀ: w = √λ_min · V Λ^(-1/2) Vᵀ · (1/K, …, 1/K), over the eigenvalues
    that are not 0 up to rounding, of which λ_min is the smallest.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return √λ_min · V Λ^(-1/2) Vᵀ · (1/K, …, 1/K)."""
        # What is rounding shows among the normalized gradients: S is made anew without it.
        values, vectors = eigh(cosines(gramian))
        n = norms(gramian)
        counted = (values > known.rounding) & (n > 0.0).any(-1, keepdim=True)
        # A task without a gradient is a direction of its own among the cosines; its norm is 0.
        rank = counted.sum(-1, keepdim=True) - (n == 0.0).sum(-1, keepdim=True)
        kept = (vectors * torch.where(counted, values, 0.0)[..., None, :]) @ vectors.mT
        values, vectors = eigh(kept * n[..., :, None] * n[..., None, :])
        order = values.argsort(-1, descending=True).argsort(-1)
        least = values.amax(-1, keepdim=True) * gramian.shape[-1] * torch.finfo(values.dtype).eps
        counted = (order < rank) & (values > least)
        smallest = torch.where(counted, values, torch.inf).amin(-1, keepdim=True)
        factors = torch.where(counted, (smallest / values).clamp(max=1.0), 0.0).sqrt()
        return product(vectors, factors * product(vectors.mT, mean_weights(gramian)))
