"""What the methods have in common that draw random numbers."""

from __future__ import annotations

from typing import ClassVar

import torch

from gcond_kernels.methods.checks import check_seed
from gcond_kernels.methods.method import Method, State


class Seeded(Method):
    """A method whose random numbers are a function of a seed and of the number of steps.

    A subclass is a dataclass with the field `seed`, and counts its random counter up.
    """

    seed: int

    shared_state: ClassVar[frozenset[str]] = frozenset({"counter"})

    def __post_init__(self) -> None:
        check_seed(self)

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return the random counter, [] int64."""
        return {"counter": torch.zeros((), dtype=torch.int64, device=device)}
