"""arbitrate: the resolution of conflicts on K×K numbers, in one program for each Gramian."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops import types
from gcond_kernels.ops.types import Arbitration, ArbitrationState, Settings
from gcond_kernels.triton_kernels.memory import uniform_mask

# K×K float64 numbers, eight of each matrix in a thread's registers.
MOST_TASKS = 64

# What a kernel reads must be a constant of Triton's.
RESIDUE = tl.constexpr(types.RESIDUE)
INFINITY = tl.constexpr(math.inf)
HALF_PI = tl.constexpr(math.pi / 2)
MILD, MODERATE, CRITICAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Offsets into the array of settings, in the order in which `arbitrate` writes them.
THETA_CRIT, THETA_MAIN, THETA_WEAK, TOLERANCE, REMAP_POWER = map(tl.constexpr, range(5))
STABILITY, STRENGTH, EMA_BETA, EMA_FLOOR, NORM_CAP, EPS = map(tl.constexpr, range(5, 11))


class Problem(NamedTuple):
    """What a resolution decides on; matrices and vectors are padded to a power of two."""

    S: Any  # [K, K], the Gramian
    X: Any  # [K, K], the cross-Gramian with the last step's gradients
    norms: Any  # [K], of the gradients
    average: Any  # [K], the moving averages of the norms
    history_gramian: Any  # [K, K], the Gramian of the last step
    history_coefficients: (
        Any  # [K, K], the coefficients of the history in the last step's gradients
    )


@triton.jit
def row_of(matrix, row):
    """Return one row of a matrix."""
    return tl.sum(tl.where(tl.arange(0, matrix.shape[0])[:, None] == row, matrix, 0.0), axis=0)


@triton.jit
def entry_of(vector, index):
    """Return one entry of a vector."""
    return tl.sum(tl.where(tl.arange(0, vector.shape[0]) == index, vector, 0.0), axis=0)


@triton.jit
def diagonal_of(matrix):
    """Return the diagonal of a matrix."""
    index = tl.arange(0, matrix.shape[0])
    return tl.sum(tl.where(index[:, None] == index[None, :], matrix, 0.0), axis=1)


@triton.jit
def with_row(matrix, row, values):
    """Return the matrix with one row replaced."""
    return tl.where(tl.arange(0, matrix.shape[0])[:, None] == row, values[None, :], matrix)


@triton.jit
def with_products(T, C, S, row):
    """Return T = C S Cᵀ after one row of C has changed: that row and that column are new."""
    by_S = tl.sum(S * row_of(C, row)[None, :], axis=1)
    products = tl.sum(C * by_S[None, :], axis=1)
    index = tl.arange(0, T.shape[0])
    T = tl.where(index[None, :] == row, products[:, None], T)
    return tl.where(index[:, None] == row, products[None, :], T)


@triton.jit
def squared_norms(C, T, norms):
    """Return T_ii, or exactly 0 where only rounding is left of it."""
    largest = tl.sum(tl.abs(C) * norms[None, :], axis=1)
    squares = diagonal_of(T)
    return tl.where(squares > largest * largest * RESIDUE, squares, 0.0)


@triton.jit
def worst_pair(T, squares):
    """Return the pair i < j of smallest cosine, the first one on a tie, and that cosine.

    The cosine is 1 if there is no pair.
    """
    SIZE: tl.constexpr = T.shape[0]
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    # Two roots: the product of two squares may leave the range of float64.
    roots = tl.sqrt(squares)
    lengths = roots[:, None] * roots[None, :]
    comparable = (i < j) & (lengths > 0.0)
    cosines = tl.where(comparable, T / tl.where(comparable, lengths, 1.0), 1.0)
    cosines = tl.maximum(cosines, -1.0)
    cosine = tl.min(tl.min(cosines, axis=1), axis=0)
    place = tl.where(comparable & (cosines == cosine), i * SIZE + j, SIZE * SIZE)
    first = tl.min(tl.min(place, axis=1), axis=0)
    return first // SIZE, first % SIZE, cosine


@triton.jit
def zone_of(cosine, settings_ptr, SMOOTH):
    """Return the zone of a cosine; θ_crit itself is critical in the smooth form alone."""
    critical, main = tl.load(settings_ptr + THETA_CRIT), tl.load(settings_ptr + THETA_MAIN)
    is_critical = cosine <= critical if SMOOTH else cosine < critical
    return tl.where(is_critical, CRITICAL, tl.where(cosine < main, MODERATE, MILD))


@triton.jit
def moving_average(old, norms, active, settings_ptr):
    """Return ν ← β ν + (1-β) n of active tasks; a ν of 0 has not started and becomes n."""
    beta, floor = tl.load(settings_ptr + EMA_BETA), tl.load(settings_ptr + EMA_FLOOR)
    moved = tl.where(old == 0.0, norms, beta * old + (1.0 - beta) * norms)
    return tl.where(active, tl.maximum(moved, floor), old)


@triton.jit
def stability(C, problem, square, task):
    """Return max(0, cos(g̃, h)) of a gradient and its history (eq. 7); 0 where h is rounding."""
    h = row_of(problem.history_coefficients, task)
    along_h = tl.sum(problem.X * h[None, :], axis=1)
    squared_h = tl.sum(tl.sum(problem.history_gramian * h[None, :], axis=1) * h, axis=0)
    largest = tl.sum(tl.abs(h) * tl.sqrt(diagonal_of(problem.history_gramian)), axis=0)
    product = tl.sum(row_of(C, task) * along_h, axis=0)
    lengths = square * squared_h
    comparable = (squared_h > largest * largest * RESIDUE) & (lengths > 0.0)
    cosine = product / tl.sqrt(tl.where(comparable, lengths, 1.0))
    return tl.where(comparable, tl.minimum(tl.maximum(cosine, 0.0), 1.0), 0.0)


@triton.jit
def relative_norm(square, average):
    """Return ‖g̃‖ relative to the task's average; 0 where there is no average."""
    known = average > 0.0
    return tl.where(known, tl.sqrt(square) / tl.where(known, average, 1.0), 0.0)


