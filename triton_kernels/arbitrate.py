"""arbitrate: the resolution itself, on K×K numbers, in one program that never asks the host."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gcond_kernels.ops import launch_tables as tables
from gcond_kernels.ops.types import RESIDUE as REFERENCE_RESIDUE
from gcond_kernels.ops.types import Arbitration, ArbitrationState, Settings
from gcond_kernels.triton_kernels.memory import throughout

# K×K float64 numbers, eight of each matrix in a thread's registers.
MOST_TASKS = 64

# What a kernel reads must be a constant of Triton's.
RESIDUE = tl.constexpr(REFERENCE_RESIDUE)
INFINITY = tl.constexpr(math.inf)
HALF_PI = tl.constexpr(math.pi / 2)


@triton.jit
def row_of(matrix, row, KP: tl.constexpr):
    """One row of a matrix [KP, KP]."""
    return tl.sum(tl.where(tl.arange(0, KP)[:, None] == row, matrix, 0.0), axis=0)


@triton.jit
def entry_of(vector, index, KP: tl.constexpr):
    """One entry of a vector [KP]."""
    return tl.sum(tl.where(tl.arange(0, KP) == index, vector, 0.0), axis=0)


@triton.jit
def diagonal_of(matrix, KP: tl.constexpr):
    """The diagonal of a matrix [KP, KP]."""
    same = tl.arange(0, KP)[:, None] == tl.arange(0, KP)[None, :]
    return tl.sum(tl.where(same, matrix, 0.0), axis=1)


@triton.jit
def squared_norms(C, T, norms, KP: tl.constexpr):
    """T_ii, or exactly 0 where only rounding is left of it."""
    largest = tl.sum(tl.abs(C) * norms[None, :], axis=1)
    squares = diagonal_of(T, KP)
    return tl.where(squares > largest * largest * RESIDUE, squares, 0.0)


@triton.jit
def worst_pair(T, squares, KP: tl.constexpr):
    """The pair i < j of smallest cosine, the first one on a tie; cosine 1 if there is no pair."""
    i, j = tl.arange(0, KP)[:, None], tl.arange(0, KP)[None, :]
    # Two roots: the product of two squares may leave the range of float64.
    roots = tl.sqrt(squares)
    lengths = roots[:, None] * roots[None, :]
    comparable = (i < j) & (lengths > 0.0)
    cosines = tl.where(comparable, T / tl.where(comparable, lengths, 1.0), 1.0)
    cosines = tl.maximum(cosines, -1.0)
    cosine = tl.min(tl.min(cosines, axis=1), axis=0)
    place = tl.where(comparable & (cosines == cosine), i * KP + j, KP * KP)
    first = tl.min(tl.min(place, axis=1), axis=0)
    return first // KP, first % KP, cosine


@triton.jit
def stability(C, X, past_rows, past_gramian, square, task, KP: tl.constexpr):
    """max(0, cos(g̃, h)) of a gradient and its history (eq. 7); 0 where h is rounding alone."""
    h = row_of(past_rows, task, KP)
    along_h = tl.sum(X * h[None, :], axis=1)
    squared_h = tl.sum(tl.sum(past_gramian * h[None, :], axis=1) * h, axis=0)
    largest = tl.sum(tl.abs(h) * tl.sqrt(diagonal_of(past_gramian, KP)), axis=0)
    product = tl.sum(row_of(C, task, KP) * along_h, axis=0)
    lengths = square * squared_h
    comparable = (squared_h > largest * largest * RESIDUE) & (lengths > 0.0)
    cosine = product / tl.sqrt(tl.where(comparable, lengths, 1.0))
    return tl.where(comparable, tl.minimum(tl.maximum(cosine, 0.0), 1.0), 0.0)


@triton.jit
def relative_norm(square, average):
    """‖g̃‖ relative to the task's own average."""
    known = average > 0.0
    return tl.where(known, tl.sqrt(square) / tl.where(known, average, 1.0), 0.0)


@triton.jit
def smooth_shares(cosine, zone, settings):
    """How much of its projection onto the other the winner and the loser give up."""
    critical, main, weak = tl.load(settings), tl.load(settings + 1), tl.load(settings + 2)
    # x^p; x is in (0, 1) in the moderate zone, and of no account elsewhere.
    x = tl.where(zone == 1, (cosine - main) / (critical - main), 0.5)
    power = tl.exp(tl.load(settings + 4) * tl.log(x))
    moderate = tl.sin((1.0 + power) * HALF_PI)
    mild = tl.sin((1.0 - (cosine - main) / (weak - main)) * HALF_PI)
    give_winner = tl.where(zone == 2, 0.0, tl.where(zone == 1, moderate, mild))
    return give_winner, tl.where(zone == 0, mild, 1.0)


