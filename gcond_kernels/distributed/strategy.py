"""The interface of the strategies for several ranks, and what one process does by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import Tensor

from gcond_kernels import ops
from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.ops.types import Gramians, Layout, Momentum, TaskGradients
from gcond_kernels.storage.accumulator import GradientStorage
from gcond_kernels.storage.dtensor import local_shard
from gcond_kernels.storage.layout import Segment

# Returns by name what must be the same on all ranks.
Describe: TypeAlias = Callable[[], dict[str, str]]


@dataclass
class LocalGradients:
    """What this process reads and writes in a resolution.

    Attributes:
        gradients: the accumulated gradients that are here; a tensor of size 0 has nothing here.
        counted: the part of them whose inner products this process contributes: over all ranks
            that is every element once.
        momentum: of what is here, or None.
        outputs: T tensors of the layout's sizes, to be written; None where there is no gradient.
        first: the place of the first element here among those of all ranks.
        gathered: [N'] memory of all ranks' outputs, where `outputs` are views of it.
    """

    gradients: TaskGradients
    counted: Layout
    momentum: Momentum | None
    outputs: list[Tensor | None]
    first: int = 0
    gathered: Tensor | None = None


class SingleProcess:
    """One process, which holds everything; strategies for several ranks override what differs.

    Args:
        storage: what this process keeps.
        group: the ranks that train together; None is one process.
    """

    name: ClassVar[str] = "single process"
    # Whether each rank keeps a shard of history and momentum only.
    shards_state: ClassVar[bool] = False
    size = 1
    # How many ranks the loss of one micro-batch is summed over.
    losses_per_micro_batch = 1
    # How many accumulators are on their way to the other ranks or reduced: the first ones.
    sent = 0

    def __init__(self, storage: GradientStorage, group: ProcessGroup | None = None) -> None:
        self.storage = storage
        self.group = group

    @property
    def is_sending(self) -> bool:
        """Whether an accumulator is on its way that another rank may not have sent yet."""
        return False

    # In a backward pass.

    def check_gradient_sync(self) -> None:
        """Check that the next backward pass reduces gradients, where it is to do so.

        Raises:
            RuntimeError: a module was told to keep them; the message names it.
        """

    def mark_complete(self, task: int) -> None:
        """Note that nothing more is added to this task's accumulator in this window."""

    def roll_back(self) -> None:
        """Forget what a failed micro-batch has marked complete and was not sent."""

    # In a resolution; every rank makes these calls, in this order.

    def synchronize(
        self,
        describe: Describe,  # noqa: ARG002  an interface
        on_nonfinite: str,  # noqa: ARG002  an interface
        begun: bool,
    ) -> list[int]:
        """Check that ranks are consistent; return the micro-batches of each task that count.

        Args:
            describe: returns by name what must be the same on all ranks.
            on_nonfinite: what becomes of gradients that are not finite.
            begun: whether this window had a micro-batch, with a loss or without.

        Raises:
            RuntimeError: nothing was accumulated, or ranks differ; all of them raise it.
        """
        if not begun:
            raise RuntimeError("nothing was accumulated: call backward(losses) before step()")
        return self.storage.counts

    def local_gradients(self, scale: Tensor, beta: float) -> LocalGradients:
        """Return what this process resolves.

        Args:
            scale: [K] float64, of the accumulators.
            beta: of the momentum, where there is some.
        """
        storage = self.storage
        layout = storage.layout
        gradients = TaskGradients(
            storage.accumulators, layout, scale, storage.history, storage.mask
        )
        momentum = momentum_of(storage, beta)
        return LocalGradients(gradients, self._counted(layout), momentum, storage.new_gradients())

    def _counted(self, layout: Layout) -> Layout:
        return layout

    def squared_norms(self, backend: str) -> Tensor:
        """Return [T] float64, the squared norm of each parameter, of the elements counted here."""
        storage = self.storage
        counted = self._counted(storage.layout)
        parts = [
            elements_of(segment, max(offset - segment.offset, 0), size)
            for segment, offset, size in zip(storage.segments, *counted, strict=True)
        ]
        return ops.multi_tensor_norm(parts, per_tensor=True, backend=backend).square()

    def sum_over_ranks(
        self, products: Gramians, squared_norms: Tensor | None, losses: Tensor | None
    ) -> tuple[Gramians, Tensor | None, Tensor | None]:
        """Return inner products, squared norms of parameters and losses, over all ranks."""
        return products, squared_norms, losses

    def on_all_ranks(self, flag: Tensor) -> Tensor:
        """Return whether a flag on the device, [] bool, is set on all ranks."""
        return flag

    def gather(self, local: LocalGradients) -> list[Tensor | None]:
        """Return what becomes `.grad` of each tensor, once the outputs are written."""
        return local.outputs

    def end_window(self) -> None:
        """Forget what was marked and sent in this window."""

    # Whenever the state of a rank changes or is saved.

    def require_check(self) -> None:
        """Have ranks compare settings, parameters and state in their next synchronization."""

    def any_rank(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank; all of them call it."""
        return flag

    def begin_saving(self, in_window: bool) -> bool:
        """Wait for all ranks where a state takes all of them; return whether any is in a window.

        Raises:
            RuntimeError: some do not call it in time; the message names them.
        """
        return in_window

    def full_state(self) -> tuple[Tensor | None, Tensor | None]:
        """Return history and momentum in full; where ranks keep shards, all of them call it."""
        return self.storage.history, self.storage.momentum

    def local_shard(self, full: Tensor) -> Tensor:
        """Return the view of a tensor [N'] that this rank keeps of history and momentum."""
        return full


def momentum_of(storage: GradientStorage, beta: float) -> Momentum | None:
    """Return the momentum that the storage keeps here, if it keeps some."""
    if storage.momentum is None or storage.momentum_steps is None:
        return None
    return Momentum(storage.momentum, storage.momentum_steps, beta)


def elements_of(segment: Segment, start: int, size: int) -> Tensor:
    """Return elements of a parameter, counted in its segment's memory order, as a vector."""
    part = local_shard(segment.parameter)
    if part.stride() != segment.stride:
        part = segment.empty(part.dtype, part.device).copy_(part)
    return part.as_strided((size,), (1,), part.storage_offset() + start)
