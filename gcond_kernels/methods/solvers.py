"""Solvers of K×K problems that never ask the host: a fixed number of steps, whole batches at once.

All of them take Gramians of gradients at length 1 (cosines), so that no scale of the gradients
spoils their numbers, and work in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Newton steps of the interior-point method, then the linear system is solved. On 44,000 problems of
# 3 to 12 tasks, random, singular, nearly parallel and anti-parallel, with lengths 1e12 apart, 20
# left 45 of them with a residual above 1e-9 at gradients of length 1, 25 none, 30 at most 2e-13. In
# float64 alone, with its smaller eigenvalues, 30 left 9 of them, at most 8e-7.
STEPS = 30
# Of the way to the boundary, how far a step may go.
TO_BOUNDARY = 0.99
# Turns of a path, for each task: of 80,000 paths of 2 to 12 tasks none took more than 1.7 with a
# radius of 0.5, and 2.5 with one of 2, but for one that went in circles among ties. A path that is
# not followed to its end has a y within the radius all the same.
TURNS = 3
# The inner products are sums of float32 partial sums: of gradients at length 1 that depend on each
# other the eigenvalue that should be 0 was 4.9e-7 at most, over 10,000 Gramians of 2 to 10 tasks
# and 1 to 300,000 elements. Below this an eigenvalue is their rounding.
FLOAT32_ROUNDING = 2.0**-20
# Of Gramians that are exact in float64.
FLOAT64_ROUNDING = 1e-12
# Sweeps of Jacobi's method, of K = 2, 3, 4 … 3, 5, 7 … and no more than this. On 50,000 matrices of
# each K up to 4 they leave rounding alone, 4e-15 of the largest entry. Where eigenvalues repeat, as
# 0 does in a singular matrix, it gets there more slowly, and leaves 2e-11 of K = 12.
SWEEPS = 12


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [..., K], in no order, and eigenvectors (columns) [..., K, K].

    `torch.linalg.eigh` makes the host wait for a GPU: there it is Jacobi's method.
    """
    if matrix.is_cuda:
        return jacobi(matrix)
    values, vectors = torch.linalg.eigh(matrix)
    return values, vectors


def definite(C: Tensor, rounding: float) -> Tensor:
    """The cosines with no eigenvalue below `rounding`: what may be nothing else is raised to that.

    So gradients that cancel out, as far as can be told, keep weights that can be added up.
    """
    values, vectors = eigh(C)
    raised = (rounding - values).clamp(min=0.0)  # to be added: the rest keeps its own rounding
    return C + (vectors * raised[..., None, :]) @ vectors.mT


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors by rotations of K/2 disjoint pairs at a time.

    (Golub and Van Loan, Matrix Computations, 8.5.)
    """
    K = matrix.shape[-1]
    vectors = identity(matrix).expand(matrix.shape)
    for _ in range(min(2 * K - 1, SWEEPS)):
        for number in range(K - 1 + K % 2):
            p, q = pairs_of_round(number, K, matrix.device)
            rotation = jacobi_rotation(matrix, p, q)
            matrix = rotation.mT @ matrix @ rotation
            vectors = vectors @ rotation
    return matrix.diagonal(dim1=-2, dim2=-1), vectors


def identity(matrix: Tensor) -> Tensor:
    """[K, K] the identity, of the type and on the device of a matrix [..., K, K]."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def pairs_of_round(number: int, players: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Disjoint pairs p < q: in players - 1 rounds, or players if they are odd, all meet once.

    The circle method: one stays (or, of odd ones, sits out), the others turn. By arithmetic on the
    device, for a copy from the host would make it wait.
    """
    turning = players - 1 + players % 2
    step = torch.arange(1, (players + 1) // 2, device=device)
    one, other = (number + step) % turning, (number - step) % turning
    if players % 2 == 0:
        one = torch.cat([one, one.new_full((1,), number)])
        other = torch.cat([other, other.new_full((1,), turning)])
    return torch.minimum(one, other), torch.maximum(one, other)


def jacobi_rotation(matrix: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """The rotation [..., K, K] that makes the entries (p, q) of a symmetric matrix zero."""
    a_pq = matrix[..., p, q]
    difference = matrix[..., q, q] - matrix[..., p, p]
    # The smaller root t of t² + 2 θ t - 1 = 0 with θ = difference / (2 a_pq), without dividing by
    # an a_pq that may be 0.
    sign = torch.where(difference < 0.0, -torch.ones_like(difference), 1.0)
    divisor = difference.abs() + torch.hypot(difference, 2.0 * a_pq)
    t = torch.where(divisor > 0.0, sign * 2.0 * a_pq / divisor.clamp(min=1e-300), 0.0)
    c = torch.rsqrt(1.0 + t * t)
    rotation = identity(matrix).repeat(*matrix.shape[:-2], 1, 1)
    rotation[..., p, p] = c
    rotation[..., q, q] = c
    rotation[..., p, q] = t * c
    rotation[..., q, p] = -t * c
    return rotation


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The x [..., K] of matrix · x = right; not finite where the matrix is singular."""
    x: Tensor = torch.linalg.solve_ex(matrix, right[..., None])[0]
    return x[..., 0]


def step_length(values: Tensor, direction: Tensor) -> Tensor:
    """[..., 1] the longest step in (0, 1] that keeps values above 0, by a margin."""
    shrinking = direction < 0.0
    room = torch.where(shrinking, -values / torch.where(shrinking, direction, -1.0), torch.inf)
    return (TO_BOUNDARY * room.amin(-1, keepdim=True)).clamp(max=1.0)


