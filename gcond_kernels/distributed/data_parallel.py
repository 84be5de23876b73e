"""DistributedDataParallel: kept from reducing gradients, its buffers broadcast all the same."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, ClassVar, TypeVar

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gcond_kernels.distributed.process_group import ProcessGroup, ranks_of
from gcond_kernels.storage.dtensor import is_dtensor

T = TypeVar("T")
# Options with which a DistributedDataParallel cannot be kept from reducing, by its attributes.
UNFIT = {
    "static_graph": "static_graph=True reduces the first backward pass whatever it is told",
    "mixed_precision": "mixed_precision= takes its parameters back in the reduction",
    "_delay_all_reduce_params": "delay_all_reduce_named_params= reduces whatever it is told",
    "_comm_hooks": "register_comm_hook is for a reduction that it does not make",
}


class DataParallel:
    """The DistributedDataParallel modules around a model, which do not reduce gradients.

    They are in the model that is given, at the start or later, or else are found by `search`.
    `left_alone` is what an error may add of one that was found, and cannot be taken.
    """

    def __init__(self, group: ProcessGroup | None, is_chosen: bool) -> None:
        # One rank alone has nothing to send, and may be copied.
        self._group = group if group is not None and group.size > 1 else None
        self._is_chosen = is_chosen  # whether the user has named the process group
        self._given: weakref.ref[nn.Module] | None = None
        self._searched = False
        self.left_alone = ""
        self.modules: dict[Any, WithoutSync] = {}

    @property
    def module(self) -> nn.Module | None:
        """The model that was given, if it still lives."""
        return None if self._given is None else self._given()

    def take(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        """Keep the modules in a model from reducing gradients, given the optimizer's parameters."""
        check_module(module)
        wrapped = data_parallel_modules(module)
        for one in wrapped:
            if why := problem_of(one, set(parameters)) or self._other_ranks(one):
                raise ValueError(f"module: {why}")
        if wrapped and any(map(is_dtensor, parameters)):
            raise ValueError(
                "module: DistributedDataParallel around DTensors is not handled: use fully_shard "
                "on a mesh of two dimensions, which also replicates"
            )
        self._given = weakref.ref(module)
        self.modules |= {one: WithoutSync.of(one) for one in wrapped}

    def search(self, parameters: Iterable[Tensor]) -> bool:
        """Find the modules around these parameters, once, where no model was given.

        Return whether there are some. One that cannot be kept from reducing is left alone.
        """
        if self._searched or self._group is None or self._given is not None:
            return False
        known = set(parameters)
        found, left_alone = [], ""
        modules = () if any(map(is_dtensor, known)) else instances_of(DistributedDataParallel)
        for one in modules:
            if known.isdisjoint(one.parameters()):
                continue
            if why := problem_of(one, known):
                left_alone = f". It was left alone: {why}"
                continue
            if why := self._other_ranks(one):
                raise RuntimeError(why)
            if not can_call_off(one):
                raise RuntimeError(
                    "the model is wrapped in a DistributedDataParallel that is about to reduce the "
                    "gradients of a forward pass, which this version of torch cannot call off: "
                    "set optimizer.module = model before the first forward pass"
                )
            found.append(one)
        self._searched, self.left_alone = True, left_alone
        self.modules |= {one: WithoutSync.of(one) for one in found}
        return bool(found)

    def _other_ranks(self, wrapped: Any) -> str | None:
        """Return an error where a module reduces over other ranks than these."""
        if self._group is None or self._is_chosen or self._group.is_same(wrapped.process_group):
            return None
        return (
            f"the model's DistributedDataParallel has ranks {ranks_of(wrapped.process_group)}, and "
            f"this GCondFused {self._group.ranks}: make it with Distributed(module=model)"
        )

    def broadcast_buffers(self) -> None:
        """Send the buffers of rank 0 to the others, as each module would in its forward pass."""
        sent = []
        for wrapped in self.modules:
            for name, buffer in wrapped.module.named_buffers() if wrapped.broadcast_buffers else ():
                if name not in wrapped.parameters_to_ignore:
                    copy = buffer.contiguous()
                    sent.append((buffer, copy, self._start_broadcast(copy, wrapped.process_group)))
        for buffer, copy, work in sent:
            work.wait()
            if copy is not buffer:
                buffer.copy_(copy)

    def _start_broadcast(self, tensor: Tensor, group: Any) -> Any:
        if self._group is not None and self._group.is_same(group):
            return self._group.start_broadcast(tensor)
        return dist.broadcast(tensor, group_src=0, group=group, async_op=True)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a model of its own, and may be given it, or search for it.
        return {**self.__dict__, "_given": None, "_searched": False, "modules": {}}


class WithoutSync:
    """Keep a DistributedDataParallel from reducing gradients, for as long as anybody holds this.

    There is one of it for a module: the end of an older optimizer must not end it for a newer one.
    """

    _alive: ClassVar[weakref.WeakValueDictionary[int, WithoutSync]] = weakref.WeakValueDictionary()

    def __init__(self, wrapped: Any) -> None:
        self._until_the_end = ExitStack()
        self._until_the_end.enter_context(wrapped.no_sync())
        # A forward pass that was made before this has it waiting for gradients.
        if can_call_off(wrapped):
            wrapped.reducer._reset_state()
        # Its first forward pass would broadcast buffers, which a rank without data would not join.
        wrapped.require_forward_param_sync = False
        self._until_the_end.callback(setattr, wrapped, "require_forward_param_sync", True)

    @classmethod
    def of(cls, wrapped: Any) -> WithoutSync:
        """Return the one for this module."""
        one = cls._alive.get(id(wrapped)) or cls(wrapped)
        cls._alive[id(wrapped)] = one
        return one

    def __del__(self) -> None:
        self._until_the_end.close()


def check_module(module: object) -> None:
    """Check that a model is one."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, not {module!r}")


def problem_of(wrapped: Any, known: set[Tensor]) -> str | None:
    """Return why a DistributedDataParallel cannot be kept from reducing, given known parameters."""
    for attribute, why in UNFIT.items():
        if getattr(wrapped, attribute, None):
            return (
                f"DistributedDataParallel's {why}: leave it out, gradients are reduced here once a "
                "window"
            )
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad and parameter not in known:
            return (
                f"{name} is in no parameter group of this optimizer, and its gradients would not "
                "be averaged: add it to base, or freeze it"
            )
    return None


def can_call_off(wrapped: Any) -> bool:
    """Return whether the reduction that a forward pass has prepared can be called off."""
    return hasattr(getattr(wrapped, "reducer", None), "_reset_state")


def data_parallel_modules(module: nn.Module | None) -> list[Any]:
    """Return the DistributedDataParallel modules in a module, itself included."""
    parts = () if module is None else module.modules()
    return [part for part in parts if isinstance(part, DistributedDataParallel)]


def instances_of(kind: type[T]) -> Iterator[T]:
    """Return all objects of a class in this process; takes as long as there are any objects."""
    # Not isinstance: that asks the object, which may do anything.
    return (one for one in gc.get_objects() if issubclass(type(one), kind))
