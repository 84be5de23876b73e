"""The gradients that an optimizer has assigned, to tell them from those of others."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class AssignedGradients:
    """Remembers what was assigned to `.grad`, without keeping it alive where that is possible."""

    def __init__(self) -> None:
        self._references: list[Tensor | weakref.ref[Tensor]] = []

    def remember(self, gradients: Iterable[Tensor | None]) -> None:
        """Remember these, and no others."""
        # torch swaps the contents of tensors when it converts modules of DTensors, and refuses
        # those that have weak references.
        swaps = torch.__future__.get_swap_module_params_on_conversion()
        self._references = [
            gradient if swaps or type(gradient) is not Tensor else weakref.ref(gradient)
            for gradient in gradients
            if gradient is not None
        ]

    def ids(self) -> set[int]:
        """Return the ids of those that still live."""
        return {id(r() if isinstance(r, weakref.ref) else r) for r in self._references}

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be copied; without them a .grad counts as somebody else's.
        return {"_references": []}
