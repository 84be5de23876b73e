"""Checks of what methods are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import FrozenInstanceError
from typing import Any

from torch import Tensor


def check_weights(source: str, weights: object, shape: Sequence[int]) -> None:
    """Raise a ValueError where the weights that a method returned are none."""
    if not isinstance(weights, Tensor) or weights.shape != tuple(shape):
        given = list(weights.shape) if isinstance(weights, Tensor) else repr(weights)
        raise ValueError(
            f"{source} must return one weight for each of the {shape[-1]} tasks, a tensor "
            f"{list(shape)}, not {given}"
        )


def check_gramian(method: object, gramian: object) -> None:
    """Raise a ValueError where a Gramian is none."""
    if isinstance(gramian, Tensor) and gramian.is_floating_point():
        shape = gramian.shape[-2:]
        if len(shape) == 2 and shape[0] == shape[1] > 0:
            return
    given = f"{list(gramian.shape)} {gramian.dtype}" if isinstance(gramian, Tensor) else gramian
    raise ValueError(
        f"{type(method).__name__} takes a Gramian [K, K] of inner products of the tasks' "
        f"gradients, a tensor of a floating type, not {given}"
    )


def check_number(method: object, option: str, value: Any, low: float, high: float) -> None:
    """Raise a ValueError where an option is not a number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or math.isinf(value):
        bounds = f"in [{low:g}, {high:g}]" if high < math.inf else f"of {low:g} or more"
        raise ValueError(
            f"{type(method).__name__}: {option} must be a number {bounds}, not {value!r}"
        )


def check_seed(method: object, seed: object) -> None:
    """Raise a ValueError where a seed is not a whole number of 64 bits."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
        raise ValueError(
            f"{type(method).__name__}: seed must be a whole number of 64 bits, not {seed!r}"
        )


def refuse_assignment(method: object, name: str, value: object) -> None:
    """Raise an error for an assignment to an option of a method, which says what to do."""
    cls = type(method).__name__
    raise FrozenInstanceError(
        f"{cls}.{name} cannot be assigned, for a method may serve several optimizers: assign a "
        f"method, optimizer.method = {cls}({name}={value!r}), which holds from the next window on"
    )
