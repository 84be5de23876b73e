"""Many ranks: whose gradients are summed when, and that all of them decide alike.

A resolution reads a few inner products. Where those are summed over the ranks every rank computes
the same weights from the same bits, whatever part of the gradients it holds itself:

    Sync        one process: nothing to do
    Ranks       gradients are reduced already (FSDP2, tensor parallel): inner products are summed
    Sharded     rows are reduce-scattered, each rank resolves its shard, the result is gathered
    Replicated  rows are all-reduced, each rank resolves all of them
    Local       each rank resolves its own gradients, the results are averaged

All of it is torch.distributed's collectives on the process group of the user.
"""

from __future__ import annotations

import functools
import hashlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from gcond_kernels import ops
from gcond_kernels.accumulator import Accumulator, Segment, aligned, rows_of
from gcond_kernels.dtensor import is_dtensor, local_part, shard_coordinate
from gcond_kernels.nonfinite import nonfinite_tasks

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
    """

    rows: Tensor
    history: Tensor | None
    momentum: Tensor | None
    offsets: Sequence[int]
    sizes: Sequence[int]
    pieces: Pieces
    outputs: list[Tensor | None]
    result: Tensor | None = None

    @property
    def counted(self) -> tuple[list[int], list[int]]:
        """Offsets and sizes of the pieces in the rows."""
        starts = [offset + a for offset, (a, _) in zip(self.offsets, self.pieces, strict=True)]
        return starts, [b - a for a, b in self.pieces]


class Sync:
    """One process, whose accumulators hold all there is. What several do beside is in subclasses.

    Args:
        accumulator: the rows, and what goes with them.
        backend: of the operations.
    """

    size = 1
    way = "alone"

    def __init__(self, accumulator: Accumulator, backend: str) -> None:
        self.accumulator = accumulator
        self.backend = backend

    @property
    def owner(self) -> list[Any] | None:
        """Whose state it is, where it is not the same on every rank: [way, rank, ranks]."""
        return None

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

    def check_begun(self) -> None:
        """Raises a RuntimeError where there is nothing to resolve."""
        if not any(self.accumulator.counts):
            raise RuntimeError("nothing was accumulated: call backward(losses) before step()")

    def meet(self, describe: Describe, on_nonfinite: str) -> list[int]:
        """Brings the ranks together; returns the micro-batches of each task that count.

        Args:
            describe: tells what all ranks must have alike, by name.
            on_nonfinite: what is done about gradients that are not finite.

        Raises:
            RuntimeError: nothing was accumulated, or the ranks differ; all of them raise it.
        """
        self.check_begun()
        return self.accumulator.counts

    def work(self) -> Work:
        """What is to be resolved here."""
        acc = self.accumulator
        return Work(
            acc.rows, acc.history, acc.momentum, acc.offsets, acc.sizes, self._pieces(),
            acc.new_gradients(),
        )  # fmt: skip

    def _pieces(self) -> Pieces:
        return [(0, size) for size in self.accumulator.sizes]

    def squared_norms(self, work: Work) -> Tensor:
        """[T] float64, of every parameter tensor; of several ranks the part that is here."""
        pieces = [
            piece_of(segment, *piece)
            for segment, piece in zip(self.accumulator.segments, self._pieces(), strict=True)
        ]
        return ops.multi_tensor_norm(pieces, per_tensor=True, backend=self.backend).square()

    def total(
        self, products: ops.Gramians, squared_norms: Tensor | None
    ) -> tuple[ops.Gramians, Tensor | None]:
        """Inner products, and squared norms of the parameters, over all ranks."""
        return products, squared_norms

    def gradients(self, work: Work) -> list[Tensor | None]:
        """What becomes `.grad` once the outputs are written."""
        return work.outputs

    def end_window(self) -> None:
        """Forgets what was on its way."""

    def forget_agreement(self) -> None:
        """Something has changed that all ranks must have alike."""

    def take_back(self) -> None:
        """A micro-batch has failed: what it made final and was not sent is not final."""


class Peers:
    """A process group, and the small things that its ranks tell each other."""

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.dist = dist
        # Not the default group itself: one that is still held when Python ends may abort it.
        self.group: Any = None if group is dist.group.WORLD else group
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self._on_host = "cpu:" in dist.get_backend_config(self.group)
        self._of_rows: Any = None

    def device(self, tensors: torch.device) -> torch.device:
        """Where small things travel: between hosts if the group can, then no GPU has to wait."""
        return torch.device("cpu") if self._on_host else tensors

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """Puts the parts [n] of all ranks side by side into `whole`, which may hold this one."""
        # torch 2.13 has given the older name up.
        newer = hasattr(self.dist, "all_gather_single")
        run = self.dist.all_gather_single if newer else self.dist.all_gather_into_tensor
        run(whole, part, group=self.group)

    def make_group_of_rows(self) -> None:
        """Rows travel in a group of their own, with the same ranks; all of them call this.

        They are sent in the middle of a backward pass, and on another rank perhaps later than what
        the user's own collectives send: in one group these would meet each other.
        """
        group: Any = self.group or self.dist.group.WORLD
        device = torch.device("cpu" if self._on_host else "cuda")
        # torch has no other way to ask; without, the new group has torch's default.
        options = getattr(group._get_backend(device), "options", None)
        self._of_rows = self.dist.new_group(
            self.dist.get_process_group_ranks(group),
            timeout=getattr(options, "_timeout", None),
            backend=self.dist.get_backend_config(group),
            use_local_synchronization=True,
        )

    def sum_of_row(self, row: Tensor) -> Any:
        """Starts to sum a row over the ranks, in place."""
        return self.dist.all_reduce(row, group=self._of_rows, async_op=True)

    def scatter_sum(self, part: Tensor, whole: Tensor) -> Any:
        """Starts to sum over the ranks what this rank keeps a part [n] of, which may lie in it."""
        newer = hasattr(self.dist, "reduce_scatter_single")
        run = self.dist.reduce_scatter_single if newer else self.dist.reduce_scatter_tensor
        return run(part, whole, group=self._of_rows, async_op=True)

    def numbers(self, own: Sequence[int], tensors: torch.device) -> list[list[int]]:
        """The whole numbers of every rank, by rank; as many from each."""
        sent = torch.tensor(own, dtype=torch.int64, device=self.device(tensors))
        table = sent.new_empty(self.size * len(own))
        self.gather(table, sent)
        rows: list[list[int]] = table.view(self.size, len(own)).tolist()
        return rows

    def mesh(self, tensors: torch.device) -> Any:
        """The group as a mesh of devices."""
        from torch.distributed.device_mesh import DeviceMesh

        group: Any = self.group or self.dist.group.WORLD
        return DeviceMesh.from_group(group, tensors.type)

    def objects(self, own: Any) -> list[Any]:
        """What every rank says, by rank."""
        said: list[Any] = [None] * self.size
        self.dist.all_gather_object(said, own, group=self.group)
        return said

    def any_of(self, flags: Tensor) -> Tensor:
        """Where a flag [...] bool is set on any rank."""
        reduced = flags.to(torch.uint8)
        self.dist.all_reduce(reduced, self.dist.ReduceOp.MAX, group=self.group)
        return reduced.bool()

    def sum(self, tensor: Tensor) -> None:
        """Sums the tensor over the ranks, in place."""
        self.dist.all_reduce(tensor, group=self.group)


class Ranks(Sync):
    """Several ranks whose gradients are reduced already: FSDP2, HSDP, tensor parallel.

    Each holds its part of every parameter, and a part that several hold is counted once: each of
    them answers for a slice of it.
    """

    way = "mesh"

    def __init__(self, accumulator: Accumulator, backend: str, peers: Peers) -> None:
        super().__init__(accumulator, backend)
        self.peers = peers
        self.size = peers.size
        self._agreed = 0  # segments that all ranks have told each other of
        self._open = False  # whether the ranks have found each other alike in this window
        self._fresh = False  # whether they have compared parameters in this window
        # Of each segment: which of the ranks that hold the same this one is, and how many they are.
        self._replica: list[tuple[int, int]] = []

    @property
    def owner(self) -> list[Any] | None:
        """Whose state it is."""
        return [self.way, self.peers.rank, self.peers.size]

    def any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; all of them ask."""
        return any(flag for (flag,) in self.peers.numbers([flag], self.accumulator.rows.device))

    def check_begun(self) -> None:
        """Another rank may have begun where this one has not: `meet` tells."""

    def meet(self, describe: Describe, on_nonfinite: str) -> list[int]:
        """Brings the ranks together; returns the micro-batches of each task that count."""
        self._meet_alike(describe)
        table = self._tell(on_nonfinite)
        if not any(map(any, table)):
            self.accumulator.start_window()
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
        acc = self.accumulator
        if self.any_rank(self._agreed != len(acc.segments)):
            self._agree(describe())
            self._fresh = True
        self._open = True

    def _check_gradients(self) -> None:
        """What `meet` does in a window in which the ranks have compared parameters."""
        self._compare_gradients()

    def _tell(self, on_nonfinite: str) -> list[list[int]]:
        """How many micro-batches of each task every rank had."""
        acc = self.accumulator
        choice = ("skip", "drop_task", "raise").index(on_nonfinite)
        own = [choice, digest(acc.touched), *acc.counts]
        table = self.peers.numbers(own, acc.rows.device)
        if len({row[0] for row in table}) > 1:
            raise RuntimeError("the ranks differ in on_nonfinite: set it alike on all of them")
        if len({row[1] for row in table}) > 1:
            self._unite_touched()
        return [row[2:] for row in table]

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
        acc = self.accumulator
        tasks = range(len(acc.counts))
        bits = [[touched >> task & 1 for touched in acc.touched] for task in tasks]
        flags = torch.tensor(bits, dtype=torch.bool, device=self.peers.device(acc.rows.device))
        of_tensors = self.peers.any_of(flags).T.tolist()
        acc.touched = [sum(bit << task for task, bit in enumerate(row)) for row in of_tensors]

    def _agree(self, settings: dict[str, str]) -> None:
        """Makes sure that all ranks have the same settings, parameters and state."""
        acc = self.accumulator
        layout = [description(segment) for segment in acc.segments]
        kinds, kind_of = kinds_of(acc.segments)
        prints = fingerprints([local_part(segment.parameter) for segment in acc.segments])
        said = self.peers.objects((digest([settings, layout]), kinds, prints))
        if len({one[0] for one in said}) > 1:
            raise RuntimeError(difference(self.peers.objects((settings, layout))))
        holders = [holders_of([one[1][kind] for one in said]) for kind in range(len(kinds))]
        unlike = first_unlike([one[2] for one in said], holders, kind_of, rel_tol=1e-6)
        if unlike is not None:
            tensor, rank, other = unlike
            raise RuntimeError(
                f"{acc.segments[tensor].name} of rank {rank} is not that of rank {other}: start "
                "from the same parameters (DistributedDataParallel sees to it; or load, or "
                "broadcast them)"
            )
        own = [held[coordinate] for held, coordinate in zip(holders, kinds, strict=True)]
        self._replica = [(own[k].index(self.peers.rank), len(own[k])) for k in kind_of]
        self._holders = holders, kind_of
        self._agreed = len(acc.segments)

    def _pieces(self) -> Pieces:
        return [slice_of(n, *r) for n, r in zip(self.accumulator.sizes, self._replica, strict=True)]

    def total(
        self, products: ops.Gramians, squared_norms: Tensor | None
    ) -> tuple[ops.Gramians, Tensor | None]:
        """Inner products, and squared norms of the parameters, summed in one all-reduce."""
        parts = [products.total, products.cross, products.per_tensor, squared_norms]
        present = [part for part in parts if part is not None]
        flat = torch.cat([part.flatten() for part in present])
        self.peers.sum(flat)
        pieces = torch.split(flat, [part.numel() for part in present])
        summed = iter([piece.view(part.shape) for piece, part in zip(pieces, present, strict=True)])
        total, cross, per_tensor, norms = [None if p is None else next(summed) for p in parts]
        assert total is not None
        assert per_tensor is not None
        # Ranks may be added in another order in S_ij than in S_ji.
        total = total.triu() + total.triu(1).T
        return ops.Gramians(total, cross, per_tensor), norms

    def _compare_gradients(self) -> None:
        """Raises a RuntimeError where those who hold the same part have other gradients of it.

        Compared once, in the first window: as lengths, of which rounding takes a little.
        """
        acc = self.accumulator
        tasks = [task for task, count in enumerate(acc.counts) if count > 0]
        lengths = [
            [float(segment.view(acc.rows[task]).norm()) for task in tasks]
            for segment in acc.segments
        ]
        said = self.peers.objects(lengths)
        # Beside large gradients one that is nothing but rounding may be another on every rank.
        largest = max(length for rank in said for tensor in rank for length in tensor)
        unlike = first_unlike(said, *self._holders, rel_tol=1e-2, abs_tol=1e-3 * largest)
        if unlike is not None:
            tensor, rank, other = unlike
            raise RuntimeError(
                f"rank {rank} and rank {other} hold the same part of {acc.segments[tensor].name}, "
                "and have other gradients of it: nothing has reduced them. Shard it with the rest "
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

    def __init__(self, accumulator: Accumulator, backend: str, peers: Peers) -> None:
        super().__init__(accumulator, backend, peers)
        peers.make_group_of_rows()
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
        if self._agreed == len(self.accumulator.segments):
            while self._started in self._final and not self._would_block():
                self._start()

    def _would_block(self) -> bool:
        """Whether the host would wait for a rank that may wait for this one, at its `meet`."""
        # On a GPU a stream waits instead. gloo's reduce-scatter cannot be asked whether it is done.
        on_host = not self.accumulator.rows.is_cuda
        return self.one_by_one and on_host and bool(self._under_way)

    def take_back(self) -> None:
        """What a failed micro-batch made final, and was not sent, is not final."""
        self._final &= set(range(self._started))

    def _start(self) -> None:
        task, acc = self._started, self.accumulator
        with self._beside():
            if self.one_by_one:
                self._wait()
            if acc.counts[task] == 0:
                acc.rows[task].zero_()  # it may hold anything: nothing is ever cleared
            self._under_way.append((task, self._reduce(task)))
        self._started += 1

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream of the exchange, after what was launched so far."""
        device = self.accumulator.rows.device
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

    def meet(self, describe: Describe, on_nonfinite: str) -> list[int]:
        """Brings the ranks together, with the sums of their rows."""
        self._meet_alike(describe)
        while self._started < len(self.accumulator.counts):
            self._start()
        self._finish()
        return super().meet(describe, on_nonfinite)

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

    @property
    def owner(self) -> list[Any] | None:
        """Every rank's state is the same, and that of one process."""
        return None

    def _reduce(self, task: int) -> Any:
        return self.peers.sum_of_row(self.accumulator.rows[task])


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
        return self.accumulator.rows.shape[1] // self.size

    def _own_shard(self, row: Tensor) -> Tensor:
        start = self.peers.rank * self._length
        return row[start : start + self._length]

    def _shards(self) -> Tensor:
        """[K, n], this rank's shard of every row."""
        rows = self.accumulator.rows
        if len(rows) == 1:
            return self._own_shard(rows[0])[None]
        return rows.view(-1)[: len(rows) * self._length].view(len(rows), self._length)

    def _reduce(self, task: int) -> Any:
        row = self.accumulator.rows[task]
        # In place where nothing was sent before it; elsewhere in that row would be read meanwhile.
        shard = self._own_shard(row) if task == 0 else self._shards()[task]
        return self.peers.scatter_sum(shard, row)

    def _arrived(self, task: int) -> None:
        if task == 0 and len(self.accumulator.rows) > 1 and self.peers.rank > 0:
            self._shards()[0].copy_(self._own_shard(self.accumulator.rows[0]))

    def work(self) -> Work:
        """The shards, and where in them the tensors lie."""
        acc, n = self.accumulator, self._length
        self.fit_kept()
        first = self.peers.rank * n
        result = self._new_result()
        spans = [
            (min(max(offset, first), first + n), min(max(offset + size, first), first + n))
            for offset, size in zip(acc.offsets, acc.sizes, strict=True)
        ]
        outputs = [
            result[a:b] if wanted else None
            for (a, b), wanted in zip(spans, acc.wanted(), strict=True)
        ]
        sizes = [b - a for a, b in spans]
        return Work(
            self._shards(), acc.history, acc.momentum, [a - first for a, _ in spans], sizes,
            [(0, size) for size in sizes], outputs, result,
        )  # fmt: skip

    def _pieces(self) -> Pieces:
        """Within the whole tensors, of which every rank has all."""
        first, last = self.peers.rank * self._length, (self.peers.rank + 1) * self._length
        return [
            (min(max(first - offset, 0), size), min(max(last - offset, 0), size))
            for offset, size in zip(self.accumulator.offsets, self.accumulator.sizes, strict=True)
        ]

    def fit_kept(self) -> None:
        """Cuts history and momentum anew where parameters have come, or there was nothing yet."""
        acc = self.accumulator
        if acc.history is not None:
            acc.history = self._cut_anew(acc.history)
        if acc.momentum is not None:
            acc.momentum = self._cut_anew(acc.momentum)

    def _cut_anew(self, kept: Tensor) -> Tensor:
        rows, before = self.accumulator.rows, kept.shape[-1]
        if before == self._length and kept.device == rows.device:
            return kept
        cut = kept.new_zeros((*kept.shape[:-1], self._length), device=rows.device)
        if before == 0:
            return cut
        for old, new in zip(rows_of(kept), rows_of(cut), strict=True):
            own = self.whole(old)[self.peers.rank * self._length :][: self._length]
            new[: len(own)] = own
        return cut

    def whole(self, part: Tensor) -> Tensor:
        """A row [N'] of which every rank has a part [n]."""
        row = part.new_empty(part.numel() * self.size)
        self.peers.gather(row, part.contiguous())
        return row

    def own_sum(self, row: Tensor) -> Tensor:
        """This rank's part [n] of the sum of a row [N'] over the ranks."""
        part = row.new_empty(row.numel() // self.size)
        self.peers.scatter_sum(part, row).wait()
        return part

    def _new_result(self) -> Tensor:
        """[N'] memory for the result, of the type of the gradients where that is one."""
        acc = self.accumulator
        dtypes = {segment.gradient_dtype for segment in acc.segments}
        dtype = functools.reduce(torch.promote_types, dtypes)  # of mixed ones none loses digits
        K, length = acc.rows.shape
        if dtype.itemsize <= acc.dtype.itemsize and K > 1:
            return acc.rows[-1].view(dtype)[:length]
        if dtype == acc.dtype:
            return acc.rows[0]
        return torch.empty(length, dtype=dtype, device=acc.rows.device)

    def gradients(self, work: Work) -> list[Tensor | None]:
        """All-gather of the shards of the result."""
        assert work.result is not None
        self.peers.gather(work.result, self._own_shard(work.result))
        return gradients_from(work.result, self.accumulator)


class Local(Ranks):
    """Every rank resolves its own gradients, and the results are averaged.

    It is what the published implementation does: the ranks' state drifts apart.
    """

    way = "local"

    def _check_gradients(self) -> None:
        """Every rank has gradients of its own."""

    def _counts(self, table: list[list[int]]) -> list[int]:
        return self.accumulator.counts

    def _pieces(self) -> Pieces:
        return Sync._pieces(self)

    def work(self) -> Work:
        """All of it; the result lies in the first row."""
        acc = self.accumulator
        outputs = [
            segment.view(acc.rows[0]) if wanted else None
            for segment, wanted in zip(acc.segments, acc.wanted(), strict=True)
        ]
        return super().work()._replace(outputs=outputs, result=acc.rows[0])

    def total(
        self, products: ops.Gramians, squared_norms: Tensor | None
    ) -> tuple[ops.Gramians, Tensor | None]:
        """Inner products of this rank, but not finite where they are not on any rank."""
        bad = self.peers.any_of(nonfinite_tasks(products.total))
        total = products.total + torch.where(bad, math.nan, 0.0).diag()
        return products._replace(total=total), squared_norms

    def gradients(self, work: Work) -> list[Tensor | None]:
        """The mean over the ranks."""
        assert work.result is not None
        self.peers.sum(work.result)
        work.result.div_(self.size)
        return gradients_from(work.result, self.accumulator)


WAYS: dict[str, type[Ranks]] = {way.way: way for way in (Ranks, Sharded, Replicated, Local)}


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
    module: nn.Module | None,
) -> str | None:
    """How the ranks work together, a key of `WAYS`; None for one process.

    Raises:
        ValueError: the parameters are DTensors, and `sync` or a DistributedDataParallel is given.
    """
    if any(map(is_dtensor, parameters)):
        if data_parallel_modules(module):
            raise ValueError(
                "module: DistributedDataParallel around DTensors is not handled: use fully_shard "
                "on a mesh of two dimensions, which also replicates"
            )
        if sync is not None:
            raise ValueError(
                f"sync={sync!r} is for parameters that every rank holds whole; these are DTensors, "
                "whose gradients are reduced in the backward pass: leave sync out"
            )
        return "mesh"
    return None if peers is None or peers.size == 1 else sync or "shard"


class DataParallel:
    """The DistributedDataParallel modules of a model, which leave their gradients alone.

    Args:
        module: the model; may hold none.
        parameters: of the optimizer.

    Raises:
        ValueError: a parameter would be left without a reduced gradient; or static_graph=True.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.modules = data_parallel_modules(module)
        known = set(parameters)
        for wrapped in self.modules:
            check_options(wrapped)
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and parameter not in known:
                    raise ValueError(
                        f"module: {name} is in no parameter group of this optimizer, and its "
                        "gradients would not be averaged: add it to base, or freeze it"
                    )
        self._quiet = [Quiet.of(wrapped) for wrapped in self.modules]

    def broadcast_buffers(self) -> None:
        """Sends the buffers of rank 0 to the others, as each module would in its forward pass."""
        import torch.distributed as dist

        sent = [
            (buffer, buffer.contiguous(), wrapped.process_group)
            for wrapped in self.modules
            if wrapped.broadcast_buffers
            for name, buffer in wrapped.module.named_buffers()
            if name not in wrapped.parameters_to_ignore
        ]
        works = [
            dist.broadcast(copy, group_src=0, group=group, async_op=True) for _, copy, group in sent
        ]
        for work, (buffer, copy, _) in zip(works, sent, strict=True):
            work.wait()
            if copy is not buffer:
                buffer.copy_(copy)


def check_options(wrapped: Any) -> None:
    """Raises a ValueError that names what of a DistributedDataParallel does not work unreduced."""
    unfit = {
        "static_graph=True reduces the first backward pass whatever it is told": (
            wrapped.static_graph
        ),
        "mixed_precision= takes its parameters back in the reduction": (
            getattr(wrapped, "mixed_precision", None) is not None
        ),
        "delay_all_reduce_named_params= reduces whatever it is told": bool(
            getattr(wrapped, "_delay_all_reduce_params", None)
        ),
        "register_comm_hook is for a reduction that it does not make": bool(
            getattr(wrapped, "_comm_hooks", None)
        ),
    }
    for why, is_so in unfit.items():
        if is_so:
            raise ValueError(
                f"module: DistributedDataParallel's {why}: leave it out, gradients are reduced "
                "here once a window"
            )


class Quiet:
    """Keeps a DistributedDataParallel from reducing gradients, for as long as anybody holds this.

    There is one of it for a module: the end of an older optimizer must not wake it up again.
    """

    _alive: ClassVar[weakref.WeakValueDictionary[int, Quiet]] = weakref.WeakValueDictionary()

    def __init__(self, wrapped: Any) -> None:
        self._entered = ExitStack()
        self._entered.enter_context(wrapped.no_sync())
        # Its first forward pass would broadcast buffers, which a rank without data would not join.
        wrapped.require_forward_param_sync = False
        self._wrapped = wrapped

    @classmethod
    def of(cls, wrapped: Any) -> Quiet:
        """The one for this module."""
        quiet = cls._alive.get(id(wrapped))
        if quiet is None:
            quiet = cls._alive[id(wrapped)] = cls(wrapped)
        return quiet

    def __del__(self) -> None:
        self._entered.close()
        self._wrapped.require_forward_param_sync = True


def data_parallel_modules(module: nn.Module | None) -> list[Any]:
    """The DistributedDataParallel modules in a module, itself included."""
    if module is None or not torch.distributed.is_available():
        return []
    from torch.nn.parallel import DistributedDataParallel

    return [part for part in module.modules() if isinstance(part, DistributedDataParallel)]


def gradients_from(result: Tensor, accumulator: Accumulator) -> list[Tensor | None]:
    """Every `.grad` from a row [N']: a view of it, or a copy where the type is another."""
    gradients: list[Tensor | None] = []
    for segment, wanted in zip(accumulator.segments, accumulator.wanted(), strict=True):
        view = segment.view(result)
        gradient = segment.new_gradient(view) if wanted else None
        if gradient is not None and gradient is not view:
            gradient.copy_(view)
        gradients.append(gradient)
    return gradients


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


def digest(what: object) -> int:
    """A whole number of 63 bits that tells contents apart, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "big") >> 1


def description(segment: Segment) -> tuple[str, ...]:
    """What must be the same of a parameter on all ranks."""
    p: Any = segment.parameter
    if is_dtensor(p):
        where = f"placed {list(p.placements)} on a mesh of {tuple(p.device_mesh.shape)}"
    else:
        where = f"of strides {segment.stride}"
    return segment.name, f"shape {list(p.shape)}", str(p.dtype), where


def kinds_of(segments: Sequence[Segment]) -> tuple[list[object], list[int]]:
    """Kinds of parameters, by mesh and placement: this rank's coordinate in each; whose is which.

    Meshes are told apart by who comes first: their names and ranks differ from rank to rank.
    """
    numbers: dict[object, int] = {}
    coordinates: list[object] = []
    kind_of = []
    for segment in segments:
        p: Any = segment.parameter
        key = (p.device_mesh, tuple(p.placements)) if is_dtensor(p) else None
        if key not in numbers:
            numbers[key] = len(numbers)
            coordinates.append(shard_coordinate(p))
        kind_of.append(numbers[key])
    return coordinates, kind_of


FINGERPRINT_PIECE = 1 << 24  # elements that are widened at a time


def fingerprints(tensors: Sequence[Tensor]) -> list[list[float]]:
    """Two numbers of each tensor that tell it from one of other values, or in another order."""
    prints = []
    for tensor in tensors:
        sums = torch.zeros(2, dtype=torch.float64, device=tensor.device)
        for piece in torch.split(tensor.flatten(), FINGERPRINT_PIECE):
            squares = piece.double().square()
            ramp = torch.arange(1, len(piece) + 1, device=tensor.device) / len(piece)
            sums += torch.stack([squares.sum(), (squares * ramp).sum()])
        prints.append(sums)
    return torch.stack(prints).tolist() if prints else []


def holders_of(coordinates: Sequence[object]) -> dict[object, list[int]]:
    """Who holds which part of a kind of parameters, from the coordinate of every rank."""
    holders: dict[object, list[int]] = {}
    for rank, coordinate in enumerate(coordinates):
        holders.setdefault(coordinate, []).append(rank)
    return holders


def first_unlike(
    said: Sequence[Sequence[Sequence[float]]],
    holders: Sequence[dict[object, list[int]]],
    kind_of: Sequence[int],
    rel_tol: float,
    abs_tol: float = 0.0,
) -> tuple[int, int, int] | None:
    """The first tensor of which two ranks hold the same part, and of which they say otherwise.

    Args:
        said: of every rank, of every tensor some numbers.
        holders: of every kind of tensors, who holds which part.
        kind_of: of every tensor its kind.
        rel_tol: how far two numbers may lie apart.
        abs_tol: how far at least.

    Returns:
        The tensor and the two ranks; None where all agree.
    """
    for tensor, kind in enumerate(kind_of):
        for first, *others in holders[kind].values():
            for rank in others:
                for here, there in zip(said[rank][tensor], said[first][tensor], strict=True):
                    both_nan = here != here and there != there
                    close = math.isclose(here, there, rel_tol=rel_tol, abs_tol=abs_tol)
                    if not close and not both_nan:
                        return tensor, rank, first
    return None


HINT = "Ranks that train other parameters belong in another process_group="


def difference(said: Sequence[tuple[dict[str, str], list[tuple[str, ...]]]]) -> str:
    """How the settings or parameters of a rank differ from those of rank 0."""
    for rank, (settings, layout) in enumerate(said):
        for option, value in said[0][0].items():
            if settings.get(option) != value:
                return f"rank {rank} has {option}={settings.get(option)}, rank 0 {option}={value}"
        for here, there in zip(layout, said[0][1], strict=False):
            if here != there:
                return f"rank {rank} has {' '.join(here)}, rank 0 {' '.join(there)}. {HINT}"
        if len(layout) != len(said[0][1]):
            return (
                f"rank {rank} has {len(layout)} parameters that require a gradient, rank 0 "
                f"{len(said[0][1])}. {HINT}"
            )
    raise AssertionError("the ranks do not differ")
