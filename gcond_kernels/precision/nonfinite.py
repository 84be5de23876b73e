"""Gradients that hold a NaN or an infinity: which tasks they are of, and going on without them.

A value that is not finite makes the squared norm of its task so: the diagonal of the Gramian tells,
and nothing else has to be read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.ops import Gramians


def nonfinite_tasks(gramian: Tensor) -> Tensor:
    """Whether each task's gradient holds a value that is not finite: [K] bool.

    Values beyond some 1e19 count too: their squares leave float32.
    """
    return ~gramian.diagonal().isfinite()


def without_tasks(products: Gramians, scale: Tensor, left_out: Tensor) -> tuple[Gramians, Tensor]:
    """The products and the scale as if the tasks in `left_out` had had no micro-batch.

    Where no task would be left all stays as it is: that is no step, and is seen as such later.

    Args:
        products: of all tasks.
        scale: [K] float64.
        left_out: [K] bool, on the same device; no host reads it.
    """
    kept = torch.where(left_out, 0.0, scale)
    either = left_out[:, None] | left_out[None, :]
    total = products.total.masked_fill(either & (kept != 0.0).any(), 0.0)
    cross = products.cross
    if cross is not None:
        cross = cross.masked_fill(left_out[:, None], 0.0)  # [K, K]; the history is always finite
    crosses = products.cross_per_tensor
    if crosses is not None:
        crosses = crosses.masked_fill(left_out[:, None], 0.0)
    R = products.per_tensor.shape[-1]
    row = torch.nn.functional.pad(left_out, (0, R - len(left_out)))  # the momentum's row stays
    per_tensor = products.per_tensor.masked_fill(row[:, None] | row[None, :], 0.0)
    return Gramians(total, cross, per_tensor, crosses), kept


def describe(per_tensor: Tensor, tasks: Sequence[str], parameters: Sequence[str]) -> str | None:
    """Which tasks and parameters are not finite, in words; None where all are.

    On a GPU this waits for the device.

    Args:
        per_tensor: [T, R, R] float64, R ≥ K.
        tasks: K names.
        parameters: T names.
    """
    diagonals = per_tensor.diagonal(dim1=1, dim2=2)[:, : len(tasks)]  # [T, K]
    bad = (~diagonals.isfinite()).T.tolist()
    said = []
    for task, of_task in zip(tasks, bad, strict=True):
        names = [name for name, is_bad in zip(parameters, of_task, strict=True) if is_bad]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            said.append(f"task {task!r}: {names[0]}{more}")
    return "; ".join(said) or None
