"""Which parameters tasks share: those are compared and resolved, others keep their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.ops import host_flag
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.host_flag import HostFlag
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.names import without_wrappers


class Factors(NamedTuple):
    """The numbers by which shared tensors are selected on a CPU, each [T, 1] float64.

    One product of finite numbers takes a fraction of the time of `torch.where` and a sum.
    """

    shared: Tensor  # 1 for a shared tensor, else 0
    own: Tensor  # 0 for a shared tensor, else 1

    @classmethod
    def of(cls, flags: Tensor) -> Factors:
        """Return the factors of [T] flags, whether tasks share a tensor."""
        shared = flags.to(torch.float64)[:, None]
        return cls(shared, 1.0 - shared)

    def summed(self, per_tensor: Tensor, tasks: int) -> Tensor:
        """Return the sum of finite matrices [T, ≥ K, ≥ K] over the shared tensors, [K, K]."""
        matrices = per_tensor.numpy()[:, :tasks, :tasks].reshape(len(self.shared), -1)
        return torch.from_numpy(self.shared.numpy().T.dot(matrices).reshape(tasks, tasks))


class SharedParameters(NamedTuple):
    """The tensors that one resolution compares.

    A parameter that only one task ever had a gradient for is that task's own: there is nothing to
    compare in it, and it gets the gradient as it is. A gradient of zeros is none: autograd gives
    zeros instead of None where losses are indexed from one tensor, where a compiled model has
    several heads, and in reentrant checkpoints. So the device knows what is shared, not the host.

    """

    by_tensor: bool
    flags: Tensor  # [T] bool, whether tasks share a tensor
    all_shared: bool  # whether the host knows that they share all of them
    selected: Tensor | None = None  # [T] bool, the shared tensors to compare; None where all
    factors: Factors | None = None  # where the host knows that some are shared alone: on a CPU

    def gramians(self, products: ops.Gramians, tasks: int) -> tuple[Tensor, Tensor | None]:
        """Return S and X for the method, [K, K] or [T, K, K].

        Where any gradient is not finite, S is not either: then no state is to change.
        """
        total, cross, per_tensor, cross_per_tensor = products
        if self.all_shared and not self.by_tensor:
            return total, cross
        if self.by_tensor:
            S, X = per_tensor[:, :tasks, :tasks], cross_per_tensor
        elif self.factors is not None and math.isfinite(total.sum().item()):
            X = cross if cross_per_tensor is None else self.factors.summed(cross_per_tensor, tasks)
            return self.factors.summed(per_tensor, tasks), X
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
        return self._summed(products.per_tensor[..., :tasks, :tasks], products.total)

    def _summed(self, per_tensor: Tensor, total: Tensor) -> Tensor:
        # Of all tensors it is `total`, to the same bits.
        all_shared = self.flags.all(-1)[..., None, None]
        return torch.where(all_shared, total, summed(per_tensor, self.flags))

    def weights(self, weights: Tensor) -> Tensor:
        """Return the weights for `combine`: [K], or [T, K] with 1 for what is a task's own."""
        if self.all_shared:
            return weights
        if self.factors is not None:
            return torch.addcmul(self.factors.own, self.factors.shared, weights)
        return torch.where(self.flags[:, None], weights, 1.0)

    def mean_weights(self, decision: ops.Arbitration, squares: Tensor) -> Tensor:
        """Return [K] weights for reports, from [K] squared norms of the gradients too.

        Weights [T, K] are averaged over the shared tensors.
        """
        mean = decision.weights
        if self.by_tensor:
            kept = torch.where(self.flags[..., None], mean, 0.0)
            mean = kept.sum(-2) / self.flags.sum(-1, keepdim=True).clamp(min=1)
        if self.all_shared:
            return mean
        # Where nothing is shared every gradient is written as it is.
        own = (decision.finite[..., None] & (squares > 0.0)).to(mean)
        if not self.by_tensor:
            own = torch.where(mean > 0.0, mean, own)
        return torch.where(self.flags.any(-1, keepdim=True), mean, own)


