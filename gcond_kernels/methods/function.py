"""A function from a Gramian to weights, as a method."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_weights
from gcond_kernels.methods.method import Known, Method, State


class Function(Method):
    """A function from S [K, K] to w [K], as a method."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def __repr__(self) -> str:
        # Without an address, which is another in every process.
        function = self.function
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return f"{function.__module__}.{name}"

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return what the function returns, for one Gramian after another."""
        K = gramian.shape[-1]
        one_by_one = [self._of_one(S, K) for S in gramian.reshape(-1, K, K)]
        if gramian.dim() == 2:
            return one_by_one[0]
        return torch.stack(one_by_one).view(gramian.shape[:-1])

    def _of_one(self, gramian: Tensor, tasks: int) -> Tensor:
        weights = self.function(gramian)
        check_weights(f"method {self!r}", weights, (tasks,))
        return weights.detach().to(gramian)