@triton.jit
def second_scores_higher(a, b, C, squares, problem, settings_ptr):
    """Return whether task b scores higher than a by stability and strength (eq. 7-9)."""
    floor, eps = tl.load(settings_ptr + EMA_FLOOR), tl.load(settings_ptr + EPS)
    square_a, square_b = entry_of(squares, a), entry_of(squares, b)
    r_a = relative_norm(square_a, entry_of(problem.average, a) + floor)
    r_b = relative_norm(square_b, entry_of(problem.average, b) + floor)
    by_stability, by_strength = tl.load(settings_ptr + STABILITY), tl.load(settings_ptr + STRENGTH)
    score_a = by_stability * stability(C, problem, square_a, a)
    score_b = by_stability * stability(C, problem, square_b, b)
    total = r_a + r_b + eps
    return score_b + by_strength * r_b / total > score_a + by_strength * r_a / total


@triton.jit
def unless_dominant(b_wins, a, b, recent, count, WINDOW):
    """Return whether b wins: not by score where one of the two won the whole window."""
    place, full = tl.arange(0, recent.shape[0]), count >= WINDOW
    others_than_a = tl.sum(tl.where((place < WINDOW) & (recent != a), 1, 0), axis=0)
    others_than_b = tl.sum(tl.where((place < WINDOW) & (recent != b), 1, 0), axis=0)
    return (b_wins & ~(full & (others_than_b == 0))) | (full & (others_than_a == 0))


@triton.jit
def smooth_shares(cosine, zone, settings_ptr):
    """Return which shares of their projection the winner and the loser give up."""
    critical, main = tl.load(settings_ptr + THETA_CRIT), tl.load(settings_ptr + THETA_MAIN)
    weak = tl.load(settings_ptr + THETA_WEAK)
    # x^p; x is in (0, 1) in the moderate zone, and not used in the others.
    x = tl.where(zone == MODERATE, (cosine - main) / (critical - main), 0.5)
    power = tl.exp(tl.load(settings_ptr + REMAP_POWER) * tl.log(x))
    moderate = tl.sin((1.0 + power) * HALF_PI)
    mild = tl.sin((1.0 - (cosine - main) / (weak - main)) * HALF_PI)
    of_winner = tl.where(zone == CRITICAL, 0.0, tl.where(zone == MODERATE, moderate, mild))
    return of_winner, tl.where(zone == MILD, mild, 1.0)


@triton.jit
def project(C, T, winner, loser, cosine, zone, settings_ptr, SMOOTH):
    """Return C after winner and loser were projected onto each other as far as the zone says."""
    if SMOOTH:
        of_winner, of_loser = smooth_shares(cosine, zone, settings_ptr)
    else:
        of_winner = tl.where(zone == MILD, 1.0, 0.0).to(tl.float64)
        of_loser = tl.where(zone == CRITICAL, 0.0, 1.0).to(tl.float64)
    T_winner = row_of(T, winner)
    T_wl = entry_of(T_winner, loser)
    by_loser = of_winner * (T_wl / entry_of(row_of(T, loser), loser))
    by_winner = of_loser * (T_wl / entry_of(T_winner, winner))
    C_winner, C_loser = row_of(C, winner), row_of(C, loser)
    new_loser = C_loser - by_winner * C_winner
    if not SMOOTH:
        new_loser = tl.where(zone == CRITICAL, 0.0, new_loser)
    C = with_row(C, winner, C_winner - by_loser * C_loser)
    return with_row(C, loser, new_loser)


