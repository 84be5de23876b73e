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

from gcond_kernels.ops.types import RESIDUE, Arbitration, ArbitrationState, Settings

Array = NDArray[np.float64]

MILD, MODERATE, CRITICAL = 0, 1, 2
NO_WINNER = -1


def arbitrate(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Return the weights of the tasks, change the state; see `gcond_kernels.ops.arbitrate`."""
    if gramian.dim() == 2:
        return arbitrate_one(gramian, cross, scale, state, settings)
    *own, history_scale = state
    decisions = [
        arbitrate_one(
            S,
            None if cross is None else cross[b],
            scale,
            ArbitrationState(*[tensor[b] for tensor in own], history_scale),
            settings,
        )
        for b, S in enumerate(gramian)
    ]
    if decisions:
        return Arbitration(*map(torch.stack, zip(*decisions, strict=True)))
    K = len(scale)
    shapes = ((0, K), (0, K, K), (0, settings.iterations(K), 5))
    return Arbitration(
        *[gramian.new_empty(shape) for shape in shapes], gramian.new_empty(0, dtype=torch.bool)
    )


def arbitrate_one(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Resolve one Gramian [K, K]."""
    S = host(gramian)
    active = host(scale) != 0.0
    events = np.full((settings.iterations(len(S)), 5), np.nan)
    finite = bool(np.isfinite(S).all())
    C = np.zeros_like(S)  # [K, K], those of entry i make the resolved gradient of task i
    if finite:
        nu = moving_average(host(state.norm_ema), np.sqrt(S.diagonal()), active, settings)
        X = np.zeros_like(S) if cross is None else host(cross)
        past = History(X, host(state.history_coefficients), host(state.history_gramian))
        recent = [int(task) for task in state.winners.tolist() if task != NO_WINNER]
        window = state.winners.numel()
        C = capped(np.diag(active.astype(np.float64)), S, settings.norm_cap)
        C = resolve(C, S, nu, past, recent, window, settings, events)

        state.norm_ema.copy_(torch.from_numpy(nu))
        listed = recent + [NO_WINNER] * (window - len(recent))
        state.winners.copy_(torch.tensor(listed, dtype=torch.int64, device="cpu"))
        both = np.outer(active, active)
        state.history_gramian.copy_(torch.from_numpy(np.where(both, S, past.gramian)))
        state.history_coefficients.copy_(
            torch.from_numpy(coefficients_to_keep(C, active, settings))
        )
        state.history_scale.copy_(torch.where(scale != 0.0, scale, state.history_scale))

    device = gramian.device
    return Arbitration(
        *[torch.from_numpy(array).to(device) for array in (C.sum(axis=0), C, events)],
        torch.tensor(finite, dtype=torch.bool, device=device),
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
    coefficients: Array  # [K, K], C': h_i = Σ_j C'_ij ĝ'_j; the identity for the raw history
    gramian: Array  # [K, K], S' of the ĝ'

    def stability(self, row: Array, squared_norm: float, task: int) -> float:
        """max(0, cos(g̃, h_task)) of the gradient that `row` makes (eq. 7).

        It is 0 where only rounding is left of h: a resolved gradient that was projected away.
        """
        h = self.coefficients[task]
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
    for iteration in range(len(events)):
        T = C @ S @ C.T
        squares = squared_norms(C, S, T)
        i, j, cosine = worst_pair(T, squares)
        if not cosine < s.thresholds[2] - s.tolerance:
            break
        zone = zone_of(cosine, s)
        if s.arbitration == "zones" and zone == MILD:
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
    if cosine < critical or (s.arbitration == "smooth" and cosine == critical):
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

    stability_weight, strength_weight = s.tie_breaking_weights

    def relative_norm(task: int) -> float:
        average = nu[task] + s.norm_ema_floor
        return math.sqrt(squares[task]) / average if average > 0.0 else 0.0

    def score(task: int, own: float, total: float) -> float:
        stability = past.stability(C[task], squares[task], task)
        return stability_weight * stability + strength_weight * own / (total + s.eps)

    r_i, r_j = relative_norm(i), relative_norm(j)
    better = score(j, r_j, r_i + r_j) > score(i, r_i, r_i + r_j)
    return (j, i) if better else (i, j)


def project(
    C: Array, T: Array, winner: int, loser: int, cosine: float, zone: int, s: Settings
) -> Array:
    """The rows of the pair, each made to give way to the other as far as the zone says."""
    C = C.copy()
    if s.arbitration == "smooth":
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


def coefficients_to_keep(C: Array, active: NDArray[np.bool_], s: Settings) -> Array:
    """C' of the next step. A task that sat this step out keeps its own last gradient as history."""
    identity = np.eye(len(C))
    return np.where(active[:, None], C, identity) if s.history == "resolved" else identity
