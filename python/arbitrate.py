"""arbitrate: the resolution itself, on K×K numbers.

Written to be read, in float64 NumPy on the host. On a GPU that is the one place where
this backend waits for the device; the kernel backends do not.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gcond_kernels.ops.types import RESIDUE

Array = NDArray[np.float64]

MILD, MODERATE, CRITICAL = 0, 1, 2
NO_WINNER = -1


@dataclass(frozen=True)
class Settings:
    """The numbers of one GCond method; `gcond_kernels.GCond` documents and checks them."""

    thresholds: tuple[float, float, float]
    remap_power: float
    smooth: bool
    max_iterations: int
    tolerance: float
    stability_weight: float
    strength_weight: float
    norm_ema_beta: float
    norm_ema_floor: float
    norm_cap: float | None
    resolved_history: bool
    eps: float


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    norm_ema: Tensor,
    winners: Tensor,
    history_gramian: Tensor,
    history_rows: Tensor,
    history_scale: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights of the tasks, and the new state in place; see `gcond_kernels.ops.arbitrate`."""
    settings = Settings(**options)  # type: ignore[arg-type]
    if gramian.dim() == 2:
        state = (norm_ema, winners, history_gramian, history_rows)
        return arbitrate_one(gramian, cross, scale, *state, history_scale, settings)
    tasks, device = scale.shape[0], gramian.device
    weights = torch.empty((len(gramian), tasks), dtype=torch.float64, device=device)
    rows = weights.new_empty((len(gramian), tasks, tasks))
    events = weights.new_empty((len(gramian), settings.max_iterations, 5))
    finite = torch.empty(len(gramian), dtype=torch.bool, device=device)
    for b, S in enumerate(gramian):
        X = None if cross is None else cross[b]
        weights[b], rows[b], events[b], finite[b] = arbitrate_one(
            S, X, scale, norm_ema[b], winners[b], history_gramian[b], history_rows[b],
            history_scale, settings,
        )  # fmt: skip
    return weights, rows, events, finite


