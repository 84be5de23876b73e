"""Solvers of batches of K×K problems, in float64.

On a GPU they take a fixed number of steps, and never synchronize with the device; on a CPU they
stop when they have converged. They take cosines, Gramians of normalized gradients, so that
their accuracy does not depend on the scale of the gradients.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gcond_kernels.methods import host
from gcond_kernels.methods.host import Array, module_of

# Newton steps of the interior-point method. On 44,000 problems of 3 to 12 tasks, random, singular,
# nearly parallel and anti-parallel, with norms 1e12 apart, 20 left 45 with a residual above 1e-9,
# 25 none, 30 at most 2e-13; with the smaller eigenvalues of float64, 30 left 9, at most 8e-7.
STEPS = 30
# Fraction of the way to the boundary that a step may go.
TO_BOUNDARY = 0.99
# Turns of a path, for each task: of 80,000 paths of 2 to 12 tasks none took more than 1.7 with a
# radius of 0.5, and 2.5 with one of 2, but for one that cycled. Cut short, y is within the radius.
TURNS = 3
# An eigenvalue below this is rounding: for dependent normalized gradients the one that should be 0
# was 4.9e-7 at most, over 10,000 Gramians of 2 to 10 tasks and 1 to 300,000 elements.
FLOAT32_ROUNDING = 2.0**-20
FLOAT64_ROUNDING = 1e-12  # of Gramians that are exact in float64
# Most sweeps of Jacobi's method; K = 2, 3, 4 … take 3, 5, 7 …. On 50,000 matrices of each K up to 4
# they leave 4e-15 of the largest entry; where eigenvalues repeat 2e-11 for K = 12.
SWEEPS = 12


def identity(matrix: Array) -> Array:
    """Return the identity [K, K], of the type and on the device of a matrix [..., K, K]."""
    if isinstance(matrix, Tensor):
        return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return np.eye(matrix.shape[-1])


def product(matrix: Array, vector: Array) -> Array:
    """Return matrix · vector, [..., K], of [..., K, K] and [..., K]."""
    return (matrix @ vector[..., None])[..., 0]


def solve(matrix: Array, right: Array) -> Array:
    """Return the x [..., K] of matrix · x = right; not finite where the matrix is singular."""
    if not isinstance(matrix, Tensor):
        return host.solve(matrix, right)
    x: Tensor = torch.linalg.solve_ex(matrix, right[..., None])[0]
    return x[..., 0]


def solve_among(matrix: Tensor, right: Tensor, active: Tensor) -> Tensor:
    """Return the x [..., K] of matrix · x = right over `active` entries, and 0 elsewhere."""
    both = active[..., :, None] & active[..., None, :]
    x: Tensor = solve(torch.where(both, matrix, identity(matrix)), torch.where(active, right, 0.0))
    return x


def definite(C: Array, rounding: float) -> Array:
    """Return the cosines with each eigenvalue below `rounding` raised to it, for finite weights."""
    values, vectors = eigh(C)
    if host.may_read(C) and not (values < rounding).any():
        return C
    raised = module_of(C).clip(rounding - values, 0.0, None)  # added: the rest keeps its bits
    return C + (vectors * raised[..., None, :]) @ vectors.swapaxes(-1, -2)


def eigh(matrix: Array) -> tuple[Array, Array]:
    """Return eigenvalues [..., K], in no order, and eigenvectors (columns) [..., K, K]."""
    if isinstance(matrix, Tensor) and matrix.is_cuda:  # torch's would synchronize with the device
        return jacobi(matrix)
    values, vectors = module_of(matrix).linalg.eigh(matrix)
    return values, vectors


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `eigh` does, by rotations of disjoint pairs (Golub and Van Loan, 8.5)."""
    K = matrix.shape[-1]
    vectors = identity(matrix).expand(matrix.shape)
    for _ in range(min(2 * K - 1, SWEEPS)):
        for number in range(K - 1 + K % 2):
            p, q = pairs_of_round(number, K, matrix.device)
            rotation = jacobi_rotation(matrix, p, q)
            matrix = rotation.mT @ matrix @ rotation
            vectors = vectors @ rotation
    return matrix.diagonal(dim1=-2, dim2=-1), vectors


