"""A process group, and what its ranks tell each other in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor


# How long a rank waits for the others before it says which of them are missing.
PATIENCE = timedelta(minutes=2)


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
        self._small: Any = None

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
        self._small = self.dist.new_group(
            self.dist.get_process_group_ranks(group),
            timeout=getattr(options, "_timeout", None),
            backend="gloo",
            use_local_synchronization=True,
        )

    def rendezvous(self, call: str, otherwise: str) -> None:
        """Wait for all ranks to make the same call, for two minutes at most.

        Args:
            call: what all of them are to call.
            otherwise: what else may be done.

        Raises:
            RuntimeError: some have not called by then; the message names them.
        """
        options = getattr(self._small._get_backend(torch.device("cpu")), "options", None)
        wait = min(PATIENCE, getattr(options, "_timeout", None) or PATIENCE)
        try:
            self.dist.monitored_barrier(self._small, wait, wait_all_ranks=True)
        except RuntimeError as error:
            # Rank 0 hears of every rank; the others of rank 0 alone, or of the end of its wait.
            named = re.search(r"Ranks? ([0-9, ]+) failed to pass", str(error))
            missing = f"ranks {named[1]}" if named else "rank 0, or another that it waits for,"
            raise RuntimeError(
                f"{missing} did not call {call} within {wait.total_seconds():g} s after rank "
                f"{self.rank}: call it on all ranks, or {otherwise}"
            ) from error

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
