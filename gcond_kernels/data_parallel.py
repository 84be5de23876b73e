"""DistributedDataParallel: kept from reducing gradients, its buffers broadcast all the same."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class DataParallel:
    """The DistributedDataParallel modules of a model, which leave their gradients alone.

    Args:
        module: the model; may hold none.
        parameters: of the optimizer.

    Raises:
        ValueError: a parameter would be left without a reduced gradient; or static_graph=True.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[Tensor]) -> None:
        self.modules = data_parallel_modules(module)
        known = set(parameters)
        for wrapped in self.modules:
            check_options(wrapped)
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad and parameter not in known:
                    raise ValueError(
                        f"module: {name} is in no parameter group of this optimizer, and its "
                        "gradients would not be averaged: add it to base, or freeze it"
                    )
        self._quiet = [Quiet.of(wrapped) for wrapped in self.modules]

    def broadcast_buffers(self) -> None:
        """Sends the buffers of rank 0 to the others, as each module would in its forward pass."""
        import torch.distributed as dist

        sent = [
            (buffer, buffer.contiguous(), wrapped.process_group)
            for wrapped in self.modules
            if wrapped.broadcast_buffers
            for name, buffer in wrapped.module.named_buffers()
            if name not in wrapped.parameters_to_ignore
        ]
        works = [
            dist.broadcast(copy, group_src=0, group=group, async_op=True) for _, copy, group in sent
        ]
        for work, (buffer, copy, _) in zip(works, sent, strict=True):
            work.wait()
            if copy is not buffer:
                buffer.copy_(copy)


def check_options(wrapped: Any) -> None:
    """Raises a ValueError that names what of a DistributedDataParallel does not work unreduced."""
    unfit = {
        "static_graph=True reduces the first backward pass whatever it is told": (
            wrapped.static_graph
        ),
        "mixed_precision= takes its parameters back in the reduction": (
            getattr(wrapped, "mixed_precision", None) is not None
        ),
        "delay_all_reduce_named_params= reduces whatever it is told": bool(
            getattr(wrapped, "_delay_all_reduce_params", None)
        ),
        "register_comm_hook is for a reduction that it does not make": bool(
            getattr(wrapped, "_comm_hooks", None)
        ),
    }
    for why, is_so in unfit.items():
        if is_so:
            raise ValueError(
                f"module: DistributedDataParallel's {why}: leave it out, gradients are reduced "
                "here once a window"
            )


class Quiet:
    """Keeps a DistributedDataParallel from reducing gradients, for as long as anybody holds this.

    There is one of it for a module: the end of an older optimizer must not wake it up again.
    """

    _alive: ClassVar[weakref.WeakValueDictionary[int, Quiet]] = weakref.WeakValueDictionary()

    def __init__(self, wrapped: Any) -> None:
        self._entered = ExitStack()
        self._entered.enter_context(wrapped.no_sync())
        # Its first forward pass would broadcast buffers, which a rank without data would not join.
        wrapped.require_forward_param_sync = False
        self._wrapped = wrapped

    @classmethod
    def of(cls, wrapped: Any) -> Quiet:
        """The one for this module."""
        quiet = cls._alive.get(id(wrapped))
        if quiet is None:
            quiet = cls._alive[id(wrapped)] = cls(wrapped)
        return quiet

    def __del__(self) -> None:
        self._entered.close()
        self._wrapped.require_forward_param_sync = True


def data_parallel_modules(module: nn.Module | None) -> list[Any]:
    """The DistributedDataParallel modules in a module, itself included."""
    if module is None or not torch.distributed.is_available():
        return []
    from torch.nn.parallel import DistributedDataParallel

    return [part for part in module.modules() if isinstance(part, DistributedDataParallel)]
