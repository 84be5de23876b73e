"""How several ranks train together, as the user states it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from gcond_kernels.distributed.data_parallel import check_module, data_parallel_modules
from gcond_kernels.distributed.mesh import MeshStrategy
from gcond_kernels.distributed.process_group import ProcessGroup
from gcond_kernels.distributed.replicate import ReplicateStrategy
from gcond_kernels.distributed.shard import ShardStrategy
from gcond_kernels.distributed.strategy import SingleProcess
from gcond_kernels.storage.collect import is_distributed
from gcond_kernels.storage.dtensor import is_dtensor


@dataclass(frozen=True)
class Distributed:
    """How the ranks of a process group come to one resolved gradient.

    With one rank it has no effect. DTensors (FSDP2, tensor parallel) need no strategy: the backward
    pass reduces their gradients, and only inner products are summed over the ranks.

    Args:
        strategy: for parameters that every rank holds in full. "shard" (the default):
            accumulators are reduce-scattered, each rank resolves its shard and keeps its shard of
            history and momentum, and the result is gathered. "replicate": accumulators are
            all-reduced, and every rank resolves and keeps everything.
        module: the model, where it is or holds a `DistributedDataParallel`. That one reduces no
            gradients for as long as the optimizer lives (`no_sync`; its
            `require_backward_grad_sync = True` ends it before), since accumulators are reduced once
            a window; its buffers are broadcast after every step. It may be assigned later
            (`optimizer.module = model`); without it the first `backward` looks for one.
        process_group: the ranks that train together; None is the group of `module`'s
            DistributedDataParallel, else all ranks. Each of them makes its GCondFused at the same
            point of the program.

    Raises:
        TypeError: `module` is no module.
        ValueError: there is no such strategy.
    """

    strategy: Literal["shard", "replicate"] | None = None
    module: nn.Module | None = field(default=None, repr=False)
    process_group: Any = None

    def __post_init__(self) -> None:
        if self.strategy not in (None, "shard", "replicate"):
            raise ValueError(f"strategy must be 'shard' or 'replicate', not {self.strategy!r}")
        if self.module is not None:
            check_module(self.module)

    def connect(self) -> ProcessGroup | None:
        """Return the ranks that train together; None where torch.distributed is not initialized."""
        if not is_distributed():
            return None
        of_modules = [wrapped.process_group for wrapped in data_parallel_modules(self.module)]
        chosen = [group for group in (self.process_group, *of_modules) if group is not None]
        return ProcessGroup(chosen[0] if chosen else None)

    def choose_strategy(
        self, parameters: Sequence[Tensor], group: ProcessGroup | None
    ) -> type[SingleProcess]:
        """Return the strategy for these parameters and ranks."""
        if any(map(is_dtensor, parameters)):
            if self.strategy is not None:
                raise ValueError(
                    f"strategy={self.strategy!r} is for parameters that every rank holds in full; "
                    "these are DTensors, whose gradients the backward pass reduces: leave strategy "
                    "out"
                )
            return MeshStrategy
        if group is None or group.size == 1:
            return SingleProcess
        return ReplicateStrategy if self.strategy == "replicate" else ShardStrategy
