"""Over which tensors gradients are compared, and which weights each tensor gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops, tables
from gcond_kernels.saving import without_wrappers


class Scope(NamedTuple):
    """What one resolution compares.

    A parameter that only one task ever had a gradient for is that task's own: there is nothing to
    compare in it, and it gets the gradient as it is.

    Attributes:
        by_tensor: whether each tensor's conflicts are resolved by themselves.
        shared: of each tensor, whether tasks share it: whether it is compared and resolved.
        chosen: of each tensor, whether the method looks at it; None where at all that are shared.
    """

    by_tensor: bool
    shared: tuple[bool, ...]
    chosen: tuple[bool, ...] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether what is resolved is the Gramian of all tensors together."""
        return not self.by_tensor and all(self.shared)

    def needed(self, products: ops.Gramians) -> ops.Gramians:
        """Without what nobody will read: it need not be sent to other ranks."""
        cross, crosses = products.cross, products.cross_per_tensor
        if crosses is None or self.by_tensor:
            return products
        if not all(self.shared):
            cross = summed(crosses, self.shared)
        return products._replace(cross=cross, cross_per_tensor=None)

    def gramians(self, products: ops.Gramians, tasks: int) -> tuple[Tensor, Tensor | None]:
        """What the method is given, of products that are `needed`: S and X, [K, K] or [T, K, K].

        Where any gradient is not finite, S is not either: then no state is to change.
        """
        if self.is_whole:
            return products.total, products.cross
        finite = products.total.isfinite().all()
        if self.by_tensor:
            S, X = products.per_tensor[:, :tasks, :tasks], products.cross_per_tensor
        else:
            S, X = self.shared_gramian(products, tasks), products.cross
        return torch.where(finite, S, math.nan).contiguous(), X

    def chosen_gramian(self, products: ops.Gramians, tasks: int) -> Tensor | None:
        """[K, K] over the tensors that the method looks at; None where at all that are shared."""
        if self.chosen is None:
            return None
        return summed(products.per_tensor[:, :tasks, :tasks], self.chosen)

    def shared_gramian(self, products: ops.Gramians, tasks: int) -> Tensor:
        """[K, K] over the tensors that are shared: what cosines are told of."""
        if all(self.shared):
            return products.total
        return summed(products.per_tensor[:, :tasks, :tasks], self.shared)

    def weights(self, weights: Tensor) -> Tensor:
        """What `combine` takes: [K] for all tensors, or [T, K] with 1 for what is a task's own."""
        if all(self.shared):
            return weights
        return torch.where(flags(self.shared, weights.device)[:, None], weights, 1.0)

    def mean_weights(self, decision: ops.Arbitration, squares: Tensor) -> Tensor:
        """[K] to be told: of weights per tensor [T, K] the mean over those that are shared.

        Args:
            decision: of which the weights are [K] or [T, K].
            squares: [K], squared norms of the gradients.
        """
        weights = decision.weights
        if not any(self.shared):  # every gradient is written as it is
            each = weights[0] if self.by_tensor else weights
            return torch.where(each > 0.0, each, (decision.finite & (squares > 0.0)).to(each))
        if not self.by_tensor:
            return weights
        chosen = flags(self.shared, weights.device)[:, None]
        return torch.where(chosen, weights, 0.0).sum(0) / max(1, sum(self.shared))


def summed(per_tensor: Tensor, chosen: tuple[bool, ...]) -> Tensor:
    """The sum of matrices [T, K, K] over the chosen tensors."""
    which = flags(chosen, per_tensor.device)
    return torch.where(which[:, None, None], per_tensor, 0.0).sum(0)


def flags(values: tuple[bool, ...], device: torch.device) -> Tensor:
    """[T] bool on the device; kept, for a copy to a GPU makes it wait."""
    tensor = tables.settings_tensor(tuple(map(float, values)), device)
    tables.keep_if_captured(tensor)
    return tensor != 0.0


def scope_of(
    owners: Sequence[int],
    counts: Sequence[int],
    names: Sequence[str],
    by_tensor: bool,
    chosen: Sequence[str] | None,
    alone: bool = False,
) -> Scope:
    """The scope of one resolution.

    Args:
        owners: of each tensor, which tasks ever had a gradient for it: a bit per task.
        counts: micro-batches of each task in this window.
        names: of each tensor.
        by_tensor: granularity="tensor".
        chosen: names of parameters or modules that alone the method looks at; None is all.
        alone: whether one task alone, with nothing that is known to be shared, is resolved too.

    Raises:
        ValueError: tasks share none of the chosen parameters.
    """
    shared = tuple(bits & (bits - 1) != 0 for bits in owners)  # more than one bit
    if alone and not any(shared) and sum(count > 0 for count in counts) <= 1:
        shared = (True,) * len(shared)
    if chosen is None or not any(shared):
        return Scope(by_tensor, shared)
    looked_at = tuple(
        flag and is_among(name, chosen) for flag, name in zip(shared, names, strict=True)
    )
    if not any(looked_at):
        raise ValueError(
            f"of parameters={tuple(chosen)}, which the method is to look at, more than one task "
            "has a gradient for none: choose some that tasks share, and that are not frozen"
        )
    return Scope(by_tensor, shared, looked_at)


def is_among(name: str, chosen: Sequence[str]) -> bool:
    """Whether a parameter is one of these, or belongs to a module of that name.

    What wrappers of a model add to names does not count.
    """
    plain, *others = without_wrappers([name, *chosen])
    return any(plain == one or plain.startswith(f"{one}.") for one in others)
