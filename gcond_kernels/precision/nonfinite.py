"""Gradients that hold a NaN or an infinity: which tasks they are of, and steps without those tasks.

The diagonal of the Gramian shows them, as the squared norm of such a gradient is not finite either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops import Gramians


def nonfinite_tasks(gramian: Tensor) -> Tensor:
    """Return which tasks' gradients hold a NaN, an infinity or too large squares: [K] bool."""
    return ~gramian.diagonal().isfinite()


def without_tasks(gramians: Gramians, scale: Tensor, dropped: Tensor) -> tuple[Gramians, Tensor]:
    """Return Gramians and scale [K] as if the tasks in `dropped` [K] had had no micro-batch.

    Where no task would be left, `total` stays as it is, so that the step is skipped.
    """
    kept = torch.where(dropped, 0.0, scale)
    pairs = dropped[:, None] | dropped[None, :]
    R = gramians.per_tensor.shape[-1]
    padded = torch.nn.functional.pad(dropped, (0, R - len(dropped)))  # the momentum is kept
    cross, crosses = (  # [..., K, K]: the history is always finite
        None if value is None else value.masked_fill(dropped[:, None], 0.0)
        for value in (gramians.cross, gramians.cross_per_tensor)
    )
    return Gramians(
        gramians.total.masked_fill(pairs & (kept != 0.0).any(), 0.0),
        cross,
        gramians.per_tensor.masked_fill(padded[:, None] | padded[None, :], 0.0),
        crosses,
    ), kept


def describe(per_tensor: Tensor, tasks: Sequence[str], parameters: Sequence[str]) -> str | None:
    """Return in words which tasks and parameters are not finite; None where all are.

    On a GPU this synchronizes with the device. `per_tensor` is [T, R, R], R ≥ K.
    """
    diagonals = per_tensor.diagonal(dim1=1, dim2=2)[:, : len(tasks)]  # [T, K]
    found = []
    for task, flags in zip(tasks, (~diagonals.isfinite()).T.tolist(), strict=True):
        names = [name for name, flag in zip(parameters, flags, strict=True) if flag]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"task {task!r}: {names[0]}{more}")
    return "; ".join(found) or None
