"""What happened in a step, as plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.storage.shared_parameters import SharedParameters

ZONES = ("mild", "moderate", "critical")


class Conflict(NamedTuple):
    """One conflict that was resolved: a pair of tasks, its cosine and zone, and who won.

    Attributes:
        tasks: the pair.
        cosine: of the two gradients when their turn came, in [-1, 1].
        zone: "mild", "moderate" or "critical".
        winner: the task that was chosen; None in the mild zone of `arbitration="zones"`, where
            both give way alike. In the mild zone of "smooth" both give way too, and the winner
            enters the history.
        parameter: with granularity="tensor" the parameter within which the two disagree.
    """

    tasks: tuple[str, str]
    cosine: float
    zone: str
    winner: str | None
    parameter: str | None = None


@dataclass(frozen=True)
class Report:
    """One resolution.

    Attributes:
        step: how many resolutions there have been, this one included.
        skipped: a gradient held a NaN or an infinity, or was so large (some 1e19) that its square
            leaves float32: `.grad` is zero, the step is left out.
        skipped_steps: how many resolutions were skipped so far.
        nonfinite_tasks: the tasks whose gradient was not finite in this one. With
            on_nonfinite="drop_task" they took no part in it.
        nonfinite_steps: task → in how many resolutions its gradient was not finite so far.
        micro_batches: task → micro-batches that it had in the window; with accumulators that are
            summed over ranks, those of all ranks.
        norms: task → norm of its accumulated gradient (loss weight and mean included).
        norm_ema: task → moving average of that norm, over the parameters that tasks share; of GCond
            with granularity="model".
        cosines: pair of tasks → cosine similarity of their accumulated gradients, over the
            parameters that tasks share; pairs of which one task has no gradient are left out.
        incidence: the share of those pairs whose cosine is below 0; None without a pair.
        zone: of the smallest cosine: "none", "mild", "moderate" or "critical", by the thresholds of
            the method (of others than GCond, its defaults); "none" too without a pair.
        conflicts: the conflicts that GCond resolved, in order; other methods name none.
        weights: task → its share in the resolved gradient Σ_k weight_k · ĝ_k of the parameters that
            tasks share; 1 is untouched. With granularity="tensor" the mean over those parameters.
            NaN with GradDrop, which has none.
        tensor_weights: with granularity="tensor": parameter → task → weight, of shared parameters.
        gradient_norm: norm of the resolved gradient, before momentum and clipping; NaN with
            GradDrop, which does not know it.
        winners: the last winners of conflicts, oldest first; of GCond with granularity="model".
        tensor_cosines: parameter → smallest cosine of any pair of tasks within that parameter;
            only parameters that more than one task has a gradient for.
    """

    step: int
    skipped: bool
    skipped_steps: int
    nonfinite_tasks: list[str]
    nonfinite_steps: dict[str, int]
    micro_batches: dict[str, int]
    norms: dict[str, float]
    norm_ema: dict[str, float]
    cosines: dict[tuple[str, str], float]
    incidence: float | None
    zone: str
    conflicts: list[Conflict]
    weights: dict[str, float]
    tensor_weights: dict[str, dict[str, float]]
    gradient_norm: float
    winners: list[str]
    tensor_cosines: dict[str, float]

    @property
    def min_cosine(self) -> float | None:
        """The smallest cosine of any pair before anything was resolved; None without a pair."""
        return min(self.cosines.values(), default=None)


@dataclass(frozen=True)
class Resolution:
    """What a report is made from: tensors that stay on the device until somebody asks."""

    counters: Tensor  # [2 + K] int64: resolutions, skipped ones, those with each task not finite
    nonfinite: Tensor  # [K] bool
    counts: Sequence[int]
    parameter_names: Sequence[str]
    per_tensor: Tensor  # [T, K, K]
    squares: Tensor  # [K], squared norms over all parameters
    gramian: Tensor  # [K, K] over the parameters that tasks share
    decision: ops.Arbitration
    shared: SharedParameters
    norm_ema: Tensor | None  # [K], or [T, K] by tensor
    winners: Tensor | None  # [W], or [T, W] by tensor
    thresholds: tuple[float, float, float]

    def report(self, tasks: Sequence[str]) -> Report:
        """Reads everything back; on a GPU this waits for the device."""
        by_tensor = self.shared.by_tensor
        cosines = pair_cosines(self.gramian.cpu())
        winners = [] if self.winners is None or by_tensor else self.winners.tolist()
        averages = [] if self.norm_ema is None or by_tensor else self.norm_ema.tolist()
        skipped = not bool(self.decision.finite)
        step, skipped_steps, *nonfinite_steps = self.counters.tolist()

        def named(values: Sequence[float]) -> dict[str, float]:
            return dict(zip(tasks, values, strict=True))

        return Report(
            step=step,
            skipped=skipped,
            skipped_steps=skipped_steps,
            nonfinite_tasks=[
                task for task, bad in zip(tasks, self.nonfinite.tolist(), strict=True) if bad
            ],
            nonfinite_steps=dict(zip(tasks, nonfinite_steps, strict=True)),
            micro_batches=dict(zip(tasks, self.counts, strict=True)),
            norms=named(self.squares.sqrt().tolist()),
            norm_ema=named(averages) if averages else {},
            cosines={(tasks[i], tasks[j]): cosine for (i, j), cosine in cosines.items()},
            incidence=incidence_of(cosines.values()),
            zone=zone_of(min(cosines.values(), default=1.0), self.thresholds),
            conflicts=self._conflicts(tasks),
            weights=named(self.shared.mean_weights(self.decision, self.squares).tolist()),
            tensor_weights=self._tensor_weights(tasks),
            gradient_norm=math.nan if skipped else self._gradient_norm(),
            winners=[tasks[index] for index in winners if index >= 0],
            tensor_cosines=self._tensor_cosines(),
        )

    def _conflicts(self, tasks: Sequence[str]) -> list[Conflict]:
        events = self.decision.events
        if events.dim() == 2:
            return conflicts_of(events, tasks, None)
        by_tensor = zip(self.parameter_names, events.cpu(), self.shared.flags.tolist(), strict=True)
        return [
            conflict
            for name, of_tensor, shared in by_tensor
            if shared
            for conflict in conflicts_of(of_tensor, tasks, name)
        ]

    def _tensor_weights(self, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        if not self.shared.by_tensor:
            return {}
        weights = self.decision.weights.tolist()
        return {
            name: dict(zip(tasks, of_tensor, strict=True))
            for name, of_tensor, shared in zip(
                self.parameter_names, weights, self.shared.flags.tolist(), strict=True
            )
            if shared
        }

    def _gradient_norm(self) -> float:
        """‖g‖² is the sum of wᵀ G w over the tensors."""
        G = self.per_tensor.cpu()
        w = self.shared.weights(self.decision.weights).cpu().expand(len(G), -1)
        return float(torch.einsum("ti,tij,tj->", w, G, w).clamp(min=0.0).sqrt())

    def _tensor_cosines(self) -> dict[str, float]:
        cosines = {}
        for name, G in zip(self.parameter_names, self.per_tensor.cpu(), strict=True):
            pairs = pair_cosines(G)
            if pairs:
                cosines[name] = min(pairs.values())
        return cosines


def pair_cosines(gramian: Tensor) -> dict[tuple[int, int], float]:
    """Cosine of every pair of which both squared norms are above zero and finite."""
    norms = gramian.diagonal().sqrt()
    cosines = (gramian / torch.outer(norms, norms)).clamp(-1.0, 1.0).tolist()
    usable = ((norms > 0.0) & norms.isfinite()).tolist()
    pairs = combinations(range(len(usable)), 2)
    return {(i, j): cosines[i][j] for i, j in pairs if usable[i] and usable[j]}


def conflicts_of(events: Tensor, tasks: Sequence[str], parameter: str | None) -> list[Conflict]:
    """The rows of events [I, 5] that there were."""
    conflicts = []
    for i, j, cosine, winner, zone in events.tolist():
        if math.isnan(i):
            break
        pair = (tasks[int(i)], tasks[int(j)])
        name = tasks[int(winner)] if winner >= 0 else None
        conflicts.append(Conflict(pair, cosine, ZONES[int(zone)], name, parameter))
    return conflicts


def incidence_of(cosines: Collection[float]) -> float | None:
    """Incidence of conflict (Zhang et al. 2024, arXiv 2411.18615): the share of pairs below 0."""
    return sum(cosine < 0.0 for cosine in cosines) / len(cosines) if cosines else None


def zone_of(cosine: float, thresholds: tuple[float, float, float]) -> str:
    """The zone of a cosine: "none" from θ_weak on, "critical" at θ_crit and below."""
    critical, main, weak = thresholds
    if not cosine < weak:
        return "none"
    if cosine <= critical:
        return "critical"
    return "moderate" if cosine < main else "mild"
