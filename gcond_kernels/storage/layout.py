"""Where each parameter's segment lies in flat storage, and how segments move between layouts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gcond_kernels.ops.types import WORD_BITS
from gcond_kernels.storage.dtensor import is_dtensor, local_shard

# Segments start at multiples of this many elements: 128 bytes of float32, 64 of bfloat16.
ALIGNMENT = 32
assert ALIGNMENT % WORD_BITS == 0  # no word of a mask belongs to two parameters


class Segment(NamedTuple):
    """The segment of one parameter in flat storage, in the parameter's memory order."""

    parameter: Tensor
    name: str
    offset: int  # in elements, like the size
    size: int
    shape: torch.Size  # of a DTensor that of the local shard, which may be empty
    stride: tuple[int, ...]  # without gaps

    def view(self, flat: Tensor) -> Tensor:
        """Return the segment of flat storage [..., N'], in the parameter's shape [..., *shape]."""
        shape, stride = (*flat.shape[:-1], *self.shape), (*flat.stride()[:-1], *self.stride)
        # An offset given to as_strided counts from the start of the memory, not of the tensor.
        return flat.as_strided(shape, stride, flat.storage_offset() + self.offset)

    def empty(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return new memory in the parameter's shape and the segment's memory order."""
        return torch.empty_strided(self.shape, self.stride, dtype=dtype, device=device)


def segments_of(parameters: Sequence[tuple[Tensor, str]]) -> tuple[list[Segment], int]:
    """Return a segment for each named parameter, and where the last one ends."""
    segments, end = [], 0
    for parameter, name in parameters:
        shard = local_shard(parameter)
        # `empty_like` closes the gaps of a parameter that is a view with some.
        stride = torch.empty_like(shard).stride()
        segments.append(Segment(parameter, name, end, shard.numel(), shard.shape, stride))
        end += align(largest_shard(parameter))
    return segments, end


def largest_shard(parameter: Any) -> int:
    """Return the number of elements of a parameter that any process holds at most.

    With room for so many, a replicated tensor has the same offset on all ranks, however unevenly
    others are sharded.
    """
    shape = list(parameter.shape)
    if is_dtensor(parameter):
        for placement, ranks in zip(parameter.placements, parameter.device_mesh.shape, strict=True):
            if hasattr(placement, "dim"):
                shape[placement.dim] = -(-shape[placement.dim] // ranks)
    return math.prod(shape)


def align(elements: int) -> int:
    """Return the next multiple of `ALIGNMENT`."""
    return -(-elements // ALIGNMENT) * ALIGNMENT


def shapes_of(parameters: Sequence[Tensor]) -> list[tuple[torch.Size, tuple[int, ...]]]:
    """Return shape and strides that each parameter has now."""
    return [(parameter.shape, parameter.stride()) for parameter in parameters]


def moved(
    flat: Tensor, length: int, pairs: Sequence[tuple[Segment, Segment]], device: torch.device
) -> Tensor:
    """Return flat storage [..., length] with each pair's first segment copied to its second."""
    result = torch.zeros((*flat.shape[:-1], length), dtype=flat.dtype, device=device)
    for old, new in pairs:
        new.view(result).copy_(old.view(flat))
    return result


def picked(values: Tensor, places: Sequence[int], fill: int, device: torch.device) -> Tensor:
    """Return [T', ...] from `values` [T, ...] by their old places; `fill` where that is -1."""
    result = torch.full((len(places), *values.shape[1:]), fill, dtype=values.dtype, device=device)
    new = [t for t, place in enumerate(places) if place >= 0]
    if new:
        result[new] = values[[places[t] for t in new]].to(device)
    return result


def accumulator_dtype_of(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the type that sums of these types need: float64 where all are, else float32."""
    return torch.float64 if set(dtypes) == {torch.float64} else torch.float32


def check_parameter(parameter: Tensor, name: str, device: torch.device, dtensors: bool) -> None:
    """Check that a parameter can have a segment, and raise a ValueError that says why not."""
    if torch.nn.parameter.is_lazy(parameter):
        raise ValueError(f"{name} is not initialized yet: run the model once before training")
    real = ": let the model take torch.view_as_complex of a real parameter"
    problems = {
        f"is {parameter.dtype}: only real floating types have accumulators"
        f"{real if parameter.is_complex() else ''}": not parameter.is_floating_point(),
        f"has layout {parameter.layout}: only dense parameters are handled": (
            parameter.layout != torch.strided
        ),
        "is a DTensor, which no parameter was when GCondFused was made: shard the model first": (
            is_dtensor(parameter) and not dtensors
        ),
        "is a DTensor still to be summed over its mesh (Partial)": any(
            placement.is_partial() for placement in getattr(parameter, "placements", ())
        ),
        "belongs to a FullyShardedDataParallel, which hides what is sharded: use "
        "torch.distributed.fsdp.fully_shard": getattr(parameter, "_fsdp_flattened", False),
        f"is on {parameter.device}, but the first parameter is on {device}: all parameters of one "
        "optimizer must be on one device": parameter.device != device,
    }
    for problem, found in problems.items():
        if found:
            raise ValueError(f"{name} {problem}")
    check_materialized([(parameter, name)])


def check_materialized(parameters: Iterable[tuple[Tensor, str]]) -> None:
    """Check that named parameters have memory, and raise a ValueError that names one on meta."""
    for parameter, name in parameters:
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, where it has no values: materialize the model "
                "first (to_empty, then load or initialize it), then make both optimizers"
            )
