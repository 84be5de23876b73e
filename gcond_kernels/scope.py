"""Over which tensors gradients are compared, and which weights each tensor gets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops, tables


class Scope(NamedTuple):
    """What one resolution compares.

    A parameter that only one task ever had a gradient for is that task's own: there is nothing to
    compare in it, and it gets the gradient as it is.

    Attributes:
        by_tensor: whether each tensor's conflicts are resolved by themselves.
        shared: of each tensor, whether it is resolved at all.
        compared: of each tensor, whether its inner products count; some of the shared ones.
    """

    by_tensor: bool
    shared: tuple[bool, ...]
    compared: tuple[bool, ...]

    @property
    def is_whole(self) -> bool:
        """Whether what is resolved is the Gramian of all tensors together."""
        return not self.by_tensor and all(self.compared)

    def needed(self, products: ops.Gramians) -> ops.Gramians:
        """Without what nobody will read: it need not be sent to other ranks."""
        cross, crosses = products.cross, products.cross_per_tensor
        if crosses is None or self.by_tensor:
            return products
        if not all(self.compared):
            cross = summed(crosses, self.compared)
        return products._replace(cross=cross, cross_per_tensor=None)

    def gramians(self, products: ops.Gramians, tasks: int) -> tuple[Tensor, Tensor | None]:
        """What the method is given, of products that are `needed`: S and X, [K, K] or [T, K, K].

        Where any gradient is not finite, S is not either: then no state is to change.
        """
        if self.is_whole:
            return products.total, products.cross
        finite = products.total.isfinite().all()
        S = products.per_tensor[:, :tasks, :tasks]
        X = products.cross_per_tensor if self.by_tensor else products.cross
        if not self.by_tensor:
            S = summed(S, self.compared)
        return torch.where(finite, S, math.nan).contiguous(), X

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

    def mean_weights(self, weights: Tensor) -> Tensor:
        """[K] to be told: of weights per tensor [T, K] the mean over those that are shared."""
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
) -> Scope:
    """The scope of one resolution.

    Args:
        owners: of each tensor, which tasks ever had a gradient for it: a bit per task.
        counts: micro-batches of each task in this window.
        names: of each tensor.
        by_tensor: granularity="tensor".
        chosen: names of parameters or modules that alone are compared; None is all.
    """
    shared = tuple(bits & (bits - 1) != 0 for bits in owners)  # more than one bit
    if not any(shared) and sum(count > 0 for count in counts) <= 1:
        # One task alone, so far: which parameters it shares is not known yet, and does not matter.
        shared = (True,) * len(shared)
    if chosen is None:
        return Scope(by_tensor, shared, shared)
    compared = tuple(
        flag and is_among(name, chosen) for flag, name in zip(shared, names, strict=True)
    )
    return Scope(by_tensor, shared, compared)


def is_among(name: str, chosen: Sequence[str]) -> bool:
    """Whether a parameter is one of these, or belongs to a module of that name."""
    return any(name == one or name.startswith(f"{one}.") for one in chosen)
