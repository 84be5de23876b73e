"""Nash-MTL: multi-task learning as a bargaining game."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods.method import Known, Method, State, cosines, norms, per_length
from gcond_kernels.methods.solvers import definite, solve

# Newton steps: of 22,000 Gramians of 3 to 12 tasks, random, singular, nearly parallel and
# anti-parallel, 15 left one unsolved (709 in float64, with its smaller eigenvalues), 20 none.
STEPS = 25
# Multiples of the damped step that are tried: where gradients nearly cancel out α is larger by far
# than where it starts, and the damped step no more than doubles it.
MULTIPLES = 12


@dataclass(frozen=True)
class NashMTL(Method):
    """The Nash bargaining solution: no task gains as much, relatively, as the others lose.

    A. Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017:
    S α = 1/α, α > 0. S is divided by its Frobenius norm before, so that the scale of the gradients
    does not change the weights: those of the authors' code are these divided by the root of that
    norm, which makes the result √K long whatever the gradients, and it is then shortened to 1;
    their bound is `max_norm` of GCondFused. α is where ½ αᵀ S α − Σ log α is smallest, a
    self-concordant function (Boyd and Vandenberghe, Convex Optimization, 9.6), found by Newton
    steps: damped, or the longest of some multiples of the damped one at whose end the way still
    leads down.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """α."""
        C = definite(cosines(gramian), known.rounding)
        y = torch.ones_like(norms(gramian))
        for _ in range(STEPS):
            slope = (C @ y[..., None])[..., 0] - 1.0 / y
            direction = solve(C + torch.diag_embed(1.0 / y**2), -slope)
            decrement = (-slope * direction).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
            # A full step where it is sure to get nearer by its square.
            full = (decrement < 0.25) & is_within_bounds(y + direction, known.rounding)[..., None]
            damped = longest_downhill(C, y, direction, 1.0 / (1.0 + decrement), known.rounding)
            y = y + direction * torch.where(full, 1.0, damped)
        size: Tensor = torch.linalg.matrix_norm(gramian)[..., None].sqrt()
        return size * per_length(y, gramian)


def longest_downhill(
    C: Tensor, y: Tensor, direction: Tensor, damped: Tensor, rounding: float
) -> Tensor:
    """[..., 1] the longest step of damped · 4^j up to which ½ yᵀ C y − Σ log y gets smaller."""
    steps = damped * 4.0 ** torch.arange(MULTIPLES, dtype=y.dtype, device=y.device)
    ahead = y[..., None, :] + steps[..., None] * direction[..., None, :]  # [..., multiples, K]
    slope = ahead @ C - 1.0 / ahead
    downhill = (slope * direction[..., None, :]).sum(-1) <= 0.0
    return torch.where(downhill & is_within_bounds(ahead, rounding), steps, 0.0).amax(
        -1, keepdim=True
    )


def is_within_bounds(y: Tensor, rounding: float) -> Tensor:
    """[...] whether all are positive, and no larger than the solution can be, by far.

    There yᵀ C y = K. Where rounding has left C indefinite there is no solution, and no end.
    """
    return (y > 0.0).all(-1) & (rounding * (y * y).sum(-1) <= 4.0 * y.shape[-1])
