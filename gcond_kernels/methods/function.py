"""What a user may give as a method: one, or a function from a Gramian to weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_weights
from gcond_kernels.methods.gcond import GCond
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.ops.contexts import users_code


class Function(Method):
    """A method that calls a function from S [K, K] to w [K]."""

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
        one_by_one = []
        for S in gramian.clone().reshape(-1, K, K):
            with users_code(S.device):
                weights = self.function(S)
            check_weights(f"method {self!r}", weights, (K,))
            one_by_one.append(weights.detach().to(S))
        return torch.stack(one_by_one).view(gramian.shape[:-1])


def method_of(method: object) -> Method:
    """Return the method that was given, of a function one that calls it; None is `GCond()`.

    Raises:
        TypeError: it is neither.
    """
    if method is None:
        return GCond()
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be {method.__name__}(...), not the class itself")
    if callable(method) and not isinstance(method, type):
        return Function(method)
    raise TypeError(
        "method must be one of gcond_kernels.methods, such as GCond() or PCGrad(), or a function "
        f"from a Gramian [K, K] to weights [K], not {method!r}"
    )
