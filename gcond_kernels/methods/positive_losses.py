"""A check that losses are positive, which does not synchronize with the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known
from gcond_kernels.ops.host_flag import HostFlag


class PositiveLosses:
    """Check losses: on a CPU at once; on a GPU a later call raises the error."""

    def __init__(self) -> None:
        self._flag = HostFlag()
        self._noted: tuple[Tensor, Sequence[str] | None] | None = None

    def __reduce__(self) -> tuple[type[PositiveLosses], tuple[()]]:
        return PositiveLosses, ()

    def check(self, method: object, known: Known, ignored: Tensor) -> Tensor:
        """Return whether a finite loss of a task that is not ignored is 0 or less, [] bool.

        Raises:
            ValueError: one is, or was in a call before, as far as the host knows; raised once.
        """
        self._raise_if_known(method)
        assert known.losses is not None
        wrong = known.losses.isfinite() & (known.losses <= 0.0) & ~ignored
        at_fault = wrong.any()
        if self._flag.note(at_fault):
            self._noted = (torch.where(wrong, known.losses, math.nan), known.tasks)
        self._raise_if_known(method)
        return at_fault

    def _raise_if_known(self, method: object) -> None:
        if not self._flag.known or self._noted is None:
            return
        losses, tasks = self._noted
        self._flag, self._noted = HostFlag(), None
        wrong = [
            f"the loss of task {k if tasks is None else repr(tasks[k])} is {loss:g}"
            for k, loss in enumerate(losses.tolist())
            if not math.isnan(loss)
        ]
        raise ValueError(
            f"{type(method).__name__} takes losses that are positive, but "
            f"{' and '.join(wrong)}. That step changed nothing. Add a constant to the loss that "
            "keeps it above 0, take exp() of it, or choose another method"
        )