class _Found(NamedTuple):
    """What was found last, and from what."""

    asked: tuple[object, ...]
    used: Tensor  # [T, K] bool, `parameter_tasks` themselves
    shared: SharedParameters
    unknown: Tensor  # [T R²] float64, 1 for a square that was 0 so far, of a task in a tensor


class Sharing:
    """Finds out which tensors tasks share, window after window."""

    def __init__(self, storage: GradientStorage) -> None:
        self._storage = storage
        self.forget()

    def forget(self) -> None:
        """Forget what the host knows: the layout has changed, or a state was loaded."""
        self._all_shared = HostFlag()
        self._known_tasks: list[int] = []  # of each tensor, a bit for each task that uses it
        self._rolled_back = HostFlag()
        self.selection_found = False
        self._last: _Found | None = None  # where the host reads it at once; None where unknown
        self._noted = False

    @property
    def all_shared(self) -> bool:
        """Whether the host knows that tasks share every tensor."""
        return self._all_shared.known

    def note(self) -> None:
        """Let the host learn, when the device is there, whether tasks share every tensor."""
        if not self._noted:
            self._all_shared.note((self._storage.parameter_tasks.sum(1) > 1).all())
        self._noted = self._last is not None
        if self._last is not None and self._last.shared.all_shared != self.all_shared:
            shared = self._last.shared._replace(all_shared=self.all_shared)
            self._last = self._last._replace(shared=shared)

    def note_roll_back(self, rolled_back: Tensor) -> None:
        """Let the host learn whether `parameter_tasks` is as it was before this window, [] bool."""
        if not host_flag.reads_at_once(rolled_back.device) or bool(rolled_back):
            self._last, self._noted = None, False
        if self._known_tasks:
            self._rolled_back.note(rolled_back)

    def update(
        self,
        products: ops.Gramians,
        counts: Sequence[int],
        *,
        by_tensor: bool,
        single: bool,
        selected: Sequence[str] | None,
    ) -> tuple[SharedParameters, Tensor | None]:
        """Record which tasks have a gradient for which tensor, without synchronizing the device.

        Args:
            products: of this window.
            counts: micro-batches of each task in it.
            by_tensor: whether each tensor's conflicts are resolved by themselves.
            single: whether a task that comes alone is compared too.
            selected: names of the parameters or modules to compare; None is all that are shared.

        Returns:
            Which tensors are shared, and whether those are others than in the last window, [] bool;
            None where the host knows that they are not.
        """
        storage = self._storage
        alone = single and sum(count > 0 for count in counts) <= 1
        asked = by_tensor, alone, selected, products.per_tensor.shape
        last = self._last
        if last is not None and last.asked == asked and not self._finds_more(last, products):
            return last.shared, None
        self._last, self._noted = None, False
        flags, changed = update_shared(storage.parameter_tasks, storage.was_shared, products, alone)
        chosen = None if selected is None else self._selected(flags, selected)
        shared = SharedParameters(by_tensor, flags, self.all_shared, chosen)
        if host_flag.reads_at_once(flags.device):
            if flags.device.type == "cpu" and not bool(flags.all()):
                shared = shared._replace(factors=Factors.of(flags))
            if bool(products.total.isfinite().all()):
                used = storage.parameter_tasks
                unknown = torch.zeros_like(products.per_tensor)
                unknown.diagonal(dim1=1, dim2=2)[:, : used.shape[1]] = ~used
                self._last = _Found(asked, used, shared, unknown.flatten())
        return shared, changed

    def _finds_more(self, last: _Found, products: ops.Gramians) -> bool:
        """Return whether a task has a gradient for a tensor for which none was known."""
        if last.used is not self._storage.parameter_tasks:
            return True
        # It is NaN where a product is not finite, and then True.
        return torch.dot(last.unknown, products.per_tensor.flatten()).item() != 0.0

    def _selected(self, shared: Tensor, names: Sequence[str]) -> Tensor:
        found = [float(is_selected(s.name, names)) for s in self._storage.segments]
        table = tables.settings_tensor(tuple(found), shared.device)  # cached: copying synchronizes
        tables.keep_if_captured(table)
        flags = (table != 0.0) & shared
        # Where nothing is shared at all, nothing is compared, and that is fine.
        if not self.selection_found and not tables.is_capturing(shared.device):
            if bool(shared.any()) and not bool(flags.any()):
                raise ValueError(
                    f"of parameters={tuple(names)}, which the method is to look at, more than one "
                    "task has a gradient for none: choose some that tasks share, and that are not "
                    "frozen"
                )
            self.selection_found = bool(flags.any())
        return flags

    def clear_absent(
        self, outputs: list[Tensor | None], counts: Sequence[int], total: Tensor
    ) -> None:
        """Write no gradient for tensors that no task of this window has ever used.

        A step with the zeros that autograd gives for them would follow stale momentum. The device
        is synchronized with only where a task had nothing in this window, and others that are not
        known to use a tensor had a gradient for it. Entries of `outputs` are set to None.
        """
        storage = self._storage
        active = [k for k, count in enumerate(counts) if count]
        if len(active) == len(counts) or tables.is_capturing(storage.parameter_tasks.device):
            return
        bits = sum(1 << k for k in active)
        known = [] if self._rolled_back.known else self._known_tasks
        given = zip_longest(storage.window_tasks, known, fillvalue=0)
        if not any(hit and not tasks & bits for hit, tasks in given):
            return
        table = storage.parameter_tasks.tolist()
        self._rolled_back = HostFlag()
        self._known_tasks = [sum(1 << k for k, used in enumerate(row) if used) for row in table]
        finite = all(self._known_tasks) or bool(total.isfinite().all())  # else nothing is known
        for t, tasks in enumerate(self._known_tasks):
            if not tasks & bits and (tasks or (finite and storage.layout.sizes[t])):
                outputs[t] = None


