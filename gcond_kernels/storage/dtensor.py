"""What the rest needs of DTensors: their local part, and local tensors put back into one.

Where torch has no distributed package there are none, and nothing of it is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.utils.dlpack
from torch import Tensor


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is spread over a device mesh."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without autograd: the same memory."""
    if not is_dtensor(tensor):
        return tensor.detach()
    with torch.no_grad():
        local: Any = tensor.to_local()  # type: ignore[attr-defined]
    # The result of a collective that was not waited for.
    part: Tensor = local.wait() if hasattr(local, "wait") else local
    return part.detach()


def local_gradient(parameter: Tensor) -> Tensor | None:
    """What this process holds of a parameter's `.grad`, placed as the parameter is.

    A replicated parameter of a sharded layer gets a gradient that is still to be summed over the
    mesh (`Partial`); then this is a collective, which all ranks of the mesh make alike.
    """
    gradient = parameter.grad
    if gradient is None or not is_dtensor(gradient):
        return gradient
    spread: Any = gradient
    if spread.placements != parameter.placements:  # type: ignore[attr-defined]
        with torch.no_grad():
            spread = spread.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return local_part(spread)


def placed_like(parameter: Tensor, local: Tensor) -> Tensor:
    """A local tensor as the part that this process holds of a tensor like the parameter."""
    if not is_dtensor(parameter):
        return local
    from torch.distributed.tensor import DTensor

    spread: Any = parameter
    return DTensor.from_local(
        local,
        spread.device_mesh,
        spread.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def from_its_start(local: Tensor) -> Tensor:
    """Return the same memory, as a storage that starts where the tensor does.

    A DTensor has the offset of its local part for an address, and what copies states for
    `async_save` then looks for memory there.
    """
    if local.storage_offset() == 0:
        return local
    if local.numel() == 0:
        return local.new_empty(local.shape)
    whole: Tensor = torch.utils.dlpack.from_dlpack(local)
    return whole


def shard_coordinate(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which shard of the parameter this process holds, and in how many it is cut.

    Both along the dimensions of its mesh that cut it; ranks with the same coordinate hold the same.
    Of a parameter that is no DTensor every rank holds all: ((), ()).
    """
    if not is_dtensor(parameter):
        return (), ()
    spread: Any = parameter
    coordinate = spread.device_mesh.get_coordinate()
    sizes = spread.device_mesh.shape
    cut = [d for d, placement in enumerate(spread.placements) if hasattr(placement, "dim")]
    return tuple(coordinate[d] for d in cut), tuple(sizes[d] for d in cut)


def is_unfinished(parameter: Tensor) -> bool:
    """Whether the tensor is still to be summed over its mesh: no parameter can be so."""
    placements: Any = getattr(parameter, "placements", ())
    return any(placement.is_partial() for placement in placements)


def check_materialized(named: Iterable[tuple[Tensor, str]]) -> None:
    """Check that parameters have memory.

    Raises:
        ValueError: one is on the meta device; the message names it.
    """
    for parameter, name in named:
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, where it has no values: materialize the model "
                "first (to_empty, then load or initialize it), then make both optimizers"
            )
