"""What happened in a step, as plain Python numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels import ops

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
    """

    tasks: tuple[str, str]
    cosine: float
    zone: str
    winner: str | None


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
        norm_ema: task → moving average of that norm.
        cosines: pair of tasks → cosine similarity of their accumulated gradients; pairs of which
            one task has no gradient are left out.
        conflicts: the conflicts that were resolved, in order.
        weights: task → its share in the resolved gradient Σ_k weight_k · ĝ_k; 1 is untouched.
        gradient_norm: norm of the resolved gradient, before momentum and clipping.
        winners: the last winners of conflicts, oldest first.
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
    conflicts: list[Conflict]
    weights: dict[str, float]
    gradient_norm: float
    winners: list[str]
    tensor_cosines: dict[str, float]

    @property
    def min_cosine(self) -> float | None:
        """The smallest cosine of any pair before anything was resolved; None without a pair."""
        return min(self.cosines.values(), default=None)

    @property
    def zone(self) -> str:
        """Zone of the first conflict that was resolved: "none", "mild", "moderate" or "critical".

        It is "none" too where nothing could be compared: then `min_cosine` is None.
        """
        return self.conflicts[0].zone if self.conflicts else "none"


@dataclass(frozen=True)
class Resolution:
    """What a report is made from: tensors that stay on the device until somebody asks."""

    counters: Tensor  # [2 + K] int64: resolutions, skipped ones, those with each task not finite
    nonfinite: Tensor  # [K] bool
    counts: Sequence[int]
    parameter_names: Sequence[str]
    per_tensor: Tensor  # [T, R, R]
    gramian: Tensor  # [K, K]
    decision: ops.Arbitration
    norm_ema: Tensor  # [K]
    winners: Tensor  # [W]

    def report(self, tasks: Sequence[str]) -> Report:
        """Reads everything back; on a GPU this waits for the device."""
        K = len(tasks)
        S = self.gramian.cpu()
        weights = self.decision.weights.cpu()
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
            norms=named(S.diagonal().sqrt().tolist()),
            norm_ema=named(self.norm_ema.tolist()),
            cosines={(tasks[i], tasks[j]): c for (i, j), c in pair_cosines(S).items()},
            conflicts=self._conflicts(tasks),
            weights=named(weights.tolist()),
            gradient_norm=math.nan
            if skipped
            else math.sqrt(max(0.0, float(weights @ S @ weights))),
            winners=[tasks[index] for index in self.winners.tolist() if index >= 0],
            tensor_cosines=self._tensor_cosines(K),
        )

    def _conflicts(self, tasks: Sequence[str]) -> list[Conflict]:
        conflicts = []
        for i, j, cosine, winner, zone in self.decision.events.tolist():
            if math.isnan(i):
                break
            pair = (tasks[int(i)], tasks[int(j)])
            name = tasks[int(winner)] if winner >= 0 else None
            conflicts.append(Conflict(pair, cosine, ZONES[int(zone)], name))
        return conflicts

    def _tensor_cosines(self, K: int) -> dict[str, float]:
        cosines = {}
        for name, G in zip(self.parameter_names, self.per_tensor[:, :K, :K].cpu(), strict=True):
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