@triton.jit
def step_shares(zone):
    """The same in the form with steps; in a critical conflict the loser's row is cleared."""
    give_winner = tl.where(zone == 0, 1.0, 0.0)
    give_loser = tl.where(zone == 2, 0.0, 1.0)
    return give_winner.to(tl.float64), give_loser.to(tl.float64)


@triton.jit
def with_row(matrix, row, values, KP: tl.constexpr):
    """The matrix with one row replaced."""
    return tl.where(tl.arange(0, KP)[:, None] == row, values[None, :], matrix)


@triton.jit
def with_products(T, C, S, row, KP: tl.constexpr):
    """T = C S Cᵀ after one row of C has changed: that row and column anew, from C and S."""
    by_S = tl.sum(S * row_of(C, row, KP)[None, :], axis=1)
    products = tl.sum(C * by_S[None, :], axis=1)
    i, j = tl.arange(0, KP)[:, None], tl.arange(0, KP)[None, :]
    return tl.where(i == row, products[None, :], tl.where(j == row, products[:, None], T))


@triton.jit
def moving_average(old, norms, active, settings):
    """ν ← β ν + (1-β) n; 0 stands for "not started": it starts at the first norm."""
    beta, floor = tl.load(settings + 7), tl.load(settings + 8)
    moved = tl.where(old == 0.0, norms, beta * old + (1.0 - beta) * norms)
    return tl.where(active, tl.maximum(moved, floor), old)


@triton.jit
def zone_of(cosine, settings, SMOOTH: tl.constexpr):
    """2 critical, 1 moderate, 0 mild; θ_crit itself is critical in the smooth form alone."""
    critical, main = tl.load(settings), tl.load(settings + 1)
    is_critical = cosine < critical
    if SMOOTH:
        is_critical = cosine <= critical
    return tl.where(is_critical, 2, tl.where(cosine < main, 1, 0))


@triton.jit
def second_wins(
    a, b, C, X, past_rows, past_gramian, squares, average, recent, count, settings,
    KP: tl.constexpr, WINDOW: tl.constexpr, WP: tl.constexpr,
):  # fmt: skip
    """Whether b wins over a: by stability and strength (eq. 7-9), unless one won too long."""
    floor, eps = tl.load(settings + 8), tl.load(settings + 10)
    square_a, square_b = entry_of(squares, a, KP), entry_of(squares, b, KP)
    r_a = relative_norm(square_a, entry_of(average, a, KP) + floor)
    r_b = relative_norm(square_b, entry_of(average, b, KP) + floor)
    by_stability, by_strength = tl.load(settings + 5), tl.load(settings + 6)
    score_a = by_stability * stability(C, X, past_rows, past_gramian, square_a, a, KP)
    score_b = by_stability * stability(C, X, past_rows, past_gramian, square_b, b, KP)
    total = r_a + r_b + eps
    b_wins = score_b + by_strength * r_b / total > score_a + by_strength * r_a / total
    if WINDOW > 0:
        place = tl.arange(0, WP)
        full = count >= WINDOW
        others_than_a = tl.sum(tl.where((place < WINDOW) & (recent != a), 1, 0), axis=0)
        others_than_b = tl.sum(tl.where((place < WINDOW) & (recent != b), 1, 0), axis=0)
        b_wins = (b_wins & ~(full & (others_than_b == 0))) | (full & (others_than_a == 0))
    return b_wins


@triton.jit
def project(C, T, S, winner, loser, cosine, zone, settings, SMOOTH: tl.constexpr, KP: tl.constexpr):
    """C and T after the two rows have given way to each other as far as the zone says."""
    if SMOOTH:
        give_winner, give_loser = smooth_shares(cosine, zone, settings)
    else:
        give_winner, give_loser = step_shares(zone)
    T_winner = row_of(T, winner, KP)
    T_wl = entry_of(T_winner, loser, KP)
    by_loser = give_winner * (T_wl / entry_of(row_of(T, loser, KP), loser, KP))
    by_winner = give_loser * (T_wl / entry_of(T_winner, winner, KP))
    C_winner, C_loser = row_of(C, winner, KP), row_of(C, loser, KP)
    new_loser = C_loser - by_winner * C_winner
    if not SMOOTH:
        new_loser = tl.where(zone == 2, 0.0, new_loser)
    C = with_row(C, winner, C_winner - by_loser * C_loser, KP)
    C = with_row(C, loser, new_loser, KP)
    T = with_products(T, C, S, winner, KP)
    return C, with_products(T, C, S, loser, KP)


