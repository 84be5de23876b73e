"""FSDP2: whether the modules that hold parameters reduce their gradients in every backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from gcond_kernels.distributed.data_parallel import instances_of
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
            segments: of the parameters; where their number has changed the modules are searched
                for, which takes as long as there are objects in the process.

        Raises:
            RuntimeError: one does not; the message names it.
        """
        if len(segments) != self._seen:
            names = {segment.parameter: segment.name for segment in segments}
            self._modules = [(weakref.ref(module), name) for module, name in modules_of(names)]
            self._seen = len(segments)
        for reference, name in self._modules:
            if (module := reference()) is not None:
                check_reduces(module, name)


def check_reduces(module: Any, name: str) -> None:
    """Check that a module of FSDP2 reduces its gradients in the next backward pass.

    Args:
        module: the module.
        name: of a parameter that it holds.

    Raises:
        RuntimeError: it does not; the message names it.
    """
    for group in param_groups_of(module):
        call = "" if group.reduce_grads else "set_requires_gradient_sync"
        # Where no rank has a copy of the shard there is no all-reduce to leave out.
        has_copies = getattr(group.mesh_info, "replicate_mesh_dim", 0) is not None
        if has_copies and not group.all_reduce_grads:
            call = call or "set_requires_all_reduce"
        if call:
            kind = type(module).__name__.removeprefix("FSDP")
            # Known after the first forward pass; the outermost module has none.
            path = getattr(group, "_module_fqn", None)
            where = f"{path}, a {kind}," if path else f"the {kind}"
            raise RuntimeError(
                f"{call}(False) was called on {where} that holds {name}: gradients of different "
                f"tasks would add up inside FSDP. Leave the call out, or call {call}(True) before "
                "backward(): GCondFused takes the gradients of every pass and accumulates them "
                "itself"
            )
    context = getattr(module._get_fsdp_state(), "_state_ctx", None)
    if not getattr(context, "is_last_backward", True):
        raise RuntimeError(
            "set_is_last_backward(False) was called on the model: then FSDP does not wait for the "
            "gradients that it reduces, which are read after every backward pass. Leave the call "
            "out"
        )


def param_groups_of(module: Any) -> Iterator[Any]:
    """Return the groups of parameters that a module of FSDP2 holds."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        yield from state._fsdp_param_groups
    elif state._fsdp_param_group is not None:  # before torch 2.12 there is one at most
        yield state._fsdp_param_group


def modules_of(names: Mapping[Tensor, str]) -> Iterator[tuple[Any, str]]:
    """Return the modules of FSDP2 that hold named parameters, each with the name of one of them."""
    if not any(map(is_dtensor, names)):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in instances_of(FSDPModule):
        held = [p.sharded_param for group in param_groups_of(module) for p in group.fsdp_params]
        known = [names[parameter] for parameter in held if parameter in names]
        if known:
            yield module, known[0]
