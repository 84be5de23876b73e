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
from gcond_kernels.diagnostics.report import ZONES, incidence_of, pair_cosines, zone_of
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.ops.launch_tables import is_capturing, keep_if_captured
from gcond_kernels.storage.names import without_wrappers

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
# Cosines of layers are counted in so many steps from -1 to 0.
BINS = 100
COMPARE = (
    "Whether the model gets better by it, only validation scores tell: compare with the plain sum."
)


class Recorder:
    """A bounded history of resolutions that never waits for the device while it records.

    What is read back waits for it: `rows`, `layers`, `advise` and `len`. Recording can be part of
    a CUDA graph, once one step was recorded outside of it: replays record too.

    Attributes:
        tasks: the names of the K tasks; `add_task` adds one.
        thresholds: (θ_crit, θ_main, θ_weak), which tell the zones apart. They may be set at any
            time, and go for all steps that are held.
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
        self._layer_names: list[str] = []
        # [T] int64: the parameters, layer by layer; and [L] int64: how many each layer has.
        self._by_layer: Tensor | None = None
        self._lengths: Tensor | None = None
        # [L, BINS + 1] int64: pairs with a cosine in each step from -1 to 0, and of 0 or more.
        self._layers: Tensor | None = None

    @fixed_precision
    @fixed_precision
    def record(
        self,
        number: Tensor,
        parameter_names: Sequence[str],
        gramian: Tensor,
        per_tensor: Tensor,
        decision: ops.Arbitration,
        dropped: Tensor,
        squares: Tensor | None = None,
    ) -> None:
        """Adds one resolution, in place of the oldest where there is no more room.

        Args:
            number: [] int64, which resolution this is, counted from 1.
            parameter_names: T names; those of before may be gone, or stand elsewhere.
            gramian: [K, K] float64 of what tasks share; rows of tasks that were dropped are zero.
            per_tensor: [T, R, R] float64, R ≥ K; what is beyond K (the momentum) is left out.
            decision: what was decided.
            dropped: [K] bool, the tasks whose gradient was not finite.
            squares: [K] float64, squared norms of all of a task's gradient; None is the diagonal of
                `gramian`.
        """
        if self.steps == 0 or not self._make_room(gramian.device, parameter_names):
            return
        assert self._ring is not None
        assert self._recorded is not None
        assert self._layers is not None
        keep_if_captured(self._ring, self._recorded, self._layers)
        # The place is counted on the device: a CUDA graph repeats what the host did once.
        squares = gramian.diagonal() if squares is None else squares
        row = _row(number, gramian, squares, decision, dropped)
        self._ring.index_copy_(0, self._recorded % self.steps, row[None])
        self._recorded += 1

        self._count_cosines(per_tensor, decision.finite)

    def _count_cosines(self, per_tensor: Tensor, finite: Tensor) -> None:
        """Counts the cosine of every pair in every layer: of sums over the layer's tensors."""
        assert self._layers is not None
        assert self._by_layer is not None
        assert self._lengths is not None
        if not self._layer_names:
            return
        keep_if_captured(self._by_layer, self._lengths)
        K = len(self.tasks)
        i, j = torch.triu_indices(K, K, 1, device=per_tensor.device)
        # Tensor after tensor of a layer: an atomic addition would round in another order each time.
        in_order = per_tensor[:, :K, :K].index_select(0, self._by_layer)
        G = torch.segment_reduce(in_order, "sum", lengths=self._lengths, unsafe=True)  # [L, K, K]
        squares = G.diagonal(dim1=1, dim2=2)
        present = (squares > 0.0) & finite
        compared = present[:, i] & present[:, j]  # [L, pairs]
        lengths = squares.sqrt()
        cosines = G[:, i, j] / torch.where(compared, lengths[:, i] * lengths[:, j], 1.0)
        steps = ((cosines + 1.0) * BINS).nan_to_num().floor().clamp(0, BINS - 1)
        steps = torch.where(cosines < 0.0, steps, BINS).long()
        self._layers.scatter_add_(1, steps, compared.long())

    def _make_room(self, device: torch.device, parameter_names: Sequence[str]) -> bool:
        """Memory on this device for these parameters; False where there can be none now."""
        K = len(self.tasks)
        as_before = self._parameter_names == list(parameter_names)
        if self._ring is not None and self._ring.device == device and as_before:
            return True
        if is_capturing(device):
            # Memory is set to zero once; a graph would do it again in every replay.
            warnings.warn(
                "steps of this CUDA graph are not recorded: take one step before the capture",
                stacklevel=5,
            )
            return False
        if self._ring is None or self._recorded is None or self._layers is None:
            width = K * K + 3 * K + 4
            self._ring = torch.zeros((self.steps, width), dtype=torch.float64, device=device)
            self._recorded = torch.zeros(1, dtype=torch.int64, device=device)
            self._layers = torch.zeros((0, BINS + 1), dtype=torch.int64, device=device)
        self._ring = self._ring.to(device)
        self._recorded = self._recorded.to(device)
        self._parameter_names = list(parameter_names)
        here = dict(zip(*layers_of(parameter_names), strict=True))
        self._layer_names += [name for name in here if name not in self._layer_names]
        members = [here.get(name, []) for name in self._layer_names]  # a layer may be gone
        by_layer = [place for of_layer in members for place in of_layer]
        self._by_layer = torch.tensor(by_layer, dtype=torch.int64, device=device)
        lengths = [len(of_layer) for of_layer in members]
        self._lengths = torch.tensor(lengths, dtype=torch.int64, device=device)
        new = len(self._layer_names) - len(self._layers)
        self._layers = torch.cat(
            [self._layers.to(device), self._layers.new_zeros((new, BINS + 1), device=device)]
        )
        return True

    @fixed_precision
    def add_task(self, name: str) -> None:
        """Add a task, after the others; what was recorded stays.

        Steps in a CUDA graph that was captured before are no longer recorded.

        Raises:
            ValueError: there is such a task.
        """
        if name in self.tasks:
            raise ValueError(f"the recorder has a task {name!r} already: give it another name")
        K = len(self.tasks)
        self.tasks = (*self.tasks, name)
        if self._ring is None:
            return
        # As `_row` has it. NaN is read as None; in the Gramian 0 is, for a task without a gradient.
        S, weights, dropped, squares, rest = torch.split(self._ring, [K * K, K, K, K, 4], dim=1)
        S = torch.nn.functional.pad(S.view(-1, K, K), (0, 1, 0, 1)).flatten(1)
        zero = torch.zeros_like(self._ring[:, :1])
        unknown = zero + math.nan
        self._ring = torch.cat([S, weights, unknown, dropped, zero, squares, unknown, rest], dim=1)

    def __len__(self) -> int:
        """How many steps are held. On a GPU this waits for the device."""
        return 0 if self._recorded is None else min(int(self._recorded), self.steps)

    def clear(self) -> None:
        """Forgets all steps, and the counts of the layers."""
        if self._recorded is not None and self._layers is not None:
            # In place: a CUDA graph goes on writing to this memory.
            self._recorded.zero_()
            self._layers.zero_()

    @fixed_precision
    def rows(self) -> list[Row]:
        """One row of plain Python values per step, oldest first. On a GPU this waits for it.

        Goes into `pandas.DataFrame(recorder.rows())` or a `csv.DictWriter` as it is. Each holds

        - step: which resolution it was, counted from 1;
        - skipped: whether it was left out, as a gradient was not finite;
        - zone: "none", "mild", "moderate" or "critical", by the smallest cosine;
        - min_cosine: the smallest cosine of any pair before anything was resolved;
        - incidence: the share of pairs with a cosine below 0;
        - conflicts: how many GCond resolved;
        - winner: of the first of those, or None (and with granularity="tensor" always);
        - cosine/a/b for every pair of tasks; norm/a, weight/a and dropped/a for every task. In
          these keys a slash within a task's name is written "%2F" (and "%2" as "%252"): `row_key`.

        A cosine is None where a task of the pair has no gradient or the step was skipped, zone,
        min_cosine and incidence where that is so of all pairs; a norm where the gradient was not
        finite; a weight where the method has none. In steps before `add_task` the cosines, the norm
        and the weight of that task are None, and it was not dropped.
        """
        return [self._row_of(values) for values in self._held()]

    def _held(self) -> Tensor:
        """[n, width] float64 on the CPU, oldest first."""
        if self._ring is None or self._recorded is None:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        recorded, ring = int(self._recorded), self._ring.cpu()
        if recorded <= self.steps:
            return ring[:recorded]
        return ring.roll(-(recorded % self.steps), 0)

    def _row_of(self, values: Tensor) -> Row:
        K, tasks = len(self.tasks), self.tasks
        S = values[: K * K].view(K, K)
        rest = values[K * K :].tolist()
        weights = [None if math.isnan(weight) else weight for weight in rest[:K]]
        dropped = [bool(flag) for flag in rest[K : 2 * K]]
        squares = rest[2 * K : 3 * K]
        number, finite, conflicts, winner = rest[3 * K :]
        cosines = pair_cosines(S) if finite else {}
        smallest = min(cosines.values(), default=None)
        norms = [
            math.sqrt(square) if math.isfinite(square) and not bad else None
            for square, bad in zip(squares, dropped, strict=True)
        ]
        return {
            "step": int(number),
            "skipped": not finite,
            "zone": None if smallest is None else zone_of(smallest, self.thresholds),
            "min_cosine": smallest,
            "incidence": incidence_of(cosines.values()),
            "conflicts": int(conflicts),
            "winner": tasks[int(winner)] if winner >= 0 else None,
            **{
                row_key("cosine", tasks[i], tasks[j]): cosines.get((i, j))
                for i, j in combinations(range(K), 2)
            },
            **{row_key("norm", task): norm for task, norm in zip(tasks, norms, strict=True)},
            **{
                row_key("weight", task): weight for task, weight in zip(tasks, weights, strict=True)
            },
            **{row_key("dropped", task): flag for task, flag in zip(tasks, dropped, strict=True)},
        }

    @fixed_precision
    def layers(self, threshold: float = 0.0) -> list[Row]:
        """Recon's conflict scores (Shi et al. 2023, arXiv 2302.11289), highest first.

        On a GPU this waits for the device. A row per layer (a module's own parameters together,
        such as weight and bias; a parameter that no dot in its name assigns to a module is one of
        its own) that more than one task had a gradient for, since the first step or the last
        `clear`, whatever `steps` is:

        - layer: its name;
        - compared: how many pairs of tasks both had a gradient for it, over all steps;
        - conflicts: the score s, how many of those had a cosine below the threshold in it;
        - share: conflicts / compared.

        Args:
            threshold: S, in (-1, 0], a multiple of 0.01.

        Raises:
            ValueError: the threshold is none of these.
        """
        last = round((threshold + 1.0) * BINS)
        if not 0 < last <= BINS or abs(threshold - (last / BINS - 1.0)) > 1e-9:
            raise ValueError(
                f"threshold must be a multiple of 0.01 above -1 and up to 0, not {threshold!r}"
            )
        if self._layers is None:
            return []
        counts = self._layers.cpu()
        compared, below = counts.sum(1).tolist(), counts[:, :last].sum(1).tolist()
        rows = [
            {"layer": name, "compared": seen, "conflicts": low, "share": low / seen}
            for name, seen, low in zip(self._layer_names, compared, below, strict=True)
            if seen > 0
        ]
        return sorted(rows, key=lambda row: (-row["conflicts"], -row["share"]))

    def incidence(self) -> float | None:
        """Incidence of conflict: the share of pairs with a cosine below 0, mean over the steps.

        (Zhang et al. 2024, arXiv 2411.18615.) None where no step compared tasks. On a GPU this
        waits for the device.
        """
        return _mean_incidence(self.rows())

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
            _incidence(rows),
            _worst_pair(rows, self.tasks, self.thresholds[2]),
            _worst_layers(self.layers()),
            _left_out(rows, self.tasks),
            "Verdict: " + _verdict(rows, len(self.tasks)),
        )
        return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def row_key(kind: str, *tasks: str) -> str:
    """Return the key of a value in a row: "cosine/a/b" of a kind and the tasks it is of.

    A slash within a name is written "%2F", and "%2" as "%252": two lists of names never have the
    same key.
    """
    return "/".join([kind, *(task.replace("%2", "%252").replace("/", "%2F") for task in tasks)])


