"""Which tensors tasks share, and what the host knows of it without asking the device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.host_flag import HostFlag
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.shared_parameters import (
    SharedParameters,
    bool_tensor,
    is_selected,
)


class Sharing:
    """Finds out which tensors tasks share, window after window.

    Args:
        storage: its `parameter_tasks` are updated.
    """

    def __init__(self, storage: GradientStorage) -> None:
        self._storage = storage
        self.forget()

    def forget(self) -> None:
        """Forget what the host knows: the layout has changed, or a state was loaded."""
        self._all_shared = HostFlag()
        self._known_tasks: list[int] = []  # of each tensor, a bit for each task that uses it
        self.selection_found = False

    @property
    def all_shared(self) -> bool:
        """Whether the host knows that tasks share every tensor."""
        return self._all_shared.known

    def note(self) -> None:
        """Let the host learn, when the device is there, whether tasks share every tensor."""
        self._all_shared.note((self._storage.parameter_tasks.sum(1) > 1).all())

    def update(
        self, products: ops.Gramians, counts: Sequence[int], *, by_tensor: bool, single: bool,
        selected: Sequence[str] | None,
    ) -> tuple[SharedParameters, Tensor]:  # fmt: skip
        """Remember which tasks have a gradient for which tensor.

        Args:
            products: of this window.
            counts: micro-batches of each task in it.
            by_tensor: whether each tensor's conflicts are resolved by themselves.
            single: whether a task that comes alone is compared too.
            selected: names of the parameters or modules to compare; None is all that are shared.

        Returns:
            Which tensors are shared, and whether those are others than in the last window, [] bool.

        Raises:
            ValueError: tasks share none of those that are selected.
        """
        finite = products.total.isfinite().all()
        seen = products.per_tensor.diagonal(dim1=1, dim2=2)[:, : len(counts)] > 0.0
        alone = single and sum(count > 0 for count in counts) <= 1
        flags, changed = self._storage.update_parameter_tasks(seen, finite, alone)
        chosen = None if selected is None else self._selected(flags, selected)
        return SharedParameters(by_tensor, flags, self.all_shared, chosen), changed

    def _selected(self, shared: Tensor, names: Sequence[str]) -> Tensor:
        segments = self._storage.segments
        flags = bool_tensor([is_selected(s.name, names) for s in segments], shared.device) & shared
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

        Autograd gives zeros for them where it cannot tell, from a compiled model with several
        heads, say; a step with those would follow stale momentum. The device is asked only in a
        window in which a task had nothing, and gradients came from tasks that are not known to use
        a tensor.

        Args:
            outputs: T tensors or None; entries are set to None.
            counts: micro-batches of each task in this window.
            total: [K, K] float64, its Gramian.
        """
        storage = self._storage
        active = [k for k, count in enumerate(counts) if count]
        if len(active) == len(counts) or tables.is_capturing(storage.parameter_tasks.device):
            return
        bits = sum(1 << k for k in active)
        known = self._known_tasks + [0] * (len(storage.segments) - len(self._known_tasks))
        given = zip(storage.window_tasks, known, strict=True)
        if not any(hit and not tasks & bits for hit, tasks in given):
            return
        table = storage.parameter_tasks.tolist()
        self._known_tasks = [sum(1 << k for k, used in enumerate(row) if used) for row in table]
        finite = all(self._known_tasks) or bool(total.isfinite().all())  # else nothing is known
        for t, tasks in enumerate(self._known_tasks):
            if not tasks & bits and (tasks or (finite and storage.layout.sizes[t])):
                outputs[t] = None
