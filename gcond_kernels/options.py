"""The options of GCondFused: their types, their checks, and what assigning one does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, MutableMapping, Sequence, ValuesView
from dataclasses import dataclass, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from gcond_kernels.lion_lars import LionLars
from gcond_kernels.methods import Method
from gcond_kernels.methods.function import method_of
from gcond_kernels.storage.shared_parameters import is_selected


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
    backend: str

    @classmethod
    def checked(cls, tasks: int, **options: Any) -> Options:
        """Return the options as plain Python values; raise where one is out of its range."""
        o = cls(**{**options, "method": method_of(options["method"])})
        check_steps(o.accumulation_steps, o.mode, tasks)
        check_choice("granularity", o.granularity, ("model", "tensor"))
        check_number("momentum", o.momentum, "[0, 1)", 0.0 <= _number(o.momentum) < 1.0)
        if o.max_norm is not None:
            check_number("max_norm", o.max_norm, "(0, inf)", 0.0 < _number(o.max_norm) < math.inf)
        if o.update is not None and not isinstance(o.update, LionLars):
            raise TypeError(f"update must be None or LionLars(...), not {o.update!r}")
        if o.update is not None and o.max_norm is not None:
            raise ValueError(
                "max_norm does not go with update=LionLars(...): the size of that update is set "
                "by its coefficient and clip"
            )
        sized_by = "max_norm" if o.max_norm is not None else None
        o.method.check(o.granularity, "update=LionLars(...)" if o.update else sized_by)
        return replace(
            o,
            accumulation_steps=int(o.accumulation_steps),
            momentum=float(o.momentum),
            max_norm=None if o.max_norm is None else float(o.max_norm),
        )

    @property
    def history(self) -> torch.dtype | None:
        """The type of the history; None where the method needs none."""
        return self.method.history_dtype if self.method.needs_history else None


@dataclass
class OptionsInUse:
    """The options of this window, those of the next, and what takes effect at once."""

    current: Options
    assigned: Options
    on_nonfinite: str


class Option:
    """An attribute that holds an option: one that is assigned takes effect in the next window."""

    def __init__(self, fixed: bool = False) -> None:
        self._is_fixed = fixed

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type | None = None) -> Any:
        if optimizer is None:
            return self
        if self._is_fixed:
            return optimizer._fixed[self._name]
        return getattr(optimizer._options.assigned, self._name)

    def __set__(self, optimizer: Any, value: object) -> None:
        if self._is_fixed:
            raise AttributeError(
                f"GCondFused.{self._name} cannot be assigned: make a new GCondFused(..., "
                f"{self._name}=...) around the same base between two windows"
            )
        optimizer._assign(self._name, value)


class TaskWeights(MutableMapping[str, float]):
    """Task → loss weight. One that is assigned holds from the next window on.

    ::

        optimizer.tasks["ssim"] = 0.2  # numbers of numpy, and tensors of one element, too

    Raises:
        TypeError, ValueError: it is no mapping of names to weights, or all of them are 0.
    """

    def __init__(self, weights: Mapping[Any, Any]) -> None:
        if not isinstance(weights, Mapping):
            raise TypeError(f"tasks must map each task's name to its loss weight, not {weights!r}")
        if not weights:
            raise ValueError("tasks must name at least one task")
        # As they were given: `active_tasks` is looked up in mappings of the user's own.
        self.keys_given = list(weights)
        self._weights = {plain_name(task): checked_weight(task, weights[task]) for task in weights}
        if len(self._weights) < len(self.keys_given):
            raise ValueError(f"tasks: two names are the same, {list(map(plain_name, weights))}")
        if not any(self._weights.values()):
            raise ValueError("tasks: at least one loss weight must be above 0")

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

    def values(self) -> ValuesView[float]:
        """Return the weights, in the order of the tasks."""
        return self._weights.values()

    def __len__(self) -> int:
        return len(self._weights)

    def __repr__(self) -> str:
        return repr(self._weights)


def plain_name(task: object) -> str:
    """Return a task's name as a plain string, also of numpy's strings and of enumerations."""
    if type(task) is str:
        return task
    if isinstance(task, str):
        return str.__str__(task)
    if isinstance(task, Enum):
        return plain_name(task.value) if isinstance(task.value, str) else task.name
    raise TypeError(f"tasks: a name must be a string, not {task!r}")


def checked_weight(task: object, weight: Any) -> float:
    """Return a loss weight as a plain number, or raise where it is none, or negative."""
    elements = weight.numel() if isinstance(weight, Tensor) else getattr(weight, "size", None)
    plain = weight.item() if elements == 1 and hasattr(weight, "item") else weight
    if not 0.0 <= _number(plain) < math.inf:
        raise ValueError(f"tasks: the loss weight of {task!r} must be 0 or more, not {weight!r}")
    return float(plain)


def _number(value: object) -> float:
    """Return a number as a float; NaN, which is in no range, for what is none."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan


def check_number(option: str, value: object, bounds: str, holds: bool) -> None:
    """Raise a ValueError where a number is not within its bounds."""
    if not holds:
        raise ValueError(f"{option} must be a number in {bounds}, not {value!r}")


def check_choice(option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise a ValueError where a value is not one of the allowed ones."""
    if value not in allowed:
        raise ValueError(f"{option} must be {' or '.join(map(repr, allowed))}, not {value!r}")


def check_steps(accumulation_steps: object, mode: str, tasks: int) -> None:
    """Raise a ValueError where no window can have so many micro-batches."""
    check_choice("mode", mode, ("exact", "stochastic"))
    if not _number(accumulation_steps) >= 1.0 or not isinstance(accumulation_steps, Integral):
        raise ValueError(
            f"accumulation_steps must be a whole number above 0, not {accumulation_steps!r}"
        )
    if mode == "stochastic" and int(accumulation_steps) < tasks:
        raise ValueError(
            f"accumulation_steps={accumulation_steps} is too few for {tasks} tasks in stochastic "
            f"mode, which gives every task a block of micro-batches: use at least {tasks}, or "
            "mode='exact'"
        )


def check_nonfinite(on_nonfinite: object, grad_scaler: object) -> None:
    """Raise an error where this cannot be done about gradients that are not finite."""
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, not {grad_scaler!r}")
    check_choice("on_nonfinite", on_nonfinite, ("skip", "drop_task", "raise"))
    if on_nonfinite == "raise" and grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(
            "on_nonfinite='raise' does not go with grad_scaler: a scaler finds its scale by "
            "overflows, which are no faults; use 'skip'"
        )


def check_selected(method: Method, names: Sequence[str]) -> None:
    """Raise a ValueError where parameters whose gradients a method compares are not there."""
    for one in method.parameters or ():
        if not any(is_selected(name, [one]) for name in names):
            raise ValueError(
                f"{type(method).__name__}: parameters has {one!r}, which is no parameter or module "
                "of base. It must be made of model.named_parameters() for its names, which start "
                f"with {', '.join(map(repr, names[:3]))}"
            )
