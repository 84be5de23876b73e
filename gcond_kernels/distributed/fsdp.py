"""FSDP2: whether the modules that hold parameters reduce their gradients in every backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gcond_kernels.distributed.data_parallel import living
from gcond_kernels.storage.dtensor import is_dtensor
from gcond_kernels.storage.layout import Segment


class FullySharded:
    """The modules that `fully_shard` made of those that hold some parameters."""

    def __init__(self) -> None:
        self._modules: list[tuple[weakref.ref[Any], str]] = []
        self._seen = 0

    def check(self, segments: Sequence[Segment]) -> None:
        """Check that all of them reduce gradients in the next backward pass.

        Args:
            segments: of the parameters; where there are more of them than the last time the modules
                are looked for, which takes as long as there are objects in the process.

        Raises:
            RuntimeError: one does not; the message names it.
        """
        if len(segments) != self._seen:
            names = {segment.parameter: segment.name for segment in segments}
            self._modules = [(weakref.ref(module), name) for module, name in holders_of(names)]
            self._seen = len(segments)
        alive = [(ref(), name) for ref, name in self._modules]
        check_synchronized([(module, name) for module, name in alive if module is not None])


def check_synchronized(modules: Sequence[tuple[Any, str]]) -> None:
    """Check that modules of FSDP2 reduce their gradients in the next backward pass.

    Args:
        modules: each with the name of a parameter that it holds.

    Raises:
        RuntimeError: one does not; the message names it.
    """
    for module, name in modules:
        for group in param_groups_of(module):
            if not group.reduce_grads:
                raise RuntimeError(unsynchronized(group, module, name, "gradient_sync"))
            # Where no rank has a copy of the shard there is no all-reduce to leave out.
            has_copies = getattr(group.mesh_info, "replicate_mesh_dim", 0) is not None
            if has_copies and not group.all_reduce_grads:
                raise RuntimeError(unsynchronized(group, module, name, "all_reduce"))
        context = getattr(module._get_fsdp_state(), "_state_ctx", None)
        if not getattr(context, "is_last_backward", True):
            raise RuntimeError(
                "set_is_last_backward(False) was called on the model: then FSDP does not wait for "
                "the gradients that it reduces, which are read after every backward pass. Leave "
                "the call out"
            )


def unsynchronized(group: Any, module: Any, name: str, what: str) -> str:
    """Return what to say of a module that does not reduce its gradients.

    Args:
        group: the parameters of the module.
        module: the module.
        name: of a parameter that it holds.
        what: which part of the reduction is left out, as torch's methods call it.
    """
    kind = type(module).__name__.removeprefix("FSDP")
    # Known after the first forward pass; the outermost module has none.
    path = getattr(group, "_module_fqn", None)
    where = f"{path}, a {kind}," if path else f"the {kind}"
    call = f"set_requires_{what}"
    return (
        f"{call}(False) was called on {where} that holds {name}: gradients of different tasks "
        f"would add up inside FSDP. Leave the call out, or call {call}(True) before "
        "backward(): GCondFused takes the gradients of every pass and accumulates them itself"
    )


def param_groups_of(module: Any) -> Iterator[Any]:
    """Return what a module of FSDP2 knows of the parameters that it holds, by group."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        yield from state._fsdp_param_groups
    elif state._fsdp_param_group is not None:  # before torch 2.12 there is one at most
        yield state._fsdp_param_group


def holders_of(names: Mapping[Tensor, str]) -> Iterator[tuple[Any, str]]:
    """Return the modules of FSDP2 that hold parameters, each with the name of one of them.

    Args:
        names: of the parameters.
    """
    if not any(map(is_dtensor, names)):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in living(FSDPModule):
        held = [p.sharded_param for group in param_groups_of(module) for p in group.fsdp_params]
        known = [names[parameter] for parameter in held if parameter in names]
        if known:
            yield module, known[0]
