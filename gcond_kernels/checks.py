"""What is refused, and with which words, before anything is changed."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.lion_lars import LionLars
from gcond_kernels.methods import GradDrop, Method
from gcond_kernels.ops.checks import ACCUMULATOR_DTYPES
from gcond_kernels.storage.shared_parameters import is_selected

NOTHING_FOR_TASK = "Where a micro-batch has nothing for a task, leave the task out, or give None"


def check_tasks(tasks: object) -> None:
    """Task names and loss weights."""
    if not isinstance(tasks, Mapping):
        raise TypeError(f"tasks must map each task's name to its loss weight, not {tasks!r}")
    if not tasks:
        raise ValueError("tasks must name at least one task")
    if not any(checked_weight(task, weight) for task, weight in tasks.items()):
        raise ValueError("tasks: at least one loss weight must be above 0")


def plain_name(task: object) -> str:
    """Return a task's name as a plain string, also of numpy's strings and of enumerations.

    Raises:
        TypeError: it is no string.
    """
    if isinstance(task, str):
        return str.__str__(task)
    if isinstance(task, Enum):
        return plain_name(task.value) if isinstance(task.value, str) else task.name
    raise TypeError(f"tasks: a name must be a string, not {task!r}")


def checked_weight(task: object, weight: Any) -> float:
    """Return a loss weight as a plain number.

    Raises:
        ValueError: it is none, or negative, or not finite.
    """
    plain = weight
    if isinstance(weight, Tensor) and weight.numel() == 1:
        plain = weight.detach().item()
    elif hasattr(weight, "item") and getattr(weight, "size", None) == 1:  # of numpy
        plain = weight.item()
    number = isinstance(plain, Real) and not isinstance(plain, bool)
    if not number or not 0.0 <= float(plain) < math.inf:
        raise ValueError(f"tasks: the loss weight of {task!r} must be 0 or more, not {weight!r}")
    return float(plain)


def check_steps(accumulation_steps: object, mode: object, tasks: int) -> None:
    """The number of micro-batches in a window."""
    check_choice("mode", mode, ("exact", "stochastic"))
    whole = isinstance(accumulation_steps, Integral) and not isinstance(accumulation_steps, bool)
    if not whole or accumulation_steps < 1:  # type: ignore[operator]
        raise ValueError(
            f"accumulation_steps must be a whole number above 0, not {accumulation_steps!r}"
        )
    if mode == "stochastic" and accumulation_steps < tasks:  # type: ignore[operator]
        raise ValueError(
            f"accumulation_steps={accumulation_steps} is too few for {tasks} tasks in stochastic "
            f"mode, which gives every task a block of micro-batches: use at least {tasks}, or "
            "mode='exact'"
        )


def check_choice(option: str, value: object, allowed: Sequence[str]) -> None:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{option} must be {' or '.join(map(repr, allowed))}, not {value!r}")


def check_count(option: str, value: object) -> None:
    """A whole number, 0 or more."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < 0:
        raise ValueError(f"{option} must be a whole number, 0 or more, not {value!r}")


def check_sync(module: object, sync: object) -> None:
    """How ranks work together."""
    if module is not None and not isinstance(module, torch.nn.Module):
        raise TypeError(f"module must be the model, a torch.nn.Module, not {module!r}")
    if sync is not None:
        check_choice("sync", sync, ("shard", "replicate"))


def check_scaler(grad_scaler: object) -> None:
    """The scaler of the losses."""
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(f"grad_scaler must be a torch.amp.GradScaler, not {grad_scaler!r}")


def check_nonfinite(on_nonfinite: object, grad_scaler: torch.amp.GradScaler | None) -> None:
    """What is done about gradients that are not finite."""
    check_choice("on_nonfinite", on_nonfinite, ("skip", "drop_task", "raise"))
    if on_nonfinite == "raise" and grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(
            "on_nonfinite='raise' does not go with grad_scaler: a scaler finds its scale by "
            "overflows, which are no faults; use 'skip'"
        )


def check_range(option: str, value: object, low: float, high: float, *, open_low: bool) -> None:
    """A number in [low, high), or in (low, high)."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not (low < value if open_low else low <= value) or not value < high:  # type: ignore[operator]
        bracket = "(" if open_low else "["
        raise ValueError(f"{option} must be a number in {bracket}{low}, {high}), not {value!r}")


def check_dtype(option: str, dtype: object, allowed: Sequence[torch.dtype]) -> None:
    """One of the allowed types."""
    if dtype not in allowed:
        raise ValueError(f"{option} must be {' or '.join(map(str, allowed))}, not {dtype}")


def check_base(base: object) -> None:
    """The optimizer to be wrapped."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            "base must be a torch optimizer, e.g. torch.optim.AdamW(model.parameters()), "
            f"not {base!r}"
        )
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(base).__name__}.step needs a closure that computes the loss anew, and there is "
            "no such thing for accumulated gradients: take another base optimizer"
        )


