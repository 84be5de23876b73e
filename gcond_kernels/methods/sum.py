"""The plain sum of the task gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State


@dataclass(frozen=True)
class Sum(Method):
    """The linear baseline: every task keeps its gradient, g = Σ_k ĝ_k."""

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """w_k = 1."""
        return torch.ones_like(gramian[..., 0])