def layers_of(names: Sequence[str]) -> tuple[list[str], list[list[int]]]:
    """The layers of parameters by their names, and the places of each one's parameters.

    Without what wrappers (torch.compile, DistributedDataParallel) put into names.
    """
    members: dict[str, list[int]] = {}
    for place, name in enumerate(without_wrappers(names)):
        members.setdefault(name.rpartition(".")[0] or name, []).append(place)
    return list(members), list(members.values())


def _row(
    number: Tensor, gramian: Tensor, squares: Tensor, decision: ops.Arbitration, dropped: Tensor
) -> Tensor:
    """[K² + 3 K + 4]: Gramian, weights, dropped, squares, number, finite, conflicts, winner."""
    events = decision.events
    # There is no row of events at all where conflicts are not to be resolved, and by tensor
    # there is no first one.
    told = events.dim() == 2 and len(events) > 0
    winner = events[0, 3:4] if told else gramian.new_full((1,), math.nan)
    return torch.cat(
        [
            gramian.flatten(),
            decision.weights,
            dropped.to(torch.float64),
            squares,
            number.to(torch.float64).view(1),
            decision.finite.to(torch.float64).view(1),
            (events[..., 0] >= 0.0).sum(dtype=torch.float64).view(1),
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


def _mean_incidence(rows: Sequence[Row]) -> float | None:
    shares = [row["incidence"] for row in _compared(rows)]
    return statistics.fmean(shares) if shares else None


def _incidence(rows: Sequence[Row]) -> str:
    incidence = _mean_incidence(rows)
    if incidence is None:
        return ""
    return (
        "Incidence of conflict (pairs of tasks with a cosine below 0, mean over the steps): "
        f"{100.0 * incidence:.1f} %."
    )


def _worst_pair(rows: Sequence[Row], tasks: Sequence[str], weak: float) -> str:
    """The pair that conflicts in the largest share of the steps that compared it."""
    best: tuple[float, float, str] | None = None
    for a, b in combinations(tasks, 2):
        cosines = [row[row_key("cosine", a, b)] for row in _compared(rows)]
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
    worst.sort(key=lambda layer: -layer["share"])
    lines = ["Layers that conflict most (cosine below 0 within the layer):"]
    lines += [
        f"  {_percent(layer['conflicts'], layer['compared']):>7} of {layer['compared']} "
        f"comparisons: {layer['layer']}"
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
        sat_out = sum(row[row_key("dropped", task)] and not row["skipped"] for row in rows)
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
