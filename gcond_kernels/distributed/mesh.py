"""Several ranks whose gradients the backward pass reduces: FSDP2, HSDP, tensor parallel."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.distributed.consistency import (
    Replicas,
    check_gradients,
    check_ranks,
    digest,
    shard_number,
)
from gcond_kernels.distributed.fsdp import check_reduces, modules_of
from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.distributed.strategy import Describe, LocalGradients, SingleProcess
from gcond_kernels.ops.types import Gramians, Layout
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.layout import align


class MeshStrategy(SingleProcess):
    """Resolve on every rank what it holds, with inner products summed over the ranks.

    All ranks compute the same weights from the same bits. What several ranks hold is counted once:
    each of them counts a part of it.
    """

    name = "mesh"
    group: ProcessGroup

    def __init__(self, storage: GradientStorage, group: ProcessGroup | None = None) -> None:
        super().__init__(storage, group)
        assert group is not None
        group.connect()
        self.size = group.size
        self.losses_per_micro_batch = group.size  # all ranks make the same passes
        self._checked_segments = 0  # how many segments the ranks have compared
        self._is_consistent = False  # whether they have found each other so in this window
        self._is_first = False  # whether they have compared parameters in this window
        self._replicas: Replicas = []
        # Of each tensor, which replica of the shard this rank has, and how many there are.
        self._own_replicas: list[tuple[int, int]] = []
        self._shard_number = 0
        # Modules of FSDP with the name of a parameter; how many segments there were at the search.
        self._fsdp_modules: list[tuple[weakref.ref[Any], str]] = []
        self._searched_segments = 0

    def check_gradient_sync(self) -> None:
        """Check that FSDP reduces the gradients of every module in the next backward pass."""
        segments = self.storage.segments
        if self.storage.has_dtensors and len(segments) != self._searched_segments:
            self._fsdp_modules = list(modules_of(segments))
            self._searched_segments = len(segments)
        for reference, name in self._fsdp_modules:
            if (module := reference()) is not None:
                check_reduces(module, name)

    def synchronize(self, describe: Describe, on_nonfinite: str, begun: bool) -> list[int]:
        """Check that ranks are consistent; return the micro-batches of each task that count."""
        self._check_consistent(describe)
        storage = self.storage
        choice = ("skip", "drop_task", "raise").index(on_nonfinite)
        tasks = digest(repr(storage.window_tasks).encode())
        own = [choice, tasks, int(begun), *storage.counts]
        table = self.group.gather_numbers(own, storage.accumulators.device)
        if len({choice for choice, *_ in table}) > 1:
            raise RuntimeError("ranks differ in on_nonfinite: set the same on all of them")
        if len({tasks for _, tasks, *_ in table}) > 1:
            self._unite_window_tasks()
        if not any(begun for _, _, begun, *_ in table):
            storage.start_window()
            self.end_window()
            raise RuntimeError(
                f"nothing was accumulated on any of the {self.size} ranks: call backward(losses) "
                "before step()"
            )
        return self._counts([counts for _, _, _, *counts in table])

    def _check_consistent(self, describe: Describe) -> None:
        """Compare ranks, once a window before anything else, where one of them has changed."""
        if self._is_consistent:
            return
        segments, rank = self.storage.segments, self.group.rank
        if self.any_rank(self._checked_segments != len(segments)):
            self._replicas = check_ranks(self.storage, self.group, describe())
            same = [next(g for g in groups if rank in g) for groups in self._replicas]
            self._own_replicas = [(ranks.index(rank), len(ranks)) for ranks in same]
            self._shard_number = shard_number(segments)
            self._checked_segments = len(segments)
            self._is_first = True
        self._is_consistent = True

    def _unite_window_tasks(self) -> None:
        """Give every rank a gradient of the tensors that any rank has one of."""
        storage = self.storage
        bits = [
            [touched >> task & 1 for touched in storage.window_tasks]
            for task in range(len(storage.counts))
        ]
        device = self.group.device(storage.accumulators.device)
        flags = self.group.any_of(torch.tensor(bits, dtype=torch.bool, device=device))
        storage.window_tasks = [
            sum(bit << task for task, bit in enumerate(of_tensor)) for of_tensor in flags.T.tolist()
        ]

    def _counts(self, table: list[list[int]]) -> list[int]:
        """Return the micro-batches that accumulators are sums of, from those of every rank."""
        for rank, counts in enumerate(table):
            if counts != table[0]:
                raise RuntimeError(
                    f"rank {rank} had {counts} micro-batches of the tasks, rank 0 {table[0]}: with "
                    "sharded parameters all ranks make the same backward passes"
                )
        if self._is_first:
            check_gradients(self.storage, self.group, self._replicas)
        return table[0]

    def local_gradients(self, scale: Tensor, beta: float) -> LocalGradients:
        """Return what this process resolves."""
        local = super().local_gradients(scale, beta)
        local.first = self._shard_number * self.storage.accumulators.shape[1]
        return local

    def _counted(self, layout: Layout) -> Layout:
        ranges = [
            counted_range(size, *replica)
            for size, replica in zip(layout.sizes, self._own_replicas, strict=True)
        ]
        offsets = [offset + a for offset, (a, _) in zip(layout.offsets, ranges, strict=True)]
        return Layout.of(offsets, [b - a for a, b in ranges])

    def sum_over_ranks(
        self, products: Gramians, squared_norms: Tensor | None, losses: Tensor
    ) -> tuple[Gramians, Tensor | None, Tensor]:
        """Return inner products, squared norms and losses, summed in one all-reduce."""
        parts = [*products, squared_norms, losses]
        present = [part for part in parts if part is not None]
        flat = torch.cat([part.flatten() for part in present])
        self.group.sum(flat)
        summed = iter(torch.split(flat, [part.numel() for part in present]))
        results: list[Any] = [p if p is None else next(summed).view(p.shape) for p in parts]
        total, cross, per_tensor, crosses, norms, losses = results
        # S_ij and S_ji may be sums in another order of the ranks.
        total, per_tensor = (S.triu() + S.triu(1).mT for S in (total, per_tensor))
        return Gramians(total, cross, per_tensor, crosses), norms, losses

    def on_all_ranks(self, flag: Tensor) -> Tensor:
        """Return whether a flag on the device, [] bool, is set on all ranks."""
        return ~self.group.any_of(~flag)

    def end_window(self) -> None:
        """Forget that ranks were consistent: they may change before the next window ends."""
        self._is_consistent = self._is_first = False

    def require_check(self) -> None:
        """Have ranks compare settings, parameters and state in their next synchronization."""
        self._checked_segments = 0

    def any_rank(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank; all of them call it."""
        device = self.storage.accumulators.device
        return any(of_rank for (of_rank,) in self.group.gather_numbers([flag], device))


def counted_range(size: int, replica: int, replicas: int) -> tuple[int, int]:
    """Return from where to where one of the ranks that hold the same elements counts them."""
    length = align(-(-size // replicas))
    return min(replica * length, size), min((replica + 1) * length, size)