@triton.jit
def store_event(events, iteration, a, b, cosine, winner, zone):
    """One row of the events."""
    event = events + 5 * iteration
    tl.store(event, a.to(tl.float64))
    tl.store(event + 1, b.to(tl.float64))
    tl.store(event + 2, cosine)
    tl.store(event + 3, winner.to(tl.float64))
    tl.store(event + 4, zone.to(tl.float64))


@triton.jit
def store_winners(winners, recent, count, is_finite, WINDOW: tl.constexpr, WP: tl.constexpr):
    """The last winners, oldest first."""
    place = tl.arange(0, WP)
    # Since the window was full, newer winners stand where the oldest stood.
    turn = tl.where(count > WINDOW, count % WINDOW, 0)
    oldest_first = (place + WINDOW - turn) % WINDOW
    stored = (place < WINDOW) & throughout(is_finite, place)
    tl.store(winners + oldest_first, recent, mask=stored)


@triton.jit(do_not_specialize=["max_iterations"])
def arbitrate_kernel(
    gramian,  # [B, K, K] float64, like all that are not said to be otherwise
    cross,  # [B, K, K]; read where CROSS
    scale,  # [K], of all
    norm_ema,  # [B, K], state
    winners,  # [B, W] int64, state
    history_gramian,  # [B, K, K], state
    history_rows,  # [B, K, K], state
    # [K], state of all: each program writes it, all of them the same, so that none may read it.
    history_scale,
    # [11]: θ_crit, θ_main, θ_weak, tolerance, power, weights of stability and strength,
    # decay and floor of the averages, cap, eps. A tensor, because arguments are float32.
    settings,
    weights,  # [B, K], written
    rows,  # [B, K, K], written
    events,  # [B, max_iterations, 5], written
    finite,  # [B] bool, written
    max_iterations,
    K: tl.constexpr,
    KP: tl.constexpr,
    WINDOW: tl.constexpr,
    WP: tl.constexpr,
    CROSS: tl.constexpr,
    CAP: tl.constexpr,
    SMOOTH: tl.constexpr,
    RESOLVED: tl.constexpr,
):
    """The whole resolution of one Gramian (see `GCond`), and the state of the next."""
    entry = tl.program_id(0).to(tl.int64)
    gramian, cross, rows = gramian + entry * K * K, cross + entry * K * K, rows + entry * K * K
    history_gramian, history_rows = history_gramian + entry * K * K, history_rows + entry * K * K
    norm_ema, weights, winners = norm_ema + entry * K, weights + entry * K, winners + entry * WINDOW
    events, finite = events + entry * 5 * max_iterations, finite + entry
    index, place = tl.arange(0, KP), tl.arange(0, WP)
    i, j = index[:, None], index[None, :]
    task, square, at = index < K, (i < K) & (j < K), i * K + j

    # What is not finite is decided on as if there were no task at all, and no state is written.
    S = tl.load(gramian + at, mask=square, other=0.0)
    is_finite = tl.sum(tl.sum(tl.where(tl.abs(S) < INFINITY, 0, 1), axis=1), axis=0) == 0
    S = tl.where(is_finite, S, 0.0)
    shares = tl.load(scale + index, mask=task, other=0.0)
    active = (shares != 0.0) & throughout(is_finite, index)
    norms = tl.sqrt(diagonal_of(S, KP))
    average = tl.load(norm_ema + index, mask=task, other=0.0)
    average = moving_average(average, norms, active, settings)
    past_gramian = tl.load(history_gramian + at, mask=square, other=0.0)
    past_rows = tl.load(history_rows + at, mask=square, other=0.0)
    X = tl.zeros([KP, KP], tl.float64)
    if CROSS:
        X = tl.load(cross + at, mask=square, other=0.0)
    recent = tl.load(winners + place, mask=place < WINDOW, other=-1)
    count = tl.sum(tl.where(recent >= 0, 1, 0), axis=0)

    own = tl.where(active, 1.0, 0.0).to(tl.float64)
    if CAP:
        cap = tl.load(settings + 9)
        own = tl.where(norms > cap, own * (cap / norms), own)
    C = tl.where(i == j, own[:, None], 0.0)
    T = own[:, None] * S * own[None, :]
    limit = tl.load(settings + 2) - tl.load(settings + 3)
    squares = squared_norms(C, T, norms, KP)
    a, b, cosine = worst_pair(T, squares, KP)
    iteration = max_iterations * 0
    while (iteration < max_iterations) & (cosine < limit):
        zone = zone_of(cosine, settings, SMOOTH)
        chosen = zone >= 0
        if not SMOOTH:
            chosen = zone != 0  # in the mild zone both give way alike
        b_wins = chosen & second_wins(
            a, b, C, X, past_rows, past_gramian, squares, average, recent, count, settings,
            KP, WINDOW, WP,
        )  # fmt: skip
        winner, loser = tl.where(b_wins, b, a), tl.where(b_wins, a, b)
        if WINDOW > 0:
            recent = tl.where(chosen & (place == count % WINDOW), winner, recent)
            count += tl.where(chosen, 1, 0)
        store_event(events, iteration, a, b, cosine, tl.where(chosen, winner, -1), zone)
        C, T = project(C, T, S, winner, loser, cosine, zone, settings, SMOOTH, KP)
        squares = squared_norms(C, T, norms, KP)
        a, b, cosine = worst_pair(T, squares, KP)
        iteration += 1

    for start in range(5 * iteration, 5 * max_iterations, 64):
        rest = start + tl.arange(0, 64)
        # No global constant: Triton compares those between launches, and NaN differs from itself.
        nothing = tl.full([64], float("nan"), tl.float64)
        tl.store(events + rest, nothing, mask=rest < 5 * max_iterations)
    tl.store(weights + index, tl.sum(C, axis=0), mask=task)
    tl.store(rows + at, C, mask=square)
    tl.store(finite, is_finite)

    # Several threads hold the same numbers: none may read the state after another wrote it.
    tl.debug_barrier()
    tl.store(norm_ema + index, average, mask=task & throughout(is_finite, index))
    if WINDOW > 0:
        store_winners(winners, recent, count, is_finite, WINDOW, WP)
    tl.store(history_gramian + at, S, mask=square & active[:, None] & active[None, :])
    kept_rows = tl.where(i == j, 1.0, 0.0).to(tl.float64)
    if RESOLVED:
        kept_rows = tl.where(active[:, None], C, kept_rows)
    tl.store(history_rows + at, kept_rows, mask=square & throughout(is_finite, at))
    tl.store(history_scale + index, shares, mask=task & active)


