"""PCGrad: projecting conflicting gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_seed
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.solvers import identity
from gcond_kernels.ops.random import start_of, uniform


@dataclass(frozen=True)
class PCGrad(Method):
    """Project each gradient onto the complements of all it conflicts with, in random order.

    T. Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020, arXiv 2001.06782. With
    c_i = e_i, for j ≠ i in random order: d = (c_i S)_j, and where d < 0: c_ij ← c_ij − d / S_jj.
    Then w = Σ_i c_i: the sum over the tasks, not their mean.

    Args:
        seed: of the random orders, which are a function of it and of the number of steps: the same
            on every device and on all ranks, and after a checkpoint.

    Raises:
        ValueError: the seed is not an integer of 64 bits.
    """

    seed: int = 0

    shared_state: ClassVar[frozenset[str]] = frozenset({"counter"})

    def __post_init__(self) -> None:
        check_seed(self)

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return the random counter, [] int64."""
        return {"counter": torch.zeros((), dtype=torch.int64, device=device)}

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return Σ_i c_i; the random counter is counted up."""
        order = random_orders(gramian, self.seed, state["counter"])
        state["counter"] += 1
        return projected(gramian, order).sum(-2)


def random_orders(gramian: Tensor, seed: int, counter: Tensor) -> Tensor:
    """Return for each row of Gramians [..., K, K] a random order of the tasks: int64."""
    indices = torch.arange(gramian.numel(), device=gramian.device).view(gramian.shape)
    return uniform(start_of(seed, counter), indices).argsort(dim=-1, stable=True)


def projected(gramian: Tensor, order: Tensor) -> Tensor:
    """Return the coefficients c [..., K, K], of which row i makes the gradient of task i.

    Row i of `order` [..., K, K] is the order in which task i is projected; i itself is skipped.
    """
    tasks = torch.arange(gramian.shape[-1], device=gramian.device)
    C = identity(gramian).expand(gramian.shape)
    for other in order.unbind(-1):  # [..., K], for each task i a task j
        j = other[..., None]
        S_j = gramian.gather(-2, j.expand(gramian.shape))
        product = (C * S_j).sum(-1, keepdim=True)
        square = S_j.gather(-1, j)
        conflict = (product < 0.0) & (square > 0.0) & (j != tasks[:, None])
        C = C.scatter_add(-1, j, -torch.where(conflict, product / square, 0.0))
    return C
