"""GradVac: gradient vaccine."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.checks import check_number
from gcond_kernels.methods.method import Known, State
from gcond_kernels.methods.normalized import cosines, from_normalized, norms
from gcond_kernels.methods.pcgrad import random_orders
from gcond_kernels.methods.seeded import Seeded
from gcond_kernels.methods.solvers import identity


@dataclass(frozen=True)
class GradVac(Seeded):
    """Bring each pair of gradients to a target cosine φ̂_ij, a moving average of the pair's cosines.

    Z. Wang et al., "Gradient Vaccine: Investigating and Improving Multi-task Optimization in
    Massively Multilingual Models", ICLR 2021, arXiv 2010.05874. With g̃_i = ĝ_i, for j ≠ i in random
    order: φ = cos(g̃_i, ĝ_j), and where φ < φ̂_ij

        g̃_i ← g̃_i + ĝ_j · ‖g̃_i‖ (φ̂ √(1−φ²) − φ √(1−φ̂²)) / (‖ĝ_j‖ √(1−φ̂²)),

    after which the two have the cosine φ̂. Then φ̂_ij ← (1−β) φ̂_ij + β φ, from φ̂ = 0 on, and the sum
    of the g̃_i is the result.

    Args:
        beta: β, in [0, 1]; with 0 it is PCGrad.
        seed: of the random orders, as of `PCGrad`.

    Raises:
        ValueError: an option is out of its range.
    """

    beta: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self, "beta", 1.0)
        super().__post_init__()

    def new_state(self, tasks: int, device: torch.device) -> State:
        """Return the targets of the pairs, [K, K] float64, and the random counter, [] int64."""
        targets = torch.zeros((tasks, tasks), dtype=torch.float64, device=device)
        return {"target_cosines": targets, **super().new_state(tasks, device)}

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return the weights of Σ_i g̃_i; targets and random counter are updated."""
        n = norms(gramian)
        order = random_orders(gramian, self.seed, state["counter"])
        state["counter"] += 1
        C = self.coefficients(cosines(gramian), n > 0.0, order, state["target_cosines"])
        # Row i of C is relative to the norm of task i.
        weights: Tensor = from_normalized((C * n[..., :, None]).sum(-2), gramian)
        return weights

    def coefficients(self, S: Tensor, present: Tensor, order: Tensor, targets: Tensor) -> Tensor:
        """Return the coefficients [..., K, K] of normalized gradients: row i makes g̃_i / ‖ĝ_i‖.

        S are cosines, `order` is as in `pcgrad.projected`, and `targets` is changed in place.
        """
        tasks = torch.arange(S.shape[-1], device=S.device)
        C: Tensor = identity(S).expand(S.shape)
        for other in order.unbind(-1):  # [..., K], for each task i a task j
            j = other[..., None]
            S_j = S.gather(-2, j.expand(S.shape))
            norm = ((C @ S) * C).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
            cosine = (C * S_j).sum(-1, keepdim=True) / norm.clamp(min=1e-150)
            cosine = cosine.clamp(-1.0, 1.0)
            target = targets.gather(-1, j)
            sine, target_sine = (1.0 - cosine**2).sqrt(), (1.0 - target**2).sqrt()
            pair = present[..., None] & present.gather(-1, other)[..., None]
            pair = pair & (j != tasks[:, None]) & (norm > 0.0)
            # A target of 1 cannot be reached: no multiple of ĝ_j makes the two parallel.
            moves = pair & (cosine < target) & (target_sine > 0.0)
            added = norm * (target * sine - cosine * target_sine)
            added = added / target_sine.clamp(min=1e-150)
            C = C.scatter_add(-1, j, torch.where(moves, added, 0.0))
            average = (1.0 - self.beta) * target + self.beta * cosine
            targets.scatter_(-1, j, torch.where(pair, average, target))
        return C