def nonnegative_minimum(C: Tensor, q: Tensor) -> Tensor:
    """The x [..., K] ≥ 0 at which ½ xᵀ C x + qᵀ x is smallest.

    Mehrotra's predictor-corrector method (Nocedal and Wright, Numerical Optimization, 16.6), and at
    last the linear system of the entries that are not 0, which leaves no rounding but its own.

    Args:
        C: [..., K, K], positive definite, of unit diagonal.
        q: [..., K].
    """
    # Where q has another size than 1, so has x.
    unit = q.abs().amax(-1, keepdim=True)
    unit = torch.where(unit > 0.0, unit, 1.0)
    q = q / unit
    x, z = torch.ones_like(q), torch.ones_like(q)
    for _ in range(STEPS):
        gap = (x * z).mean(-1, keepdim=True)
        residual = (C @ x[..., None])[..., 0] + q
        system = C + torch.diag_embed(z / x)
        straight = solve(system, -residual)
        straight_z = -z - z / x * straight
        ahead = step_length(x, straight), step_length(z, straight_z)
        left = ((x + ahead[0] * straight) * (z + ahead[1] * straight_z)).mean(-1, keepdim=True)
        target = (left / gap).clamp(0.0, 1.0) ** 3 * gap
        complement = (target - straight * straight_z) / x
        dx = solve(system, complement - residual)
        dz = complement - z - z / x * dx
        step = torch.minimum(step_length(x, dx), step_length(z, dz))
        # Once the gap is rounding alone the system may be singular: what is there is kept.
        sound = (dx.isfinite() & dz.isfinite()).all(-1, keepdim=True)
        x = torch.where(sound, x + step * dx, x).clamp(min=1e-280)
        z = torch.where(sound, z + step * dz, z).clamp(min=1e-280)
    return unit * polished(C, q, x, x > z)


def polished(C: Tensor, q: Tensor, x: Tensor, free: Tensor) -> Tensor:
    """The exact minimum where the entries that are not `free` are 0, if it is one; else x."""
    both = free[..., :, None] & free[..., None, :]
    exact = solve(torch.where(both, C, identity(C)), torch.where(free, -q, 0.0))
    slope = (C @ exact[..., None])[..., 0] + q
    tolerance = 1e-9 * (1.0 + exact.abs().amax(-1, keepdim=True))
    is_minimum = ((exact >= 0.0) & (slope >= -tolerance)).all(-1, keepdim=True)
    return torch.where(is_minimum, exact, torch.where(free, x, 0.0))


def best_for_the_worst(C: Tensor, b: Tensor, a: Tensor, radius: float) -> Tensor:
    """The y [..., K] ≥ 0 as long as the radius whose smallest (C y + b)_i / a_i is largest.

    Its length is √(yᵀ C y).
    For a bound τ from below on all (C y + b)_i / a_i the shortest y is piecewise linear in τ. It is
    followed from the τ at which y = 0 will do, until it is so long (as least angle regression
    follows a path: Efron et al. 2004): where a bound becomes tight its y_i starts to grow, where a
    y_i gets back to 0 its bound is let go. That is exact, after some K to 2 K turns.

    Args:
        C: [..., K, K], positive definite, of unit diagonal.
        b: [..., K].
        a: [..., K], above 0.
        radius: above 0.
    """
    tasks = torch.arange(C.shape[-1], device=C.device)
    tau, first = (b / a).min(-1, keepdim=True)
    tight = tasks == first  # [..., K]
    y, done = torch.zeros_like(b), torch.zeros_like(first, dtype=torch.bool)
    for _ in range(TURNS * C.shape[-1]):
        # y = τ p - s, and what is left above the bounds is τ (C p - a) + b - C s.
        p, s = on_the_tight(C, a, tight), on_the_tight(C, b, tight)
        Cp, Cs = (C @ p[..., None])[..., 0], (C @ s[..., None])[..., 0]
        closing = ~tight & (Cp - a < -1e-12 * a)
        enters = torch.where(closing, (b - Cs) / torch.where(closing, a - Cp, 1.0), torch.inf)
        leaving = tight & (p < 0.0)
        leaves = torch.where(leaving, s / torch.where(leaving, p, -1.0), torch.inf)
        turn, which = torch.minimum(enters, leaves).min(-1, keepdim=True)
        turn = torch.maximum(turn, tau)
        reached = torch.maximum(longest_within(p, Cp, s, Cs, radius), tau)
        last = ~(turn < reached)  # or rounding has the last word: then y stays as it is
        step = torch.where(last, reached, turn) * p - s
        y = torch.where(done | ~step.isfinite().all(-1, keepdim=True), y, step)
        done = done | last
        tau = torch.where(done, tau, turn)
        tight = torch.where(done, tight, tight ^ (tasks == which))
    return y.clamp(min=0.0)


def on_the_tight(C: Tensor, right: Tensor, tight: Tensor) -> Tensor:
    """Product of C⁻¹ and `right` among the entries that are `tight`; 0 elsewhere."""
    both = tight[..., :, None] & tight[..., None, :]
    return solve(torch.where(both, C, identity(C)), torch.where(tight, right, 0.0))


def longest_within(p: Tensor, Cp: Tensor, s: Tensor, Cs: Tensor, radius: float) -> Tensor:
    """The larger τ [..., 1] at which τ p - s is as long as the radius; NaN if p has no length."""
    pp, ps = (p * Cp).sum(-1, keepdim=True), (p * Cs).sum(-1, keepdim=True)
    ss = (s * Cs).sum(-1, keepdim=True)
    tau = (ps + (ps**2 - pp * (ss - radius**2)).clamp(min=0.0).sqrt()) / pp
    return torch.where(pp > 0.0, tau, torch.nan)
