"""What methods compute on the host: on a CPU, whose tensors may be read at any time.

An operation of NumPy on K×K numbers takes a fraction of the time of torch's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcond_kernels.ops import random

# A tensor, or on a CPU a NumPy array, with the operations that both have in common.
Array: TypeAlias = Any
Numbers = NDArray[np.float64]
Mask = NDArray[np.bool_]

# Turns in which all wrong entries change sides, and those in which one does, before it gives up.
TURNS_OF_ALL, TURNS_OF_ONE = 20, 40
# Numbers in the systems that are solved together: they fit in a cache.
SOLVED_AT_ONCE = 2**18
# Numbers in systems that are all solved, without a choice of rows and columns.
SMALL = 2**12
# A slope above minus this, relative to x, is rounding.
SLOPE = 1e-13


def module_of(array: Array) -> Any:
    """Return the module that has the functions of an array: torch or NumPy."""
    return torch if isinstance(array, Tensor) else np


def in_numpy(weights: Callable[..., Array]) -> Callable[..., Tensor]:
    """Return a method's `weights` that is given NumPy arrays where the Gramian lies on a CPU."""

    @functools.wraps(weights)
    def run(method: object, *given: object) -> Tensor:
        if not may_read(given[0]):
            found: Tensor = weights(method, *given)
            return found
        arrays = [each.numpy() if isinstance(each, Tensor) else each for each in given]
        with np.errstate(all="ignore"):
            return torch.from_numpy(weights(method, *arrays))

    return run


def may_read(array: Array) -> bool:
    """Return whether reading the values of an array synchronizes with no device."""
    if not isinstance(array, Tensor):
        return True
    return array.device.type == "cpu" and not torch.compiler.is_compiling()


def projected(gramian: Numbers, order: NDArray[np.int64]) -> Numbers:
    """Return what `pcgrad.projected` does: the coefficients [..., K, K], to the same bits."""
    K = gramian.shape[-1]
    tasks = np.arange(K)
    # Row i: the Gramian's rows in the order of task i, and S_jj, infinite where it is skipped.
    products = np.take_along_axis(gramian[..., None, :, :], order[..., None], -2)  # [..., i, p, k]
    squares = np.take_along_axis(products, order[..., None], -1)[..., 0]
    squares[(squares <= 0.0) | (order == tasks[:, None])] = np.inf
    C: Numbers = np.broadcast_to(np.eye(K), gramian.shape).copy()
    for p in range(K):
        product = (C * products[..., p, :]).sum(-1)
        step = np.minimum(product, 0.0) / squares[..., p]
        C -= np.where(order[..., p, None] == tasks, step[..., None], 0.0)
    return C


def random_orders(shape: tuple[int, ...], seed: int, counter: int) -> NDArray[np.int64]:
    """Return what `pcgrad.random_orders` does, for Gramians of a shape [..., K, K]."""
    origin = np.array([(counter * random.GAMMA + seed) % 2**64], dtype=np.uint64)
    places = np.arange(1, math.prod(shape) + 1, dtype=np.uint64).reshape(shape)
    bits = mixed(mixed(origin) + places * np.uint64(random.GAMMA))
    # The bits of which `random.uniform` makes its numbers: the same order.
    bits = bits >> np.uint64(64 - random.RANDOM_BITS)
    order: NDArray[np.int64] = bits.argsort(axis=-1, kind="stable")
    return order


