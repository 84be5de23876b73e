"""Norms and cosines of task gradients, from their Gramian, and weights of normalized gradients.

They take tensors, or NumPy arrays on a CPU (see `host.in_numpy`), and return the same kind.
"""

from __future__ import annotations

from gcond_kernels.methods.host import Array, module_of
from gcond_kernels.methods.solvers import identity


def quotient(numerator: Array, denominator: Array) -> Array:
    """Return numerator / denominator, and 0 where the denominator, 0 or more, is 0."""
    where, positive = module_of(denominator).where, denominator > 0.0
    return where(positive, numerator / where(positive, denominator, 1.0), 0.0)


def norms(gramian: Array) -> Array:
    """Return the norms of the gradients: [..., K] from a Gramian [..., K, K]."""
    module, squares = module_of(gramian), gramian.diagonal(0, -2, -1)
    return module.sqrt(module.where(squares > 0.0, squares, 0.0))


def cosines(gramian: Array) -> Array:
    """Return the Gramian of the normalized gradients, [..., K, K], with a diagonal of 1.

    A task without a gradient is orthogonal to all others.
    """
    module, n = module_of(gramian), norms(gramian)
    n = module.where(n > 0.0, n, 1.0)
    # Divided twice: the product of two norms may exceed float64.
    between = module.clip(gramian / n[..., :, None] / n[..., None, :], -1.0, 1.0)
    return module.where(identity(gramian) == 1.0, 1.0, between)


def from_normalized(weights: Array, gramian: Array) -> Array:
    """Return the weights of gradients, from those of normalized ones; 0 without a gradient."""
    return quotient(weights, norms(gramian))


def inverse_norms(gramian: Array) -> Array:
    """Return 1 / ‖ĝ_k‖ relative to the largest of these, [..., K]; 0 without a gradient."""
    module, n = module_of(gramian), norms(gramian)
    smallest = module.amin(module.where(n > 0.0, n, module.inf), -1)[..., None]
    return quotient(smallest, n)


def mean_weights(gramian: Array) -> Array:
    """Return the weights of the mean of all gradients that are not zero, [..., K]."""
    n = norms(gramian)
    present = quotient(n, n)
    return quotient(present, present.sum(-1)[..., None])
