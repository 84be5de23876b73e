"""Masks of the elements that are trained, a bit for each, in the layout of flat storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS
from gcond_kernels.storage.dtensor import is_dtensor, local_part, shard_coordinate


def packed(bits: Tensor) -> Tensor:
    """[⌈n / 32⌉] int32 of a bool tensor [n]: bit e % 32 of word e // 32; 1 after the end."""
    missing = -len(bits) % WORD_BITS
    padded = torch.cat([bits, bits.new_ones(missing)]).view(-1, WORD_BITS)
    places = torch.arange(WORD_BITS, device=bits.device)
    return (padded.long() << places).sum(-1).to(torch.int32)  # the highest bit becomes the sign


def check_mask(mask: object, parameters: Sequence[tuple[Tensor, str]]) -> dict[Tensor, Tensor]:
    """Parameter → bool tensor of what this process holds of it, or an error that names it."""
    if not isinstance(mask, Mapping):
        raise TypeError(
            "mask must map parameters to bool tensors, as neuron_mask(model, share=...) does, not "
            f"{type(mask)}"
        )
    names = dict(parameters)
    checked: dict[Tensor, Tensor] = {}
    for parameter, bits in mask.items():
        if not isinstance(parameter, Tensor):
            raise TypeError(f"mask: a key must be a parameter, not {parameter!r}")
        if parameter not in names:
            raise ValueError(
                f"mask has a parameter of shape {list(parameter.shape)} that base does not hold: "
                "make it for the model as it is trained, after it was moved, wrapped or sharded"
            )
        name = names[parameter]
        if not isinstance(bits, Tensor) or bits.dtype != torch.bool:
            raise TypeError(f"mask of {name} must be a bool tensor, not {bits!r}")
        if bits.shape != parameter.shape:
            raise ValueError(
                f"mask of {name} has shape {list(bits.shape)}, the parameter "
                f"{list(parameter.shape)}"
            )
        if not alike_spread(bits, parameter):
            raise ValueError(
                f"mask of {name} is not spread as the parameter is: make it with neuron_mask after "
                "the model was sharded, or give torch.distributed.tensor.distribute_tensor(mask, "
                "parameter.device_mesh, parameter.placements)"
            )
        checked[parameter] = local_part(bits)
    return checked


def alike_spread(tensor: Any, parameter: Any) -> bool:
    """Whether two tensors are cut alike; all ranks find the same."""
    if is_dtensor(tensor) and is_dtensor(parameter):
        same_mesh: bool = tensor.device_mesh == parameter.device_mesh
        return same_mesh and tuple(tensor.placements) == tuple(parameter.placements)
    # One of them is whole: the other must be so too, in however many copies.
    cuts = (*shard_coordinate(tensor)[1], *shard_coordinate(parameter)[1])
    return all(pieces == 1 for pieces in cuts)
