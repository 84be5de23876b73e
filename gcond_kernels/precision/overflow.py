"""Checks, before anything is written, whether a resolved gradient fits into the type of `.grad`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.ops.contexts import full_float32

LARGEST_HALF = torch.finfo(torch.float16).max


def norms_fit(gramians: ops.Gramians, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return whether Σ_k w_k ĝ_k stays within the range of a type in every tensor: [] bool.

    No element is larger than the norm of its tensor. With momentum a mean of such gradients is
    written, which is no larger than the largest of them.
    """
    return (norms(gramians, weights) <= torch.finfo(dtype).max).all()


def norms(gramians: ops.Gramians, weights: Tensor) -> Tensor:
    """Return the norm √(wᵀ G w) of the resolved gradient in every tensor: [T] float64."""
    K = weights.shape[-1]
    G = gramians.per_tensor[:, :K, :K]
    w = weights.expand(len(G), K)
    return torch.einsum("ti,tij,tj->t", w, G, w).clamp(min=0.0).sqrt()


def halves_fit(
    accumulators: Tensor, segments: Sequence[tuple[int, int]], weights: Tensor, norms: Tensor
) -> Tensor:
    """Return whether all elements of Σ_k w_k accumulators[k] fit float16 in segments: [] bool.

    Args:
        accumulators: [K, N'], sums of gradients.
        segments: offset and size of each tensor whose `.grad` is float16.
        weights: [H, K] float64, those of each segment, times the scale of the accumulators.
        norms: [H] float64, the norm of each.
    """
    fit = torch.ones((), dtype=torch.bool, device=accumulators.device)
    doubtful = [True] * len(segments)
    if accumulators.device.type == "cpu":  # a GPU would synchronize
        doubtful = (~(norms <= LARGEST_HALF)).tolist()
    for (offset, size), w, is_doubtful in zip(segments, weights.float(), doubtful, strict=True):
        if is_doubtful and size:
            segment = accumulators[:, offset : offset + size].float()
            # With a weight of 0 an accumulator may hold anything, so that 0 times it is not 0.
            segment = torch.where(w[:, None] != 0.0, segment, 0.0)
            with full_float32():
                fit &= ((w @ segment).abs() <= LARGEST_HALF).all()
    return fit
