"""Many ranks: whose gradients are summed when, and that all of them decide alike.

A resolution reads a few inner products. Where those are summed over the ranks every rank computes
the same weights from the same bits, whatever part of the gradients it holds itself:

    Sync        one process: nothing to do
    Ranks       gradients are reduced already (FSDP2, tensor parallel): inner products are summed
    Sharded     rows are reduce-scattered, each rank resolves its shard, the result is gathered
    Replicated  rows are all-reduced, each rank resolves all of them

All of it is torch.distributed's collectives among the ranks of the user's process group, in groups
of our own (`Peers`).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gcond_kernels import ops
from gcond_kernels.distributed.consistency import (
    description,
    difference,
    digest,
    fingerprints,
    first_unlike,
    holders_of,
    kinds_of,
)
from gcond_kernels.distributed.data_parallel import data_parallel_modules
from gcond_kernels.distributed.fsdp import FullySharded
from gcond_kernels.distributed.process_group import Peers
from gcond_kernels.ops.types import WORD_BITS
from gcond_kernels.storage.accumulator import GradientStorage, Segment, aligned, moved, rows_of
from gcond_kernels.storage.dtensor import is_dtensor, local_part

Pieces: TypeAlias = list[tuple[int, int]]
Describe: TypeAlias = Callable[[], dict[str, str]]


class Work(NamedTuple):
    """What one resolution reads and writes in this process.

    Attributes:
        rows: [K, n], sums of the gradients.
        history: [K, n], or None.
        momentum: [n], or None.
        offsets: T starts of the segments in these rows.
        sizes: T lengths; 0 where nothing of the tensor is here.
        pieces: T pairs: from where to where in its segment this process answers for a tensor's
            inner products. Over all ranks that is every element once.
        outputs: T tensors of the segments' sizes, to be written; None where there is no gradient.
        result: [N'], what the outputs are pieces of where that is for the other ranks too.
        mask: [n / 32], a bit for each element of these rows that is trained; or None for all.
        first: the place of the first element of these rows in whole ones.
    """

    rows: Tensor
    history: Tensor | None
    momentum: Tensor | None
    offsets: Sequence[int]
    sizes: Sequence[int]
    pieces: Pieces
    outputs: list[Tensor | None]
    result: Tensor | None = None
    mask: Tensor | None = None
    first: int = 0

    @property
    def counted(self) -> tuple[list[int], list[int]]:
        """Offsets and sizes of the pieces in the rows."""
        starts = [offset + a for offset, (a, _) in zip(self.offsets, self.pieces, strict=True)]
        return starts, [b - a for a, b in self.pieces]


class Sync:
    """One process, whose accumulators hold all there is. What several do beside is in subclasses.

    Args:
        storage: the accumulators, and what goes with them.
        backend: of the operations.
    """

    size = 1
    way = "alone"
    # Of how many ranks the losses of one micro-batch are summed.
    losses_per_micro_batch = 1

    def __init__(self, storage: GradientStorage, backend: str) -> None:
        self.storage = storage
        self.backend = backend

    @property
    def started(self) -> int:
        """How many rows are on their way to the other ranks: the first ones."""
        return 0

    @property
    def is_sending(self) -> bool:
        """Whether a row is on its way that not all ranks may have sent."""
        return False

    def row_is_final(self, task: int) -> None:
        """Nothing will be added to the row of this task any more in this window."""

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all of them ask."""
        return flag

    def on_all_ranks(self, flag: Tensor) -> Tensor:
        """Whether a flag on the device, [] bool, is set on all ranks; all of them ask."""
        return flag

    def check_wrapper(self) -> None:
        """Raises a RuntimeError where the next backward pass would not reduce gradients."""

    def check_begun(self, begun: bool) -> None:
        """Raises a RuntimeError where there is nothing to resolve."""
        if not begun:
            raise RuntimeError("nothing was accumulated: call backward(losses) before step()")

    def meet(self, describe: Describe, on_nonfinite: str, begun: bool) -> list[int]:
        """Brings the ranks together; returns the micro-batches of each task that count.

        Args:
            describe: tells what all ranks must have alike, by name.
            on_nonfinite: what is done about gradients that are not finite.
            begun: whether this window had a micro-batch, with a loss or without.

        Raises:
            RuntimeError: nothing was accumulated, or the ranks differ; all of them raise it.
        """
        self.check_begun(begun)
        return self.storage.counts

    def work(self) -> Work:
        """What is to be resolved here."""
        storage = self.storage
        return Work(
            storage.accumulators, storage.history, storage.momentum, *storage.layout,
            self._pieces(), storage.new_gradients(), mask=storage.mask,
        )  # fmt: skip

    def _pieces(self) -> Pieces:
        return [(0, size) for size in self.storage.layout.sizes]

    def squared_norms(self) -> Tensor:
        """[T] float64, of every parameter tensor; of several ranks the part that is here."""
        pieces = [
            piece_of(segment, *piece)
            for segment, piece in zip(self.storage.segments, self._pieces(), strict=True)
        ]
        return ops.multi_tensor_norm(pieces, per_tensor=True, backend=self.backend).square()

    def total(
        self, products: ops.Gramians, squared_norms: Tensor | None, losses: Tensor | None
    ) -> tuple[ops.Gramians, Tensor | None, Tensor | None]:
        """Inner products, squared norms of the parameters, and losses, over all ranks."""
        return products, squared_norms, losses

    def gradients(self, work: Work) -> list[Tensor | None]:
        """What becomes `.grad` once the outputs are written."""
        return work.outputs

    def end_window(self) -> None:
        """Forgets what was on its way."""

    def forget_agreement(self) -> None:
        """Something has changed that all ranks must have alike."""

    def take_back(self) -> None:
        """A micro-batch has failed: what it made final and was not sent is not final."""


class Ranks(Sync):
    """Several ranks whose gradients are reduced already: FSDP2, HSDP, tensor parallel.

    Each holds its part of every parameter, and a part that several hold is counted once: each of
    them answers for a slice of it.
    """

    way = "mesh"

    def __init__(self, storage: GradientStorage, backend: str, peers: Peers) -> None:
        super().__init__(storage, backend)
        peers.connect()
        self.peers = peers
        self.size = peers.size
        self.losses_per_micro_batch = peers.size  # all ranks make the same passes
        self._agreed = 0  # segments that all ranks have told each other of
        self._open = False  # whether the ranks have found each other alike in this window
        self._fresh = False  # whether they have compared parameters in this window
        # Of each segment: which of the ranks that hold the same this one is, and how many they are.
        self._replica: list[tuple[int, int]] = []
        self._part = 0  # which part of all parameters this process holds
        self._fsdp = FullySharded()

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all of them ask."""
        return any(flag for (flag,) in self.peers.numbers([flag], self.storage.accumulators.device))

    def on_all_ranks(self, flag: Tensor) -> Tensor:
        """Whether a flag on the device, [] bool, is set on all ranks; all of them ask."""
        return ~self.peers.any_of(~flag)

    def check_wrapper(self) -> None:
        """Raises a RuntimeError where FSDP is told to keep gradients of any module for itself."""
        if self.storage.has_dtensors:
            self._fsdp.check(self.storage.segments)

    def check_begun(self, begun: bool) -> None:
        """Another rank may have begun where this one has not: `meet` tells."""

    def meet(self, describe: Describe, on_nonfinite: str, begun: bool) -> list[int]:
        """Brings the ranks together; returns the micro-batches of each task that count."""
        self._meet_alike(describe)
        any_begun, table = self._tell(on_nonfinite, begun)
        if not any_begun:
            self.storage.start_window()
            self.end_window()
            raise RuntimeError(
                f"nothing was accumulated on any of the {self.size} ranks: call backward(losses) "
                "before step()"
            )
        counts = self._counts(table)
        if self._fresh:
            self._check_gradients()
        return counts

    def end_window(self) -> None:
        """The next window may find the ranks changed."""
        self._open = self._fresh = False

    def forget_agreement(self) -> None:
        """The ranks are to compare what they have, at their next meeting."""
        self._agreed = 0

    def _meet_alike(self, describe: Describe) -> None:
        """Once a window, before anything else: have all ranks what they had when they compared?

        Where one has not, all compare: so all take part in the same collectives.
        """
        if self._open:
            return
        storage = self.storage
        if self.any_rank(self._agreed != len(storage.segments)):
            self._agree(describe())
            self._fresh = True
        self._open = True

    def _tell(self, on_nonfinite: str, begun: bool) -> tuple[bool, list[list[int]]]:
        """Whether any rank has begun, and how many micro-batches of each task every rank had."""
        storage = self.storage
        choice = ("skip", "drop_task", "raise").index(on_nonfinite)
        own = [choice, digest(storage.window_tasks), int(begun), *storage.counts]
        table = self.peers.numbers(own, storage.accumulators.device)
        if len({row[0] for row in table}) > 1:
            raise RuntimeError("the ranks differ in on_nonfinite: set it alike on all of them")
        if len({row[1] for row in table}) > 1:
            self._unite_touched()
        return any(row[2] for row in table), [row[3:] for row in table]

    def _counts(self, table: list[list[int]]) -> list[int]:
        """The micro-batches that the rows are sums of, from those of every rank."""
        for rank, counts in enumerate(table):
            if counts != table[0]:
                raise RuntimeError(
                    f"rank {rank} had {counts} micro-batches of the tasks, rank 0 {table[0]}: with "
                    "sharded parameters all ranks make the same backward passes"
                )
        return table[0]

    def _unite_touched(self) -> None:
        """A tensor that has a gradient on any rank has one on all."""
        storage = self.storage
        tasks = range(len(storage.counts))
        bits = [[touched >> task & 1 for touched in storage.window_tasks] for task in tasks]
        flags = torch.tensor(
            bits, dtype=torch.bool, device=self.peers.device(storage.accumulators.device)
        )
        of_tensors = self.peers.any_of(flags).T.tolist()
        storage.window_tasks = [
            sum(bit << task for task, bit in enumerate(row)) for row in of_tensors
        ]

    def _agree(self, settings: dict[str, str]) -> None:
        """Makes sure that all ranks have the same settings, parameters and state."""
        storage = self.storage
        layout = [description(segment) for segment in storage.segments]
        kinds, kind_of = kinds_of(storage.segments)
        prints = fingerprints([local_part(segment.parameter) for segment in storage.segments])
        said = self.peers.objects((digest([settings, layout]), kinds, prints, mask_prints(storage)))
        if len({one[0] for one in said}) > 1:
            raise RuntimeError(difference(self.peers.objects((settings, layout))))
        holders = [holders_of([one[1][kind] for one in said]) for kind in range(len(kinds))]
        unlike = first_unlike([one[2] for one in said], holders, kind_of, rel_tol=1e-6)
        if unlike is not None:
            tensor, rank, other = unlike
            raise RuntimeError(
                f"{storage.segments[tensor].name} of rank {rank} is not that of rank {other}: "
                "start from the same parameters (DistributedDataParallel sees to it; or load, or "
                "broadcast them)"
            )
        if storage.mask is not None:
            unlike = first_unlike([one[3] for one in said], holders, kind_of, rel_tol=0.0)
            if unlike is not None:
                tensor, rank, other = unlike
                raise RuntimeError(
                    f"mask of {storage.segments[tensor].name} of rank {rank} is not that of rank "
                    f"{other}: make masks from the same weights, or broadcast them"
                )
        own = [held[kind] for held, kind in zip(holders, kinds, strict=True)]
        self._replica = [(own[k].index(self.peers.rank), len(own[k])) for k in kind_of]
        # Where all are cut alike; of what others hold too the elements have the same places there.
        coordinate: Any = kinds[0] if len(kinds) == 1 else ((), ())
        self._part = number_of(*coordinate)
        self._holders = holders, kind_of
        self._agreed = len(storage.segments)

    def work(self) -> Work:
        """What is to be resolved here."""
        return super().work()._replace(first=self._part * self.storage.accumulators.shape[1])

    def _pieces(self) -> Pieces:
        return [
            slice_of(n, *r) for n, r in zip(self.storage.layout.sizes, self._replica, strict=True)
        ]

    def total(
        self, products: ops.Gramians, squared_norms: Tensor | None, losses: Tensor | None
    ) -> tuple[ops.Gramians, Tensor | None, Tensor | None]:
        """Inner products, squared norms and losses, summed over the ranks in one all-reduce."""
        parts = [*products, squared_norms, losses]
        present = [part for part in parts if part is not None]
        flat = torch.cat([part.flatten() for part in present])
        self.peers.sum(flat)
        pieces = torch.split(flat, [part.numel() for part in present])
        summed = iter([piece.view(part.shape) for piece, part in zip(pieces, present, strict=True)])
        total, cross, per_tensor, crosses, norms, losses = [
            None if part is None else next(summed) for part in parts
        ]
        assert total is not None
        assert per_tensor is not None
        # Ranks may be added in another order in S_ij than in S_ji.
        total, per_tensor = symmetric(total), symmetric(per_tensor)
        return ops.Gramians(total, cross, per_tensor, crosses), norms, losses

    def _check_gradients(self) -> None:
        """Raises a RuntimeError where those who hold the same part have other gradients of it.

        Compared once, in the first window: as lengths, of which rounding takes a little.
        """
        storage = self.storage
        tasks = [task for task, count in enumerate(storage.counts) if count > 0]
        lengths = [
            [float(segment.view(storage.accumulators[task]).norm()) for task in tasks]
            for segment in storage.segments
        ]
        said = self.peers.objects(lengths)
        # Beside large gradients one that is nothing but rounding may be another on every rank.
        largest = max(length for rank in said for tensor in rank for length in tensor)
        unlike = first_unlike(said, *self._holders, rel_tol=1e-2, abs_tol=1e-3 * largest)
        if unlike is not None:
            tensor, rank, other = unlike
            raise RuntimeError(
                f"rank {rank} and rank {other} hold the same part of "
                f"{storage.segments[tensor].name}, and have other gradients of it: nothing has reduced them. Shard it with the rest "
                "(fully_shard around the whole model, no ignored_params); give ranks of one tensor "
                "parallel group the same data; and ranks that train another model a process_group "
                "of their own"
            )


class Reduced(Ranks):
    """Data parallel: the rows of the ranks are summed, one after another.

    A row is sent off as soon as nothing will be added to it: while the next task's last backward
    pass runs, or in stochastic mode its block. On a GPU that has a stream of its own, so that what
    computes does not wait for it.
    """

    one_by_one = False

    def __init__(self, storage: GradientStorage, backend: str, peers: Peers) -> None:
        super().__init__(storage, backend, peers)
        self.losses_per_micro_batch = 1  # the micro-batches of all ranks are counted
        self._final: set[int] = set()
        self._started = 0
        self._under_way: list[tuple[int, Any]] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def started(self) -> int:
        """How many rows are on their way to the other ranks, or there: the first ones."""
        return self._started

    @property
    def is_sending(self) -> bool:
        """Whether a row is on its way that not all ranks may have sent."""
        return bool(self._under_way)

    def row_is_final(self, task: int) -> None:
        """Sends off what is final, in the order of the tasks: all ranks must have the same."""
        self._final.add(task)
        # Rows of other sizes would end in a deadlock; and to ask now would wait for other ranks.
        if self._agreed == len(self.storage.segments):
            while self._started in self._final and not self._would_block():
                self._start()

    def _would_block(self) -> bool:
        """Whether the host would wait for a rank that may wait for this one, at its `meet`."""
        # On a GPU a stream waits instead. gloo's reduce-scatter cannot be asked whether it is done.
        on_host = not self.storage.accumulators.is_cuda
        return self.one_by_one and on_host and bool(self._under_way)

    def take_back(self) -> None:
        """What a failed micro-batch made final, and was not sent, is not final."""
        self._final &= set(range(self._started))

    def _start(self) -> None:
        task, storage = self._started, self.storage
        with self._beside():
            if self.one_by_one:
                self._wait()
            if storage.counts[task] == 0:
                storage.accumulators[task].zero_()  # it may hold anything: nothing is ever cleared
            self._under_way.append((task, self._reduce(task)))
        self._started += 1

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the exchange, after what was launched so far."""
        device = self.storage.accumulators.device
        if device.type != "cuda":
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            yield

    def _wait(self) -> None:
        """For the rows under way; on a GPU the stream waits, not the host."""
        while self._under_way:
            task, work = self._under_way.pop(0)
            work.wait()
            self._arrived(task)

    def _finish(self) -> None:
        """From here on what is launched comes after the exchange."""
        with self._beside():
            self._wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _reduce(self, task: int) -> Any:
        """Starts to sum a row over the ranks."""
        raise NotImplementedError

    def _arrived(self, task: int) -> None:
        """The sum is there."""

    def meet(self, describe: Describe, on_nonfinite: str, begun: bool) -> list[int]:
        """Brings the ranks together, with the sums of their rows."""
        self._meet_alike(describe)
        while self._started < len(self.storage.counts):
            self._start()
        self._finish()
        return super().meet(describe, on_nonfinite, begun)

    def _check_gradients(self) -> None:
        """Every rank has had gradients of its own, which are summed by now."""

    def _counts(self, table: list[list[int]]) -> list[int]:
        return [sum(of_task) for of_task in zip(*table, strict=True)]

    def end_window(self) -> None:
        """Forgets the rows."""
        super().end_window()
        if self._under_way:
            self._finish()
        self._final.clear()
        self._started = 0


class Replicated(Reduced):
    """All-reduce of the rows; then every rank resolves all of it and keeps all state."""

    way = "replicate"

    def _reduce(self, task: int) -> Any:
        return self.peers.sum_of_row(self.storage.accumulators[task])


class Sharded(Reduced):
    """Reduce-scatter of the rows; every rank resolves its shard, and the result is gathered.

    A row [N'] is cut into as many shards [n] as there are ranks, across tensors. No memory beside
    the rows is needed: the shards of row k > 0 go where rows before it were, which have been sent,
    side by side from the start of the first row; the gathered result goes into the last row. (NCCL
    works in place; gloo takes copies, and an all-reduce for a reduce-scatter.)
    """

    way = "shard"
    one_by_one = True

    @property
    def _length(self) -> int:
        return self.storage.accumulators.shape[1] // self.size

    def _own_shard(self, row: Tensor) -> Tensor:
        start = self.peers.rank * self._length
        return row[start : start + self._length]

    def _shards(self) -> Tensor:
        """[K, n], this rank's shard of every row."""
        rows = self.storage.accumulators
        if len(rows) == 1:
            return self._own_shard(rows[0])[None]
        return rows.view(-1)[: len(rows) * self._length].view(len(rows), self._length)

    def _reduce(self, task: int) -> Any:
        row = self.storage.accumulators[task]
        # In place where nothing was sent before it; elsewhere in that row would be read meanwhile.
        shard = self._own_shard(row) if task == 0 else self._shards()[task]
        return self.peers.scatter_sum(shard, row)

    def _arrived(self, task: int) -> None:
        if task == 0 and len(self.storage.accumulators) > 1 and self.peers.rank > 0:
            self._shards()[0].copy_(self._own_shard(self.storage.accumulators[0]))

    def work(self) -> Work:
        """The shards, and where in them the tensors lie."""
        storage, n = self.storage, self._length
        self.fit_kept()
        first = self.peers.rank * n
        result = self._new_result()
        spans = [
            (min(max(offset, first), first + n), min(max(offset + size, first), first + n))
            for offset, size in zip(storage.layout.offsets, storage.layout.sizes, strict=True)
        ]
        outputs = [
            result[a:b] if touched else None
            for (a, b), touched in zip(spans, storage.window_tasks, strict=True)
        ]
        sizes = [b - a for a, b in spans]
        return Work(
            self._shards(), storage.history, storage.momentum, [a - first for a, _ in spans], sizes,
            [(0, size) for size in sizes], outputs, result, self._own_words(), first,
        )  # fmt: skip

    def _own_words(self) -> Tensor | None:
        """The part of the mask that says of the shards; a copy, for kernels take whole vectors."""
        mask, words = self.storage.mask, self._length // WORD_BITS
        first = self.peers.rank * words
        return None if mask is None else mask[first : first + words].clone()

    def _pieces(self) -> Pieces:
        """Within the whole tensors, of which every rank has all."""
        first, last = self.peers.rank * self._length, (self.peers.rank + 1) * self._length
        return [
            (min(max(first - offset, 0), size), min(max(last - offset, 0), size))
            for offset, size in zip(
                self.storage.layout.offsets, self.storage.layout.sizes, strict=True
            )
        ]

    def fit_kept(self) -> None:
        """Cuts history and momentum anew where the layout has changed, or there was none yet."""
        storage = self.storage
        if storage.history is not None:
            storage.history = self._cut_anew(storage.history)
        if storage.momentum is not None:
            storage.momentum = self._cut_anew(storage.momentum)
        storage.sharded_layout = storage.segments, storage.accumulators.shape[1]

    def _cut_anew(self, kept: Tensor) -> Tensor:
        storage, device = self.storage, self.storage.accumulators.device
        segments, length = storage.sharded_layout
        same = length == storage.accumulators.shape[1] and layout_of(segments) == layout_of(
            storage.segments
        )
        if same and kept.shape[-1] == self._length:
            return kept.to(device)
        cut = kept.new_zeros((*kept.shape[:-1], self._length), device=device)
        if kept.shape[-1] == 0:
            return cut
        place = {segment.parameter: segment for segment in segments}
        pairs = [
            (place[s.parameter], s)
            for s in storage.segments
            if s.parameter in place and place[s.parameter].shape == s.shape
        ]
        for old, new in zip(rows_of(kept), rows_of(cut), strict=True):
            new.copy_(
                self._own_shard(
                    moved(self.whole(old), storage.accumulators.shape[1], pairs, device)
                )
            )
        return cut

    def own_part(self, row: Tensor) -> Tensor:
        """A copy of this rank's part of a row [N']."""
        return self._own_shard(row).clone()

    def all_kept(self, kept: Tensor) -> Tensor:
        """History or momentum [..., N'], on the host, of which every rank keeps a part."""
        return torch.stack([self.whole(row).cpu() for row in rows_of(kept)])

    def whole(self, part: Tensor) -> Tensor:
        """A row [N'] of which every rank has a part [n]."""
        row = part.new_empty(part.numel() * self.size)
        self.peers.gather(row, part.contiguous())
        return row

    def _new_result(self) -> Tensor:
        """[N'] memory for the result, of the type of the gradients where that is one."""
        storage = self.storage
        dtypes = {segment.gradient_dtype for segment in storage.segments}
        dtype = functools.reduce(torch.promote_types, dtypes)  # of mixed ones none loses digits
        K, length = storage.accumulators.shape
        if dtype.itemsize <= storage.dtype.itemsize and K > 1:
            return storage.accumulators[-1].view(dtype)[:length]
        if dtype == storage.dtype:
            return storage.accumulators[0]
        return torch.empty(length, dtype=dtype, device=storage.accumulators.device)

    def gradients(self, work: Work) -> list[Tensor | None]:
        """All-gather of the shards of the result."""
        assert work.result is not None
        self.peers.gather(work.result, self._own_shard(work.result))
        return gradients_from(work.result, self.storage, work.outputs)


WAYS: dict[str, type[Ranks]] = {way.way: way for way in (Ranks, Sharded, Replicated)}


def peers_of(group: Any, module: nn.Module | None) -> Peers | None:
    """The ranks that train together; None for one process.

    Args:
        group: the process group; None is that of the model's DistributedDataParallel, else all.
        module: the model, if known.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    for wrapped in data_parallel_modules(module):
        group = wrapped.process_group if group is None else group
    return Peers(group)


def way_of(
    sync: str | None,
    parameters: Sequence[Tensor],
    peers: Peers | None,
) -> str | None:
    """How the ranks work together, a key of `WAYS`; None for one process.

    Raises:
        ValueError: the parameters are DTensors, and `sync` is given.
    """
    if any(map(is_dtensor, parameters)):
        if sync is not None:
            raise ValueError(
                f"sync={sync!r} is for parameters that every rank holds whole; these are DTensors, "
                "whose gradients are reduced in the backward pass: leave sync out"
            )
        return "mesh"
    return None if peers is None or peers.size == 1 else sync or "shard"


def gradients_from(
    result: Tensor, storage: GradientStorage, outputs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Every `.grad` from a row [N']: a view of it, or a copy where the type is another."""
    gradients: list[Tensor | None] = []
    for segment, output in zip(storage.segments, outputs, strict=True):
        view = segment.view(result)
        gradient = None if output is None else segment.new_gradient(view)
        if gradient is not None and gradient is not view:
            gradient.copy_(view)
        gradients.append(gradient)
    return gradients


def layout_of(segments: Sequence[Segment]) -> list[tuple[int, int, tuple[int, ...]]]:
    """What tells one layout of parameters from another: who lies where, in which order."""
    return [(id(s.parameter), s.offset, s.stride) for s in segments]


def mask_prints(storage: GradientStorage) -> list[list[float]]:
    """A number of each tensor's mask that tells it from others; nothing without one."""
    if storage.mask is None:
        return []
    words = storage.mask.cpu().numpy()
    prints = []
    for offset, size in zip(storage.layout.offsets, storage.layout.sizes, strict=True):
        of_tensor = words[offset // WORD_BITS : -(-(offset + size) // WORD_BITS)].tobytes()
        # 48 bits, which a float holds.
        hashed = hashlib.blake2b(of_tensor, digest_size=6).digest()
        prints.append([float(int.from_bytes(hashed, "big"))])
    return prints


def number_of(coordinate: Sequence[int], sizes: Sequence[int]) -> int:
    """The number of a place in a grid of these sizes, counted row by row."""
    number = 0
    for place, size in zip(coordinate, sizes, strict=True):
        number = number * size + place
    return number


def symmetric(matrix: Tensor) -> Tensor:
    """Matrices [..., R, R] with their upper halves mirrored."""
    return matrix.triu() + matrix.triu(1).mT


def piece_of(segment: Segment, start: int, stop: int) -> Tensor:
    """Elements from `start` to `stop` of a parameter, in its segment's memory order."""
    part = local_part(segment.parameter)
    if part.stride() != segment.stride:
        part = torch.empty_strided(
            part.shape, segment.stride, dtype=part.dtype, device=part.device
        ).copy_(part)
    return part.as_strided((stop - start,), (1,), part.storage_offset() + start)


def slice_of(size: int, replica: int, replicas: int) -> tuple[int, int]:
    """The slice of a tensor that one of those who hold it answers for."""
    length = aligned(-(-size // replicas))
    return min(replica * length, size), min((replica + 1) * length, size)
