"""Norms and cosines of task gradients, from their Gramian, and weights of normalized gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from gcond_kernels.methods.solvers import identity


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, and 0 where the denominator, 0 or more, is 0."""
    return torch.where(denominator > 0.0, numerator / denominator.clamp(min=1e-300), 0.0)


def norms(gramian: Tensor) -> Tensor:
    """Return the norms of the gradients: [..., K] from a Gramian [..., K, K]."""
    return gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt()


def cosines(gramian: Tensor) -> Tensor:
    """Return the Gramian of the normalized gradients, [..., K, K], with a diagonal of 1.

    A task without a gradient is orthogonal to all others.
    """
    n = norms(gramian)
    n = torch.where(n > 0.0, n, 1.0)
    # Divided twice: the product of two norms may exceed float64.
    between = (gramian / n[..., :, None] / n[..., None, :]).clamp(-1.0, 1.0)
    return torch.where(identity(gramian) == 1.0, 1.0, between)


def from_normalized(weights: Tensor, gramian: Tensor) -> Tensor:
    """Return the weights of gradients, from those of normalized ones; 0 without a gradient."""
    return quotient(weights, norms(gramian))


def inverse_norms(gramian: Tensor) -> Tensor:
    """Return 1 / ‖ĝ_k‖ relative to the largest of these, [..., K]; 0 without a gradient."""
    n = norms(gramian)
    smallest = torch.where(n > 0.0, n, torch.inf).amin(-1, keepdim=True)
    return quotient(smallest, n)


def mean_weights(gramian: Tensor) -> Tensor:
    """Return the weights of the mean of all gradients that are not zero, [..., K]."""
    present = (norms(gramian) > 0.0).to(gramian.dtype)
    return present / present.sum(-1, keepdim=True).clamp(min=1.0)
