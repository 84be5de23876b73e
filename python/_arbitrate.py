"""arbitrate: the resolution itself, on K×K numbers, written to be read.

It computes in float64 NumPy on the host: on a GPU it synchronizes with the device.
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
    B, K = len(gramian), len(scale)
    weights, coefficients = gramian.new_empty((B, K)), gramian.new_empty((B, K, K))
    events = gramian.new_empty((B, settings.iterations(K), 5))
    finite = gramian.new_empty(B, dtype=torch.bool)
    for b, S in enumerate(gramian):
        own = ArbitrationState._make([*(each[b] for each in state[:-1]), state.history_scale])
        X = None if cross is None else cross[b]
        one = arbitrate_one(S, X, scale, own, settings)
        weights[b], coefficients[b], events[b], finite[b] = one
    return Arbitration(weights, coefficients, events, finite)


def arbitrate_one(
    gramian: Tensor,
    cross: Tensor | None,
    scale: Tensor,
    state: ArbitrationState,
    settings: Settings,
) -> Arbitration:
    """Return the weights for one Gramian [K, K], and change its state."""
    S = on_host(gramian)
    active = on_host(scale) != 0.0
    events = np.full((settings.iterations(len(S)), 5), np.nan)
    finite = bool(np.isfinite(S).all())
    C = np.zeros_like(S)  # [K, K]: g̃_i = Σ_j C_ij g_j is what task i's gradient has become
    if finite:
        nu = moving_average(on_host(state.norm_ema), np.sqrt(S.diagonal()), active, settings)
        X = np.zeros_like(S) if cross is None else on_host(cross)
        coefficients, previous = map(on_host, (state.history_coefficients, state.history_gramian))
        winners = [int(task) for task in state.winners.tolist() if task != NO_WINNER]
        window = state.winners.numel()
        arbitrator = Arbitrator(settings, nu, X, coefficients, previous, winners, window)
        C = capped(np.diag(active.astype(np.float64)), S, settings.norm_cap)
        C = resolve(C, S, arbitrator, events)

        padded = winners + [NO_WINNER] * (window - len(winners))
        state.norm_ema.copy_(torch.from_numpy(nu))
        state.winners.copy_(torch.tensor(padded, dtype=torch.int64, device="cpu"))
        both = np.outer(active, active)
        state.history_gramian.copy_(torch.from_numpy(np.where(both, S, previous)))
        # A task that sat this step out keeps its own last gradient as history.
        resolved = settings.history == "resolved"
        kept = np.where(active[:, None] & resolved, C, np.eye(len(C)))
        state.history_coefficients.copy_(torch.from_numpy(kept))
        state.history_scale.copy_(torch.where(scale != 0.0, scale, state.history_scale))
    device = gramian.device
    return Arbitration(
        weights=torch.from_numpy(C.sum(axis=0)).to(device),
        coefficients=torch.from_numpy(C).to(device),
        events=torch.from_numpy(events).to(device),
        finite=torch.tensor(finite, dtype=torch.bool, device=device),
    )


def on_host(tensor: Tensor) -> Array:
    """Return a tensor as float64 on the host; it is not to be written to."""
    array: Array = tensor.double().cpu().numpy()
    return array


def moving_average(nu: Array, norms: Array, active: NDArray[np.bool_], s: Settings) -> Array:
    """Return ν_i ← β ν_i + (1-β) n_i; 0 stands for "not started": it starts at the first norm."""
    updated = np.where(nu == 0.0, norms, s.norm_ema_beta * nu + (1.0 - s.norm_ema_beta) * norms)
    return np.where(active, np.maximum(updated, s.norm_ema_floor), nu)


def capped(C: Array, S: Array, cap: float | None) -> Array:
    """Return coefficients with which no gradient is longer than the cap."""
    if cap is None:
        return C
    norms = np.sqrt(S.diagonal())
    factors = np.divide(cap, norms, out=np.ones_like(norms), where=norms > cap)
    return C * factors[:, None]


@dataclass
class Arbitrator:
    """Chooses the winners of conflicts."""

    settings: Settings
    nu: Array  # [K], moving average of each norm
    cross: Array  # [K, K], X_ij = g_i · g'_j with the gradients g' of the last step
    coefficients: Array  # [K, K], h_i = Σ_j coefficients_ij g'_j; the identity for a raw history
    previous: Array  # [K, K], Gramian of the g'
    winners: list[int]  # the last ones, oldest first; changed
    window: int  # how many of them count

    def choose(self, i: int, j: int, C: Array, squares: Array) -> tuple[int, int]:
        """Return winner and loser by stability and norm (eq. 7-9), unless one has won too long."""
        winner, loser = self._by_dominance(i, j) or self._by_score(i, j, C, squares)
        if self.window > 0:
            self.winners.append(winner)
            del self.winners[: -self.window]
        return winner, loser

    def _by_dominance(self, i: int, j: int) -> tuple[int, int] | None:
        if self.window == 0 or len(self.winners) < self.window or len(set(self.winners)) > 1:
            return None
        return {i: (j, i), j: (i, j)}.get(self.winners[0])

    def _by_score(self, i: int, j: int, C: Array, squares: Array) -> tuple[int, int]:
        s = self.settings
        stability_weight, strength_weight = s.tie_breaking_weights
        average = self.nu + s.norm_ema_floor
        norms = [
            math.sqrt(squares[task]) / average[task] if average[task] > 0.0 else 0.0
            for task in (i, j)
        ]
        score_i, score_j = (
            stability_weight * self._stability(C[task], squares[task], task)
            + strength_weight * norm / (norms[0] + norms[1] + s.eps)
            for task, norm in zip((i, j), norms, strict=True)
        )
        return (j, i) if score_j > score_i else (i, j)

    def _stability(self, row: Array, squared_norm: float, task: int) -> float:
        """Return max(0, cos(g̃, h)) of a task, where `row` holds the coefficients of g̃ (eq. 7).

        It is 0 where only rounding is left of h: a resolved gradient that was projected away.
        """
        c = self.coefficients[task]
        squared_h = float(c @ self.previous @ c)
        largest = float(np.abs(c) @ np.sqrt(self.previous.diagonal())) ** 2
        squares = squared_norm * squared_h
        if not squared_h > RESIDUE * largest or not squares > 0.0:
            return 0.0
        return min(1.0, max(0.0, float(row @ self.cross @ c) / math.sqrt(squares)))


def resolve(C: Array, S: Array, arbitrator: Arbitrator, events: Array) -> Array:
    """Return coefficients without conflict, removing the worst one each time; fill `events`."""
    s = arbitrator.settings
    for event in events:
        T = C @ S @ C.T
        squares = squared_norms(C, S, T)
        i, j, cosine = worst_pair(T, squares)
        if not cosine < s.thresholds[2] - s.tolerance:
            break
        zone = zone_of(cosine, s)
        if s.arbitration == "zones" and zone == MILD:
            winner, loser = i, j
            event[:] = i, j, cosine, NO_WINNER, zone
        else:
            winner, loser = arbitrator.choose(i, j, C, squares)
            event[:] = i, j, cosine, winner, zone
        C = projected(C, T, (winner, loser), shares_of(cosine, zone, s))
    return C


def squared_norms(C: Array, S: Array, T: Array) -> Array:
    """Return T_ii, or exactly 0 where only rounding is left of it."""
    largest = (np.abs(C) @ np.sqrt(S.diagonal())) ** 2
    squares = T.diagonal()
    return np.where(squares > RESIDUE * largest, squares, 0.0)


def worst_pair(T: Array, squares: Array) -> tuple[int, int, float]:
    """Return the pair i < j of the smallest cosine, the first of several; cosine 1 without pair."""
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
    """Return the zone of a cosine; θ_crit itself is critical in the smooth form alone."""
    critical, main, _ = s.thresholds
    if cosine < critical or (s.arbitration == "smooth" and cosine == critical):
        return CRITICAL
    return MODERATE if cosine < main else MILD


def shares_of(cosine: float, zone: int, s: Settings) -> tuple[float, float] | None:
    """Return which share of its projection onto the other the winner and the loser give up.

    None means that the winner takes all.
    """
    critical, main, weak = s.thresholds
    if s.arbitration == "zones":
        return {MILD: (1.0, 1.0), MODERATE: (0.0, 1.0)}.get(zone)
    if zone == CRITICAL:
        return 0.0, 1.0  # sin π, exactly
    if zone == MODERATE:
        angle = math.pi / 2 * (1.0 + ((cosine - main) / (critical - main)) ** s.remap_power)
        return math.sin(angle), 1.0
    angle = math.pi / 2 * (1.0 - (cosine - main) / (weak - main))
    return math.sin(angle), math.sin(angle)


def projected(
    C: Array, T: Array, pair: tuple[int, int], shares: tuple[float, float] | None
) -> Array:
    """Return the coefficients after winner and loser have given up their shares."""
    (winner, loser), old = pair, C
    C = C.copy()
    if shares is None:
        C[loser] = 0.0
        return C
    C[winner] -= shares[0] * (T[winner, loser] / T[loser, loser]) * old[loser]
    C[loser] -= shares[1] * (T[winner, loser] / T[winner, winner]) * old[winner]
    return C
