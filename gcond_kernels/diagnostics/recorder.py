"""The recorder: what happened in the latest steps, kept on the device until it is read."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels.diagnostics.advice import advise
from gcond_kernels.diagnostics.records import (
    Record,
    check_count,
    incidence_of,
    mean_incidence,
    pair_cosines,
    record_key,
    zone_of,
)
from gcond_kernels.diagnostics.report import Resolution
from gcond_kernels.ops.contexts import fixed_precision
from gcond_kernels.ops.launch_tables import is_capturing, keep_if_captured
from gcond_kernels.storage.names import without_wrappers

BINS = 100  # cosines of layers are counted in this many intervals from -1 to 0


class _Buffers(NamedTuple):
    """Hold what a recorder keeps on the device.

    Attributes:
        table: [capacity, K² + 3 K + 4] float64, a record each: Gramian, weights, dropped, squares;
            number, finite, conflicts, winner. The latest is at (recorded - 1) % capacity.
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
    """

    def __init__(
        self, tasks: Sequence[str], thresholds: tuple[float, float, float], capacity: int = 1000
    ) -> None:
        self.tasks = tuple(tasks)
        self.thresholds = thresholds
        self._parameter_names: list[str] = []
        self._layer_names: list[str] = []
        self._buffers: _Buffers | None = None  # made by the first `record`, on its device
        self.capacity = capacity

    @property
    def capacity(self) -> int:
        """How many of the latest steps are kept."""
        return self._capacity

    @capacity.setter
    @fixed_precision
    def capacity(self, capacity: int) -> None:
        check_count("capacity", capacity, 0)
        self._capacity = int(capacity)
        if self._buffers is None:
            return
        held = self._held()
        held = held[max(len(held) - self.capacity, 0) :]
        table = self._buffers.table.new_zeros((self.capacity, held.shape[1]))
        table[: len(held)] = held
        # A new count: a CUDA graph that was captured before goes on with the former one.
        recorded = torch.full_like(self._buffers.recorded, len(held))
        self._buffers = self._buffers._replace(table=table, recorded=recorded)

    @fixed_precision
    def record(self, resolution: Resolution) -> None:
        """Write one resolution, in place of the oldest where the table is full."""
        if self.capacity == 0:
            return
        buffers = self._buffers_for(resolution.gramian.device, list(resolution.parameter_names))
        if buffers is None:
            return
        keep_if_captured(*buffers)
        # The index is counted on the device: a CUDA graph repeats what the host did once.
        index = buffers.recorded % self.capacity
        buffers.table.index_copy_(0, index, _encoded(resolution)[None])
        buffers.recorded.add_(1)
        if self._layer_names:
            _count_cosines(buffers, resolution.per_tensor, resolution.decision.finite)

    def _buffers_for(self, device: torch.device, parameter_names: list[str]) -> _Buffers | None:
        """Return buffers on this device for these parameters; None where none can be made now."""
        old = self._buffers
        unchanged = self._parameter_names == parameter_names
        if old is not None and old.table.device == device and unchanged:
            return old
        if is_capturing(device):
            # Memory is set to zero once; a graph would do it again in every replay.
            warnings.warn(
                "steps of this CUDA graph are not recorded: take one step before the capture",
                stacklevel=4,
            )
            return None
        if old is None:
            table = self._new_table(self.capacity, device)
            recorded = torch.zeros(1, dtype=torch.int64, device=device)
            counts = recorded.new_zeros((0, BINS + 1))
        else:
            table, recorded, counts = (value.to(device) for value in old[:3])
        self._parameter_names = parameter_names
        members = layers_of(parameter_names)
        self._layer_names += [name for name in members if name not in self._layer_names]
        indices = [members.get(name, []) for name in self._layer_names]  # a layer may be gone
        new = counts.new_zeros((len(indices) - len(counts), BINS + 1))
        order = counts.new_tensor([index for layer in indices for index in layer])
        sizes = counts.new_tensor([len(layer) for layer in indices])
        self._buffers = _Buffers(table, recorded, torch.cat([counts, new]), order, sizes)
        return self._buffers

    def _new_table(self, capacity: int, device: torch.device) -> Tensor:
        K = len(self.tasks)
        width = K * K + 3 * K + 4
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
        K = len(self.tasks)
        self.tasks = (*self.tasks, name)
        if self._buffers is None:
            return
        # NaN is read as None; in the Gramian 0 is, for a task without a gradient.
        S, weights, dropped, squares, others = _fields(self._buffers.table, K)
        S = torch.nn.functional.pad(S.view(-1, K, K), (0, 1, 0, 1)).flatten(1)
        zero = torch.zeros_like(weights[:, :1])
        unknown = zero + math.nan
        table = torch.cat([S, weights, unknown, dropped, zero, squares, unknown, others], dim=1)
        recorded = self._buffers.recorded.clone()
        self._buffers = self._buffers._replace(table=table, recorded=recorded)

    def __len__(self) -> int:
        """Return how many steps are kept. On a GPU this synchronizes with the device."""
        if self._buffers is None:
            return 0
        return min(int(self._buffers.recorded), len(self._buffers.table))

    def clear(self) -> None:
        """Drop all steps, and the counts of the layers."""
        if self._buffers is not None:
            # In place: a CUDA graph goes on writing to this memory.
            self._buffers.recorded.zero_()
            self._buffers.counts.zero_()

    @fixed_precision
    def rows(self) -> list[Record]:
        """Return a record of each step, oldest first: the rows of a table of plain Python values.

        For `pandas.DataFrame(recorder.rows())` or a `csv.DictWriter`. On a GPU this
        synchronizes with the device. Each record holds

        - step: which resolution it was, counted from 1;
        - skipped: whether it was left out, as a gradient was not finite;
        - zone: "none", "mild", "moderate" or "critical", by the smallest cosine;
        - min_cosine: the smallest cosine of any pair before anything was resolved;
        - incidence: the share of pairs with a cosine below 0;
        - conflicts: how many GCond resolved;
        - winner: of the first of those, or None (and with granularity="tensor" always);
        - cosine/a/b for every pair of tasks; norm/a, weight/a and dropped/a for every task. In
          these keys a slash within a task's name is written "%2F" (and "%2" as "%252").

        A cosine is None where a task of the pair has no gradient or the step was skipped, zone,
        min_cosine and incidence where that is so of all pairs; a norm where the gradient was not
        finite; a weight where the method has none. In steps before `add_task` the cosines, the norm
        and the weight of that task are None, and it was not dropped.
        """
        fields = _fields(self._held(), len(self.tasks))
        return [self._decoded(*values) for values in zip(*fields, strict=True)]

    def _held(self) -> Tensor:
        """Return the records that are kept, oldest first: [n, width] float64 on the CPU."""
        if self._buffers is None:
            return self._new_table(0, torch.device("cpu"))
        table, recorded = self._buffers.table.cpu(), int(self._buffers.recorded)
        if recorded <= len(table):
            return table[:recorded]
        return table.roll(-(recorded % len(table)), 0)

    def _decoded(
        self, gramian: Tensor, weights: Tensor, dropped: Tensor, squares: Tensor, others: Tensor
    ) -> Record:
        tasks = self.tasks
        number, finite, conflicts, winner = others.tolist()
        cosines = pair_cosines(gramian.view(len(tasks), -1)) if finite else {}
        smallest = min(cosines.values(), default=None)
        record: Record = {
            "step": int(number),
            "skipped": not finite,
            "zone": None if smallest is None else zone_of(smallest, self.thresholds),
            "min_cosine": smallest,
            "incidence": incidence_of(cosines.values()),
            "conflicts": int(conflicts),
            "winner": tasks[int(winner)] if winner >= 0 else None,
        }
        for i, j in combinations(range(len(tasks)), 2):
            record[record_key("cosine", tasks[i], tasks[j])] = cosines.get((i, j))
        flags = dropped.bool()
        norms = squares.sqrt().masked_fill(flags | ~squares.isfinite(), math.nan)
        for quantity, values in (("norm", norms), ("weight", weights), ("dropped", flags)):
            for task, value in zip(tasks, values.tolist(), strict=True):
                record[record_key(quantity, task)] = None if math.isnan(value) else value
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
        if self._buffers is None:
            return []
        counts = self._buffers.counts.cpu()
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
        """Return whether conflicts are worth resolving, in words; synchronizes with a GPU."""
        return advise(self)


def layers_of(names: Sequence[str]) -> dict[str, list[int]]:
    """Return layer → indices of its parameters, without what wrappers add to their names."""
    members: dict[str, list[int]] = {}
    for index, name in enumerate(without_wrappers(names)):
        members.setdefault(name.rpartition(".")[0] or name, []).append(index)
    return members


def _fields(table: Tensor, tasks: int) -> tuple[Tensor, ...]:
    """Return Gramians, weights, dropped, squares and the other four of records [n, width]."""
    return torch.split(table, [tasks * tasks, tasks, tasks, tasks, 4], dim=1)


def _encoded(resolution: Resolution) -> Tensor:
    """Return a record as `_fields` splits it: [K² + 3 K + 4] float64."""
    events, finite = resolution.decision.events, resolution.decision.finite
    # A method that resolves no conflicts has no events; of those per tensor none is the first.
    has_first = events.dim() == 2 and len(events) > 0
    winner = events[0, 3:4] if has_first else resolution.gramian.new_full((1,), math.nan)
    return torch.cat(
        [
            resolution.gramian.flatten(),
            resolution.weights,
            resolution.nonfinite.to(torch.float64),
            resolution.squares,
            resolution.counters[:1].to(torch.float64),
            finite.to(torch.float64).view(1),
            (events[..., 0] >= 0.0).sum(dtype=torch.float64).view(1),
            winner,
        ]
    )


def _count_cosines(buffers: _Buffers, per_tensor: Tensor, finite: Tensor) -> None:
    """Count the cosine of every pair in every layer where `finite`, from Gramians [T, K, K]."""
    K = per_tensor.shape[-1]
    i, j = torch.triu_indices(K, K, 1, device=per_tensor.device)
    # One tensor of a layer after another: an atomic addition would round in any order.
    in_order = per_tensor.index_select(0, buffers.order)
    G = torch.segment_reduce(in_order, "sum", lengths=buffers.sizes, unsafe=True)  # [L, K, K]
    squares = G.diagonal(dim1=1, dim2=2)
    present = (squares > 0.0) & finite
    compared = present[:, i] & present[:, j]  # [L, pairs]
    norms = squares.sqrt()
    cosines = G[:, i, j] / torch.where(compared, norms[:, i] * norms[:, j], 1.0)
    bins = ((cosines + 1.0) * BINS).nan_to_num().floor().clamp(0, BINS - 1)
    bins = torch.where(cosines < 0.0, bins, BINS).long()
    buffers.counts.scatter_add_(1, bins, compared.long())
