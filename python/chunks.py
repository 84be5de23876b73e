"""Segments of flat storage in chunks, which bound the memory that an operation needs."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gcond_kernels.ops.types import Layout

# Elements of one float32 partial sum.
PARTIAL = 4096

# Elements of a chunk, a multiple of it: few launches, and memory that a CPU's allocator reuses.
CHUNK = 1 << 17


class Chunk(NamedTuple):
    """Elements of one tensor.

    Attributes:
        tensor: its place in the layout.
        own: the elements, counted in the tensor.
        flat: the elements, counted in flat storage.
    """

    tensor: int
    own: slice
    flat: slice


def chunks_of(layout: Layout) -> Iterator[Chunk]:
    """Return the chunks of each tensor in turn; empty tensors have none."""
    for tensor, (offset, size) in enumerate(zip(*layout, strict=True)):
        for start in range(0, size, CHUNK):
            stop = min(start + CHUNK, size)
            yield Chunk(tensor, slice(start, stop), slice(offset + start, offset + stop))


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums and products of a type are formed: float32 or float64."""
    return torch.promote_types(dtype, torch.float32)


def flattened(tensor: Tensor) -> Tensor:
    """Return a tensor without gaps as a vector of its elements, in memory order."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))
