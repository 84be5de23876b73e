"""What happened in the latest steps, kept on the device until somebody asks."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.report import ZONES, pair_cosines
from gcond_kernels.tables import is_capturing

Row: TypeAlias = "dict[str, Any]"

ALL_ZONES = ("none", *ZONES)

# What the verdict of `advise` goes by: rules of thumb, no results of experiments.
# Fewer steps say little: with 20 of them a share is known to some 20 points, and early training
# is not like the rest. The same holds for how often a layer was compared.
ENOUGH_STEPS = 20
# Where fewer steps have a conflict, the other 95 % are the plain sum to the last bit.
RARE_SHARE = 0.05
# A projection at this cosine takes 5 % of a gradient's length away: less than the gradients of
# two micro-batches usually differ by.
WEAK_COSINE = -0.05
# Moderate and critical conflicts in one step of ten are a part of training, not a mishap.
NOTABLE_SHARE = 0.1
LAYERS_NAMED = 3
COMPARE = (
    "Whether the model gets better by it, only validation scores tell: compare with the plain sum."
)


class Recorder:
    """A bounded history of resolutions that never waits for the device while it records.

    What is read back waits for it: `rows`, `layers`, `advise` and `len`. Recording can be part of
    a CUDA graph, once one step was recorded outside of it: replays record too.

    Attributes:
        tasks: the names of the K tasks.
        thresholds: (θ_crit, θ_main, θ_weak), which tell the zones apart.
        steps: how many of the latest steps are kept; with 0 nothing is recorded.
    """

    def __init__(
        self, tasks: Sequence[str], thresholds: tuple[float, float, float], steps: int
    ) -> None:
        self.tasks = tuple(tasks)
        self.thresholds = thresholds
        self.steps = steps
        self._parameter_names: list[str] = []
        # Made by the first `record`, which knows the device.
        self._ring: Tensor | None = None  # [steps, width] float64
        self._recorded: Tensor | None = None  # [1] int64, how many there have been
        # [2, T, K, K] int64: how often a pair was compared in a tensor, and how often it conflicted
        self._layers: Tensor | None = None

    def record(
        self,
        number: Tensor,
        parameter_names: Sequence[str],
        gramian: Tensor,
        per_tensor: Tensor,
        decision: ops.Arbitration,
        dropped: Tensor,
    ) -> None:
        """Adds one resolution, in place of the oldest where there is no more room.

        Args:
            number: [] int64, which resolution this is, counted from 1.
            parameter_names: T names; those of the last call come first, in their order.
            gramian: [K, K] float64, as it was resolved: rows of tasks that were dropped are zero.
            per_tensor: [T, R, R] float64, R ≥ K; what is beyond K (the momentum) is left out.
            decision: what was decided.
            dropped: [K] bool, the tasks whose gradient was not finite.
        """
        if self.steps == 0 or not self._make_room(gramian.device, parameter_names):
            return
        assert self._ring is not None
        assert self._recorded is not None
        assert self._layers is not None
        # The place is counted on the device: a CUDA graph repeats what the host did once.
        row = _row(number, gramian, decision, dropped)
        self._ring.index_copy_(0, self._recorded % self.steps, row[None])
        self._recorded += 1

        K = len(self.tasks)
        present = per_tensor.diagonal(dim1=1, dim2=2)[:, :K] > 0.0  # [T, K]
        present = present & decision.finite
        compared = present[:, :, None] & present[:, None, :]
        seen, below = self._layers.unbind()  # an indexed += would copy the whole once more
        seen += compared
        below += compared & (per_tensor[:, :K, :K] < 0.0)

    def _make_room(self, device: torch.device, parameter_names: Sequence[str]) -> bool:
        """Memory on this device for these parameters; False where there can be none now."""
        K, T = len(self.tasks), len(parameter_names)
        more = T - len(self._parameter_names)
        if self._ring is not None and self._ring.device == device and more == 0:
            return True
        if is_capturing(device):
            # Memory is set to zero once; a graph would do it again in every replay.
            warnings.warn(
                "steps of this CUDA graph are not recorded: take one step before the capture",
                stacklevel=4,
            )
            return False
        if self._ring is None or self._recorded is None or self._layers is None:
            width = K * K + 2 * K + 4
            self._ring = torch.zeros((self.steps, width), dtype=torch.float64, device=device)
            self._recorded = torch.zeros(1, dtype=torch.int64, device=device)
            self._layers = torch.zeros((2, 0, K, K), dtype=torch.int64, device=device)
        self._ring = self._ring.to(device)
        self._recorded = self._recorded.to(device)
        grown = self._layers.new_zeros((2, more, K, K), device=device)
        self._layers = torch.cat([self._layers.to(device), grown], dim=1)
        self._parameter_names = list(parameter_names)
        return True

    def __len__(self) -> int:
        """How many steps are held. On a GPU this waits for the device."""
        return 0 if self._recorded is None else min(int(self._recorded), self.steps)

    def clear(self) -> None:
        """Forgets all steps, and the counts of the layers."""
        if self._recorded is not None and self._layers is not None:
            # In place: a CUDA graph goes on writing to this memory.
            self._recorded.zero_()
            self._layers.zero_()

    def rows(self) -> list[Row]:
        """One row of plain Python values per step, oldest first. On a GPU this waits for it.

        Goes into `pandas.DataFrame(recorder.rows())` or a `csv.DictWriter` as it is. Each holds

        - step: which resolution it was, counted from 1;
        - skipped: whether it was left out, as a gradient was not finite;
        - zone: "none", "mild", "moderate" or "critical", by the smallest cosine;
        - min_cosine: the smallest cosine of any pair before anything was resolved;
        - conflicts: how many were resolved;
        - winner: of the first of those, or None;
        - cosine/a/b for every pair of tasks; norm/a, weight/a and dropped/a for every task.

        A cosine is None where a task of the pair has no gradient or the step was skipped, zone and
        min_cosine where that is so of all pairs; a norm where the gradient was not finite.
        """
        return [self._row_of(values) for values in self._held()]

    def _held(self) -> Tensor:
        """[n, width] float64 on the CPU, oldest first."""
        if self._ring is None or self._recorded is None:
            return torch.zeros(0)
        recorded, ring = int(self._recorded), self._ring.cpu()
        if recorded <= self.steps:
            return ring[:recorded]
        return ring.roll(-(recorded % self.steps), 0)

    def _row_of(self, values: Tensor) -> Row:
        K, tasks = len(self.tasks), self.tasks
        S = values[: K * K].view(K, K)
        rest = values[K * K :].tolist()
        weights, dropped = rest[:K], [bool(flag) for flag in rest[K : 2 * K]]
        number, finite, conflicts, winner = rest[2 * K :]
        cosines = pair_cosines(S) if finite else {}
        smallest = min(cosines.values(), default=None)
        squares = S.diagonal().tolist()
        norms = [
            math.sqrt(square) if math.isfinite(square) and not bad else None
            for square, bad in zip(squares, dropped, strict=True)
        ]
        return {
            "step": int(number),
            "skipped": not finite,
            "zone": None if smallest is None else zone_of(smallest, self.thresholds),
            "min_cosine": smallest,
            "conflicts": int(conflicts),
            "winner": tasks[int(winner)] if winner >= 0 else None,
            **{
                f"cosine/{tasks[i]}/{tasks[j]}": cosines.get((i, j))
                for i, j in combinations(range(K), 2)
            },
            **{f"norm/{task}": norm for task, norm in zip(tasks, norms, strict=True)},
            **{f"weight/{task}": weight for task, weight in zip(tasks, weights, strict=True)},
            **{f"dropped/{task}": flag for task, flag in zip(tasks, dropped, strict=True)},
        }

    def layers(self) -> list[Row]:
        """How often tasks conflict in each parameter, worst share first. On a GPU this waits.

        A row per parameter that more than one task had a gradient for, since the first step or the
        last `clear`, whatever `steps` is:

        - parameter: its name;
        - compared: how often a pair of tasks both had a gradient for it, all steps and pairs;
        - conflicts: how often the cosine of the two was below zero in it;
        - share: conflicts / compared.
        """
        if self._layers is None:
            return []
        counts = self._layers.cpu().triu(1).sum((-1, -2)).tolist()  # each pair once
        rows = [
            {"parameter": name, "compared": seen, "conflicts": below, "share": below / seen}
            for name, seen, below in zip(self._parameter_names, *counts, strict=True)
            if seen > 0
        ]
        return sorted(rows, key=lambda row: -row["share"])

    def advise(self) -> str:
        """Whether there is a conflict worth resolving, in plain words. On a GPU this waits."""
        if self.steps == 0:
            return "Nothing is recorded: record_steps is 0."
        rows = self.rows()
        if not rows:
            return "Nothing is recorded yet: train some steps, then ask again."
        paragraphs = (
            _what_was_seen(rows),
            _zone_shares(rows),
            _worst_pair(rows, self.tasks, self.thresholds[2]),
            _worst_layers(self.layers()),
            _left_out(rows, self.tasks),
            "Verdict: " + _verdict(rows, len(self.tasks)),
        )
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def zone_of(cosine: float, thresholds: tuple[float, float, float]) -> str:
    """The zone of a cosine: "none" from θ_weak on, "critical" at θ_crit and below."""
    critical, main, weak = thresholds
    if not cosine < weak:
        return "none"
    if cosine <= critical:
        return "critical"
    return "moderate" if cosine < main else "mild"


def _row(number: Tensor, gramian: Tensor, decision: ops.Arbitration, dropped: Tensor) -> Tensor:
    """[K² + 2 K + 4] float64: Gramian, weights, dropped, number, finite, conflicts, winner."""
    events = decision.events
    # There is no row of events at all where conflicts are not to be resolved.
    winner = events[0, 3:4] if len(events) else gramian.new_full((1,), math.nan)
    return torch.cat(
        [
            gramian.flatten(),
            decision.weights,
            dropped.to(torch.float64),
            number.to(torch.float64).view(1),
            decision.finite.to(torch.float64).view(1),
            (events[:, 0] >= 0.0).sum(dtype=torch.float64).view(1),
            winner,
        ]
    )


# The paragraphs of `advise`.


def _compared(rows: Sequence[Row]) -> list[Row]:
    """The steps in which two tasks could be compared."""
    return [row for row in rows if row["zone"] is not None]


def _percent(part: int, whole: int) -> str:
    return f"{100.0 * part / whole:.1f} %"


def _what_was_seen(rows: Sequence[Row]) -> str:
    first, last = rows[0]["step"], rows[-1]["step"]
    if len(rows) == 1:
        return f"Looked at 1 step (step {last})."
    return f"Looked at {len(rows)} steps ({first} to {last})."


def _zone_shares(rows: Sequence[Row]) -> str:
    compared = _compared(rows)
    if not compared:
        return ""
    zones = [row["zone"] for row in compared]
    lines = ["Steps by the zone of their smallest cosine:"]
    for zone in ALL_ZONES:
        label = "no conflict" if zone == "none" else zone
        lines.append(f"  {label:<12}{_percent(zones.count(zone), len(zones)):>8}")
    return "\n".join(lines)


def _worst_pair(rows: Sequence[Row], tasks: Sequence[str], weak: float) -> str:
    """The pair that conflicts in the largest share of the steps that compared it."""
    best: tuple[float, float, str] | None = None
    for a, b in combinations(tasks, 2):
        cosines = [row[f"cosine/{a}/{b}"] for row in _compared(rows)]
        seen = [cosine for cosine in cosines if cosine is not None]
        below = [cosine for cosine in seen if cosine < weak]
        if not below:
            continue
        median = statistics.median(below)
        said = (
            f"{a} and {b} conflict{'' if len(tasks) == 2 else ' most'}: "
            f"in {_percent(len(below), len(seen))} of {len(seen)} comparisons.\n"
            f"The median cosine in those is {median:+.2f}."
        )
        candidate = (len(below) / len(seen), -median, said)
        if best is None or candidate[:2] > best[:2]:
            best = candidate
    return "" if best is None else best[2]


def _worst_layers(layers: Sequence[Row]) -> str:
    """The layers with the largest share of conflicts, of those that were compared often enough."""
    worst = [layer for layer in layers if layer["compared"] >= ENOUGH_STEPS and layer["conflicts"]]
    if not worst:
        return ""
    lines = ["Layers that conflict most (cosine below 0 within the layer):"]
    lines += [
        f"  {_percent(layer['conflicts'], layer['compared']):>7} of {layer['compared']} "
        f"comparisons: {layer['parameter']}"
        for layer in worst[:LAYERS_NAMED]
    ]
    return "\n".join(lines)


def _left_out(rows: Sequence[Row], tasks: Sequence[str]) -> str:
    """What was not finite: steps that were skipped, and tasks that sat a step out."""
    lines = []
    skipped = sum(row["skipped"] for row in rows)
    if skipped:
        share = _percent(skipped, len(rows))
        lines.append(f"Skipped, as a gradient was not finite: {_steps(skipped)} ({share}).")
    for task in tasks:
        sat_out = sum(row[f"dropped/{task}"] and not row["skipped"] for row in rows)
        if sat_out:
            share = _percent(sat_out, len(rows))
            lines.append(f"Without {task}, as it was not finite: {_steps(sat_out)} ({share}).")
    return "\n".join(lines)


def _steps(count: int) -> str:
    return f"{count} step{'' if count == 1 else 's'}"


def _verdict(rows: Sequence[Row], tasks: int) -> str:
    """What the numbers support, and no more."""
    compared = _compared(rows)
    if tasks == 1:
        return "one task alone has nothing to conflict with."
    if not compared:
        return "none. No step had finite gradients of two tasks to compare."
    if len(compared) < ENOUGH_STEPS:
        return f"too early to say. Ask again after {ENOUGH_STEPS} steps or more that compare tasks."
    below = [row["min_cosine"] for row in compared if row["zone"] != "none"]
    strong = sum(
        row["zone"] in ("moderate", "critical") and row["min_cosine"] <= WEAK_COSINE
        for row in compared
    )
    if strong >= NOTABLE_SHARE * len(compared):
        return (
            "this conflict is worth resolving: it is moderate or critical in "
            f"{_percent(strong, len(compared))} of the steps.\n{COMPARE}"
        )
    if len(below) < RARE_SHARE * len(compared):
        return "the tasks hardly ever conflict.\n" + _plain_sum_will_do(tasks)
    median = statistics.median(below)
    if median > WEAK_COSINE:
        return f"the conflicts are weak, with a median cosine of {median:+.3f}.\n" + (
            _plain_sum_will_do(tasks)
        )
    if 2 * strong > len(below):
        return f"the conflicts are few, but not mild: those are where it matters.\n{COMPARE}"
    return f"the conflicts are mostly mild, and resolving them changes little at a time.\n{COMPARE}"


def _plain_sum_will_do(tasks: int) -> str:
    return (
        "The result is close to the plain sum.\n"
        "Tuning the loss weights, or the plain sum as it is, will likely do as well.\n"
        f"That saves the memory for the gradients of {tasks} tasks, and in exact mode "
        f"{tasks - 1} of {tasks} backward passes."
    )