def check_update(update: object, max_norm: float | None) -> None:
    """The form of the written gradient."""
    if update is not None and not isinstance(update, LionLars):
        raise TypeError(f"update must be None or LionLars(...), not {update!r}")
    if max_norm is not None:
        check_range("max_norm", max_norm, 0.0, math.inf, open_low=True)
        if update is not None:
            raise ValueError(
                "max_norm does not go with update=LionLars(...): the size of that update is set "
                "by its coefficient and clip"
            )


def check_method(method: Method, granularity: str, update: object, max_norm: float | None) -> None:
    """What does not go with a method."""
    if granularity == "tensor" and method.parameters is not None:
        raise ValueError(
            "granularity='tensor' weighs each tensor by its own gradients: it does not go with "
            f"parameters={method.parameters} of {type(method).__name__}"
        )
    if not isinstance(method, GradDrop):
        return
    if granularity == "tensor":
        raise ValueError("granularity='tensor' says nothing of GradDrop, which goes by elements")
    if update is not None or max_norm is not None:
        what = "max_norm" if update is None else "update=LionLars(...)"
        raise ValueError(
            f"{what} asks for the length of a gradient before it is written, which the Gramian "
            "does not tell of GradDrop's: clip between backward() and step(), e.g. with "
            "torch.nn.utils.clip_grad_norm_"
        )


def check_chosen(method: Method, names: Sequence[str]) -> None:
    """That the parameters whose gradients a method looks at are there."""
    for one in method.parameters or ():
        if not any(is_selected(name, [one]) for name in names):
            raise ValueError(
                f"{type(method).__name__}: parameters has {one!r}, which is no parameter or module "
                "of base. It must be made of model.named_parameters() for its names, which start "
                f"with {', '.join(map(repr, names[:3]))}"
            )


def check_storage(accumulator_dtype: object, history_dtype: object) -> None:
    """The types of what is kept for every parameter and task."""
    check_dtype("accumulator_dtype", accumulator_dtype, ACCUMULATOR_DTYPES)
    check_dtype("history_dtype", history_dtype, ACCUMULATOR_DTYPES)


def check_task_names(
    losses: object, active: Iterable[Any], known: Sequence[str], exact: bool
) -> dict[str, Any]:
    """Return the losses that there are by plain names.

    Raises:
        TypeError: it is no mapping.
        KeyError: a task is unknown or not active; or missing where one alone is active.
    """
    if not isinstance(losses, Mapping):
        raise TypeError(f"losses must map each active task to its loss, not {type(losses)}")
    given = {task if type(task) is str else plain_name(task): loss for task, loss in losses.items()}
    active = [plain_name(task) for task in active]
    for task in given:
        if task not in known:
            raise KeyError(f"unknown task {task!r}: the tasks are {list(known)}")
        if task not in active:
            raise KeyError(
                f"task {task!r} is not active in this micro-batch: give losses for "
                f"optimizer.active_tasks, now {active}"
            )
    if not exact:
        for task in active:
            if task not in given:
                raise KeyError(
                    f"no loss for task {task!r}: optimizer.active_tasks is {active}. Where this "
                    "micro-batch has nothing for it, give None"
                )
    return {task: loss for task, loss in given.items() if loss is not None}


def check_loss(task: str, loss: object) -> None:
    """That a loss can be back-propagated."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss of task {task!r} must be a scalar tensor or a function that returns one, "
            f"not {type(loss)}. {NOTHING_FOR_TASK}"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"the loss of task {task!r} must be a scalar, not of shape {list(loss.shape)}: "
            "reduce it, e.g. with .mean()"
        )
    if loss.is_complex():
        raise ValueError(
            f"the loss of task {task!r} is {loss.dtype}, and only a real number can be made small: "
            "take its .real or .abs()"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of task {task!r} has no graph: it was computed under torch.no_grad(), was "
            f"detached, or depends on no parameter that requires a gradient. {NOTHING_FOR_TASK}"
        )


def warn_of_double_smoothing(base: torch.optim.Optimizer) -> None:
    """Warns where both this wrapper and the wrapped optimizer average the gradient."""
    for group in base.param_groups:
        for name in ("betas", "momentum"):
            value = group.get(name) or 0.0
            beta = float(value[0] if isinstance(value, (tuple, list)) else value)
            if beta <= 0.0:
                continue
            warnings.warn(
                f"the gradient is smoothed twice: by momentum in GCondFused and by {name}={value} "
                f"in {type(base).__name__}. Set momentum=0 here, or "
                + ("betas=(0.0, ...)" if name == "betas" else "momentum=0")
                + " there.",
                stacklevel=3,
            )
            return
