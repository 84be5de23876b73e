"""Adam, for the few numbers that a method learns in its state."""

from __future__ import annotations

import torch
from torch import Tensor

from gcond_kernels.methods.method import State

BETA_1, BETA_2, EPS = 0.9, 0.999, 1e-8


def direction_of_adam(state: State, slope: Tensor, updated: Tensor) -> Tensor:
    """Return m̂ / (√v̂ + ε), which times the learning rate is what Adam subtracts.

    Kingma and Ba, "Adam: A Method for Stochastic Optimization", 2015, arXiv 1412.6980, with β of
    0.9 and 0.999 and ε = 1e-8, as `torch.optim.Adam` has it.

    Args:
        state: "average" and "square_average", of the slope's shape, and "updates" int64, how
            often each was updated (or one number for all); changed in place.
        slope: [..., K] float64.
        updated: bool, of the shape of "updates"; elsewhere nothing changes and 0 is returned.
    """
    average, square = state["average"], state["square_average"]
    state["updates"] += updated
    t = state["updates"].double()
    average.copy_(torch.where(updated, BETA_1 * average + (1.0 - BETA_1) * slope, average))
    square.copy_(torch.where(updated, BETA_2 * square + (1.0 - BETA_2) * slope**2, square))
    root = (square / (1.0 - BETA_2**t)).sqrt()
    return torch.where(updated, average / (1.0 - BETA_1**t) / (root + EPS), 0.0)
