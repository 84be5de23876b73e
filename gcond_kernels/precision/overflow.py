"""Whether a resolved gradient fits into the type of `.grad`, before anything is written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.ops.contexts import full_float32

LARGEST_HALF = torch.finfo(torch.float16).max
LARGEST_FLOAT = torch.finfo(torch.float32).max


def norms_fit(products: ops.Gramians, weights: Tensor) -> Tensor:
    """Return whether Σ_k w_k ĝ_k stays within float32 in every tensor: [] bool.

    No element is larger than the norm √(wᵀ G w) of its tensor. With momentum what is written is a
    mean of such gradients, which is no larger than the largest of them.

    Args:
        products: with a Gramian of each tensor.
        weights: [K] or [T, K] float64.
    """
    return (norms(products, weights) <= LARGEST_FLOAT).all()


def norms(products: ops.Gramians, weights: Tensor) -> Tensor:
    """Return the norm of the resolved gradient in every tensor: [T] float64."""
    K = weights.shape[-1]
    G = products.per_tensor[:, :K, :K]
    w = weights.expand(len(G), K)
    return torch.einsum("ti,tij,tj->t", w, G, w).clamp(min=0.0).sqrt()


def halves_fit(
    rows: Tensor,
    segments: Sequence[tuple[int, int]],
    weights: Tensor,
    bound: Tensor,
) -> Tensor:
    """Return whether no element of Σ_k w_k row_k leaves float16 in these segments: [] bool.

    On a CPU segments are not read where the norm alone shows that they fit; a GPU, which cannot
    be asked, reads them once more.

    Args:
        rows: [K, N'], sums of gradients.
        segments: offset and size of each tensor whose `.grad` is float16.
        weights: [H, K] float64, one row for each of these, with the scale of the rows.
        bound: [H] float64, the norm of each.
    """
    fit = torch.ones((), dtype=torch.bool, device=rows.device)
    doubtful = [True] * len(segments)
    if rows.device.type == "cpu":
        doubtful = (~(bound <= LARGEST_HALF)).tolist()
    for (offset, size), w, unsure in zip(segments, weights.float(), doubtful, strict=True):
        if unsure and size:
            # A weight of 0 may stand beside anything: selected, not multiplied.
            part = torch.where(w[:, None] != 0.0, rows[:, offset : offset + size].float(), 0.0)
            with full_float32():
                fit &= ((w @ part).abs() <= LARGEST_HALF).all()
    return fit
