"""The recorder: what happened in the latest steps, kept on the device until it is read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels.diagnostics.advice import advise
from gcond_kernels.diagnostics.records import (
    InUse,
    Record,
    check_count,
    incidence_of,
    known,
    mean_incidence,
    norms_of,
    pair_cosines,
    ratio_of,
    record_key,
    zone_of,
)
from gcond_kernels.diagnostics.report import Resolution, stacked
from gcond_kernels.ops import host_flag
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.ops.launch_tables import is_capturing, keep_if_captured
from gcond_kernels.storage.names import without_wrappers

BINS = 100  # cosines of layers are counted in this many intervals from -1 to 0

# Steps on a CPU that are written together, when there are so many, or so many bytes of them, or
# something is read.
TOGETHER = 64
BYTES_TOGETHER = 1 << 20


class _Buffers(NamedTuple):
    """Hold what a recorder keeps on the device.

    Attributes:
        table: [capacity, K² + 6 K + 5] float64, a record each, as `_fields` splits it. The latest
            is at (recorded - 1) % capacity.
        recorded: [1] int64, how many records were written.
        counts: [L, BINS + 1] int64, for each layer the pairs with a cosine in each interval from
            -1 to 0, and those of 0 or more.
        order: [T] int64, indices of the parameters, layer by layer.
        sizes: [L] int64, how many parameters each layer has.
    """

    table: Tensor
    recorded: Tensor
    counts: Tensor
    order: Tensor
    sizes: Tensor


class Recorder:
    """Record the latest resolutions, without synchronizing with the device.

    Reading synchronizes: `rows`, `layers`, `incidence`, `advise`, `len`, and assigning `capacity`.
    A CUDA graph can record too, once one step was recorded outside of it: replays record. ::

        optimizer.recorder.capacity = 200
        ...
        pandas.DataFrame(optimizer.recorder.rows())

    Attributes:
        tasks: the names of the K tasks; `add_task` adds one.
        thresholds: (θ_crit, θ_main, θ_weak), which separate the zones. They can be assigned at any
            time and then hold for all steps that are kept.
        capacity: how many of the latest steps are kept; 0 records nothing. Assigning it keeps the
            latest as far as they fit. Steps in a CUDA graph that was captured before are no longer
            recorded.
        in_use: what is known of the method; the optimizer assigns it.
        loss_weights: of the tasks; None where it is not known. The optimizer assigns it. `advise`
            looks at the steps since either changed.
    """

    def __init__(
        self, tasks: Sequence[str], thresholds: tuple[float, float, float], capacity: int = 1000
    ) -> None:
        self.tasks = tuple(tasks)
        self.thresholds = thresholds
        self._names: list[str] = []
        self._layer_names: list[str] = []
        self._made: _Buffers | None = None  # by the first `record`, on its device
        self._waiting: list[Resolution] = []  # alike but for their values, still to be written
        self._in_use = InUse()
        self._loss_weights: tuple[float, ...] | None = None
        self._changes = 0  # of those two; of what waits too
        self.capacity = capacity

    def __getstate__(self) -> dict[str, object]:
        self._write()
        return self.__dict__

    @property
    def _buffers(self) -> _Buffers | None:
        """What is kept, with all that was recorded."""
        self._write()
        return self._made

    @property
    def in_use(self) -> InUse:
        """What is known of the method."""
        return self._in_use

    @in_use.setter
    def in_use(self, in_use: InUse) -> None:
        if in_use != self._in_use:
            self._count_change()
            self._in_use = in_use

    @property
    def loss_weights(self) -> tuple[float, ...] | None:
        """The tasks' loss weights."""
        return self._loss_weights

    @loss_weights.setter
    def loss_weights(self, loss_weights: tuple[float, ...] | None) -> None:
        if loss_weights != self._loss_weights:
            self._count_change()
            self._loss_weights = loss_weights

    def _count_change(self) -> None:
        self._write()
        self._changes += self._made is not None

    @property
    def capacity(self) -> int:
        """How many of the latest steps are kept."""
        return self._capacity

    @capacity.setter
    @fixed_precision
    def capacity(self, capacity: int) -> None:
        check_count("capacity", capacity, 0)
        buffers, held = self._buffers, self._held()
        self._capacity = int(capacity)
        if buffers is None:
            return
        held = held[max(len(held) - self.capacity, 0) :]
        table = buffers.table.new_zeros((self.capacity, held.shape[1]))
        table[: len(held)] = held
        # A new count: a CUDA graph that was captured before goes on with the former one.
        recorded = torch.full_like(buffers.recorded, len(held))
        self._made = buffers._replace(table=table, recorded=recorded)

    def record(self, resolution: Resolution) -> None:
        """Keep one resolution, in place of the oldest where as many as `capacity` are kept.

        On a CPU it is written later, with others: what it holds must not change any more.
        """
        device, made = resolution.counters.device, self._made
        if self.capacity == 0:
            return
        if made is None or made.table.device != device or self._names != resolution.names:
            self._write()
            if not self._prepare(device, list(resolution.names)):
                return
        if self._waiting and not self._waiting[-1].is_like(resolution):
            self._write()
        self._waiting.append(resolution)
        most = min(TOGETHER, self.capacity, 1 + BYTES_TOGETHER // resolution.nbytes)
        # A GPU's work is in the order of the steps, and in a graph that is captured.
        if not host_flag.reads_at_once(device) or len(self._waiting) >= most:
            self._write()

    @fixed_precision
    def _write(self) -> None:
        """Write the resolutions that wait."""
        buffers, waiting = self._made, self._waiting
        if not waiting or buffers is None:
            return
        self._waiting = []
        keep_if_captured(*buffers)
        several = stacked(waiting)
        # The index is counted on the device: a CUDA graph repeats what the host did once.
        index = buffers.recorded
        if len(waiting) > 1:
            index = index + torch.arange(len(waiting), device=index.device)
        buffers.table.index_copy_(0, index % self.capacity, _encoded(several, self._changes))
        buffers.recorded.add_(len(waiting))
        if self._layer_names:
            _count_cosines(buffers, several.per_tensor, several.decision.finite)

    @fixed_precision
    def _prepare(self, device: torch.device, names: list[str]) -> bool:
        """Make buffers on this device for these parameters; return whether that can be done."""
        old = self._made
        if is_capturing(device):
            # Memory is set to zero once; a graph would do it again in every replay.
            warnings.warn(
                "steps of this CUDA graph are not recorded: take one step before the capture",
                stacklevel=4,
            )
            return False
        if old is None:
            table = self._new_table(self.capacity, device)
            recorded = torch.zeros(1, dtype=torch.int64, device=device)
            counts = recorded.new_zeros((0, BINS + 1))
        else:
            table, recorded, counts = (value.to(device) for value in old[:3])
        self._names = names
        members = layers_of(names)
        self._layer_names += [name for name in members if name not in self._layer_names]
        indices = [members.get(name, []) for name in self._layer_names]  # a layer may be gone
        new = counts.new_zeros((len(indices) - len(counts), BINS + 1))
        order = counts.new_tensor([index for layer in indices for index in layer])
        sizes = counts.new_tensor([len(layer) for layer in indices])
        self._made = _Buffers(table, recorded, torch.cat([counts, new]), order, sizes)
        return True

    def _new_table(self, capacity: int, device: torch.device) -> Tensor:
        K = len(self.tasks)
        width = K * K + 6 * K + 5
        return torch.zeros((capacity, width), dtype=torch.float64, device=device)

    @fixed_precision
    def add_task(self, name: str) -> None:
        """Add a task, after the others; what was recorded stays.

        Steps in a CUDA graph that was captured before are no longer recorded.

        Raises:
            ValueError: there is such a task.
        """
        if name in self.tasks:
            raise ValueError(f"the recorder has a task {name!r} already: give it another name")
        K, buffers = len(self.tasks), self._buffers
        self.tasks = (*self.tasks, name)
        if buffers is None:
            return
        # NaN is read as None; in the Gramian 0 is, for a task without a gradient.
        S, dropped, *per_task, others = _fields(buffers.table, K)
        S = torch.nn.functional.pad(S.view(-1, K, K), (0, 1, 0, 1)).flatten(1)
        unknown = torch.full_like(dropped[:, :1], math.nan)
        added = [part for values in per_task for part in (values, unknown)]
        table = torch.cat([S, dropped, torch.zeros_like(unknown), *added, others], dim=1)
        self._made = buffers._replace(table=table, recorded=buffers.recorded.clone())

    def __len__(self) -> int:
        """Return how many steps are kept. On a GPU this synchronizes with the device."""
        buffers = self._buffers
        return 0 if buffers is None else min(int(buffers.recorded), len(buffers.table))

    def clear(self) -> None:
        """Drop all steps, and the counts of the layers."""
        self._waiting = []
        if self._made is not None:
            # In place: a CUDA graph goes on writing to this memory.
            self._made.recorded.zero_()
            self._made.counts.zero_()

    @fixed_precision
    def rows(self) -> list[Record]:
        """Return a record of each step, oldest first: the rows of a table of plain Python values.

        For `pandas.DataFrame(recorder.rows())` or a `csv.DictWriter`. On a GPU this
        synchronizes with the device. Each record holds

        - step: which resolution it was, counted from 1;
        - changes: how often the loss weights or the method (granularity, mode) had changed;
        - skipped: whether it was left out, as a gradient was not finite;
        - zone: "none", "mild", "moderate" or "critical", by the smallest cosine;
        - min_cosine: the smallest cosine of any pair before anything was resolved;
        - incidence: the share of pairs with a cosine below 0;
        - conflicts: how many GCond resolved;
        - winner: of the first of those, or None (and with granularity="tensor" always);
        - norm_ratio: the largest norm over shared parameters divided by the smallest;
        - cosine/a/b for every pair of tasks;
        - norm/a for every task: of its gradient; shared_norm/a: of the part that tasks share;
        - weight/a: of its gradient in the result; descent/a: the cosine of the result with it;
          rising/a: whether the result raises the task's loss to first order;
        - loss/a: the mean of its losses in the window, without the loss weight;
        - dropped/a: whether it was left out, as its gradient was not finite.

        In these keys a slash within a task's name is written "%2F" (and "%2" as "%252").

        A value is None where there is none: a cosine, and what follows from cosines, where a task
        has no gradient or the step was skipped; a norm that is not finite; a weight and what
        follows from it where the method has none; a loss without a micro-batch, or not finite; of
        a task that `add_task` added, all of these before that. `Report` says more of each.
        """
        fields = _fields(self._held(), len(self.tasks))
        return [self._decoded(*values) for values in zip(*fields, strict=True)]

    def _held(self) -> Tensor:
        """Return the records that are kept, oldest first: [n, width] float64 on the CPU."""
        buffers = self._buffers
        if buffers is None:
            return self._new_table(0, torch.device("cpu"))
        table, recorded = buffers.table.cpu(), int(buffers.recorded)
        if recorded <= len(table):
            return table[:recorded]
        return table.roll(-(recorded % len(table)), 0)

    def _decoded(
        self, gramian: Tensor, dropped: Tensor, squares: Tensor, *values: Tensor
    ) -> Record:
        tasks = self.tasks
        weights, descent, rising, losses = map(known, values[:4])
        number, finite, conflicts, winner, changes = values[4].tolist()
        S = gramian.view(len(tasks), -1)
        cosines, shared_norms = pair_cosines(S) if finite else {}, norms_of(S)
        smallest = min(cosines.values(), default=None)
        record: Record = {
            "step": int(number),
            "changes": int(changes),
            "skipped": not finite,
            "zone": None if smallest is None else zone_of(smallest, self.thresholds),
            "min_cosine": smallest,
            "incidence": incidence_of(cosines.values()),
            "conflicts": int(conflicts),
            "winner": tasks[int(winner)] if winner >= 0 else None,
            "norm_ratio": ratio_of(shared_norms) if finite else None,
        }
        for i, j in combinations(range(len(tasks)), 2):
            record[record_key("cosine", tasks[i], tasks[j])] = cosines.get((i, j))
        norms = known(squares.sqrt().masked_fill(dropped.bool(), math.nan))
        per_task: dict[str, list[Any]] = {
            "norm": norms,
            "shared_norm": [
                s if n is not None else n for s, n in zip(shared_norms, norms, strict=True)
            ],
            "weight": weights,
            "descent": descent,
            "rising": [None if value is None else value > 0.0 for value in rising],
            "loss": losses,
            "dropped": dropped.bool().tolist(),
        }
        for quantity, of_tasks in per_task.items():
            for task, value in zip(tasks, of_tasks, strict=True):
                record[record_key(quantity, task)] = value
        return record

    @fixed_precision
    def layers(self, threshold: float = 0.0) -> list[Record]:
        """Return the conflict score of Recon (Shi et al. 2023, arXiv 2302.11289) of each layer.

        Highest first. A layer is a module's own parameters together, such as weight and bias; a
        parameter without a dot in its name is a layer of its own. There is a record of each layer
        that more than one task had a gradient for, since the first step or the last `clear`,
        whatever `capacity` is. On a GPU this synchronizes with the device.

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
        buffers = self._buffers
        if buffers is None:
            return []
        counts = buffers.counts.cpu()
        compared, below = counts.sum(1).tolist(), counts[:, :last].sum(1).tolist()
        records = [
            {"layer": name, "compared": seen, "conflicts": low, "share": low / seen}
            for name, seen, low in zip(self._layer_names, compared, below, strict=True)
            if seen > 0
        ]
        return sorted(records, key=lambda record: (-record["conflicts"], -record["share"]))

    def incidence(self) -> float | None:
        """Return the mean share of pairs with a cosine below 0 (arXiv 2411.18615).

        None where no step compared tasks. On a GPU this synchronizes with the device.
        """
        return mean_incidence(self.rows())

    def advise(self) -> str:
        """Return what to try first, in words; synchronizes with a GPU."""
        return advise(self)


def layers_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Return layer → indices of its parameters, without what wrappers add to their names."""
    members: dict[str, list[int]] = {}
    for index, name in enumerate(without_wrappers(names)):
        members.setdefault(name.rpartition(".")[0] or name, []).append(index)
    return members


def _fields(table: Tensor, tasks: int) -> tuple[Tensor, ...]:
    """Return what records [n, width] hold.

    Gramian, dropped, squared norms, weights, descent, rising, losses, and five numbers: step,
    finite, conflicts, winner, changes.
    """
    return torch.split(table, [tasks * tasks, *[tasks] * 6, 5], dim=1)


def _encoded(several: Resolution, changes: int) -> Tensor:
    """Return records as `_fields` splits them, [n, K² + 6 K + 5] float64, of n resolutions."""
    (events, finite), gramian = several.decision[2:], several.gramian
    # A method that resolves no conflicts has no events; of those per tensor none is the first.
    has_first = events.dim() == 3 and events.shape[1] > 0
    winner = events[:, 0, 3:4] if has_first else gramian.new_full((len(gramian), 1), math.nan)
    return torch.cat(
        [
            gramian.flatten(1),
            several.nonfinite.to(torch.float64),
            several.squares,
            several.weights,
            *several.descent_and_rising,
            several.losses,
            several.counters[:, :1].to(torch.float64),
            finite.to(torch.float64)[:, None],
            (events[..., 0] >= 0.0).flatten(1).sum(1, keepdim=True, dtype=torch.float64),
            winner,
            torch.full_like(winner, changes),
        ],
        dim=1,
    )


def _count_cosines(buffers: _Buffers, per_tensor: Tensor, finite: Tensor) -> None:
    """Count every pair's cosine in every layer where `finite`, from Gramians [n, T, K, K]."""
    K = per_tensor.shape[-1]
    i, j = torch.triu_indices(K, K, 1, device=per_tensor.device)
    # One tensor of a layer after another: an atomic addition would round in any order.
    in_order = per_tensor.index_select(1, buffers.order).transpose(0, 1).contiguous()
    G = torch.segment_reduce(in_order, "sum", lengths=buffers.sizes, unsafe=True)  # [L, n, K, K]
    squares = G.diagonal(dim1=2, dim2=3)
    present = (squares > 0.0) & finite[:, None]
    compared = present[..., i] & present[..., j]  # [L, n, pairs]
    norms = squares.sqrt()
    cosines = G[..., i, j] / torch.where(compared, norms[..., i] * norms[..., j], 1.0)
    bins = ((cosines + 1.0) * BINS).nan_to_num().floor().clamp(0, BINS - 1)
    bins = torch.where(cosines < 0.0, bins, BINS).long()
    buffers.counts.scatter_add_(1, bins.flatten(1), compared.long().flatten(1))
