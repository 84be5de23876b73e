"""Nash-MTL: multi-task learning as a bargaining game."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gcond_kernels.methods import host
from gcond_kernels.methods.method import Known, Method, State
from gcond_kernels.methods.normalized import cosines, from_normalized
from gcond_kernels.methods.solvers import definite, product, solve

# Newton steps: of 22,000 Gramians of 3 to 12 tasks, random, singular, nearly parallel and
# anti-parallel, 15 left one unsolved (709 in float64, with its smaller eigenvalues), 20 none.
STEPS = 25
# Multiples of the damped step that are tried: where gradients nearly cancel out α is far larger
# than its start, and the damped step at most doubles it.
MULTIPLES = 12
# A full step with a decrement below this leaves rounding: it would square it.
CONVERGED = 1e-8


@dataclass(frozen=True)
class NashMTL(Method):
    """Take the Nash bargaining solution: no task gains as much, relatively, as the others lose.

    A. Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017:
    S α = 1/α, α > 0. S is divided by its Frobenius norm before, so that the scale of the gradients
    does not change the weights. The weights of the authors' code are these divided by the root of
    that norm, so that the result has the norm √K for all gradients, and is then clipped to 1;
    `max_norm` of GCondFused does that. α is where ½ αᵀ S α − Σ log α is smallest, a
    self-concordant function (Boyd and Vandenberghe, Convex Optimization, 9.6), found by Newton
    steps: the damped one, or the longest of some multiples of it at whose end the function still
    decreases. Two tasks in closed form: y_1 = y_2 for the normalized gradients.
    """

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return α."""
        C = definite(cosines(gramian), known.rounding)
        y = bargain_of_two(C) if C.shape[-1] == 2 else bargain(C, known.rounding)
        size: Tensor = torch.linalg.matrix_norm(gramian)[..., None].sqrt()
        weights: Tensor = size * from_normalized(y, gramian)
        return weights


def bargain_of_two(C: Tensor) -> Tensor:
    """Return what `bargain` does for two tasks, in closed form: y [..., 2]."""
    # The same of both: what differs would be multiplied by the condition of C.
    return (C.sum((-2, -1)) / 2.0).rsqrt()[..., None].expand(C.shape[:-1])


def bargain(C: Tensor, rounding: float) -> Tensor:
    """Return the y > 0 [..., K] of C y = 1/y, for definite cosines C."""
    y = torch.ones_like(C[..., 0])
    for _ in range(STEPS):
        slope = product(C, y) - 1.0 / y
        direction = solve(C + torch.diag_embed(1.0 / y**2), -slope)
        decrement = (-slope * direction).sum(-1, keepdim=True).clamp(min=0.0).sqrt()
        # A full step where convergence is sure to be quadratic.
        full = (decrement < 0.25) & is_within_bounds(y + direction, rounding)[..., None]
        damped = longest_downhill(C, y, direction, 1.0 / (1.0 + decrement), rounding)
        y = y + direction * torch.where(full, 1.0, damped)
        if host.may_read(C) and bool((full & (decrement < CONVERGED)).all()):
            break
    return y


def longest_downhill(
    C: Tensor, y: Tensor, direction: Tensor, damped: Tensor, rounding: float
) -> Tensor:
    """Return the largest step damped · 4^j at whose end ½ yᵀ C y − Σ log y decreases: [..., 1]."""
    steps = damped * 4.0 ** torch.arange(MULTIPLES, dtype=y.dtype, device=y.device)
    ahead = y[..., None, :] + steps[..., None] * direction[..., None, :]  # [..., multiples, K]
    slope = ahead @ C - 1.0 / ahead
    decreases = (slope * direction[..., None, :]).sum(-1) <= 0.0
    steps = torch.where(decreases & is_within_bounds(ahead, rounding), steps, 0.0)
    return steps.amax(-1, keepdim=True)


def is_within_bounds(y: Tensor, rounding: float) -> Tensor:
    """Return whether all y [..., K] are positive, and at most twice as large as a solution can be.

    A solution has yᵀ C y = K. Where rounding has left C indefinite there is none, and no bound.
    """
    return (y > 0.0).all(-1) & (rounding * (y * y).sum(-1) <= 4.0 * y.shape[-1])
