"""The ranks that train together, and what they tell each other in process groups of their own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

# How long a rank waits for the others before it says which of them are missing.
PATIENCE = timedelta(minutes=2)


class Peers:
    """The ranks of a process group, which `connect` joins in two groups more.

    Nothing of GCondFused travels in the group of the user: there, in threads of their own, others
    may send at any time (`dcp.async_save` does), and what is sent at once in one group gets mixed
    up. Small things and rows have a group each, for rows are sent in the middle of a backward pass,
    which on another rank may be later than what it tells by then.

    Args:
        group: the process group of the user; None is all ranks.

    Attributes:
        ranks: in the whole job, in the order of the group.
        rank: the place of this process among them.
        size: how many they are.
    """

    def __init__(self, group: Any) -> None:
        import torch.distributed as dist

        self.dist = dist
        # Not the default group itself: one that is still held when Python ends may abort it.
        self._users: Any = None if group is dist.group.WORLD else group
        self.ranks = ranks_of(group)
        self.rank = dist.get_rank(self._users)
        self.size = len(self.ranks)
        self._config = dist.get_backend_config(self._users)
        self._small: Any = None
        self._large: Any = None
        self._on_host = False
        self._meetings = 0

    def connect(self) -> None:
        """Makes the two groups; all ranks call this at the same point of the program.

        Raises:
            RuntimeError: a group cannot be made.
        """
        # Between hosts, so that no GPU has to wait. A dry run with a fake group stays one.
        hosts = self.dist.is_gloo_available() and "fake" not in self._config
        small = "gloo" if hosts else self._config
        self._on_host = hosts or "cpu:" in self._config
        self._small = self._new_group(small, "small numbers")
        self._large = self._new_group(self._config, "gradients")

    def _new_group(self, backend: str, purpose: str) -> Any:
        users: Any = self._users or self.dist.group.WORLD
        options: dict[str, Any] = {"backend": backend, "timeout": timeout_of(users)}
        options["group_desc"] = f"gcond_kernels: {purpose}"
        if self.ranks != sorted(self.ranks):  # older versions of torch cannot make such a group
            options["sort_ranks"] = False
        # Of all ranks torch counts the groups; of some it would need all to make this one.
        options["use_local_synchronization"] = self.size < self.dist.get_world_size()
        try:
            return self.dist.new_group(self.ranks, **options)
        except Exception as error:
            raise RuntimeError(
                f"the process group ({backend}) in which ranks {self.ranks} exchange {purpose} "
                f"cannot be made: {error}. All of them must make GCondFused at the same point of "
                "the program, with the same process_group; where gloo does not find the way to "
                "other hosts, set GLOO_SOCKET_IFNAME to the name of the network interface"
            ) from error

    def is_group(self, group: Any) -> bool:
        """Whether a process group has the same ranks in the same order."""
        return ranks_of(group) == self.ranks

    def device(self, tensors: torch.device) -> torch.device:
        """Where small things travel: between hosts if possible, then no GPU has to wait."""
        return torch.device("cpu") if self._on_host else tensors

    # Small things.

    def rendezvous(self, call: str, otherwise: str) -> None:
        """Wait for all ranks to make the same call, for two minutes at most.

        In the store of the group: a barrier would keep all but one rank for the time after which
        the group gives up, and not say who is missing.

        Args:
            call: what all of them are to call.
            otherwise: what else may be done.

        Raises:
            RuntimeError: some have not called by then; the message names them.
        """
        store = store_of(self._small)
        if store is None:
            return
        wait = min(PATIENCE, timeout_of(self._small) or PATIENCE).total_seconds()
        end, pause = time.monotonic() + wait, 0.001
        arrived, here = f"arrived {self._meetings}", f"{self._meetings} has {{}}"
        store.set(here.format(self.rank), "")
        store.add(arrived, 1)
        while store.add(arrived, 0) < self.size:
            if time.monotonic() > end:
                names = enumerate(self.ranks)
                missing = [str(name) for r, name in names if not store.check([here.format(r)])]
                # So that nobody who comes later takes this one for present.
                store.delete_key(here.format(self.rank))
                store.add(arrived, -1)
                raise RuntimeError(
                    f"rank {', '.join(missing)} did not call {call} within {wait:g} s after rank "
                    f"{self.ranks[self.rank]}: call it on all ranks, or {otherwise}"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
        self._meetings += 1

    def numbers(self, own: Sequence[int], tensors: torch.device) -> list[list[int]]:
        """The whole numbers of every rank, by rank; as many from each."""
        sent = torch.tensor(own, dtype=torch.int64, device=self.device(tensors))
        table = sent.new_empty(self.size * len(own))
        self._gather(table, sent, self._small)
        rows: list[list[int]] = table.view(self.size, len(own)).tolist()
        return rows

    def objects(self, own: Any) -> list[Any]:
        """What every rank says, by rank."""
        said: list[Any] = [None] * self.size
        self.dist.all_gather_object(said, own, group=self._small)
        return said

    def any_of(self, flags: Tensor) -> Tensor:
        """Where a flag [...] bool is set on any rank; from a GPU it takes the way of the rows."""
        reduced = flags.to(torch.uint8)
        is_small = flags.device == self.device(flags.device)
        group = self._small if is_small else self._large
        self.dist.all_reduce(reduced, self.dist.ReduceOp.MAX, group=group)
        return reduced.bool()

    # What is as large as the gradients, or lies on their device.

    def gather(self, whole: Tensor, part: Tensor) -> None:
        """Puts the parts [n] of all ranks side by side into `whole`, which may hold this one."""
        self._gather(whole, part, self._large)

    def _gather(self, whole: Tensor, part: Tensor, group: Any) -> None:
        # torch 2.13 has given the older name up.
        newer = hasattr(self.dist, "all_gather_single")
        run = self.dist.all_gather_single if newer else self.dist.all_gather_into_tensor
        run(whole, part, group=group)

    def sum_of_row(self, row: Tensor) -> Any:
        """Starts to sum a row over the ranks, in place."""
        return self.dist.all_reduce(row, group=self._large, async_op=True)

    def scatter_sum(self, part: Tensor, whole: Tensor) -> Any:
        """Starts to sum over the ranks what this rank keeps a part [n] of, which may lie in it."""
        newer = hasattr(self.dist, "reduce_scatter_single")
        run = self.dist.reduce_scatter_single if newer else self.dist.reduce_scatter_tensor
        return run(part, whole, group=self._large, async_op=True)

    def sum(self, tensor: Tensor) -> None:
        """Sums the tensor over the ranks, in place."""
        self.dist.all_reduce(tensor, group=self._large)

    def broadcast(self, tensor: Tensor) -> Any:
        """Starts to send the first rank's tensor to all, in place."""
        return self.dist.broadcast(tensor, group_src=0, group=self._large, async_op=True)

    def mesh(self, tensors: torch.device) -> Any:
        """The ranks as a mesh of devices, for DTensors that leave us.

        It is of the user's group: what others do with them happens where others send.
        """
        from torch.distributed.device_mesh import DeviceMesh

        users: Any = self._users or self.dist.group.WORLD
        return DeviceMesh.from_group(users, tensors.type)


def ranks_of(group: Any) -> list[int]:
    """The ranks of a process group in the whole job, in the order of the group; None is all."""
    import torch.distributed as dist

    whole: Any = dist.group.WORLD
    return dist.get_process_group_ranks(whole if group is None else group)


def timeout_of(group: Any) -> Any:
    """How long a process group waits; None where it does not say."""
    import torch.distributed as dist

    device = torch.device("cpu" if "cpu:" in dist.get_backend_config(group) else "cuda")
    # torch has no other way to ask.
    return getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)


def store_of(group: Any) -> Any:
    """The key-value store by which the ranks of a group found each other; None without one."""
    import torch.distributed as dist

    ask = getattr(dist.distributed_c10d, "_get_process_group_store", None)
    if ask is None or "fake" in dist.get_backend_config(group):
        return None
    return ask(group)
