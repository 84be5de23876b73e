"""Norms, cosines and Gramians of plain lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops.backends import Backend, backend_for
from gcond_kernels.ops.checks import check_dense, is_dense
from gcond_kernels.ops.contexts import fixed_precision


@fixed_precision
def multi_tensor_norm(
    tensors: Sequence[Tensor], *, per_tensor: bool = False, backend: str | Backend = "auto"
) -> Tensor:
    """Return the Euclidean norm of a list of tensors, [] float64, or of each of them, [T] float64.

    Args:
        tensors: T tensors of `GRADIENT_DTYPES` and any shape, on one device; T may be 0. Squares
            are formed in float32: numbers beyond 1e19 or below 1e-22 leave its range. Where one
            of the tensors is float64 its squares are, by the reference.
        per_tensor: one norm for each tensor instead of one for all.
        backend: a name, or what `backend_for` returned.
    """
    total, each = multi_tensor_dot([tensors], backend)
    return (each if per_tensor else total)[..., 0, 0].sqrt()


@fixed_precision
def multi_tensor_cosine_similarity(
    a: Sequence[Tensor], b: Sequence[Tensor], *, backend: str | Backend = "auto"
) -> Tensor:
    """Return the cosine between two lists of tensors, [] float64; 0 where either is zero.

    Args:
        a: T tensors of `GRADIENT_DTYPES`, on one device, taken as one long vector.
        b: T tensors of the same shapes, in the same order.
        backend: a name, or what `backend_for` returned.
    """
    if [tensor.shape for tensor in a] != [tensor.shape for tensor in b]:
        raise ValueError("the two lists must hold tensors of the same shapes in the same order")
    products, _ = multi_tensor_dot([a, b], backend)
    norms = products[0, 0].sqrt() * products[1, 1].sqrt()
    return torch.where(norms > 0.0, products[0, 1] / norms, 0.0)


def multi_tensor_dot(
    lists: Sequence[Sequence[Tensor]], backend: str | Backend
) -> tuple[Tensor, Tensor]:
    """Return the Gramian [L, L], and that of each tensor [T, L, L], of L lists of T tensors.

    Where one of the tensors is float64, products with it are formed in float64, by the reference.
    """
    ordered = [_in_one_order(tensors) for tensors in zip(*lists, strict=True)]
    device = ordered[0][0].device if ordered else torch.device("cpu")
    lists = [[tensors[i] for tensors in ordered] for i in range(len(lists))]
    for tensors in lists:
        check_dense("tensors", tensors, [tensor.numel() for tensor in tensors], device)
    dtypes = {tensor.dtype for tensors in lists for tensor in tensors}
    widest = torch.float64 if torch.float64 in dtypes else torch.float32
    return backend_for(backend, device, widest).multi_tensor_dot(lists)


def _in_one_order(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one shape in one memory order without gaps; copies only if needed."""
    first = tensors[0]
    if is_dense(first) and all(tensor.stride() == first.stride() for tensor in tensors):
        return [tensor.detach() for tensor in tensors]
    return [tensor.detach().contiguous() for tensor in tensors]
