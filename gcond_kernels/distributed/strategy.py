"""What one process does in a resolution; strategies for several ranks override what differs."""

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
        gradients: what is here; a tensor of size 0 has nothing here.
        counted: the part whose inner products this process contributes: over all ranks that is
            every element once.
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
    """One process, which holds everything."""

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
        """Check that no module was told to keep the gradients of the next backward pass."""

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
        """Check that ranks are consistent; return the micro-batches of each task that count."""
        if not begun:
            raise RuntimeError("nothing was accumulated: call backward(losses) before step()")
        return self.storage.counts

    def local_gradients(self, scale: Tensor, beta: float) -> LocalGradients:
        """Return what this process resolves, given the scale [K] and the β of the momentum."""
        s = self.storage
        gradients = TaskGradients(s.accumulators, s.layout, scale, s.history, s.mask)
        return LocalGradients(
            gradients, self._counted(s.layout), self._momentum(beta), s.new_gradients()
        )

    def _momentum(self, beta: float) -> Momentum | None:
        s = self.storage
        if s.momentum is None or s.momentum_steps is None:
            return None
        return Momentum(s.momentum, s.momentum_steps, beta)

    def _counted(self, layout: Layout) -> Layout:
        return layout

    def squared_norms(self, backend: str | ops.Backend) -> Tensor:
        """Return [T] float64, the squared norm of each parameter, of the elements counted here."""
        segments, layout = self.storage.segments, self.storage.layout
        parts = [
            elements_of(segment, max(offset - segment.offset, 0), size)
            for segment, offset, size in zip(segments, *self._counted(layout), strict=True)
        ]
        return ops.multi_tensor_norm(parts, per_tensor=True, backend=backend).square()

    def sum_over_ranks(
        self, products: Gramians, squared_norms: Tensor | None, losses: Tensor
    ) -> tuple[Gramians, Tensor | None, Tensor]:
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
        """Wait for all ranks that a state takes; return whether any of them is in a window."""
        return in_window

    def full_state(self) -> tuple[Tensor | None, Tensor | None]:
        """Return history and momentum in full; where ranks keep shards, all of them call it."""
        return self.storage.history, self.storage.momentum

    def local_shard(self, full: Tensor) -> Tensor:
        """Return the view of a tensor [N'] that this rank keeps of history and momentum."""
        return full


def elements_of(segment: Segment, start: int, size: int) -> Tensor:
    """Return elements of a parameter, counted in its segment's memory order, as a vector."""
    part = local_shard(segment.parameter)
    if part.stride() != segment.stride:
        part = segment.empty(part.dtype, part.device).copy_(part)
    return part.as_strided((size,), (1,), part.storage_offset() + start)
