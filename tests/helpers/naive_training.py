"""GCondFused's part in training, on whole float64 vectors: what test_fuzz.py compares with.

Of the package it knows the settings alone. Beside each number it keeps how far a float32
computation may be off, and it says where rounding may decide otherwise.
"""

import copy
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from tests.helpers.naive import NaiveGCond

# Of a sum of up to six float32 gradients, times a few factors: eight roundings.
ROUNDING = 2.0**-21
# Of an inner product, relative to the norms; float32 partial sums of that length do better.
PRODUCT_ROUNDING = 2.0**-20
TRUST_RATIO_EPS = 1e-8
LARGEST_HALF = 65504.0


class Outcome(NamedTuple):
    """What a step must come to; where rounding may decide otherwise nothing can be compared."""

    skipped: bool
    taking_part: list[int]  # if the step is skipped none, or those whose sum leaves float16
    written: list  # per parameter the new `.grad`, None where there is none
    slack: list  # per parameter how far each element may be off, before it is rounded to its type
    conflicts: list  # (i, j, winner) of each conflict that is resolved
    weights: np.ndarray
    weights_slack: np.ndarray
    undecided: bool


# What a step changes beside the counts of what happened.
KEPT = (
    "resolvers",
    "momentum",
    "momentum_slack",
    "momentum_steps",
    "last",
    "last_mass",
    "parameter_tasks",
    "was_shared",
)


