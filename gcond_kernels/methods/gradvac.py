"""GradVac: gradient vaccine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gcond_kernels.methods.method import (
    Known,
    Method,
    State,
    check_number,
    check_seed,
    cosines,
    norms,
    per_length,
)
from gcond_kernels.methods.pcgrad import random_orders
from gcond_kernels.ops.contexts import fixed_precision


@dataclass(frozen=True)
class GradVac(Method):
    """PCGrad with a target cosine φ̂_ij for each pair, which follows the cosines that were seen.

    Z. Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models", ICLR 2021, arXiv 2010.05874. With g̃_i = ĝ_i, for j ≠ i in random
    order: φ = cos(g̃_i, ĝ_j), and where φ < φ̂_ij

        g̃_i ← g̃_i + ĝ_j · ‖g̃_i‖ (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (‖ĝ_j‖ √(1−φ̂²)),

    after which the two have the cosine φ̂. Then φ̂_ij ← (1−β) φ̂_ij + β φ, from φ̂ = 0 on, and the sum
    of the g̃_i is the result.

    Args:
        beta: β, in [0, 1]; with 0 it is PCGrad.
        seed: of the random orders, as of `PCGrad`.
    """

    beta: float = 0.01
    seed: int = 0

    shared_state: ClassVar[frozenset[str]] = frozenset({"draws"})

    def __post_init__(self) -> None:
        check_number(self, "beta", self.beta, 0.0, 1.0)
        check_seed(self, self.seed)

    @fixed_precision
    def new_state(self, tasks: int, device: torch.device) -> State:
        """Targets of the pairs, and how many orders were drawn."""
        return {
            "target_cosines": torch.zeros((tasks, tasks), dtype=torch.float64, device=device),
            "draws": torch.zeros((), dtype=torch.int64, device=device),
        }

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Sum of the vaccinated rows."""
        lengths = norms(gramian)
        order = random_orders(gramian, self.seed, state["draws"])
        state["draws"] += 1
        # In units of each gradient's own length; row i then is in units of task i's.
        C = self.vaccinated(cosines(gramian), lengths > 0.0, order, state["target_cosines"])
        return per_length((C * lengths[..., :, None]).sum(-2), gramian)

    def vaccinated(self, S: Tensor, present: Tensor, order: Tensor, targets: Tensor) -> Tensor:
        """C [..., K, K] of gradients at length 1; `targets` [..., K, K] follow, in place."""
        tasks = torch.arange(S.shape[-1], device=S.device)
        C = torch.eye(len(tasks), dtype=S.dtype, device=S.device).expand(S.shape)
        for other in order.unbind(-1):
            place = other[..., None]
            S_j = S.gather(-2, place.expand(S.shape))
            length = ((C @ S) * C).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
            cosine = (C * S_j).sum(-1, keepdim=True) / length.clamp(min=1e-150)
            cosine = cosine.clamp(-1.0, 1.0)
            target = targets.gather(-1, place)
            sine, target_sine = (1.0 - cosine**2).sqrt(), (1.0 - target**2).sqrt()
            pair = present[..., None] & present.gather(-1, other)[..., None]
            pair = pair & (place != tasks[:, None]) & (length > 0.0)
            # No multiple of the other gradient makes them parallel: a target of 1 is not to be had.
            moves = pair & (cosine < target) & (target_sine > 0.0)
            share = length * (target * sine - cosine * target_sine)
            share = share / target_sine.clamp(min=1e-150)
            C = C.scatter_add(-1, place, torch.where(moves, share, 0.0))
            followed = (1.0 - self.beta) * target + self.beta * cosine
            targets.scatter_(-1, place, torch.where(pair, followed, target))
        return C
