"""Data parallel: accumulators are summed over the ranks, and every rank resolves them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from gcond_kernels.distributed.mesh import MeshStrategy
from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.distributed.strategy import Describe
from gcond_kernels.storage.accumulator import GradientStorage


class ReplicateStrategy(MeshStrategy):
    """All-reduce the accumulators, one after another; every rank resolves and keeps everything.

    An accumulator is sent as soon as it is complete: while the backward pass of the next task runs,
    on a GPU in a stream of its own.
    """

    name = "replicate"
    # Whether an accumulator is sent only after the one before it has arrived.
    one_at_a_time = False

    def __init__(self, storage: GradientStorage, group: ProcessGroup | None = None) -> None:
        super().__init__(storage, group)
        self.losses_per_micro_batch = 1  # the micro-batches of all ranks are counted
        self._complete: set[int] = set()
        self._under_way: list[Callable[[], object]] = []  # each waits for an accumulator
        self._stream: torch.cuda.Stream | None = None

    @property
    def is_sending(self) -> bool:
        """Whether an accumulator is on its way that another rank may not have sent yet."""
        return bool(self._under_way)

    def mark_complete(self, task: int) -> None:
        """Send what is complete, in the order of the tasks, which is the same on all ranks."""
        self._complete.add(task)
        # Accumulators of other sizes would end in a deadlock; to compare them now would wait.
        if self._checked_segments != len(self.storage.segments):
            return
        # On a GPU a stream waits for one after another. The host would wait for a rank that may
        # wait in `synchronize` for this one; gloo's reduce-scatter cannot be asked if it is done.
        host_waits = self.one_at_a_time and not self.storage.accumulators.is_cuda
        while self.sent in self._complete and not (host_waits and self.is_sending):
            self._send()

    def roll_back(self) -> None:
        """Forget what a failed micro-batch has marked complete and was not sent."""
        self._complete &= set(range(self.sent))

    def _send(self) -> None:
        task, storage = self.sent, self.storage
        with self._on_own_stream():
            if self.one_at_a_time:
                self._wait()
            if storage.counts[task] == 0:
                storage.accumulators[task].zero_()  # it may hold anything: nothing is ever cleared
            self._under_way.append(self._start_reduction(task))
        self.sent += 1

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """Run collectives beside the backward pass, after what was launched so far."""
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
        """Wait for the accumulators under way; on a GPU the stream waits, not the host."""
        while self._under_way:
            self._under_way.pop(0)()

    def _finish(self) -> None:
        """Have what is launched from here on wait for the accumulators under way."""
        with self._on_own_stream():
            self._wait()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _start_reduction(self, task: int) -> Callable[[], object]:
        """Start to send an accumulator; return what waits for it and puts it in its place."""
        work = self.group.start_sum(self.storage.accumulators[task])
        return lambda: work.wait()

    def synchronize(self, describe: Describe, on_nonfinite: str, begun: bool) -> list[int]:
        """Reduce what was not sent; return the micro-batches of each task over all ranks."""
        self._check_consistent(describe)
        while self.sent < len(self.storage.counts):
            self._send()
        self._finish()
        return super().synchronize(describe, on_nonfinite, begun)

    def _counts(self, table: list[list[int]]) -> list[int]:
        return [sum(of_task) for of_task in zip(*table, strict=True)]

    def end_window(self) -> None:
        """Forget what was marked and sent in this window."""
        super().end_window()
        if self._under_way:
            self._finish()
        self._complete.clear()
        self.sent = 0
