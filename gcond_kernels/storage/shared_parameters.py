"""Which parameters tasks share: those are compared and resolved, others keep their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.storage.names import without_wrappers


class SharedParameters(NamedTuple):
    """The tensors that one resolution compares.

    A parameter that only one task ever had a gradient for is that task's own: there is nothing to
    compare in it, and it gets the gradient as it is. A gradient of zeros is none: autograd gives
    zeros instead of None where losses are indexed from one tensor, where a compiled model has
    several heads, and in reentrant checkpoints. So the device knows what is shared, not the host.

    Attributes:
        by_tensor: whether each tensor's conflicts are resolved by themselves.
        flags: [T] bool, whether tasks share a tensor.
        all_shared: whether the host knows that all tensors are shared; False where it does not.
        selected: [T] bool, the shared tensors that the method compares; None where all.
    """

    by_tensor: bool
    flags: Tensor
    all_shared: bool
    selected: Tensor | None = None

    def gramians(self, products: ops.Gramians, tasks: int) -> tuple[Tensor, Tensor | None]:
        """Return S and X for the method, [K, K] or [T, K, K].

        Where any gradient is not finite, S is not either: then no state is to change.
        """
        total, cross, per_tensor, cross_per_tensor = products
        if self.all_shared and not self.by_tensor:
            return total, cross
        if self.by_tensor:
            S, X = per_tensor[:, :tasks, :tasks], cross_per_tensor
        else:
            S, X = self.shared_gramian(products, tasks), cross
            if cross_per_tensor is not None and X is not None:
                X = self._summed(cross_per_tensor, X)
        return torch.where(total.isfinite().all(), S, math.nan).contiguous(), X

    def selected_gramian(self, products: ops.Gramians, tasks: int) -> Tensor | None:
        """Return [K, K] over the tensors that the method compares; None where all shared ones."""
        if self.selected is None:
            return None
        return summed(products.per_tensor[:, :tasks, :tasks], self.selected)

    def shared_gramian(self, products: ops.Gramians, tasks: int) -> Tensor:
        """Return [K, K] over the shared tensors, from which cosines are reported."""
        if self.all_shared:
            return products.total
        return self._summed(products.per_tensor[:, :tasks, :tasks], products.total)

    def _summed(self, per_tensor: Tensor, total: Tensor) -> Tensor:
        # Of all tensors it is `total`, to the same bits.
        return torch.where(self.flags.all(), total, summed(per_tensor, self.flags))

    def weights(self, weights: Tensor) -> Tensor:
        """Return the weights for `combine`: [K], or [T, K] with 1 for what is a task's own."""
        if self.all_shared:
            return weights
        return torch.where(self.flags[:, None], weights, 1.0)

    def mean_weights(self, decision: ops.Arbitration, squares: Tensor) -> Tensor:
        """Return [K] weights for reports: of [T, K] the mean over the shared tensors.

        Args:
            decision: its weights are [K] or [T, K].
            squares: [K], squared norms of the gradients.
        """
        mean = decision.weights
        if self.by_tensor:
            kept = torch.where(self.flags[:, None], mean, 0.0)
            mean = kept.sum(0) / self.flags.sum().clamp(min=1)
        if self.all_shared:
            return mean
        # Where nothing is shared every gradient is written as it is.
        own = (decision.finite & (squares > 0.0)).to(mean)
        if not self.by_tensor:
            own = torch.where(mean > 0.0, mean, own)
        return torch.where(self.flags.any(), mean, own)


def summed(per_tensor: Tensor, flags: Tensor) -> Tensor:
    """Return the sum of matrices [T, K, K] over the tensors that [T] bool flags select."""
    return torch.where(flags[:, None, None], per_tensor, 0.0).sum(0)


def bool_tensor(values: Sequence[bool], device: torch.device) -> Tensor:
    """Return [T] bool on the device; cached, for a copy to a GPU synchronizes with it."""
    tensor = tables.settings_tensor(tuple(map(float, values)), device)
    tables.keep_if_captured(tensor)
    return tensor != 0.0


def shared_tensors(parameter_tasks: Tensor, alone: bool) -> Tensor:
    """Return [T] bool, the tensors that several tasks ever had a gradient for.

    Args:
        parameter_tasks: [T, K] bool, which tasks ever had a gradient for each tensor.
        alone: whether all tensors count as shared where none is: so one task alone is resolved too.
    """
    several = parameter_tasks.sum(1) > 1
    return several | ~several.any() if alone else several


def is_selected(name: str, selected: Sequence[str]) -> bool:
    """Return whether a parameter, or a module that it belongs to, has one of these names.

    What wrappers of a model add to names does not count.
    """
    plain, *others = without_wrappers([name, *selected])
    return any(plain == one or plain.startswith(f"{one}.") for one in others)
