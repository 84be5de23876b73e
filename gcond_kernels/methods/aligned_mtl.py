"""Aligned-MTL: independent components of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Method, State, mean_weights
from gcond_kernels.methods.solvers import eigh


@dataclass(frozen=True)
class AlignedMTL(Method):
    """The principal components of the gradients are all brought to the size of the smallest.

    D. Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, arXiv
    2305.19000. With S = V Λ Vᵀ: w = √λ_min · V Λ^(-1/2) Vᵀ · (1/K, …, 1/K), over the eigenvalues
    above K · 2^-52 · λ_max, of which λ_min is the smallest.
    """

    def weights(self, gramian: Tensor, state: State, losses: Tensor | None) -> Tensor:
        """√λ_min · S^(-1/2) · mean."""
        values, vectors = eigh(gramian)
        largest = values.amax(-1, keepdim=True)
        counted = values > largest * gramian.shape[-1] * torch.finfo(values.dtype).eps
        smallest = torch.where(counted, values, torch.inf).amin(-1, keepdim=True)
        shrinking = torch.where(counted, (smallest / values).clamp(max=1.0), 0.0).sqrt()
        components = (vectors.mT @ mean_weights(gramian)[..., None])[..., 0]
        return (vectors @ (shrinking * components)[..., None])[..., 0]
