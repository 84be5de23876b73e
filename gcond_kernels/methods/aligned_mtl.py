"""Aligned-MTL: independent components of equal size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, cosines, mean_weights, norms
from gcond_kernels.methods.solvers import eigh


@dataclass(frozen=True)
class AlignedMTL(Method):
    """The principal components of the gradients are all brought to the size of the smallest.

    D. Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, arXiv
    2305.19000. With S = V Λ Vᵀ: w = √λ_min · V Λ^(-1/2) Vᵀ · (1/K, …, 1/K), over the eigenvalues
    that are not 0, as far as rounding tells, of which λ_min is the smallest.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """√λ_min · S^(-1/2) · mean."""
        values, vectors, rank = independent(gramian, known.rounding)
        largest = values.amax(-1, keepdim=True)
        place = values.argsort(-1, descending=True).argsort(-1)
        eps = torch.finfo(values.dtype).eps
        counted = (place < rank) & (values > largest * gramian.shape[-1] * eps)
        smallest = torch.where(counted, values, torch.inf).amin(-1, keepdim=True)
        shrinking = torch.where(counted, (smallest / values).clamp(max=1.0), 0.0).sqrt()
        components = (vectors.mT @ mean_weights(gramian)[..., None])[..., 0]
        return (vectors @ (shrinking * components)[..., None])[..., 0]


def independent(gramian: Tensor, rounding: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues and eigenvectors of S without what is rounding, and its rank [..., 1].

    What is rounding shows among gradients at length 1, where all are told alike.
    """
    values, vectors = eigh(cosines(gramian))
    lengths = norms(gramian)
    counted = (values > rounding) & (lengths > 0.0).any(-1, keepdim=True)
    # A task without a gradient is a direction of its own among the cosines; its length is 0.
    absent = (lengths == 0.0).sum(-1, keepdim=True)
    rank = counted.sum(-1, keepdim=True) - absent
    kept = (vectors * torch.where(counted, values, 0.0)[..., None, :]) @ vectors.mT
    S = kept * lengths[..., :, None] * lengths[..., None, :]
    return *eigh(S), rank
