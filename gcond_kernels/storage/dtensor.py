"""DTensors: their local shards, and DTensors made of local tensors.

Where torch has no distributed package there are none, and nothing of it is imported.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Return whether the tensor is distributed over a device mesh."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_shard(tensor: Tensor) -> Tensor:
    """Return the memory that this process holds of a tensor, without autograd."""
    if not is_dtensor(tensor):
        return tensor.detach()
    with torch.no_grad():
        local: Any = tensor.to_local()  # type: ignore[attr-defined]
    # The result of a collective that was not waited for.
    shard: Tensor = local.wait() if hasattr(local, "wait") else local
    return shard.detach()


def local_gradient(parameter: Any) -> Tensor | None:
    """Return this process's shard of a parameter's `.grad`, placed as the parameter is.

    A replicated parameter of a sharded layer gets a gradient that is still to be summed over the
    mesh (`Partial`); then this is a collective of all ranks of the mesh.
    """
    gradient = parameter.grad
    if gradient is not None and is_dtensor(gradient):
        if gradient.placements != parameter.placements:
            with torch.no_grad():
                gradient = gradient.redistribute(placements=parameter.placements)
        gradient = local_shard(gradient)
    return gradient  # type: ignore[no-any-return]


def full_value(tensor: Any) -> Tensor:
    """Return the whole of a tensor, without autograd.

    Of one that is still to be summed over its mesh this is a collective of all its ranks.
    """
    value: Tensor = tensor.detach()
    return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]


def placed_like(parameter: Any, local: Tensor) -> Tensor:
    """Return a local tensor as this process's shard of a tensor placed as the parameter is."""
    if not is_dtensor(parameter):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def without_offset(local: Tensor) -> Tensor:
    """Return the same memory as a storage that starts where the tensor does.

    The address of a DTensor is the offset of its local shard, and what copies states for
    `async_save` looks for memory there.
    """
    if local.storage_offset() == 0:
        return local
    if local.numel() == 0:
        return local.new_empty(local.shape)
    same: Tensor = torch.utils.dlpack.from_dlpack(local)
    return same


def shard_coordinate(tensor: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which shard of a tensor this process holds, and the number of shards.

    Both along the dimensions of its mesh that shard it; ranks with the same coordinate hold the
    same. Of a tensor that is no DTensor every rank holds all: ((), ()).
    """
    if not is_dtensor(tensor):
        return (), ()
    coordinate, sizes = tensor.device_mesh.get_coordinate(), tensor.device_mesh.shape
    sharded = [d for d, placement in enumerate(tensor.placements) if hasattr(placement, "dim")]
    return tuple(coordinate[d] for d in sharded), tuple(sizes[d] for d in sharded)
