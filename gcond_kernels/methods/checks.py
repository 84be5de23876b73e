"""Checks of what methods are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

from torch import Tensor


def check_weights(source: str, weights: object, shape: Sequence[int]) -> None:
    """Check that a method returned one weight for each task."""
    if not isinstance(weights, Tensor) or weights.shape != tuple(shape):
        raise ValueError(
            f"{source} must return one weight for each of the {shape[-1]} tasks, a tensor "
            f"{list(shape)}, not {_described(weights)}"
        )


def check_gramian(method: object, gramian: object) -> None:
    """Check that a Gramian is square and of a floating type."""
    if isinstance(gramian, Tensor) and gramian.is_floating_point():
        shape = gramian.shape[-2:]
        if len(shape) == 2 and shape[0] == shape[1] > 0:
            return
    raise ValueError(
        f"{type(method).__name__} takes a Gramian [K, K] of inner products of the tasks' "
        f"gradients, a tensor of a floating type, not {_described(gramian)}"
    )


def _described(value: object) -> str:
    return f"{list(value.shape)} {value.dtype}" if isinstance(value, Tensor) else repr(value)


def check_option(method: object, option: str, what: str, holds: bool) -> None:
    """Check an option of a method, for which a condition holds where it is what it must be."""
    if not holds:
        value = getattr(method, option)
        raise ValueError(f"{type(method).__name__}: {option} must be {what}, not {value!r}")


def check_number(method: object, option: str, high: float = math.inf) -> None:
    """Check that an option is a finite number in [0, high]."""
    value = getattr(method, option)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    bounds = f"in [0, {high:g}]" if high < math.inf else "of 0 or more"
    holds = is_number and 0.0 <= value <= high and math.isfinite(value)
    check_option(method, option, f"a number {bounds}", holds)


def check_positive(method: object, option: str) -> None:
    """Check that an option is a finite number above 0."""
    value = getattr(method, option)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    holds = is_number and 0.0 < value < math.inf
    check_option(method, option, "a number above 0", holds)


def check_count(method: object, option: str) -> None:
    """Check that an option is a whole number above 0."""
    value = getattr(method, option)
    holds = isinstance(value, int) and not isinstance(value, bool) and value > 0
    check_option(method, option, "a whole number above 0", holds)


def check_seed(method: Any) -> None:
    """Check that the seed of a method is an integer of 64 bits."""
    seed = method.seed
    is_integer = isinstance(seed, int) and not isinstance(seed, bool)
    holds = is_integer and -(2**63) <= seed < 2**63
    check_option(method, "seed", "a whole number of 64 bits", holds)


def refuse_assignment(method: object, name: str, value: object) -> None:
    """Raise an error for an assignment to an option of a method, which says what to do."""
    cls = type(method).__name__
    raise FrozenInstanceError(
        f"{cls}.{name} cannot be assigned, for a method may serve several optimizers: assign a "
        f"method, optimizer.method = {cls}({name}={value!r}), which holds from the next window on"
    )
