"""GradDrop: gradient sign dropout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, check_number, check_seed
from gcond_kernels.ops.contexts import fixed_precision


@dataclass(frozen=True)
class GradDrop(Method):
    """Of every element one sign is picked at random, and gradients of the other sign are dropped.

    Z. Chen et al., "Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout",
    NeurIPS 2020, arXiv 2010.06808, with f the identity: the positive sign is picked with
    probability P = (1 + Σ_k ĝ_k / Σ_k |ĝ_k|) / 2. It is no function of the Gramian and has no
    weights: what it does is `gcond_kernels.ops.graddrop`. Parameters of one task keep their
    gradient.

    Args:
        leak: the share of the dropped gradients that is let through, in [0, 1]: one for all tasks
            (the paper allows one for each).
        seed: of the random numbers, which are a function of it, of how many steps there were, and
            of the element's place: the same on every device and in every backend.
    """

    leak: float = 0.0
    seed: int = 0

    shared_state: ClassVar[frozenset[str]] = frozenset({"draws"})

    def __post_init__(self) -> None:
        check_number(self, "leak", self.leak, 0.0, 1.0)
        check_seed(self, self.seed)

    @fixed_precision
    def new_state(self, tasks: int, device: torch.device) -> State:
        """How many steps there were."""
        return {"draws": torch.zeros((), dtype=torch.int64, device=device)}

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Raises: there are none."""
        raise TypeError(
            "GradDrop picks signs element by element: it has no weights, and a Gramian does not "
            "tell its result. See gcond_kernels.ops.graddrop"
        )
