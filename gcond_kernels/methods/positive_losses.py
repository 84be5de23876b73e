"""A check that losses are positive, which does not synchronize with the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known
from gcond_kernels.ops import host_flag, launch_tables
from gcond_kernels.ops.host_flag import HostFlag


class PositiveLosses:
    """Check losses: on a CPU at once; on a GPU a later call raises the error."""

    def __init__(self) -> None:
        self._flag = HostFlag()
        # What was at fault and the host does not know of yet (NaN where nothing was), and names.
        self._kept: tuple[Tensor, Sequence[str] | None] | None = None

    def __reduce__(self) -> tuple[type[PositiveLosses], tuple[()]]:
        return PositiveLosses, ()

    def check(self, method: object, known: Known, ignored: Tensor) -> Tensor:
        """Return whether a finite loss of a task that is not ignored is 0 or less, [] bool.

        Raises:
            ValueError: one is, or was in a call before, as far as the host knows; raised once.
        """
        self._raise_if_known(method)
        losses = known.losses
        assert losses is not None
        wrong = losses.isfinite() & (losses <= 0.0) & ~ignored
        at_fault = wrong.any()
        if not launch_tables.is_capturing(losses.device):
            self._keep(method, torch.where(wrong, losses, math.nan), known.tasks)
            self._raise_if_known(method)
        return at_fault

    def _keep(self, method: object, losses: Tensor, tasks: Sequence[str] | None) -> None:
        """Keep losses at fault, [K], NaN elsewhere, until the host knows whether there are any."""
        if self._kept is not None:
            before, names = self._kept
            if (names, before.shape, before.device) == (tasks, losses.shape, losses.device):
                losses = torch.where(before.isnan(), losses, before)
            else:
                self._raise(method)  # waits for the device, once for other tasks
        self._kept = losses, tasks
        self._flag.note(~losses.isnan().all())
        if host_flag.reads_at_once(losses.device) and not self._flag.known:
            self._kept = None

    def _raise_if_known(self, method: object) -> None:
        if self._flag.known:
            self._raise(method)

    def _raise(self, method: object) -> None:
        """Forget what is kept, and raise the error where it has a loss at fault."""
        if self._kept is None:
            return
        losses, tasks = self._kept
        self._flag, self._kept = HostFlag(), None
        wrong = [
            f"the loss of task {k if tasks is None else repr(tasks[k])} is {loss:g}"
            for k, loss in enumerate(losses.tolist())
            if not math.isnan(loss)
        ]
        if not wrong:
            return
        raise ValueError(
            f"{type(method).__name__} takes losses that are positive, but "
            f"{' and '.join(wrong)}. That step changed nothing. Add a constant to the loss that "
            "keeps it above 0, take exp() of it, or choose another method"
        )