def mixed(bits: Any) -> Any:
    """Return what `random.mixed` does, of uint64 numbers."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(random.FIRST_FACTOR)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(random.SECOND_FACTOR)
    return bits ^ (bits >> np.uint64(31))


@np.errstate(all="ignore")
def nonnegative_minima(C: Numbers, q: Numbers) -> tuple[Numbers, Mask]:
    """Return what `solvers.nonnegative_minima` does, and which of them were not found [B, R].

    C are cosines [B, K, K], each of R problems q [B, R, K]. Block principal pivoting (Júdice and
    Pires 1994): a guess which entries are free (the others are 0) is solved for, and all entries
    with a wrong sign, of x or of the slope, change sides; after some turns the last of them alone.
    """
    free, x = q < 0.0, np.zeros_like(q)
    left = np.ones(q.shape[:-1], dtype=bool)
    size = np.abs(q).max(-1, keepdims=True)
    for turn in range(TURNS_OF_ALL + TURNS_OF_ONE):
        solve_among(C, -q, free, left, x)
        slope = x @ C + q
        rounding = SLOPE * (size + x.max(-1, keepdims=True))
        wrong = np.where(free, x < 0.0, slope < -rounding)
        left[...] = wrong.any(-1)
        if not left.any():
            break
        free ^= wrong if turn < TURNS_OF_ALL else last_of(wrong)
    return x, left | ~np.isfinite(x).all(-1)


@np.errstate(all="ignore")
def best_for_the_worst(C: Numbers, b: Numbers, a: Numbers, radius: float) -> tuple[Numbers, Mask]:
    """Return what `solvers.best_for_the_worst` does of [P, K], and which were not found [P].

    The norm of the least y with all bounds (C y + b)_i ≥ τ a_i is convex in τ: Newton's method
    finds the τ at which it is the radius. Which bounds are tight at a τ, where y = τ p − s, is
    guessed, and the guess improved, as in `nonnegative_minima`.
    """
    tight, left = b < 0.0, np.ones(len(b), dtype=bool)
    both = np.stack([a, b], 1)
    systems = np.zeros_like(both)  # p and s, [P, 2, K]
    tau = ((radius + b) / a).min(-1, keepdims=True)  # at least the best
    for turn in range(TURNS_OF_ALL + TURNS_OF_ONE):
        for system in (0, 1):
            solve_among(
                C, both[:, system, None], tight[:, None], left[:, None], systems[:, system, None]
            )
        products = systems @ C
        end, is_last = tau_of_radius(systems, products, tau, radius)
        solved = ~wrong_bounds(both, systems, products, tau, tight).any(-1, keepdims=True)
        tau = np.where(solved & left[:, None], end, tau)
        wrong = wrong_bounds(both, systems, products, tau, tight)
        left &= wrong.any(-1) | ~(solved & is_last)[:, 0]
        if not left.any():
            break
        tight ^= wrong if turn < TURNS_OF_ALL else last_of(wrong)
    y = tau * systems[:, 0] - systems[:, 1]
    return y, left | ~np.isfinite(y).all(-1)


def tau_of_radius(
    systems: Numbers, products: Numbers, tau: Numbers, radius: float
) -> tuple[Numbers, Mask]:
    """Return the larger τ [P, 1] at which y = τ p − s has this norm, and where there is one.

    Where there is none: where the tangent at the given τ has it, which is nearer to the best.
    """
    pp, ps = np.moveaxis((systems[:, :1] * products).sum(-1), 1, 0)[..., None]
    ss = (systems[:, 1] * products[:, 1]).sum(-1)[:, None]
    end = (ps + np.sqrt(ps**2 - pp * (ss - radius**2))) / pp
    norm, slope = np.sqrt(tau * (tau * pp - 2.0 * ps) + ss), tau * pp - ps
    return np.where(np.isfinite(end), end, tau - (norm - radius) * norm / slope), np.isfinite(end)


def wrong_bounds(
    both: Numbers, systems: Numbers, products: Numbers, tau: Numbers, tight: Mask
) -> Mask:
    """Return where y is negative, and where a bound that is not tight does not hold: [P, K]."""
    (a, b), y = np.moveaxis(both, 1, 0), tau * systems[:, 0] - systems[:, 1]
    rounding = SLOPE * (a * np.abs(tau) + np.abs(b) + np.abs(y).max(-1, keepdims=True))
    beyond = tau * (products[:, 0] - a) + b - products[:, 1]
    wrong: Mask = np.where(tight, y < 0.0, beyond < -rounding)
    return wrong


def last_of(wrong: Mask) -> Mask:
    """Return a mask [..., K] of the last entry of each that is true."""
    index = wrong.shape[-1] - 1 - wrong[..., ::-1].argmax(-1)[..., None]
    last: Mask = wrong & (np.arange(wrong.shape[-1]) == index)
    return last


def solve_among(C: Numbers, right: Numbers, free: Mask, left: Mask, x: Numbers) -> None:
    """Solve C x = right over the `free` entries [B, R, K], where `left` [B, R]; x is 0 elsewhere.

    Of large systems as many rows and columns are solved for as the one with the most free entries
    has; of small ones, where choosing costs more than solving, all.
    """
    if free.size * free.shape[-1] <= SMALL:
        both = free[..., :, None] & free[..., None, :]
        matrix = np.where(both, C[:, None], np.eye(free.shape[-1]))
        x[...] = solve(matrix, np.where(free, right, 0.0))
        return
    batch, problem = left.nonzero()
    most = int(free.sum(-1).max())
    at_once = max(1, SOLVED_AT_ONCE // max(1, most * most))
    for start in range(0, len(batch), at_once):
        b, r = batch[start : start + at_once, None], problem[start : start + at_once, None]
        mask = free[b[:, 0], r[:, 0]]
        entries = (~mask).argsort(axis=-1, kind="stable")[:, :most]  # the free ones first
        kept = mask[np.arange(len(mask))[:, None], entries]
        matrix = C[b[..., None], entries[:, :, None], entries[:, None, :]]
        matrix = np.where(kept[:, :, None] & kept[:, None, :], matrix, np.eye(most))
        x[b, r] = 0.0
        x[b, r, entries] = solve(matrix, right[b, r, entries] * kept)


def solve(matrix: Numbers, right: Numbers) -> Numbers:
    """Return the x [..., K] of matrix · x = right; NaN where one of the matrices is singular."""
    try:
        x = np.linalg.solve(matrix, right[..., None])[..., 0]
    except np.linalg.LinAlgError:
        x = np.full_like(right, np.nan)
    return np.asarray(x, dtype=np.float64)