@triton.jit
def store_event(events_ptr, iteration, a, b, cosine, winner, zone):
    """Write one event."""
    event_ptr = events_ptr + 5 * iteration
    tl.store(event_ptr, a.to(tl.float64))
    tl.store(event_ptr + 1, b.to(tl.float64))
    tl.store(event_ptr + 2, cosine)
    tl.store(event_ptr + 3, winner.to(tl.float64))
    tl.store(event_ptr + 4, zone.to(tl.float64))


@triton.jit
def resolve_conflicts(
    own, problem, recent, events_ptr, max_iterations, settings_ptr, WINDOW, SMOOTH
):
    """Remove the worst conflict until none is left, from gradients own_i · g_i on.

    Returns:
        C, the recent winners, and how many winners there were.
    """
    place, index = tl.arange(0, recent.shape[0]), tl.arange(0, own.shape[0])
    count = tl.sum(tl.where(recent >= 0, 1, 0), axis=0)
    C = tl.where(index[:, None] == index[None, :], own[:, None], 0.0)
    T = own[:, None] * problem.S * own[None, :]
    limit = tl.load(settings_ptr + THETA_WEAK) - tl.load(settings_ptr + TOLERANCE)
    squares = squared_norms(C, T, problem.norms)
    a, b, cosine = worst_pair(T, squares)
    iteration = max_iterations * 0
    while (iteration < max_iterations) & (cosine < limit):
        zone = zone_of(cosine, settings_ptr, SMOOTH)
        # In the mild zone of the older form there is no winner.
        chosen = zone >= MILD if SMOOTH else zone != MILD
        b_wins = second_scores_higher(a, b, C, squares, problem, settings_ptr)
        if WINDOW > 0:
            b_wins = unless_dominant(b_wins, a, b, recent, count, WINDOW)
        b_wins &= chosen
        winner, loser = tl.where(b_wins, b, a), tl.where(b_wins, a, b)
        if WINDOW > 0:
            recent = tl.where(chosen & (place == count % WINDOW), winner, recent)
            count += tl.where(chosen, 1, 0)
        store_event(events_ptr, iteration, a, b, cosine, tl.where(chosen, winner, -1), zone)
        C = project(C, T, winner, loser, cosine, zone, settings_ptr, SMOOTH)
        T = with_products(with_products(T, C, problem.S, winner), C, problem.S, loser)
        squares = squared_norms(C, T, problem.norms)
        a, b, cosine = worst_pair(T, squares)
        iteration += 1

    for start in range(5 * iteration, 5 * max_iterations, 64):
        rest = start + tl.arange(0, 64)
        # No global constant: Triton compares those between launches, and NaN differs from itself.
        nothing = tl.full([64], float("nan"), tl.float64)
        tl.store(events_ptr + rest, nothing, mask=rest < 5 * max_iterations)
    return C, recent, count


@triton.jit
def store_winners(winners_ptr, recent, count, is_finite, WINDOW):
    """Write the last winners, oldest first."""
    place = tl.arange(0, recent.shape[0])
    # Since the window was full, newer winners stand where the oldest stood.
    turn = tl.where(count > WINDOW, count % WINDOW, 0)
    oldest_first = (place + WINDOW - turn) % WINDOW
    stored = (place < WINDOW) & uniform_mask(is_finite, place)
    tl.store(winners_ptr + oldest_first, recent, mask=stored)


