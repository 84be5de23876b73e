"""Data parallel: accumulators are reduce-scattered, and every rank resolves its shard."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gcond_kernels.distributed.replicate import ReplicateStrategy
from gcond_kernels.distributed.strategy import LocalGradients
from gcond_kernels.ops.types import Layout, TaskGradients
from gcond_kernels.storage.layout import Segment, moved


class ShardStrategy(ReplicateStrategy):
    """Reduce-scatter the accumulators, resolve a shard on every rank, and gather the result.

    An accumulator [N'] has as many shards [n] as there are ranks, across tensors. No memory beside
    the accumulators is needed: the shard of accumulator k > 0 goes where accumulators before it
    were, which have been sent, side by side from the start of the first; the gathered result goes
    into the last one. (NCCL works in place; gloo takes copies, and an all-reduce for a
    reduce-scatter.)
    """

    name = "shard"
    shards_state = True
    one_at_a_time = True

    @property
    def _length(self) -> int:
        return self.storage.accumulators.shape[1] // self.size

    def local_shard(self, full: Tensor) -> Tensor:
        """Return the view of a tensor [N'] that is this rank's shard."""
        return full.tensor_split(self.size)[self.group.rank]

    def _shards(self) -> Tensor:
        """Return [K, n], this rank's shard of every accumulator."""
        accumulators = self.storage.accumulators
        K = len(accumulators)
        if K == 1:
            return self.local_shard(accumulators[0])[None]
        return accumulators.view(-1)[: K * self._length].view(K, self._length)

    def _start_reduction(self, task: int) -> Callable[[], object]:
        full, place = self.storage.accumulators[task], self._shards()[task]
        # In place where nothing was sent before it; elsewhere in it would be read meanwhile.
        shard = self.local_shard(full) if task == 0 else place
        work = self.group.start_sum_to_shards(shard, full)

        def finish() -> None:
            work.wait()
            if shard.data_ptr() != place.data_ptr():
                place.copy_(shard)

        return finish

    def local_gradients(self, scale: Tensor, beta: float) -> LocalGradients:
        """Return this rank's shards, and where in them the tensors lie."""
        storage, first = self.storage, self.group.rank * self._length
        self._fit_state()
        # A copy, since kernels read whole vectors.
        mask = None if storage.mask is None else self.local_shard(storage.mask).clone()
        gathered = self._new_result()
        offsets, sizes = self._counted(storage.layout)
        outputs = [
            gathered[offset : offset + size] if touched else None
            for offset, size, touched in zip(offsets, sizes, storage.window_tasks, strict=True)
        ]
        layout = Layout.of([offset - first for offset in offsets], sizes)
        gradients = TaskGradients(self._shards(), layout, scale, storage.history, mask)
        return LocalGradients(gradients, layout, self._momentum(beta), outputs, first, gathered)

    def _counted(self, layout: Layout) -> Layout:
        """Return the part of each segment that lies in this rank's shard."""
        first = self.group.rank * self._length
        ends = [
            [min(max(end, first), first + self._length) for end in (offset, offset + size)]
            for offset, size in zip(*layout, strict=True)
        ]
        return Layout.of([start for start, _ in ends], [stop - start for start, stop in ends])

    def _new_result(self) -> Tensor:
        """Return [N'] memory for the result, of the type of the gradients where that is one."""
        storage = self.storage
        # Of mixed ones none loses digits.
        dtype = functools.reduce(torch.promote_types, set(storage.gradient_dtypes()))
        K, length = storage.accumulators.shape
        if dtype.itemsize <= storage.dtype.itemsize and K > 1:
            return storage.accumulators[-1].view(dtype)[:length]
        if dtype == storage.dtype:
            return storage.accumulators[0]
        return torch.empty(length, dtype=dtype, device=storage.accumulators.device)

    def gather(self, local: LocalGradients) -> list[Tensor | None]:
        """Gather the shards of the result; return every `.grad`, a view where the type allows."""
        result = local.gathered
        assert result is not None
        self.group.gather(result, self.local_shard(result))
        return self.storage.gradients_from(result, local.outputs)

    # History and momentum, of which this rank keeps a shard.

    def begin_saving(self, in_window: bool) -> bool:
        """Wait for all ranks to call state_dict(); return whether any is in a window."""
        alternative = 'use strategy="replicate", where any rank alone may'
        self.group.wait_for_all("state_dict()", alternative)
        return self.any_rank(in_window)

    def full_state(self) -> tuple[Tensor | None, Tensor | None]:
        """Return history and momentum in full, on the host; all ranks call it."""
        self._fit_state()
        history, momentum = self.storage.history, self.storage.momentum
        if history is not None:
            history = torch.stack([self._full(shard).cpu() for shard in history])
        return history, None if momentum is None else self._full(momentum).cpu()

    def _full(self, shard: Tensor) -> Tensor:
        """Return a tensor [N'] of which every rank has a shard [n]."""
        full = shard.new_empty(shard.numel() * self.size)
        self.group.gather(full, shard.contiguous())
        return full

    def _fit_state(self) -> None:
        """Shard history and momentum anew where the layout has changed, or there was none yet."""
        storage = self.storage
        storage.history, storage.momentum = (
            None if kept is None else self._sharded_anew(kept)
            for kept in (storage.history, storage.momentum)
        )
        storage.sharded_layout = storage.segments, storage.accumulators.shape[1]

    def _sharded_anew(self, kept: Tensor) -> Tensor:
        storage, device = self.storage, self.storage.accumulators.device
        before, length_before = storage.sharded_layout
        length = storage.accumulators.shape[1]
        is_same = length == length_before and layout_of(before) == layout_of(storage.segments)
        if is_same and kept.shape[-1] == self._length:
            return kept.to(device)
        sharded = kept.new_zeros((*kept.shape[:-1], self._length), device=device)
        if kept.shape[-1] == 0:
            return sharded
        place = {segment.parameter: segment for segment in before}
        pairs = [
            (place[s.parameter], s)
            for s in storage.segments
            if s.parameter in place and place[s.parameter].shape == s.shape
        ]
        for old, new in zip(*map(torch.atleast_2d, (kept, sharded)), strict=True):
            new.copy_(self.local_shard(moved(self._full(old), length, pairs, device)))
        return sharded


def layout_of(segments: Sequence[Segment]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return what distinguishes layouts of parameters: which lies where, in which order."""
    return [(id(s.parameter), s.offset, s.stride) for s in segments]