def summed(per_tensor: Tensor, flags: Tensor) -> Tensor:
    """Return the sum of matrices [..., T, K, K] over the tensors that [..., T] flags select."""
    return torch.where(flags[..., None, None], per_tensor, 0.0).sum(-3)


def shared_tensors(parameter_tasks: Tensor, alone: bool) -> Tensor:
    """Return [T] bool, the tensors that several tasks ever had a gradient for, from [T, K].

    Where none is shared all are if `alone`: so one task alone is resolved too.
    """
    several = parameter_tasks.sum(1) > 1
    return several | ~several.any() if alone else several


def update_shared(
    parameter_tasks: Tensor, was_shared: Tensor, products: ops.Gramians, alone: bool
) -> tuple[Tensor, Tensor]:
    """Return which tensors are shared, [T] bool, and whether others were in the last step, [] bool.

    What is known of the tensors is changed in place, so that a CUDA graph repeats it.

    Args:
        parameter_tasks: [T, K] bool, which tasks ever had a gradient for a tensor.
        was_shared: [T] int8, whether the tensor was compared in the last step; -1 before its first.
        products: of this step.
        alone: as for `shared_tensors`.
    """
    finite = products.total.isfinite().all()
    seen = products.per_tensor.diagonal(dim1=1, dim2=2)[:, : parameter_tasks.shape[1]] > 0.0
    parameter_tasks |= seen & finite
    flags = shared_tensors(parameter_tasks, alone)
    now = flags.to(torch.int8)
    changed = finite & ((was_shared >= 0) & (was_shared != now)).any()
    # A tensor that no task had a gradient for was not compared: its history is zero.
    known = parameter_tasks.any(1)
    was_shared.copy_(torch.where(known & finite, now, was_shared))
    return flags, changed


def is_selected(name: str, selected: Sequence[str]) -> bool:
    """Return whether a parameter or a module of it has one of these names, but for wrappers."""
    plain, *others = without_wrappers([name, *selected])
    return any(plain == one or plain.startswith(f"{one}.") for one in others)
