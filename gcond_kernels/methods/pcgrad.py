"""PCGrad: projecting conflicting gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, check_seed
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.ops.random import start_of, uniform


@dataclass(frozen=True)
class PCGrad(Method):
    """Each gradient gives way to all others that it conflicts with, in random order.

    T. Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782. With
    c_i = e_i, for j ≠ i in random order: d = (c_i S)_j, and where d < 0: c_ij ← c_ij − d / S_jj.
    Then w = Σ_i c_i: the sum over the tasks, not their mean.

    Args:
        seed: of the random orders, which are a function of it and of how many there were: the same
            on every device and on all ranks, and after a checkpoint.
    """

    seed: int = 0

    shared_state: ClassVar[frozenset[str]] = frozenset({"draws"})

    def __post_init__(self) -> None:
        check_seed(self, self.seed)

    @fixed_precision
    def new_state(self, tasks: int, device: torch.device) -> State:
        """How many orders were drawn."""
        return {"draws": torch.zeros((), dtype=torch.int64, device=device)}

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Sum of the projected rows."""
        order = random_orders(gramian, self.seed, state["draws"])
        state["draws"] += 1
        return projected(gramian, order).sum(-2)


def random_orders(gramian: Tensor, seed: int, draws: Tensor) -> Tensor:
    """For each row of each Gramian [..., K, K] the tasks in an order of its own: int64."""
    places = torch.arange(gramian.numel(), device=gramian.device).view(gramian.shape)
    return uniform(start_of(seed, draws), places).argsort(dim=-1, stable=True)


def projected(gramian: Tensor, order: Tensor) -> Tensor:
    """C [..., K, K], row i makes the resolved gradient of task i.

    Args:
        gramian: S [..., K, K].
        order: [..., K, K]; row i has the tasks in the order in which task i gives way to them, and
            i itself somewhere, which is passed over.
    """
    tasks = torch.arange(gramian.shape[-1], device=gramian.device)
    C = torch.eye(len(tasks), dtype=gramian.dtype, device=gramian.device).expand(gramian.shape)
    for other in order.unbind(-1):  # [..., K], of every row i a task j
        place = other[..., None]
        S_j = gramian.gather(-2, place.expand(gramian.shape))
        product = (C * S_j).sum(-1, keepdim=True)
        square = S_j.gather(-1, place)
        conflict = (product < 0.0) & (square > 0.0) & (place != tasks[:, None])
        share = torch.where(conflict, product / square, 0.0)
        C = C.scatter_add(-1, place, -share)
    return C