def warps_for(KP: int) -> int:
    """Warps that hold a matrix [KP, KP] with eight numbers in a thread."""
    return max(1, KP * KP // 256)


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Weights of the tasks, and the new state in place; see `gcond_kernels.ops.arbitrate`."""
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
    numbers = tables.settings_tensor(tuple(map(float, values)), device)
    tables.keep_if_captured(numbers)
    weights = torch.empty((*batch, K), dtype=torch.float64, device=device)
    rows = torch.empty((*batch, K, K), dtype=torch.float64, device=device)
    max_iterations = int(
        settings.iterations(K)
    )  # of a NumPy type, the interpreter would not take it
    events = torch.empty((*batch, max_iterations, 5), dtype=torch.float64, device=device)
    finite = torch.empty(batch, dtype=torch.bool, device=device)
    KP = triton.next_power_of_2(K)
    with tables.guard(device):
        arbitrate_kernel[(math.prod(batch),)](
            gramian.contiguous(),
            gramian if cross is None else cross.contiguous(),
            scale,
            *state,
            numbers,
            weights,
            rows,
            events,
            finite,
            max_iterations,
            K=K,
            KP=KP,
            WINDOW=window,
            WP=triton.next_power_of_2(max(window, 1)),
            CROSS=cross is not None,
            CAP=settings.norm_cap is not None,
            SMOOTH=settings.arbitration == "smooth",
            RESOLVED=settings.history == "resolved",
            num_warps=warps_for(KP),
            enable_fp_fusion=False,
        )
    return Arbitration(weights, rows, events, finite)