def arbitrate_one(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    norm_ema: Tensor,
    winners: Tensor,
    history_gramian: Tensor,
    history_rows: Tensor,
    history_scale: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One resolution, of a Gramian [K, K]."""
    S = host(gramian)
    active = host(scale) != 0.0
    tasks = len(S)
    events = np.full((settings.max_iterations, 5), np.nan)
    finite = bool(np.isfinite(S).all())
    C = np.diag(active.astype(np.float64))  # [K, K], row i makes g̃_i of the ĝ_j
    if finite:
        nu = moving_average(host(norm_ema), np.sqrt(S.diagonal()), active, settings)
        X = np.zeros((tasks, tasks)) if cross is None else host(cross)
        past = History(X, host(history_rows), host(history_gramian))
        recent = [int(task) for task in winners.tolist() if task != NO_WINNER]
        C = capped(C, S, settings.norm_cap)
        C = resolve(C, S, nu, past, recent, winners.numel(), settings, events)

        norm_ema.copy_(torch.from_numpy(nu))
        listed = recent + [NO_WINNER] * (winners.numel() - len(recent))
        winners.copy_(torch.tensor(listed, dtype=torch.int64, device="cpu"))
        both = np.outer(active, active)
        history_gramian.copy_(torch.from_numpy(np.where(both, S, past.gramian)))
        history_rows.copy_(torch.from_numpy(rows_to_keep(C, active, settings)))
        history_scale.copy_(torch.where(scale != 0.0, scale, history_scale))
    else:
        C = np.zeros_like(C)

    def back(array: Array) -> Tensor:
        return torch.from_numpy(array).to(gramian.device)

    return (
        back(C.sum(axis=0)),
        back(C),
        back(events),
        torch.tensor(finite, dtype=torch.bool, device=gramian.device),
    )


def host(tensor: Tensor) -> Array:
    """As float64 on the host; not to be written to."""
    array: Array = tensor.double().cpu().numpy()
    return array


def moving_average(nu: Array, norms: Array, active: NDArray[np.bool_], s: Settings) -> Array:
    """ν_i ← β ν_i + (1-β) n_i; 0 stands for "not started": it starts at the first norm."""
    updated = np.where(nu == 0.0, norms, s.norm_ema_beta * nu + (1.0 - s.norm_ema_beta) * norms)
    return np.where(active, np.maximum(updated, s.norm_ema_floor), nu)


def capped(C: Array, S: Array, cap: float | None) -> Array:
    """Rows whose gradient is longer than the cap, shortened to it."""
    if cap is None:
        return C
    norms = np.sqrt(S.diagonal())
    factors = np.divide(cap, norms, out=np.ones_like(norms), where=norms > cap)
    return C * factors[:, None]


@dataclass(frozen=True)
class History:
    """Last step's gradients, as inner products: what the stability of a gradient is told from."""

    cross: Array  # [K, K], X_ij = ĝ_i · ĝ'_j
    rows: Array  # [K, K], C': h_i = Σ_j C'_ij ĝ'_j; the identity for the raw history
    gramian: Array  # [K, K], S' of the ĝ'

    def stability(self, row: Array, squared_norm: float, task: int) -> float:
        """max(0, cos(g̃, h_task)) of the gradient that `row` makes (eq. 7).

        It is 0 where only rounding is left of h: a resolved gradient that was projected away.
        """
        h = self.rows[task]
        squared_h = float(h @ self.gramian @ h)
        largest = float(np.abs(h) @ np.sqrt(self.gramian.diagonal())) ** 2
        lengths = squared_norm * squared_h
        if not squared_h > RESIDUE * largest or not lengths > 0.0:
            return 0.0
        return min(1.0, max(0.0, float(row @ self.cross @ h) / math.sqrt(lengths)))


def resolve(
    C: Array,
    S: Array,
    nu: Array,
    past: History,
    recent: list[int],
    window: int,
    s: Settings,
    events: Array,
) -> Array:
    """Removes the worst conflict until none is left; fills `recent` and `events`."""
    for iteration in range(s.max_iterations):
        T = C @ S @ C.T
        squares = squared_norms(C, S, T)
        i, j, cosine = worst_pair(T, squares)
        if not cosine < s.thresholds[2] - s.tolerance:
            break
        zone = zone_of(cosine, s)
        if not s.smooth and zone == MILD:
            winner, loser = i, j
            events[iteration] = i, j, cosine, NO_WINNER, zone
        else:
            winner, loser = choose_winner(i, j, C, squares, nu, past, recent, window, s)
            events[iteration] = i, j, cosine, winner, zone
            if window > 0:
                recent.append(winner)
                del recent[:-window]
        C = project(C, T, winner, loser, cosine, zone, s)
    return C


def squared_norms(C: Array, S: Array, T: Array) -> Array:
    """T_ii, or exactly 0 where only rounding is left of it."""
    largest = (np.abs(C) @ np.sqrt(S.diagonal())) ** 2
    squares = T.diagonal()
    return np.where(squares > RESIDUE * largest, squares, 0.0)


def worst_pair(T: Array, squares: Array) -> tuple[int, int, float]:
    """The pair i < j of smallest cosine, the first one on a tie; cosine 1 if there is no pair."""
    worst = (0, 0, 1.0)
    for i in range(len(T)):
        for j in range(i + 1, len(T)):
            if squares[i] > 0.0 and squares[j] > 0.0:
                # Two roots: the product of two squares may leave the range of float64.
                cosine = float(T[i, j] / (math.sqrt(squares[i]) * math.sqrt(squares[j])))
                cosine = max(cosine, -1.0)  # beyond by rounding alone: a tie all the same
                if cosine < worst[2]:
                    worst = (i, j, cosine)
    return worst


def zone_of(cosine: float, s: Settings) -> int:
    """Critical, moderate or mild; θ_crit itself is critical in the smooth form alone."""
    critical, main, _ = s.thresholds
    if cosine < critical or (s.smooth and cosine == critical):
        return CRITICAL
    return MODERATE if cosine < main else MILD


def choose_winner(
    i: int,
    j: int,
    C: Array,
    squares: Array,
    nu: Array,
    past: History,
    recent: list[int],
    window: int,
    s: Settings,
) -> tuple[int, int]:
    """Winner and loser by stability and strength (eq. 7-9), unless one has won too long."""
    if window > 0 and len(recent) == window:
        if all(task == i for task in recent):
            return j, i
        if all(task == j for task in recent):
            return i, j

    def relative_norm(task: int) -> float:
        average = nu[task] + s.norm_ema_floor
        return math.sqrt(squares[task]) / average if average > 0.0 else 0.0

    def score(task: int, own: float, total: float) -> float:
        stability = past.stability(C[task], squares[task], task)
        return s.stability_weight * stability + s.strength_weight * own / (total + s.eps)

    r_i, r_j = relative_norm(i), relative_norm(j)
    better = score(j, r_j, r_i + r_j) > score(i, r_i, r_i + r_j)
    return (j, i) if better else (i, j)


def project(
    C: Array, T: Array, winner: int, loser: int, cosine: float, zone: int, s: Settings
) -> Array:
    """The rows of the pair, each made to give way to the other as far as the zone says."""
    C = C.copy()
    if s.smooth:
        give_w, give_l = smooth_shares(cosine, zone, s)
    elif zone == CRITICAL:
        C[loser] = 0.0
        return C
    else:
        give_w, give_l = (1.0 if zone == MILD else 0.0), 1.0
    old_winner, old_loser = C[winner].copy(), C[loser].copy()
    C[winner] -= give_w * (T[winner, loser] / T[loser, loser]) * old_loser
    C[loser] -= give_l * (T[winner, loser] / T[winner, winner]) * old_winner
    return C


def smooth_shares(cosine: float, zone: int, s: Settings) -> tuple[float, float]:
    """How much of its projection onto the other the winner and the loser give up."""
    critical, main, weak = s.thresholds
    if zone == CRITICAL:
        return 0.0, 1.0  # sin π, exactly
    if zone == MODERATE:
        share = math.pi / 2 * (1.0 + ((cosine - main) / (critical - main)) ** s.remap_power)
        return math.sin(share), 1.0
    share = math.pi / 2 * (1.0 - (cosine - main) / (weak - main))
    return math.sin(share), math.sin(share)


def rows_to_keep(C: Array, active: NDArray[np.bool_], s: Settings) -> Array:
    """C' of the next step. A task that sat this step out keeps its own last gradient as history."""
    identity = np.eye(len(C))
    return np.where(active[:, None], C, identity) if s.resolved_history else identity
