"""PCGrad: projecting conflicting gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gcond_kernels.methods import host
from gcond_kernels.methods.method import Known, State
from gcond_kernels.methods.seeded import Seeded
from gcond_kernels.methods.solvers import identity
from gcond_kernels.ops.random import start_of, uniform


@dataclass(frozen=True)
class PCGrad(Seeded):
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

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return Σ_i c_i; the random counter is counted up."""
        # Of many Gramians torch computes faster than NumPy.
        if host.may_read(gramian) and (gramian.dim() == 2 or gramian.shape[-1] == 2):
            S, counter = gramian.numpy(), int(state["counter"])
            state["counter"] += 1
            return torch.from_numpy(weights_on_host(S, self.seed, counter))
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
    C: Tensor = identity(gramian).expand(gramian.shape)
    for other in order.unbind(-1):  # [..., K], for each task i a task j
        j = other[..., None]
        S_j = gramian.gather(-2, j.expand(gramian.shape))
        product = (C * S_j).sum(-1, keepdim=True)
        square = S_j.gather(-1, j)
        conflict = (product < 0.0) & (square > 0.0) & (j != tasks[:, None])
        C = C.scatter_add(-1, j, -torch.where(conflict, product / square, 0.0))
    return C


def weights_on_host(S: host.Numbers, seed: int, counter: int) -> host.Numbers:
    """Return the weights of Gramians [..., K, K] in NumPy."""
    if S.shape[-1] != 2:
        weights: host.Numbers = host.projected(S, host.random_orders(S.shape, seed, counter)).sum(
            -2
        )
        return weights
    # The order of two does not matter. A task without a gradient has no weight.
    squares = S.diagonal(axis1=-2, axis2=-1)
    return 1.0 - np.minimum(S[..., 0, 1:], 0.0) / np.where(squares > 0.0, squares, 1.0)
