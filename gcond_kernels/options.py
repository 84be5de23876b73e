"""The options of GCondFused: their types, their checks, and what assigning one does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from gcond_kernels.checks import (
    check_choice,
    check_method,
    check_range,
    check_steps,
    check_storage,
    check_update,
    checked_weight,
    plain_name,
)
from gcond_kernels.lion_lars import LionLars
from gcond_kernels.methods import GCond, Method
from gcond_kernels.methods.method import Function


@dataclass(frozen=True)
class Options:
    """What can be assigned in training; `GCondFused` documents each of them."""

    accumulation_steps: int
    mode: Literal["exact", "stochastic"]
    method: Method
    granularity: Literal["model", "tensor"]
    momentum: float
    update: LionLars | None
    max_norm: float | None
    history_dtype: torch.dtype
    backend: str

    @classmethod
    def checked(cls, tasks: int, **options: Any) -> Options:
        """Return the options as plain Python values.

        Raises:
            TypeError, ValueError: one is out of its range, or two do not go together.
        """
        o = cls(**{**options, "method": method_of(options["method"])})
        check_steps(o.accumulation_steps, o.mode, tasks)
        check_choice("granularity", o.granularity, ("model", "tensor"))
        check_range("momentum", o.momentum, 0.0, 1.0, open_low=False)
        check_update(o.update, o.max_norm)
        check_method(o.method, o.granularity, o.update, o.max_norm)
        check_storage(torch.float32, o.history_dtype)
        return replace(
            o,
            accumulation_steps=int(o.accumulation_steps),
            momentum=float(o.momentum),
            max_norm=None if o.max_norm is None else float(o.max_norm),
        )

    @property
    def history(self) -> torch.dtype | None:
        """The type of the history; None where the method needs none."""
        return self.history_dtype if self.method.needs_history else None


class Assignable:
    """An attribute that may be assigned at any time, and takes effect from the next window on."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else getattr(optimizer._now.assigned, self._name)

    def __set__(self, optimizer: Any, value: object) -> None:
        optimizer._assign(self._name, value)


class Fixed:
    """An attribute that is set once, when the optimizer is made."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        return self if optimizer is None else optimizer._fixed[self._name]

    def __set__(self, optimizer: Any, value: object) -> None:
        raise AttributeError(
            f"GCondFused.{self._name} cannot be assigned: make a new GCondFused(..., "
            f"{self._name}=...) around the same base between two windows"
        )


class TaskWeights(MutableMapping[str, float]):
    """Task → loss weight. One that is assigned holds from the next window on.

    ::

        optimizer.tasks["ssim"] = 0.2  # numbers of numpy, and tensors of one element, too
    """

    def __init__(self, weights: Mapping[Any, Any]) -> None:
        # As they were given: `active_tasks` is looked up in mappings of the user's own.
        self.keys_given = list(weights)
        self._weights = {plain_name(task): checked_weight(task, weights[task]) for task in weights}
        if len(self._weights) < len(self.keys_given):
            raise ValueError(f"tasks: two names are the same, {list(map(plain_name, weights))}")

    def __getitem__(self, task: Any) -> float:
        return self._weights[plain_name(task)]

    def __setitem__(self, task: Any, weight: Any) -> None:
        name = plain_name(task)
        if name not in self._weights:
            raise KeyError(f"unknown task {task!r}: add it with optimizer.add_task(name, weight)")
        self._weights[name] = checked_weight(task, weight)

    def __delitem__(self, task: Any) -> None:
        raise TypeError(
            f"task {task!r} cannot be deleted: leave its loss out of backward(losses), or set its "
            "weight to 0"
        )

    def add(self, task: Any, weight: Any) -> None:
        """Add a task, the last one."""
        name = plain_name(task)
        if name in self._weights:
            raise ValueError(f"there is a task {task!r} already")
        self._weights[name] = checked_weight(task, weight)
        self.keys_given.append(task)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return repr(self._weights)


def method_of(method: object) -> Method:
    """Return the method that was asked for; a function of the user's own as one."""
    if method is None:
        return GCond()
    if isinstance(method, Method):
        return method
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be {method.__name__}(...), not the class itself")
    if callable(method) and not isinstance(method, type):
        function: Callable[[Tensor], Tensor] = method
        return Function(function)
    raise TypeError(
        "method must be one of gcond_kernels.methods, such as GCond() or PCGrad(), or a function "
        f"from a Gramian [K, K] to weights [K], not {method!r}"
    )


def schedule(
    tasks: int, accumulation_steps: int, mode: Literal["exact", "stochastic"]
) -> list[tuple[int, ...]]:
    """Return the active tasks of every micro-batch in a window.

    In stochastic mode every task has one block; where the tasks do not divide the window evenly
    the first blocks are one longer.
    """
    if mode == "exact":
        return [tuple(range(tasks))] * accumulation_steps
    length, longer = divmod(accumulation_steps, tasks)
    return [(task,) for task in range(tasks) for _ in range(length + (task < longer))]
