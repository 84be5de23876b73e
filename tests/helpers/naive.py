"""GCond on whole gradient vectors in float64, step by step as the paper describes it.

Nothing here knows of Gramians or coefficients (but for the one rule about rounding residues):
it is the independent check of the form that the package computes.
"""

import numpy as np

from gcond_kernels import GCond


def cosine(a, b):
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norms) if norms > 0 else 0.0


class NaiveGCond:
    def __init__(self, method: GCond, tasks: int, close: float = 1e-9) -> None:
        self.m = method
        self.close = close  # cosines and scores that are no further apart count as tied
        self.K = tasks
        self.ema = [method.norm_ema_start or 0.0] * tasks
        self.history = [None] * tasks  # what stability compares with
        self.last = [None] * tasks  # the gradients of the last step that each took part in
        self.winners: list[int] = []
        self.log: list[tuple[int, int, int | None]] = []
        self.weights = [0.0] * tasks  # the result is Σ_k weights[k] · gradients[k]
        # Whether two pairs ever conflicted as badly, or two tasks scored alike where that does not
        # follow from the rules: then rounding decides.
        self.tied = False

    def resolve(self, gradients):
        """Takes a vector per task, or None where it has no micro-batch; returns the sum."""
        m, present = self.m, [k for k in range(self.K) if gradients[k] is not None]
        original = {k: np.array(gradients[k], dtype=np.float64) for k in present}
        floor = 0.0 if m.norm_ema_start is None else m.eps
        for k in present:
            n = np.linalg.norm(original[k])
            started = self.ema[k] != 0.0
            new = m.norm_ema_beta * self.ema[k] + (1 - m.norm_ema_beta) * n if started else n
            self.ema[k] = max(new, floor)
        g = dict(original)
        made_of = {k: {j: float(j == k) for j in present} for k in present}
        if m.norm_cap is not None:
            for k in present:
                n = np.linalg.norm(g[k])
                if n > m.norm_cap:
                    g[k] = g[k] * (m.norm_cap / n)
                    made_of[k][k] = m.norm_cap / n
        self.log = []
        limit = 2 * self.K if m.max_iterations is None else m.max_iterations
        for _ in range(limit):
            pair, c = self._worst(g, made_of, original, present)
            if pair is None or not c < m.thresholds[2] - m.tolerance:
                break
            self._act(*pair, c, g, made_of, floor)
        for k in range(self.K):
            if k in present:
                self.last[k] = original[k].copy()
            # What a task was resolved to is a sum over gradients that are gone when it sits out.
            resolved = m.history == "resolved" and k in present
            gone = resolved and self._is_zero(k, g, made_of, original)
            kept = np.zeros_like(g[k]) if gone else g[k].copy() if resolved else self.last[k]
            self.history[k] = kept
        self.weights = [sum(made_of[i].get(k, 0.0) for i in present) for k in range(self.K)]
        size = len(next(iter(original.values())))
        return sum((g[k] for k in present), np.zeros(size))

    def _is_zero(self, k, g, made_of, original):
        terms = sum(abs(w) * np.linalg.norm(original[j]) for j, w in made_of[k].items())
        return float(g[k] @ g[k]) <= 2.0**-23 * terms**2

    def _worst(self, g, made_of, original, present):
        best, lowest, second = None, 1.0, 1.0
        for a, i in enumerate(present):
            for j in present[a + 1 :]:
                if self._is_zero(i, g, made_of, original) or self._is_zero(j, g, made_of, original):
                    continue
                c = cosine(g[i], g[j])
                if c < lowest:
                    best, lowest, second = (i, j), c, lowest
                else:
                    second = min(second, c)
        if lowest < self.m.thresholds[2] - self.m.tolerance and second - lowest < self.close:
            self.tied = True
        return best, lowest

    def _winner(self, i, j, g, made_of, floor):
        m = self.m
        recent = self.winners
        if m.dominance_window and len(recent) == m.dominance_window:
            if set(recent) == {i}:
                return j, i
            if set(recent) == {j}:
                return i, j

        def stability(k):
            h = self.history[k]
            return 0.0 if h is None else max(0.0, cosine(g[k], h))

        def score(k, other):
            r = [np.linalg.norm(g[t]) / (self.ema[t] + floor) for t in (k, other)]
            strength = r[0] / (r[0] + r[1] + m.eps)
            return m.tie_breaking_weights[0] * stability(k) + m.tie_breaking_weights[1] * strength

        ahead = score(j, i) - score(i, j)
        # Without a history, or away from it, a stability is 0; untouched gradients of a first step
        # are equally strong. Where both hold, two scores are the same in any arithmetic.
        untouched = all(made_of[t] == {k: float(k == t) for k in made_of[t]} for t in (i, j))
        alike = untouched or m.tie_breaking_weights[1] == 0.0
        exact = ahead == 0.0 and alike and stability(i) == stability(j) == 0.0
        if abs(ahead) < self.close and not exact:
            self.tied = True
        return (j, i) if ahead > 0.0 else (i, j)

    def _act(self, i, j, c, g, made_of, floor):
        m = self.m
        crit, main, weak = m.thresholds
        zones = m.arbitration == "zones"
        if zones and c >= main:
            w, loser, give_w, give_l = i, j, 1.0, 1.0
            self.log.append((i, j, None))
        else:
            w, loser = self._winner(i, j, g, made_of, floor)
            self.log.append((i, j, w))
            if m.dominance_window:
                self.winners = [*self.winners, w][-m.dominance_window :]
            if zones and c < crit:
                g[loser] = np.zeros_like(g[loser])
                made_of[loser] = dict.fromkeys(made_of[loser], 0.0)
                return
            if zones:
                give_w, give_l = 0.0, 1.0
            else:
                if c <= crit:
                    alpha = np.pi
                elif c < main:
                    alpha = np.pi / 2 + np.pi / 2 * ((c - main) / (crit - main)) ** m.remap_power
                else:
                    alpha = np.pi / 2 * (1 - (c - main) / (weak - main))
                give_w, give_l = np.sin(alpha), np.sin(min(alpha, np.pi / 2))
        a, b = g[w], g[loser]
        along_loser, along_winner = a @ b / (b @ b), a @ b / (a @ a)
        g[w] = a - give_w * along_loser * b
        g[loser] = b - give_l * along_winner * a
        rows = dict(made_of[w]), dict(made_of[loser])
        for t in rows[0]:
            made_of[w][t] -= give_w * along_loser * rows[1][t]
            made_of[loser][t] -= give_l * along_winner * rows[0][t]
