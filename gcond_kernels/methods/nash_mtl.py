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
# Multiples of the damped step that are tried: where gradients nearly cancel out the solution is far
# larger than its start, and the damped step at most doubles it.
MULTIPLES = 12
# A full step after which no entry has changed by this much leaves rounding: it would square it.
CONVERGED = 1e-8


@dataclass(frozen=True)
class NashMTL(Method):
    """Take the Nash bargaining solution: no task gains as much, relatively, as the others lose.

    A. Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022, arXiv 2202.01017:
    S α = 1/α, α > 0. S is divided by its Frobenius norm before, so that the scale of the gradients
    does not change the weights. The weights of the authors' code are these divided by the root of
    that norm, so that the result has the norm √K for all gradients, and is then clipped to 1;
    `max_norm` of GCondFused does that. Two tasks in closed form: y_1 = y_2 for the normalized
    gradients.
    """

    follows_loss_weights = False

    def weights(self, gramian: Tensor, state: State, known: Known) -> Tensor:
        """Return α."""
        C = definite(cosines(gramian), known.rounding)
        ones = torch.ones_like(C[..., 0])
        two = C.shape[-1] == 2
        y = bargain_of_two(C) if two else bargain(C, ones, 1.0, known.rounding, ones)
        size: Tensor = torch.linalg.matrix_norm(gramian)[..., None].sqrt()
        weights: Tensor = size * from_normalized(y, gramian)
        return weights


def bargain_of_two(C: Tensor) -> Tensor:
    """Return the y [..., 2] of C y = 1/y for two tasks, in closed form."""
    # The same of both: what differs would be multiplied by the condition of C.
    return (C.sum((-2, -1)) / 2.0).rsqrt()[..., None].expand(C.shape[:-1])


def bargain(
    C: Tensor, unit: Tensor, power: float, rounding: float, start: Tensor, steps: int = STEPS
) -> Tensor:
    """Return the v > 0 of C (u ∘ v) = u / v^p, [..., K].

    It is where the convex ½ yᵀ C y − Σ u_k² ∫ v_k^−p, with y = u ∘ v, is smallest. Newton steps: a
    full one near the solution, else the one that is sure to go downhill, or the longest of some
    multiples of it at whose end the function still decreases. Where no entry changes by more than a
    share t of itself, the second derivative grows by (1 − t)^−(p + 1) at most, whence the step that
    is sure; for p = 1, a self-concordant function, it is the damped one (Boyd and Vandenberghe,
    Convex Optimization, 9.6).

    Args:
        C: definite, [..., K, K].
        unit: u > 0, [..., K].
        power: p > 0.
        rounding: no eigenvalue of C is smaller.
        start: v > 0 to begin with, [..., K].
        steps: the most Newton steps; on a CPU it stops when it has converged.
    """
    v = start
    for _ in range(steps):
        slope = product(C, unit * v) - unit * v**-power
        direction = solve(C + torch.diag_embed(power * v ** -(power + 1.0)), -slope)
        share = (direction / (unit * v)).abs().amax(-1, keepdim=True).clamp(min=1e-300)
        sure = -torch.expm1(torch.log1p(power * share) / -power) / share
        # A full step where convergence is sure to be quadratic.
        full = (power + 1.0) * share < 0.5
        full = full & is_within_bounds(v + direction / unit, unit, power, rounding)[..., None]
        downhill = longest_downhill(C, unit, v, direction, sure, power, rounding)
        v = v + direction / unit * torch.where(full, 1.0, downhill)
        if host.may_read(C) and bool((full & (share < CONVERGED)).all()):
            break
    return v


def longest_downhill(
    C: Tensor,
    unit: Tensor,
    v: Tensor,
    direction: Tensor,
    sure: Tensor,
    power: float,
    rounding: float,
) -> Tensor:
    """Return the largest step sure · 4^j at whose end the function still decreases: [..., 1]."""
    steps = sure * 4.0 ** torch.arange(MULTIPLES, dtype=v.dtype, device=v.device)
    unit = unit[..., None, :]
    ahead = v[..., None, :] + steps[..., None] * direction[..., None, :] / unit  # [..., steps, K]
    slope = (unit * ahead) @ C - unit * ahead**-power
    decreases = (slope * direction[..., None, :]).sum(-1) <= 0.0
    steps = torch.where(decreases & is_within_bounds(ahead, unit, power, rounding), steps, 0.0)
    return steps.amax(-1, keepdim=True)


def is_within_bounds(v: Tensor, unit: Tensor, power: float, rounding: float) -> Tensor:
    """Return whether all v [..., K] are positive, and at most twice as large as a solution can be.

    A solution has yᵀ C y = Σ u_k² v_k^(1−p), with y = u ∘ v. Where rounding has left C indefinite
    there is none, and no bound.
    """
    squares = unit * unit
    largest = 4.0 * (squares * v.abs() ** (1.0 - power)).sum(-1)
    return (v > 0.0).all(-1) & (rounding * (squares * v * v).sum(-1) <= largest)