@triton.jit(do_not_specialize=["max_iterations"])
def arbitrate_kernel(  # noqa: PLR0913 - a kernel's launch takes no objects
    gramian_ptr,  # [B, K, K] float64, like all that are not said to be otherwise
    cross_ptr,  # [B, K, K], or None
    scale_ptr,  # [K], of all
    norm_ema_ptr,  # [B, K], state
    winners_ptr,  # [B, W] int64, state
    history_gramian_ptr,  # [B, K, K], state
    history_coefficients_ptr,  # [B, K, K], state
    history_scale_ptr,  # [K], state of all: each program writes the same, so that none may read it
    settings_ptr,  # [11]; a tensor, because arguments are float32
    weights_ptr,  # [B, K], written
    coefficients_ptr,  # [B, K, K], written
    events_ptr,  # [B, max_iterations, 5], written
    finite_ptr,  # [B] bool, written
    max_iterations,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_WINDOW: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    RESOLVED: tl.constexpr,
):
    """Resolve one Gramian (see `GCond`), and write the state for the next step."""
    entry = tl.program_id(0).to(tl.int64)
    index, place = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_WINDOW)
    i, j = index[:, None], index[None, :]
    vector_mask, matrix_mask = index < K, (i < K) & (j < K)
    vector, matrix = entry * K + index, entry * K * K + i * K + j

    # What is not finite is decided on as if there were no task at all, and no state is written.
    S = tl.load(gramian_ptr + matrix, mask=matrix_mask, other=0.0)
    is_finite = tl.sum(tl.sum(tl.where(tl.abs(S) < INFINITY, 0, 1), axis=1), axis=0) == 0
    S = tl.where(is_finite, S, 0.0)
    scale = tl.load(scale_ptr + index, mask=vector_mask, other=0.0)
    active = (scale != 0.0) & uniform_mask(is_finite, index)
    norms = tl.sqrt(diagonal_of(S))
    average = tl.load(norm_ema_ptr + vector, mask=vector_mask, other=0.0)
    average = moving_average(average, norms, active, settings_ptr)
    past_gramian = tl.load(history_gramian_ptr + matrix, mask=matrix_mask, other=0.0)
    past = tl.load(history_coefficients_ptr + matrix, mask=matrix_mask, other=0.0)
    X = tl.zeros([BLOCK_K, BLOCK_K], tl.float64)
    if cross_ptr is not None:
        X = tl.load(cross_ptr + matrix, mask=matrix_mask, other=0.0)
    problem = Problem(S, X, norms, average, past_gramian, past)
    recent = tl.load(winners_ptr + entry * WINDOW + place, mask=place < WINDOW, other=-1)
    own = tl.where(active, 1.0, 0.0).to(tl.float64)
    if CAP:
        cap = tl.load(settings_ptr + NORM_CAP)
        own = tl.where(norms > cap, own * (cap / norms), own)

    C, recent, count = resolve_conflicts(
        own,
        problem,
        recent,
        events_ptr + entry * 5 * max_iterations,
        max_iterations,
        settings_ptr,
        WINDOW,
        SMOOTH,
    )
    tl.store(weights_ptr + vector, tl.sum(C, axis=0), mask=vector_mask)
    tl.store(coefficients_ptr + matrix, C, mask=matrix_mask)
    tl.store(finite_ptr + entry, is_finite)

    # Several threads hold the same numbers: none may read the state after another wrote it.
    tl.debug_barrier()
    tl.store(norm_ema_ptr + vector, average, mask=vector_mask & uniform_mask(is_finite, index))
    if WINDOW > 0:
        store_winners(winners_ptr + entry * WINDOW, recent, count, is_finite, WINDOW)
    both_active = active[:, None] & active[None, :]
    tl.store(history_gramian_ptr + matrix, S, mask=matrix_mask & both_active)
    kept = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    if RESOLVED:
        kept = tl.where(active[:, None], C, kept)
    finite_mask = matrix_mask & uniform_mask(is_finite, matrix)
    tl.store(history_coefficients_ptr + matrix, kept, mask=finite_mask)
    tl.store(history_scale_ptr + index, scale, mask=vector_mask & active)


def warps_for(BLOCK_K: int) -> int:
    """Return the warps that hold a matrix [BLOCK_K, BLOCK_K], eight numbers in a thread."""
    return max(1, BLOCK_K * BLOCK_K // 256)


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Return the weights of the tasks and change the state; see `gcond_kernels.ops.arbitrate`."""
    (*batch, K, _), device, window = gramian.shape, gramian.device, state.winners.shape[-1]
    if K > MOST_TASKS:
        raise ValueError(
            f"backend='triton' arbitrates up to {MOST_TASKS} tasks, not {K}: use backend='python'"
        )
    values = (
        *settings.thresholds,
        settings.tolerance,
        settings.remap_power,
        *settings.tie_breaking_weights,
        settings.norm_ema_beta,
        settings.norm_ema_floor,
        0.0 if settings.norm_cap is None else settings.norm_cap,
        settings.eps,
    )
    on_device = tables.settings_tensor(tuple(map(float, values)), device)
    tables.keep_if_captured(on_device)
    iterations = int(settings.iterations(K))  # of a NumPy type, the interpreter would not take it
    decision = Arbitration(
        weights=torch.empty((*batch, K), dtype=torch.float64, device=device),
        coefficients=torch.empty((*batch, K, K), dtype=torch.float64, device=device),
        events=torch.empty((*batch, iterations, 5), dtype=torch.float64, device=device),
        finite=torch.empty(batch, dtype=torch.bool, device=device),
    )
    BLOCK_K = triton.next_power_of_2(K)
    with tables.guard(device):
        arbitrate_kernel[(math.prod(batch),)](
            gramian.contiguous(),
            None if cross is None else cross.contiguous(),
            scale,
            *state,
            on_device,
            *decision,
            iterations,
            K=K,
            BLOCK_K=BLOCK_K,
            WINDOW=window,
            BLOCK_WINDOW=triton.next_power_of_2(max(window, 1)),
            CAP=settings.norm_cap is not None,
            SMOOTH=settings.arbitration == "smooth",
            RESOLVED=settings.history == "resolved",
            num_warps=warps_for(BLOCK_K),
            enable_fp_fusion=False,
        )
    return decision
