"""Over which tensors gradients are compared, and which weights each tensor gets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.storage.names import without_wrappers


class SharedParameters(NamedTuple):
    """Which tensors one resolution compares.

    A parameter that only one task ever had a gradient for is that task's own: there is nothing to
    compare in it, and it gets the gradient as it is. A gradient of zeros is none: autograd gives
    zeros instead of None where losses are indexed from one tensor, where a compiled model has
    several heads, and in reentrant checkpoints. So the device knows what is shared, not the host.

    Attributes:
        by_tensor: whether each tensor's conflicts are resolved by themselves.
        flags: [T] bool, whether tasks share a tensor: whether it is compared and resolved.
        all_shared: whether the host knows that all tensors are shared; False where it does not.
        selected: [T] bool, which of the shared tensors the method looks at; None where at all.
    """

    by_tensor: bool
    flags: Tensor
    all_shared: bool
    selected: Tensor | None = None

    @property
    def is_total(self) -> bool:
        """Whether what is resolved is known to be the Gramian of all tensors together."""
        return not self.by_tensor and self.all_shared

    def gramians(self, products: ops.Gramians, tasks: int) -> tuple[Tensor, Tensor | None]:
        """Return what the method is given: S and X, [K, K] or [T, K, K].

        Where any gradient is not finite, S is not either: then no state is to change.
        """
        if self.is_total:
            return products.total, products.cross
        finite = products.total.isfinite().all()
        if self.by_tensor:
            S, X = products.per_tensor[:, :tasks, :tasks], products.cross_per_tensor
        else:
            S, X = self.shared_gramian(products, tasks), products.cross
            if products.cross_per_tensor is not None and X is not None:
                X = self._summed(products.cross_per_tensor, X)
        return torch.where(finite, S, math.nan).contiguous(), X

    def selected_gramian(self, products: ops.Gramians, tasks: int) -> Tensor | None:
        """Return [K, K] over the tensors that the method looks at; None where at all shared."""
        if self.selected is None:
            return None
        return summed(products.per_tensor[:, :tasks, :tasks], self.selected)

    def shared_gramian(self, products: ops.Gramians, tasks: int) -> Tensor:
        """Return [K, K] over the tensors that are shared: what cosines are reported of."""
        if self.all_shared:
            return products.total
        return self._summed(products.per_tensor[:, :tasks, :tasks], products.total)

    def _summed(self, per_tensor: Tensor, total: Tensor) -> Tensor:
        """The sum over the shared tensors; of all of them `total`, to the same bits."""
        return torch.where(self.flags.all(), total, summed(per_tensor, self.flags))

    def weights(self, weights: Tensor) -> Tensor:
        """Return what `combine` takes: [K], or [T, K] with 1 for what is a task's own."""
        if self.all_shared:
            return weights
        return torch.where(self.flags[:, None], weights, 1.0)

    def mean_weights(self, decision: ops.Arbitration, squares: Tensor) -> Tensor:
        """Return [K] for reports: of weights per tensor [T, K] the mean over the shared ones.

        Args:
            decision: of which the weights are [K] or [T, K].
            squares: [K], squared norms of the gradients.
        """
        weights = decision.weights
        if self.by_tensor:
            kept = torch.where(self.flags[:, None], weights, 0.0)
            mean = kept.sum(0) / self.flags.sum().clamp(min=1)
        else:
            mean = weights
        if self.all_shared:
            return mean
        # Where nothing is shared every gradient is written as it is.
        each = mean if not self.by_tensor else torch.zeros_like(mean)
        alone = torch.where(each > 0.0, each, (decision.finite & (squares > 0.0)).to(mean))
        return torch.where(self.flags.any(), mean, alone)


def summed(per_tensor: Tensor, chosen: Tensor) -> Tensor:
    """Return the sum of matrices [T, K, K] over the chosen tensors, [T] bool."""
    return torch.where(chosen[:, None, None], per_tensor, 0.0).sum(0)


def bool_tensor(values: Sequence[bool], device: torch.device) -> Tensor:
    """Return [T] bool on the device; kept, for a copy to a GPU makes it wait."""
    tensor = tables.settings_tensor(tuple(map(float, values)), device)
    tables.keep_if_captured(tensor)
    return tensor != 0.0


def shared_among(active: int, alone: bool) -> Callable[[Tensor], Tensor]:
    """Return a function from the owners [T, K] of all tensors to those that are shared, [T].

    Args:
        active: how many tasks had a micro-batch in this window.
        alone: whether one task alone, with nothing that is known to be shared, is resolved too.
    """

    def shared(owners: Tensor) -> Tensor:
        several = owners.sum(1) > 1
        if alone and active <= 1:
            return several | ~several.any()
        return several

    return shared


def is_selected(name: str, chosen: Sequence[str]) -> bool:
    """Return whether a parameter is one of these, or belongs to a module of that name.

    What wrappers of a model add to names does not count.
    """
    plain, *others = without_wrappers([name, *chosen])
    return any(plain == one or plain.startswith(f"{one}.") for one in others)
