"""What GCondFused shares with the optimizer that it wraps."""

from __future__ import annotations

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.storage.assigned import AssignedGradients
from gcond_kernels.storage.names import labels_of
from gcond_kernels.storage.state_format import KEY

NOT_COPIED = ("step", "_opt_called", "_wrapped_by_lr_sched", "profile_hook_step")

# Options of before that can no longer be assigned, and what has taken their place.
REPLACED = {
    "record_steps": "assign recorder.capacity",
    "sync": "make a new GCondFused with distributed=Distributed(strategy=...)",
    "process_group": "make a new GCondFused with distributed=Distributed(process_group=...)",
    "history_dtype": "assign method=GCond(history_dtype=...)",
    "trust_ratio_coef": "assign update=LionLars(coefficient=...)",
    "trust_ratio_clip": "assign update=LionLars(clip=...)",
}


class OptimizerWrapper(torch.optim.Optimizer):
    """An optimizer that has parameter groups, state and options in common with another."""

    base: torch.optim.Optimizer

    def __init__(self, base: torch.optim.Optimizer) -> None:
        # Not super().__init__: that would make lists of parameters and state of our own.
        self.base = base
        super().__setstate__({})
        self._assigned_gradients = AssignedGradients()
        self._initialized: list[Tensor] = []  # whose state the base made in a step that was none

    def __getattr__(self, name: str) -> Any:
        # What is not ours: train() and eval() of schedule-free optimizers, and so on.
        base = self.__dict__.get("base")
        if base is None or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(base, name)
        except AttributeError:
            raise AttributeError(
                f"neither {type(self).__name__} nor {type(base).__name__} has an attribute {name!r}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        ours = name.startswith("_") or name in self.__dict__ or hasattr(type(self), name)
        # What is not ours is the base's own, which would not get it otherwise.
        of_base = base is not None and not ours and hasattr(base, name)
        if not ours and not of_base and name in REPLACED:
            raise AttributeError(f"{type(self).__name__} has no {name}: {REPLACED[name]}")
        (setattr if of_base else object.__setattr__)(base if of_base else self, name, value)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of the wrapped optimizer: the same list."""
        # GradScaler.unscale_ is part of recipes that clip, and these gradients have no scale: it
        # is shown none. It asks nowhere else.
        if sys._getframe(1).f_code.co_name == "_unscale_grads_":
            return []
        for group in self.base.param_groups:
            group.setdefault(KEY, {})  # what loads a state group by group finds its place
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def defaults(self) -> dict[str, Any]:
        """The defaults of the wrapped optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler.step calls `step` and leaves the rest to it."""
        # Lightning does not clip for those that do, since their gradients have a scale: these have
        # none, and can be clipped.
        return sys._getframe(1).f_code.co_name != "_optimizer_handles_unscaling"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, at any time; with several ranks between two windows."""
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear `.grad`. What the window has accumulated stays: `step` starts a new one.

        So a loop that calls this for every micro-batch, as is the habit, does no harm. What the
        window has accumulated is dropped with `drop_window`.
        """
        # There are optimizers that take no arguments here, and decide by themselves.
        self.base.zero_grad(*[set_to_none][: parameters_of(type(self.base).zero_grad) - 1])
        # Where zeros are left, what is added to them is somebody else's.
        self._assigned_gradients.remember([])

    def _check_scaler_calls(self) -> None:
        """Raise where GradScaler.step, which leaves a flag here, was called without the option."""
        if "found_inf" in self.__dict__:
            # GradScaler.step would take these off after a step that it gets back from.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise RuntimeError(
                "GradScaler.step was called on an optimizer that does not know the scaler: give "
                "GCondFused(..., grad_scaler=scaler), and losses without a scale to backward()"
            )

    def _parameters(self) -> Iterator[tuple[Tensor, str]]:
        """Return every parameter and its label, in the order of the parameter groups."""
        listed = [p for group in self.base.param_groups for p in group["params"]]
        return iter(zip(listed, labels_of(self.base.param_groups), strict=True))

    def __getstate__(self) -> dict[str, Any]:
        # As torch's optimizers do: hooks, and the step that a scheduler has put in place of ours,
        # are those of the original.
        hooks = {k for k in self.__dict__ if k.startswith("_optimizer_") and k.endswith("_hooks")}
        return {k: v for k, v in self.__dict__.items() if k not in hooks.union(NOT_COPIED)}


@functools.lru_cache(maxsize=64)
def parameters_of(function: Callable[..., object]) -> int:
    """Return how many parameters a function has."""
    return len(inspect.signature(function).parameters)


def check_base(base: object) -> None:
    """Raise a TypeError where an optimizer cannot be wrapped."""
    if not isinstance(base, torch.optim.Optimizer):
        raise TypeError(
            "base must be a torch optimizer, e.g. torch.optim.AdamW(model.parameters()), "
            f"not {base!r}"
        )
    if isinstance(base, OptimizerWrapper):
        raise TypeError("base must be the optimizer itself, not another GCondFused")
    closure = inspect.signature(base.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise TypeError(
            f"{type(base).__name__}.step needs a closure that computes the loss anew, and there is "
            "no such thing for accumulated gradients: take another base optimizer"
        )


def warn_of_double_smoothing(base: torch.optim.Optimizer) -> None:
    """Warn where the wrapped optimizer averages the gradient, as GCondFused does."""
    for group in base.param_groups:
        for name in ("betas", "momentum"):
            value = group.get(name) or 0.0
            if float(value[0] if isinstance(value, (tuple, list)) else value) > 0.0:
                there = "betas=(0.0, ...)" if name == "betas" else "momentum=0"
                warnings.warn(
                    f"the gradient is smoothed twice: by momentum in GCondFused and by {name}="
                    f"{value} in {type(base).__name__}. Set momentum=0 here, or {there} there.",
                    stacklevel=3,
                )
                return
