"""gramian: every inner product that the method needs, from one read of the accumulators.

Two launches. In the first each block reads its piece of all rows once and sums every product in
float32; in the second the pieces' sums are added up in float64, in a fixed order.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import _cuda
from gcond_kernels.cuda.launch import Cut, cut, parts, place_of
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import Gramians, TaskGradients


class Sums(NamedTuple):
    """Memory for the products of K tasks and of the momentum, if any.

    Attributes:
        partials: [P, C] float32: each product over each piece; P counts those with momentum and
            history, whether there are any or not.
        total: [K, K] float64.
        cross: [K, K] float64, or None without history.
        per_tensor: [T, R, R] float64, R = K, or K + 1 with momentum.
        crosses: [T, K, K] float64, or None without history.
    """

    partials: Tensor
    total: Tensor
    cross: Tensor | None
    per_tensor: Tensor
    crosses: Tensor | None


def new_sums(tasks: int, momentum: bool, history: bool, which: Cut) -> Sums:
    """Memory for the sums over these pieces."""
    device, rows = which.segments.device, tasks + momentum
    products = (tasks + 1) * (tasks + 2) // 2 + tasks * tasks
    total = torch.empty((tasks, tasks), dtype=torch.float64, device=device)
    tensors = len(which.segments)
    return Sums(
        torch.empty((products, which.chunks.total), dtype=torch.float32, device=device),
        total,
        torch.empty_like(total) if history else None,
        total.new_empty((tensors, rows, rows)),
        total.new_empty((tensors, tasks, tasks)) if history else None,
    )


def gramian(
    gradients: TaskGradients, history_scale: Tensor | None, momentum: Tensor | None
) -> Gramians:
    """Gramian, cross-Gramian, and both per tensor; see `gcond_kernels.ops.gramian`."""
    accumulators, (offsets, sizes), scale, history, mask = gradients
    tasks, device = accumulators.shape[0], accumulators.device
    with tables.guard(device):
        which = cut(offsets, sizes, tables.chunk_length(sum(sizes)), device)
        which.keep_if_captured()
        sums = new_sums(tasks, momentum is not None, history is not None, which)
        _cuda.gramian(
            *place_of(device),
            which.pieces,
            tasks,
            accumulators,
            history,
            momentum,
            mask,
            scale,
            scale if history_scale is None else history_scale,
            sums.partials,
            sums.total,
            sums.cross,
            sums.per_tensor,
            sums.crosses,
        )
    return Gramians(sums.total, sums.cross, sums.per_tensor, sums.crosses)


def multi_tensor_dot(lists: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor]:
    """Gramian, and Gramian per tensor, of L lists; see `gcond_kernels.python.norms`."""
    count, sizes = len(lists), tuple([tensor.numel() for tensor in lists[0]])
    device = lists[0][0].device if sizes else torch.device("cpu")
    length = tables.chunk_length(sum(sizes))
    per_tensor = torch.empty((len(sizes), count, count), dtype=torch.float64, device=device)
    totals = []
    with tables.guard(device):
        for part in parts(len(sizes), _cuda.MOST_TENSORS // count):
            which = cut((0,) * len(sizes[part]), sizes[part], length, device)
            which.keep_if_captured()
            products = count * (count + 1) // 2
            partials = torch.empty(
                (products, which.chunks.total), dtype=torch.float32, device=device
            )
            totals.append(per_tensor.new_empty((count, count)))
            _cuda.lists(
                *place_of(device),
                which.pieces,
                count,
                _cuda.Addresses([tensor for one in lists for tensor in one[part]]),
                partials,
                totals[-1],
                per_tensor[part],
            )
    if len(totals) == 1:
        return totals[0], per_tensor
    return sum(totals, per_tensor.new_zeros((count, count))), per_tensor
