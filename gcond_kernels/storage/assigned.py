"""The gradients that an optimizer has assigned, to tell them from those of others."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class AssignedGradients:
    """Remembers what was assigned to `.grad`, without keeping it alive where that is possible."""

    def __init__(self) -> None:
        self._references: list[Callable[[], Tensor | None]] = []

    def remember(self, gradients: Iterable[Tensor | None]) -> None:
        """Remember these, and no others."""
        self._references = [reference_to(g) for g in gradients if g is not None]

    def ids(self) -> set[int]:
        """Return the ids of those that still live."""
        return {id(gradient()) for gradient in self._references}

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; without them a .grad counts as somebody else's.
        return {"_references": []}


def reference_to(gradient: Tensor) -> Callable[[], Tensor | None]:
    """Return what leads to a gradient.

    torch swaps the contents of tensors when it converts modules of DTensors, and refuses those
    that have weak references.
    """
    if type(gradient) is Tensor and not torch.__future__.get_swap_module_params_on_conversion():
        return weakref.ref(gradient)
    return lambda: gradient
