"""FSDP2: whether the modules that hold parameters reduce their gradients in every backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from gcond_kernels.distributed.data_parallel import instances_of
from gcond_kernels.storage.layout import Segment


def check_reduces(module: Any, name: str) -> None:
    """Check that a module, which holds the named parameter, reduces gradients in every pass."""
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


def modules_of(segments: Sequence[Segment]) -> Iterator[tuple[weakref.ref[Any], str]]:
    """Return the modules of FSDP2 that hold some parameters, each with the name of one of them."""
    from torch.distributed.fsdp import FSDPModule

    names = {segment.parameter: segment.name for segment in segments}
    for module in instances_of(FSDPModule):
        held = [p.sharded_param for group in param_groups_of(module) for p in group.fsdp_params]
        known = [names[parameter] for parameter in held if parameter in names]
        if known:
            yield weakref.ref(module), known[0]
