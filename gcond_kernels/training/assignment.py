"""The options of an optimizer that can be assigned in training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch

from gcond_kernels import ops
from gcond_kernels.options import (
    Assignable,
    Fixed,
    Options,
    TaskWeights,
    check_nonfinite,
    check_selected,
    plain_name,
)
from gcond_kernels.storage.names import labels_of
from gcond_kernels.training.saving import SavedOptimizer


class AssignableOptimizer(SavedOptimizer):
    """An optimizer whose options are attributes, checked when they are assigned."""

    _fixed: dict[str, Any]

    accumulation_steps = Assignable()
    mode = Assignable()
    method = Assignable()
    granularity = Assignable()
    momentum = Assignable()
    update = Assignable()
    max_norm = Assignable()
    backend = Assignable()
    accumulator_dtype = Fixed()
    mask = Fixed()
    grad_scaler = Fixed()
    distributed = Fixed()

    @property
    def tasks(self) -> TaskWeights:
        """Task → loss weight. One that is assigned holds from the next window on."""
        return self._weights

    @tasks.setter
    def tasks(self, weights: Mapping[str, float]) -> None:
        new = TaskWeights(weights)
        if set(new) != set(self._weights):
            raise ValueError(
                f"tasks: {list(new)} are not the tasks {list(self._weights)} of this optimizer: "
                "add one with add_task(name, weight), leave one out of backward(losses)"
            )
        self._weights.update(new)

    def add_task(self, name: str, weight: float) -> None:
        """Add a task, the last one, between two windows; the others keep all that they have.

        Args:
            name: of the task.
            weight: λ, 0 or more.

        Raises:
            TypeError, ValueError: there is such a task, or the weight is none; or in stochastic
                mode `accumulation_steps` are too few for one more.
            RuntimeError: in the middle of a window.
        """
        if self._window.position or self._window.resolved or any(self._storage.counts):
            raise RuntimeError("a task is added between two windows: after step() or drop_window()")
        self._options.assigned = Options.checked(
            len(self._weights) + 1, **vars(self._options.assigned)
        )
        self._weights.add(name, weight)
        self._storage.add_task()
        self.recorder.add_task(plain_name(name))
        self._resolver.add_task()
        self._renew()

    @property
    def on_nonfinite(self) -> str:
        """What becomes of a step in which a gradient is not finite; may be set at any time."""
        return self._options.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, choice: str) -> None:
        check_nonfinite(choice, self.grad_scaler)
        self._options.on_nonfinite = choice

    @property
    def module(self) -> torch.nn.Module | None:
        """The model; assigned, it has the effect of `Distributed(module=model)`."""
        return self._data_parallel.module

    @module.setter
    def module(self, module: torch.nn.Module | None) -> None:
        if module is None or module is self.module:
            return
        self._data_parallel.take(module, [parameter for parameter, _ in self._parameters()])
        self._collector.wrapper_known = True

    @property
    def thresholds(self) -> tuple[float, float, float]:
        """Cosines that tell zones of conflict apart; those of GCond may be assigned."""
        thresholds: tuple[float, float, float] = self.method.thresholds
        return thresholds

    @thresholds.setter
    def thresholds(self, thresholds: tuple[float, float, float]) -> None:
        method = self.method
        if not is_dataclass(method) or "thresholds" not in {f.name for f in fields(method)}:
            raise AttributeError(f"{type(method).__name__} has no thresholds to be assigned")
        self.method = replace(method, thresholds=thresholds)  # type: ignore[type-var]

    def _assign(self, name: str, value: object) -> None:
        """Check an option; it takes effect from the next window on."""
        options = Options.checked(
            len(self._weights), **{**vars(self._options.assigned), name: value}
        )
        check_selected(options.method, labels_of(self.base.param_groups))
        ops.backend_for(options.backend, self._resolver.device)
        self._options.assigned = options
        if self._window.position == 0 and not self._window.resolved:
            self._renew()
