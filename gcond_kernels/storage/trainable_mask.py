"""Masks of the trainable elements, a bit for each, in the layout of flat storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gcond_kernels.ops.mask import trainable
from gcond_kernels.ops.types import WORD_BITS
from gcond_kernels.storage.dtensor import is_dtensor, local_shard, shard_coordinate
from gcond_kernels.storage.layout import Segment


def write_mask(words: Tensor, segment: Segment, bits: Tensor) -> None:
    """Write the trainable elements of a parameter (bool, in its shape) into a mask [N' / 32]."""
    length = -(-segment.size // WORD_BITS)
    ordered = torch.ones(length, WORD_BITS, dtype=torch.bool, device=words.device)
    segment._replace(offset=0).view(ordered.view(-1)).copy_(bits)  # 1 after the end
    packed = (ordered.long() << torch.arange(WORD_BITS, device=words.device)).sum(-1)
    first = segment.offset // WORD_BITS
    words[first : first + length] = packed.to(torch.int32)  # the highest bit becomes the sign


def read_mask(words: Tensor, segment: Segment) -> Tensor:
    """Return the trainable elements of a parameter (bool, in its shape) from a mask [N' / 32]."""
    bits = trainable(words, segment.offset, segment.offset + segment.size)
    return segment._replace(offset=0).view(bits)


def check_mask(mask: object, parameters: Sequence[tuple[Tensor, str]]) -> dict[Tensor, Tensor]:
    """Return the local shard of each parameter's mask, or raise an error that names it."""
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
        label = f"mask of {names[parameter]}"
        if not isinstance(bits, Tensor) or bits.dtype != torch.bool:
            raise TypeError(f"{label} must be a bool tensor, not {bits!r}")
        if bits.shape != parameter.shape:
            shapes = f"{list(bits.shape)}, the parameter {list(parameter.shape)}"
            raise ValueError(f"{label} has shape {shapes}")
        if not same_placement(bits, parameter):
            raise ValueError(
                f"{label} is not sharded as the parameter is: make it with neuron_mask after the "
                "model was sharded, or give torch.distributed.tensor.distribute_tensor(mask, "
                "parameter.device_mesh, parameter.placements)"
            )
        checked[parameter] = local_shard(bits)
    return checked


def same_placement(tensor: Any, parameter: Any) -> bool:
    """Return whether two tensors have the same placement, the same on all ranks."""
    if is_dtensor(tensor) and is_dtensor(parameter):
        same_mesh: bool = tensor.device_mesh == parameter.device_mesh
        return same_mesh and tuple(tensor.placements) == tuple(parameter.placements)
    # One of them is full: the other must be so too, on however many ranks.
    shards = (*shard_coordinate(tensor)[1], *shard_coordinate(parameter)[1])
    return all(number == 1 for number in shards)