def pairs_of_round(number: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the disjoint pairs p < q of a round by the circle method, computed on the device.

    Each pair occurs once in all rounds: count - 1 of them, or `count` if that is odd.
    """
    turning = count - 1 + count % 2
    step = torch.arange(1, (count + 1) // 2, device=device)
    one, other = (number + step) % turning, (number - step) % turning
    if count % 2 == 0:
        one = torch.cat([one, one.new_full((1,), number)])
        other = torch.cat([other, other.new_full((1,), turning)])
    return torch.minimum(one, other), torch.maximum(one, other)


def jacobi_rotation(matrix: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return the rotation [..., K, K] that makes entries (p, q) of a symmetric matrix zero."""
    a_pq = matrix[..., p, q]
    difference = matrix[..., q, q] - matrix[..., p, p]
    # The smaller root t of t² + 2 θ t - 1 = 0 with θ = difference / (2 a_pq), without dividing by
    # an a_pq that may be 0.
    sign = torch.where(difference < 0.0, -torch.ones_like(difference), 1.0)
    divisor = difference.abs() + torch.hypot(difference, 2.0 * a_pq)
    t = torch.where(divisor > 0.0, sign * 2.0 * a_pq / divisor.clamp(min=1e-300), 0.0)
    c = torch.rsqrt(1.0 + t * t)
    rotation: Tensor = identity(matrix).repeat(*matrix.shape[:-2], 1, 1)
    rotation[..., p, p] = c
    rotation[..., q, q] = c
    rotation[..., p, q] = t * c
    rotation[..., q, p] = -t * c
    return rotation


def step_length(values: Tensor, direction: Tensor) -> Tensor:
    """Return the longest step in (0, 1] that keeps values above 0, by a margin: [..., 1]."""
    shrinks = direction < 0.0
    to_zero = torch.where(shrinks, -values / torch.where(shrinks, direction, -1.0), torch.inf)
    return (TO_BOUNDARY * to_zero.amin(-1, keepdim=True)).clamp(max=1.0)


def nonnegative_minimum(C: Array, q: Array) -> Array:
    """Return the x [..., K] ≥ 0 at which ½ xᵀ C x + qᵀ x is smallest, of definite cosines C."""
    return nonnegative_minima(C, q[..., None, :])[..., 0, :]


def nonnegative_minima(C: Array, q: Array) -> Array:
    """Return the x ≥ 0 [..., R, K] of `nonnegative_minimum`, for R problems q of each C."""
    if not host.may_read(q):
        return interior_minimum(C[..., None, :, :].expand(*q.shape, q.shape[-1]), q)
    K = q.shape[-1]
    matrices, right = np.asarray(C).reshape(-1, K, K), np.asarray(q).reshape(-1, *q.shape[-2:])
    x, left = host.nonnegative_minima(matrices, right)
    if left.any():
        batch, problem = left.nonzero()
        rest = torch.from_numpy(matrices[batch]), torch.from_numpy(right[batch, problem])
        x[batch, problem] = interior_minimum(*rest).numpy()
    x = x.reshape(q.shape)
    return torch.from_numpy(x) if isinstance(q, Tensor) else x


def interior_minimum(C: Tensor, q: Tensor) -> Tensor:
    """Return what `nonnegative_minimum` does, in a fixed number of steps.

    Mehrotra's predictor-corrector method (Nocedal and Wright, Numerical Optimization, 16.6), and
    last the linear system of the entries that are not 0, to remove the method's own error.
    """
    unit = q.abs().amax(-1, keepdim=True)  # x scales with q
    unit = torch.where(unit > 0.0, unit, 1.0)
    q = q / unit
    x, z = torch.ones_like(q), torch.ones_like(q)
    for _ in range(STEPS):
        gap = (x * z).mean(-1, keepdim=True)
        residual = product(C, x) + q
        system = C + torch.diag_embed(z / x)
        predicted = solve(system, -residual)
        predicted_z = -z - z / x * predicted
        steps = step_length(x, predicted), step_length(z, predicted_z)
        left = ((x + steps[0] * predicted) * (z + steps[1] * predicted_z)).mean(-1, keepdim=True)
        target = (left / gap).clamp(0.0, 1.0) ** 3 * gap
        complement = (target - predicted * predicted_z) / x
        dx = solve(system, complement - residual)
        dz = complement - z - z / x * dx
        step = torch.minimum(step_length(x, dx), step_length(z, dz))
        # Once the gap is only rounding the system may be singular: then x and z stay.
        sound = (dx.isfinite() & dz.isfinite()).all(-1, keepdim=True)
        x = torch.where(sound, x + step * dx, x).clamp(min=1e-280)
        z = torch.where(sound, z + step * dz, z).clamp(min=1e-280)
    exact = solve_among(C, -q, x > z)
    slope = product(C, exact) + q
    tolerance = 1e-9 * (1.0 + exact.abs().amax(-1, keepdim=True))
    is_minimum = ((exact >= 0.0) & (slope >= -tolerance)).all(-1, keepdim=True)
    return unit * torch.where(is_minimum, exact, torch.where(x > z, x, 0.0))


def best_for_the_worst(C: Array, b: Array, a: Array, radius: float) -> Array:
    """Return the y [..., K] ≥ 0 with norm `radius` whose smallest (C y + b)_i / a_i is largest.

    C are definite cosines, a > 0, and the norm of y is √(yᵀ C y).
    """
    K = b.shape[-1]
    if K == 2:
        return best_for_the_worst_of_two(C, b, a, radius)
    if not host.may_read(b):
        return path_to_the_best(C, b, a, radius)
    problems = C.reshape(-1, K, K), b.reshape(-1, K), a.reshape(-1, K)
    matrices, bounds, scales = (np.asarray(each) for each in problems)
    y, left = host.best_for_the_worst(matrices, bounds, scales, radius)
    if left.any():
        C_left, b_left, a_left = (torch.from_numpy(x[left]) for x in (matrices, bounds, scales))
        y[left] = path_to_the_best(C_left, b_left, a_left, radius).numpy()
    y = y.reshape(b.shape)
    return torch.from_numpy(y) if isinstance(b, Tensor) else y


def best_for_the_worst_of_two(C: Array, b: Array, a: Array, radius: float) -> Array:
    """Return what `best_for_the_worst` does for two tasks, in closed form: y [..., 2].

    One of them alone, or both of the bounds are tight: then g = Σ y_i ĝ_i is known in the direction
    h = a_2 ĝ_1 − a_1 ĝ_2, and goes as far as the radius allows in the direction across it.
    """
    module = module_of(b)
    d, o = C[..., 0, 0, None], C[..., 0, 1, None]
    other_a, other_b = module.flip(a, (-1,)), module.flip(b, (-1,))
    alone = radius / module.sqrt(d)
    enough = a * (o * alone + other_b) >= other_a * (d * alone + b)
    away = a - other_a
    h = (d - o) * (a * a).sum(-1)[..., None] + o * away * away  # ‖h‖²
    difference = a * other_b - other_a * b
    across = (d - o) * a + o * away
    room = radius**2 - difference * difference / h
    room = module.where(room > 0.0, room, 0.0)
    both = difference * other_a / h
    both = both + across * module.sqrt(room / ((d - o) * (d + o) * h))
    both = module.where(both > 0.0, both, 0.0)
    one = module.where(enough, alone, 0.0)
    # Where each alone is enough, they are the same but for rounding.
    one = one / module.where(enough.all(-1)[..., None], 2.0, 1.0)
    return module.where(enough.any(-1)[..., None], one, both)


def path_to_the_best(C: Tensor, b: Tensor, a: Tensor, radius: float) -> Tensor:
    """Return what `best_for_the_worst` does, in a fixed number of turns.

    For a lower bound τ of all (C y + b)_i / a_i the y of least norm is piecewise linear in τ. It is
    followed from the τ at which y = 0 is enough, until its norm is the radius (as in least angle
    regression: Efron et al. 2004): where a bound becomes tight its y_i starts to grow, where a y_i
    returns to 0 its bound is dropped. That is exact, after about K to 2 K turns.
    """
    tasks = torch.arange(C.shape[-1], device=C.device)
    tau, first = (b / a).min(-1, keepdim=True)
    tight = tasks == first  # [..., K]
    y, done = torch.zeros_like(b), torch.zeros_like(first, dtype=torch.bool)
    for _ in range(TURNS * C.shape[-1]):
        # y = τ p - s, and the distance to the bounds is τ (C p - a) + b - C s.
        p, s = solve_among(C, a, tight), solve_among(C, b, tight)
        Cp, Cs = product(C, p), product(C, s)
        closing = ~tight & (Cp - a < -1e-12 * a)
        enters = torch.where(closing, (b - Cs) / torch.where(closing, a - Cp, 1.0), torch.inf)
        leaving = tight & (p < 0.0)
        leaves = torch.where(leaving, s / torch.where(leaving, p, -1.0), torch.inf)
        turn, index = torch.minimum(enters, leaves).min(-1, keepdim=True)
        turn = torch.maximum(turn, tau)
        # The larger τ at which y has the norm `radius`.
        pp, ps, ss = ((u * Cv).sum(-1, keepdim=True) for u, Cv in ((p, Cp), (p, Cs), (s, Cs)))
        end = (ps + (ps**2 - pp * (ss - radius**2)).clamp(min=0.0).sqrt()) / pp
        end = torch.maximum(torch.where(pp > 0.0, end, torch.nan), tau)
        last = ~(turn < end)
        step = torch.where(last, end, turn) * p - s
        # Where rounding leaves no finite step y stays.
        y = torch.where(done | ~step.isfinite().all(-1, keepdim=True), y, step)
        done = done | last
        tau = torch.where(done, tau, turn)
        tight = torch.where(done, tight, tight ^ (tasks == index))
        if host.may_read(done) and bool(done.all()):
            break
    return y.clamp(min=0.0)
