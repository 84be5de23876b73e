"""The ranks that train together, and the collectives among them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How long a rank waits for the others before it raises an error that names the missing ones.
PATIENCE = timedelta(minutes=2)
# torch 2.13 has renamed them.
NEWER_NAMES = hasattr(dist, "all_gather_single")
ALL_GATHER = "all_gather_single" if NEWER_NAMES else "all_gather_into_tensor"
REDUCE_SCATTER = "reduce_scatter_single" if NEWER_NAMES else "reduce_scatter_tensor"


class ProcessGroup:
    """The ranks of a process group of the user, None for all, which `connect` joins in two more.

    This package sends nothing in the user's group: other threads may send there at any time
    (`dcp.async_save` does), and collectives of two threads in one group get mixed up. Metadata and
    accumulators have a group each, since accumulators are sent in the middle of a backward pass,
    which on another rank may be later than its metadata.

    Attributes:
        ranks: the ranks in the whole job, in the order of the group.
        rank: the place of this process among them.
        size: how many they are.
    """

    def __init__(self, group: Any) -> None:
        # Not the default group itself: one that is still held when Python ends may abort it.
        self._of_user: Any = None if group is dist.group.WORLD else group
        self.ranks = ranks_of(group)
        self.rank = dist.get_rank(self._of_user)
        self.size = len(self.ranks)
        self._config = dist.get_backend_config(self._of_user)
        self._metadata_group: Any = None
        self._gradient_group: Any = None
        self._on_host = False
        self._waits = 0

    def connect(self) -> None:
        """Make the two groups; all ranks call this at the same point of the program."""
        # Between hosts, so that no GPU has to wait. A dry run with a fake group stays one.
        hosts = dist.is_gloo_available() and "fake" not in self._config
        self._on_host = hosts or "cpu:" in self._config
        self._metadata_group = self._new_group("gloo" if hosts else self._config, "metadata")
        self._gradient_group = self._new_group(self._config, "gradients")

    def _new_group(self, backend: str, purpose: str) -> Any:
        of_user: Any = self._of_user or dist.group.WORLD
        options: dict[str, Any] = {"backend": backend, "timeout": timeout_of(of_user)}
        options["group_desc"] = f"gcond_kernels: {purpose}"
        if self.ranks != sorted(self.ranks):  # older versions of torch cannot make such a group
            options["sort_ranks"] = False
        # Of all ranks torch counts the groups; of some it would need all to make this one.
        options["use_local_synchronization"] = self.size < dist.get_world_size()
        try:
            return dist.new_group(self.ranks, **options)
        except Exception as error:
            raise RuntimeError(
                f"the process group ({backend}) in which ranks {self.ranks} exchange {purpose} "
                f"cannot be made: {error}. All of them must make GCondFused at the same point of "
                "the program, with the same process_group; where gloo does not find the way to "
                "other hosts, set GLOO_SOCKET_IFNAME to the name of the network interface"
            ) from error

    def is_same(self, group: Any) -> bool:
        """Return whether a process group has the same ranks in the same order."""
        return ranks_of(group) == self.ranks

    # Metadata.

    def device(self, tensors: torch.device) -> torch.device:
        """Return where metadata travels: between hosts if possible, so that no GPU has to wait."""
        return torch.device("cpu") if self._on_host else tensors

    def wait_for_all(self, call: str, alternative: str) -> None:
        """Wait two minutes at most for all ranks to make a call; raise an error of who is missing.

        In the store of the group: a barrier would keep all but one rank until the timeout of the
        group, and not name the missing ones.
        """
        store = store_of(self._metadata_group)
        if store is None:
            return
        wait = min(PATIENCE, timeout_of(self._metadata_group) or PATIENCE).total_seconds()
        end, pause = time.monotonic() + wait, 0.001
        keys = {rank: f"{call} {self._waits} on {rank}" for rank in self.ranks}
        own = keys[self.ranks[self.rank]]
        store.set(own, "")
        while not store.check([*keys.values()]):
            late = time.monotonic() > end
            missing = [str(r) for r, key in keys.items() if late and not store.check([key])]
            if missing:
                store.delete_key(own)  # so that nobody who comes later takes this one for present
                raise RuntimeError(
                    f"rank {', '.join(missing)} did not call {call} within {wait:g} s after rank "
                    f"{self.ranks[self.rank]}: call it on all ranks, or {alternative}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        self._waits += 1

    def gather_numbers(self, own: Sequence[int], tensors: torch.device) -> list[list[int]]:
        """Return the whole numbers of every rank, by rank; each has as many."""
        sent = torch.tensor(own, dtype=torch.int64, device=self.device(tensors))
        table = sent.new_empty(self.size * len(own))
        getattr(dist, ALL_GATHER)(table, sent, group=self._metadata_group)
        by_rank: list[list[int]] = table.view(self.size, len(own)).tolist()
        return by_rank

    def gather_objects(self, own: Any) -> list[Any]:
        """Return the object of every rank, by rank."""
        by_rank: list[Any] = [None] * self.size
        dist.all_gather_object(by_rank, own, group=self._metadata_group)
        return by_rank

    # Gradients, and whatever lies on their device.

    def any_of(self, flags: Tensor) -> Tensor:
        """Return where a flag [...] bool is set on any rank."""
        reduced = flags.to(torch.uint8)
        is_metadata = flags.device == self.device(flags.device)
        group = self._metadata_group if is_metadata else self._gradient_group
        dist.all_reduce(reduced, dist.ReduceOp.MAX, group=group)
        return reduced.bool()

    def gather(self, full: Tensor, shard: Tensor) -> None:
        """Put the shards [n] of all ranks side by side into `full`, which may hold this one."""
        getattr(dist, ALL_GATHER)(full, shard, group=self._gradient_group)

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        dist.all_reduce(tensor, group=self._gradient_group)

    def start_sum(self, tensor: Tensor) -> Any:
        """Start to sum a tensor over the ranks, in place."""
        return dist.all_reduce(tensor, group=self._gradient_group, async_op=True)

    def start_sum_to_shards(self, shard: Tensor, full: Tensor) -> Any:
        """Start to sum `full` over the ranks into this rank's shard [n], which may lie in it."""
        run = getattr(dist, REDUCE_SCATTER)
        return run(shard, full, group=self._gradient_group, async_op=True)

    def start_broadcast(self, tensor: Tensor) -> Any:
        """Start to send the first rank's tensor to all, in place."""
        return dist.broadcast(tensor, group_src=0, group=self._gradient_group, async_op=True)


def ranks_of(group: Any) -> list[int]:
    """Return the ranks of a process group in the whole job, in its order; of None all."""
    world: Any = dist.group.WORLD
    return dist.get_process_group_ranks(world if group is None else group)


def timeout_of(group: Any) -> Any:
    """Return how long a process group waits; None where it has no such option."""
    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
    # torch has no other way to ask.
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)


def store_of(group: Any) -> Any:
    """Return the key-value store by which ranks of a group found each other; None without one."""
    ask = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    return None if ask is None or "fake" in dist.get_backend_config(group) else ask(group)
