"""Losses that must be positive, checked without synchronizing with the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known
from gcond_kernels.ops.host_flag import HostFlag


class PositiveLosses:
    """Checks losses for a method that divides by them: they must be positive.

    On a CPU the error is raised at once. A GPU is not synchronized with: there the step is to be
    skipped, and a later call raises the error.
    """

    def __init__(self) -> None:
        self._flag = HostFlag()
        self._noted: tuple[Tensor, Sequence[str] | None] | None = None

    def __reduce__(self) -> tuple[type[PositiveLosses], tuple[()]]:
        return PositiveLosses, ()

    def check(self, method: object, known: Known, ignored: Tensor) -> Tensor:
        """Return whether a loss is not positive, [] bool.

        Args:
            method: is named in the error.
            known: its losses are looked at; what is not finite is no loss.
            ignored: [K] bool, tasks whose loss may be anything.

        Raises:
            ValueError: one is not, or was not in a call before, as far as the host knows. Raised
                once: the losses after it are looked at anew.
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
        said = [
            f"the loss of task {k if tasks is None else repr(tasks[k])} is {loss:g}"
            for k, loss in enumerate(losses.tolist())
            if not math.isnan(loss)
        ]
        raise ValueError(
            f"{type(method).__name__} divides by losses, which must be positive, but "
            f"{' and '.join(said)}. That step changed nothing. Add a constant to the loss that "
            "keeps it above 0, take exp() of it, or choose another method"
        )
