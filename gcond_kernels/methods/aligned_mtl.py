"""Aligned-MTL: independent components of equal size."""

from __future__ import annotations

from dataclasses import dataclass

from gcond_kernels.methods.host import Array, in_numpy, module_of
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, mean_weights, norms
from gcond_kernels.methods.solvers import eigh, product

EPS = 2.0**-52  # of float64


@dataclass(frozen=True)
class AlignedMTL(Method):
    """Bring the principal components of the gradients to the size of the smallest.

    D. Senushkin et al., "Independent Component Alignment for Multi-Task Learning", CVPR 2023, arXiv
    2305.19000. With S = V Λ Vᵀ: w = √λ_min · V Λ^(-1/2) Vᵀ · (1/K, …, 1/K), over the eigenvalues
    that are not 0 up to rounding, of which λ_min is the smallest.
    """

    follows_loss_weights = False

    @in_numpy
    def weights(self, gramian: Array, state: State, known: Known) -> Array:
        """Return √λ_min · V Λ^(-1/2) Vᵀ · (1/K, …, 1/K)."""
        # What is rounding shows among the normalized gradients: S is made anew without it.
        values, vectors = eigh(cosines(gramian))
        n, module = norms(gramian), module_of(gramian)
        counted = (values > known.rounding) & (n > 0.0).any(-1)[..., None]
        # A task without a gradient is a direction of its own among the cosines; its norm is 0.
        rank = (counted.sum(-1) - (n == 0.0).sum(-1))[..., None]
        kept = (vectors * module.where(counted, values, 0.0)[..., None, :]) @ vectors.swapaxes(
            -1, -2
        )
        values, vectors = eigh(kept * n[..., :, None] * n[..., None, :])
        order = (-values).argsort(-1).argsort(-1)
        least = module.amax(values, -1)[..., None] * gramian.shape[-1] * EPS
        counted = (order < rank) & (values > least)
        smallest = module.amin(module.where(counted, values, module.inf), -1)[..., None]
        ratio = module.where(counted, smallest / values, 0.0)
        factors = module.sqrt(module.where(ratio < 1.0, ratio, 1.0))
        return product(vectors, factors * product(vectors.swapaxes(-1, -2), mean_weights(gramian)))