class NaiveTraining:
    """Trains as GCondFused would with these options: a Configuration, or what has its fields."""

    def __init__(self, options, seed: int) -> None:
        self.o = o = options
        self.K, self.N = len(o.weights), sum(o.sizes)
        ends = np.cumsum([0, *o.sizes])
        self.segments = [slice(a, b) for a, b in pairwise(ends)]
        # The last three resolve gradients that are off by as much as rounding may put them off.
        self.resolvers = [NaiveGCond(o.method, self.K, 1e-6) for _ in range(4)]
        self.random = np.random.default_rng(seed)
        self.momentum, self.momentum_slack = np.zeros(self.N), np.zeros(self.N)
        self.momentum_steps = np.zeros(len(o.sizes), dtype=int)
        # Of each task the gradient of the last step that it took part in.
        self.last, self.last_mass = np.zeros((self.K, self.N)), np.zeros((self.K, self.N))
        # Which tasks ever had a gradient other than zero for each parameter.
        self.parameter_tasks: list[set[int]] = [set() for _ in o.sizes]
        self.was_shared = [None] * len(o.sizes)
        self.steps, self.skipped_steps = 0, 0
        self.nonfinite_steps = [0] * self.K
        self.start_window()

    @property
    def averages(self):
        return self.resolvers[0].ema

    @property
    def winners(self):
        return self.resolvers[0].winners

    # A window.

    def start_window(self) -> None:
        self.position = 0
        self.counts = [0] * self.K
        self.sums = np.zeros((self.K, self.N))
        self.mass = np.zeros((self.K, self.N))  # sums of magnitudes: what rounding is relative to
        self.touched: set[int] = set()

    def active(self) -> list[int]:
        """The tasks of the next micro-batch."""
        A, K = self.o.accumulation_steps, self.K
        if self.position == A:
            return []
        if self.o.mode == "exact":
            return list(range(K))
        return [next(k for k in range(K) if self.position < sum(self.planned()[: k + 1]))]

    def planned(self) -> list[int]:
        """Micro-batches of each task in a full window."""
        A, K = self.o.accumulation_steps, self.K
        if self.o.mode == "exact":
            return [A] * K
        return [A // K + (k < A % K) for k in range(K)]

    def add(self, task: int, gradients: dict[int, np.ndarray]) -> None:
        """A task's gradient in this micro-batch: flat, for the parameters that have one.

        It is that of the loss times λ_k / (its planned micro-batches), as a plain loop has it.
        """
        self.counts[task] += 1
        for i, gradient in gradients.items():
            with np.errstate(invalid="ignore"):  # infinity minus infinity
                self.sums[task, self.segments[i]] += gradient
            self.mass[task, self.segments[i]] += np.abs(gradient)
            self.touched.add(i)

    def shares(self) -> list[float]:
        """What makes the mean over the micro-batches that there were of what was added."""
        return [
            planned / count if count and w else 0.0
            for w, planned, count in zip(self.o.weights, self.planned(), self.counts, strict=True)
        ]

    def nonfinite(self) -> dict[int, list[int]]:
        """Tasks that count in this window and are not finite, and in which parameters."""
        bad = {}
        for k, share in enumerate(self.shares()):
            finite = [np.isfinite(self.sums[k, segment]).all() for segment in self.segments]
            if share > 0.0 and not all(finite):
                bad[k] = [i for i, fine in enumerate(finite) if not fine]
        return bad

    # A step.

    def step(self, drop: bool, parameter_norms: list[float]) -> Outcome | None:
        """Resolves the window and starts another. None where no task had a micro-batch.

        With `drop` tasks that are not finite sit it out; else the step is skipped.
        """
        if not any(self.counts):
            self.start_window()
            return None
        bad = self.nonfinite()
        going = [k for k, share in enumerate(self.shares()) if share > 0.0 and k not in bad]
        self.steps += 1
        for k in bad:
            self.nonfinite_steps[k] += 1
        if not bad or (drop and going):
            before = copy.deepcopy({name: getattr(self, name) for name in KEPT})
            outcome = self._resolved(going, parameter_norms)
            if outcome.skipped:
                self.__dict__.update(before)
        else:
            outcome = self._skipped([], False, finite=False)
        self.skipped_steps += outcome.skipped
        self.start_window()
        return outcome

    def _skipped(self, going: list[int], undecided: bool, finite: bool = True) -> Outcome:
        written = self._written(finite)
        zeros, nothing = self._of_parameters(np.zeros(self.N), written), np.zeros(self.K)
        return Outcome(True, going, zeros, zeros, [], nothing, nothing, undecided)

    def _written(self, finite: bool = True) -> list[int]:
        """The parameters that get a gradient: not those that no task with a micro-batch ever used.

        Where a gradient is not finite nobody knows who uses what was not used before.
        """
        active = {k for k, count in enumerate(self.counts) if count}
        if len(active) == self.K:
            return sorted(self.touched)

        def is_used(i: int) -> bool:
            empty = self.segments[i].stop == self.segments[i].start
            return bool(self.parameter_tasks[i] & active) or (
                not self.parameter_tasks[i] and (empty or not finite)
            )

        return sorted(i for i in self.touched if is_used(i))

    def _resolved(self, going, parameter_norms) -> Outcome:
        shares = np.array(self.shares())[:, None]
        self.vectors = np.where(np.isin(range(self.K), going)[:, None], self.sums, 0.0) * shares
        self.scales = np.where(np.isin(range(self.K), going)[:, None], self.mass, 0.0) * shares
        for tasks, segment in zip(self.parameter_tasks, self.segments, strict=True):
            tasks |= {k for k in going if self.vectors[k, segment].any()}
        self.shared = self._shared()
        written = self._written()
        self.last[going], self.last_mass[going] = self.vectors[going], self.scales[going]
        weights, weights_slack, undecided = self._weights(going)
        # A parameter of one task alone gets its gradient as it is.
        each = np.where(self.shared, weights[:, None], 1.0)  # [K, N]
        g = (each * self.vectors).sum(0)
        off = np.where(self.shared, weights_slack[:, None], 0.0)
        slack = (off * np.abs(self.vectors) + ROUNDING * np.abs(each) * self.scales).sum(0)
        beyond = self._leaves_float16(g, slack)
        if beyond is None or beyond:
            return self._skipped(going, beyond is None)
        g, slack = self._averaged(g, slack, written)
        terms = self._norms_of_terms(weights)
        if self.o.update is not None:
            g, slack = self._signs(g, slack, written, terms, parameter_norms)
        elif self.o.max_norm is not None:
            g, slack = self._clipped(g, slack, written, terms)
        return Outcome(
            False,
            going,
            self._of_parameters(g, written),
            self._of_parameters(slack, written),
            self.resolvers[0].log if going else [],
            weights,
            weights_slack,
            undecided,
        )

    def _leaves_float16(self, g, slack) -> bool | None:
        """Whether the sum does not fit into a `.grad`; None where rounding decides."""
        clipped = self.o.max_norm is not None and self.o.max_norm <= LARGEST_HALF
        half = np.isin(np.repeat(range(len(self.segments)), self.o.sizes), sorted(self.touched))
        half &= np.repeat(self.o.halves, self.o.sizes)
        if clipped or self.o.update is not None or not half.any():
            return False
        size, off = np.abs(g[half]), slack[half] + 1e-6 * np.abs(g[half])
        beyond = bool((size - off > LARGEST_HALF).any())
        return None if not beyond and (size + off > LARGEST_HALF).any() else beyond

    def _shared(self):
        """[N] whether each element belongs to a parameter that tasks share."""
        shared = [len(tasks) > 1 for tasks in self.parameter_tasks]
        if not any(shared) and sum(count > 0 for count in self.counts) <= 1:
            shared = [True] * len(shared)
        # With other parameters to compare than in the last step histories start anew.
        pairs = list(zip(shared, self.was_shared, strict=True))
        if any(was is not None and was != now for now, was in pairs):
            for resolver in self.resolvers:
                resolver.history, resolver.last = [None] * self.K, [None] * self.K
        self.was_shared = [
            s if o else None for s, o in zip(shared, self.parameter_tasks, strict=True)
        ]
        return np.repeat(shared, self.o.sizes)

    def _of_parameters(self, vector, written) -> list:
        return [vector[s] if i in written else None for i, s in enumerate(self.segments)]

    def _weights(self, going):
        """The tasks' weights, how far they may be off, and whether rounding may decide anything."""
        if not going:
            return np.zeros(self.K), np.zeros(self.K), False
        found = []
        for number, resolver in enumerate(self.resolvers):
            off = self._off_by_rounding() if number else np.where(self.shared, self.vectors, 0.0)
            resolver.resolve([off[k] if k in going else None for k in range(self.K)])
            found.append(np.array(resolver.weights))
        first, *others = self.resolvers
        undecided = first.tied or any(other.log != first.log for other in others)
        if not first.log and self.o.method.norm_cap is None:
            return found[0], np.zeros(self.K), undecided  # exactly the sum
        off = np.max([np.abs(other - found[0]) for other in found[1:]], axis=0)
        # Of a few draws the largest; where gradients are nearly anti-parallel (cosine -0.9999) the
        # sums of a backend have been half as much again beyond three times it.
        return found[0], 6.0 * off + 1e-6 * (1.0 + np.abs(found[0])), undecided

    def _off_by_rounding(self):
        """The gradients, off by what float32 sums and products of them may be off.

        An inner product is off relative to the norms, also where two gradients almost cancel. So
        each has some more coordinates, which change the products by that much, and nothing else.
        """
        noise = self.random.normal(size=(self.K, self.N + self.K))
        off = self.vectors + 1e-6 * self.scales * noise[:, : self.N]
        off = np.where(self.shared, off, 0.0)
        shared_scales = np.where(self.shared, self.scales, 0.0)
        norms = np.linalg.norm(shared_scales, axis=1, keepdims=True)
        return np.hstack([off, (2.0**-24 / self.K) ** 0.5 * norms * noise[:, self.N :]])

    def _averaged(self, g, slack, written):
        """m̂. What is not written keeps its average."""
        beta = self.o.momentum
        if beta == 0.0:
            return g, slack
        self.old_momentum = self.momentum.copy()
        hat, hat_slack = np.zeros(self.N), np.zeros(self.N)
        for i in written:
            s = self.segments[i]
            size = beta * np.abs(self.momentum[s]) + (1 - beta) * np.abs(g[s])
            self.momentum[s] = beta * self.momentum[s] + (1 - beta) * g[s]
            self.momentum_slack[s] = beta * self.momentum_slack[s] + (1 - beta) * slack[s]
            self.momentum_slack[s] += ROUNDING * size
            self.momentum_steps[i] += 1
            correction = 1.0 / (1.0 - beta ** self.momentum_steps[i])
            hat[s] = self.momentum[s] * correction
            hat_slack[s] = self.momentum_slack[s] * correction
        return hat, hat_slack

    def _norms_of_terms(self, weights) -> list[float]:
        """Per parameter the norms of what m̂ is a sum of, added up: rounding is relative to that."""
        beta, norms = self.o.momentum, []
        for i, s in enumerate(self.segments):
            own = np.abs(weights) if self.shared[s].any() else np.ones(self.K)
            norm = (1 - beta) * own @ np.linalg.norm(self.scales[:, s], axis=1)
            if beta > 0.0:
                norm += beta * np.linalg.norm(self.old_momentum[s])
                norm /= 1.0 - beta ** max(1, self.momentum_steps[i])
            norms.append(float(norm))
        return norms

    def _between(self, norm: float, slack, terms: float) -> tuple[float, float]:
        """The least and the largest that a norm may be found to be, by inner products."""
        off = np.linalg.norm(slack) + 1e-6 * norm
        squares = PRODUCT_ROUNDING * terms**2
        low, high = max(0.0, norm - off), norm + off
        return max(0.0, low**2 - squares) ** 0.5, (high**2 + squares) ** 0.5

    def _clipped(self, g, slack, written, terms):
        all_of_it = np.isin(np.repeat(range(len(self.segments)), self.o.sizes), written)
        norm = float(np.linalg.norm(g[all_of_it]))
        total = float(np.linalg.norm([terms[i] for i in written]))
        low, high = self._between(norm, slack[all_of_it], total)
        factor, least, most = (
            min(1.0, self.o.max_norm / max(n, 1e-300)) for n in (norm, high, low)
        )
        return g * factor, slack * most + np.abs(g) * (most - least)

    def _signs(self, g, slack, written, terms, parameter_norms):
        signs, off = np.zeros(self.N), np.zeros(self.N)
        for i in written:
            s, p = self.segments[i], parameter_norms[i]
            norm = float(np.linalg.norm(g[s]))
            low, high = self._between(norm, slack[s], terms[i])
            edge = [TRUST_RATIO_EPS] if low < TRUST_RATIO_EPS <= high else []
            ratios = [self._ratio(p, n) for n in (norm, low, high, *edge)]
            coef = self.o.update.coefficient
            signs[s] = np.sign(g[s]) * ratios[0] * coef
            # Where rounding may have turned a number around, any sign will do.
            unsure = (np.abs(g[s]) <= slack[s]) & (slack[s] > 0.0)
            off[s] = (max(ratios) - min(ratios)) * coef + 1e-6 * np.abs(signs[s])
            off[s] = np.where(unsure, 2.1 * max(ratios) * coef, off[s])
        return signs, off

    def _ratio(self, parameter_norm: float, norm: float) -> float:
        if norm < TRUST_RATIO_EPS or parameter_norm < TRUST_RATIO_EPS:
            return 1.0
        return min(parameter_norm / norm, self.o.update.clip)
